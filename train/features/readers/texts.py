"""Tokens as text, from the tokenizer that wrote the store."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from shared.errors import UserError
from shared.gate import BadData, members, quoted
from shared.model.tokenizer import Encoder, open_encoder, resolve_tokenizer, sample_ids, stored_encoder

BROKEN: Final = "\ufffd"


class TokenTexts:
    """The text of tokens: a word keeps the space before it, and a token that no text stands for has its number.

    Tokenizers drop a space at the beginning of a text. Each text is therefore decoded behind an ordinary token, whose
    own text is cut off again."""

    def __init__(self, encoder: Encoder) -> None:
        self.tokenizer = encoder.tokenizer
        special = encoder.special_ids()
        self.most = len(self.tokenizer)
        self.anchor = next(one for one in sample_ids(encoder) if one not in special and self.plain([one]))
        self.before = self.plain([self.anchor])
        self.known: dict[int, str] = {}

    def plain(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def text(self, ids: Sequence[int]) -> str:
        """The text of neighbouring tokens. A character of several tokens is whole when all of them are there."""
        inside = [one for one in ids if one < self.most]
        if len(inside) < len(ids):
            return "".join(map(self.piece, ids))
        whole = self.plain([self.anchor, *inside])
        return whole[len(self.before) :] if whole.startswith(self.before) else self.plain(inside)

    def piece(self, token: int) -> str:
        """The text of one token."""
        if token not in self.known:
            found = self.text([token]) if token < self.most else ""
            self.known[token] = found or f"⟨{token}⟩"
        return self.known[token]


def token_texts(about: Mapping[str, Any], name: str | None) -> TokenTexts:
    """Finds the tokenizer of a store in the description of its features, or the one that was named. Raises UserError
    when it is not here, or is another one."""
    try:
        model = members(about.get("model"), ("name", "commit", "local"), None)
        tokenizer = members(about.get("tokenizer"), ("blake2b",), None)
    except BadData as error:
        if name is None:
            raise UserError(
                "about.json: does not say which tokenizer wrote the tokens. Name it with --tokenizer, or make the "
                "features again with --overwrite"
            ) from error
        model, tokenizer = {}, {}
    if model and tokenizer["blake2b"] is None:
        raise UserError(
            "the store holds no text: no tokenizer made its tokens. Only a store of text can be put in words"
        )
    if name is not None:
        encoder = open_encoder(resolve_tokenizer(name))
        if encoder.tokenizer is None:
            raise UserError(f"--tokenizer {name}: holds no tokenizer")
        if tokenizer and encoder.digest != tokenizer["blake2b"]:
            raise UserError(f"--tokenizer {name}: is not the one that wrote the store")
        return TokenTexts(encoder)
    try:
        return TokenTexts(stored_encoder(model, tokenizer))
    except UserError as error:
        words = f"the tokenizer of {quoted(model['name'])} is not on this machine, or is another one by now"
        raise UserError(f"{words}. Name its folder with --tokenizer") from error
