"""Tokens as text, from tokens.parquet."""

from collections.abc import Sequence
from pathlib import Path

from shared.errors import UserError
from train.features.readers.folder import TOKENS, damage_named, opened


class TokenTexts:
    """The text of tokens: a word keeps the space before it, and a token that no text stands for has its number."""

    def __init__(self, known: Sequence[bytes | None]) -> None:
        self.known = known

    def text(self, ids: Sequence[int]) -> str:
        """The text of neighbouring tokens. A character of several tokens is whole when all of them are there."""
        return b"".join(map(self.raw, ids)).decode("utf-8", errors="replace")

    def piece(self, token: int) -> str:
        """The text of one token."""
        return self.text([token])

    def raw(self, token: int) -> bytes:
        found = self.known[token] if token < len(self.known) else None
        return found or f"⟨{token}⟩".encode()


def token_texts(folder: Path) -> TokenTexts:
    """Reads the texts of a store's tokens beside its features. Raises UserError where `sagsae features` found no
    tokenizer, DamagedError for a file that it does not write."""
    path = folder / TOKENS
    with damage_named(path), opened(path, {"token": "int", "bytes": "bytes"}) as file:
        known = file.read(["bytes"])["bytes"].to_pylist()
    if not any(known):
        raise UserError(
            f"{folder}: holds no text. Either no tokenizer made the store's tokens, or it was not on this machine when "
            "the features were found. Then name its model: sagsae features --model FOLDER --overwrite"
        )
    return TokenTexts(known)
