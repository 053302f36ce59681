"""Finds, reads and checks the tokenizer that turns a corpus into ids.

A library that finds no tokenizer makes an empty one, which knows no text; and its list of special ids is incomplete.
Neither is accepted here.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from shared.errors import UserError
from shared.model.source import (
    ALIASES,
    ModelSource,
    explained_loading,
    gguf_of,
    hub_commit,
    means_a_path,
    resolve_model,
)
from shared.model.weights import check_gguf, check_regular, check_small

FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tokenizer.model.v3",
)
"""Files of a tokenizer: one of these holds the vocabulary."""
SAMPLES: Final = (
    "The capital of France is Paris, and 12 of its bridges are old.",
    "Die Katze saß auf der Straße.",
    "今日は天気がいいです。",
    "Сегодня хорошая погода.",
    "def f(x): return x + 1",
    "ACGTACGTNN",
    "MKTAYIAKQR",
    "1. e4 e5 2. Nf3",
)
"""Plain text of several kinds. A usable tokenizer knows some of it."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as a harvest uses it. If `tokenizer` is None, a corpus must consist of ids."""

    source: ModelSource
    tokenizer: Any
    split_special: bool = False
    """Whether special tokens that are spelt out in a text stay text."""
    eos_asked: int | None = None

    @property
    def eos_id(self) -> int | None:
        return self.eos_asked if self.eos_asked is not None else getattr(self.tokenizer, "eos_token_id", None)

    @property
    def end(self) -> int:
        """The id that ends a document. Raises UserError where none is known."""
        if self.eos_id is None:
            raise UserError("--eos: no id is known that ends a document. Give the id, or the token")
        return self.eos_id

    @property
    def bos_id(self) -> int | None:
        return getattr(self.tokenizer, "bos_token_id", None)

    def __call__(self, texts: str | list[str], **options: Any) -> Any:
        """Tokenises texts. Raises UserError where there is no tokenizer, or where it fails."""
        if self.tokenizer is None:
            raise UserError(
                f"--model {self.source.name}: comes with no tokenizer ({', '.join(FILES[:4])}, …), and this corpus "
                "holds text. Name one with --tokenizer FOLDER_OR_ID, or give a corpus of token ids"
            )
        with explained_loading(self.source, "tokenizer, given this text,"):
            if self.split_special:
                options["split_special_tokens"] = True
            return self.tokenizer(texts, **options)

    def ids(self, text: str) -> list[int]:
        found = self(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [int(one) for one in found]

    def starts_with(self) -> int | None:
        """The first id of a tokenised text, including the tokenizer's own special tokens."""
        found = self("a", verbose=False)["input_ids"]
        return int(found[0]) if len(found) else None

    def listed_special_ids(self) -> set[int]:
        """The special ids that the library lists: the only ones that earlier versions knew."""
        return set() if self.tokenizer is None else set(self.tokenizer.all_special_ids)

    def special_ids(self) -> set[int]:
        """All special ids: the listed ones, and every added token that is marked as special (Llama 3's chat tokens)."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        marked = {int(number) for number, token in added.items() if getattr(token, "special", False)}
        return self.listed_special_ids() | marked | (set() if self.eos_asked is None else {self.eos_asked})

    @cached_property
    def digest(self) -> str | None:
        """A digest of what decides the ids of a text: the tokenizer in memory, or else its files."""
        if self.tokenizer is None:
            return None
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        with explained_loading(self.source, "tokenizer"):
            if backend is not None:
                return hashlib.blake2b(backend.to_str().encode(), digest_size=16).hexdigest()
            saved = getattr(self.tokenizer, "vocab_file", None)
            data = Path(saved).read_bytes() if saved else repr(sorted(self.tokenizer.get_vocab().items())).encode()
            return hashlib.blake2b(data, digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The tokenizer as a store records it."""
        split = {"split_special_tokens": True} if self.split_special else {}
        return {"blake2b": self.digest, "eos_id": self.eos_id, **split}


def open_encoder(
    model: ModelSource, name: str | None = None, eos: int | str | None = None, split_special: bool = False
) -> Encoder:
    """The model's tokenizer, or the one that `name` (--tokenizer) means. Raises UserError for one that knows no text or
    returns only special ids, and for an `eos` that it does not have."""
    source = model if name is None else resolve_tokenizer(name)
    if source.local and source.gguf is None and not has_files(source):
        if name is not None:
            raise UserError(f"--tokenizer {name}: the folder holds no tokenizer ({', '.join(FILES[:4])}, …)")
        return Encoder(source, None, split_special, eos_number(None, eos))
    encoder = Encoder(source, load_from_source(source), split_special)
    encoder = replace(encoder, eos_asked=eos_number(encoder.tokenizer, eos))
    check_knows_text(encoder)
    return encoder


def stored_encoder(model: Mapping[str, Any], tokenizer: Mapping[str, Any], at: str | None = None) -> Encoder:
    """The tokenizer that wrote a store's tokens, from this machine. `model`, `tokenizer`: as the store describes them;
    `at`: where the model is now, when not where it was. Opens no connection: a tokenizer of Hugging Face is read from
    the local cache. Raises UserError where it is not here."""
    name = str(at or model["name"])
    if at is not None or model.get("local"):
        source = resolve_model(name, weights=False)
    else:
        source = ModelSource(name, ALIASES.get(name, name), False, str(model.get("commit")), cached=True)
    encoder = open_encoder(source)
    if encoder.digest != tokenizer.get("blake2b"):
        raise UserError(f"{name}: its tokenizer here is not the one that wrote the store")
    return encoder


def load_tokenizer(source: ModelSource) -> Any:
    """The library's object. Raises UserError for one that cannot be loaded or knows no text."""
    encoder = open_encoder(source)
    encoder([]) if encoder.tokenizer is None else None
    return encoder.tokenizer


def load_from_source(source: ModelSource) -> Any:
    from transformers import AutoTokenizer

    with explained_loading(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **source.arguments)


def has_files(source: ModelSource) -> bool:
    """Whether a folder holds a vocabulary. Raises UserError for one that Git LFS has not fetched."""
    found = [path for path in (Path(source.location) / file for file in FILES) if path.exists()]
    for path in found:
        check_regular(path, source.name)
    return bool(found)


def resolve_tokenizer(name: str) -> ModelSource:
    """The tokenizer that a name means; like `resolve_model`, but needs no weights and no config.json."""
    if not name.strip():
        raise UserError("--tokenizer is empty: give a folder, a GGUF file or a Hugging Face id")
    place = Path(os.path.expanduser(ALIASES.get(name, name) if not Path(name).exists() else name))
    if place.is_dir() or place.is_file():
        folder = place if place.is_dir() else place.parent
        if place.is_dir():
            check_small(place, name)
        gguf = None if place.is_dir() and any((place / file).exists() for file in FILES) else gguf_of(name, place)
        if gguf:
            check_gguf(folder / gguf, name)
        return ModelSource(name, str(folder), True, "", gguf=gguf)
    if means_a_path(name) or "/" not in str(place):
        raise UserError(f"--tokenizer {name}: is neither a folder, a GGUF file nor a Hugging Face id (owner/name)")
    commit, cached = hub_commit(str(place), None)
    return ModelSource(name, str(place), False, commit, cached)


def eos_number(tokenizer: Any, eos: int | str | None) -> int | None:
    """The id that `--eos` means: a number, or a token of the tokenizer's vocabulary."""
    if eos is None or isinstance(eos, int):
        return eos
    if eos.isascii() and eos.isdigit():
        return int(eos)
    known = {} if tokenizer is None else tokenizer.get_vocab()
    if eos not in known:
        raise UserError(f"--eos {eos}: is neither an id nor a token of the tokenizer's vocabulary")
    return int(known[eos])


def check_knows_text(encoder: Encoder) -> None:
    """Raises UserError where plain text becomes nothing, or only unknown and special ids."""
    useless = encoder.special_ids() | {getattr(encoder.tokenizer, "unk_token_id", None)}
    given = set(sample_ids(encoder))
    if not given - useless:
        what = f"only unknown or special tokens (ids {sorted(given)[:5]})" if given else "no token at all"
        raise UserError(
            f"--model {encoder.source.name}: its tokenizer turns plain text into {what}, so its vocabulary is missing "
            "or belongs to another model. Copy the tokenizer's files beside the model, or name another with --tokenizer"
        )


def sample_ids(encoder: Encoder) -> Iterable[int]:
    for text in SAMPLES:
        yield from encoder.ids(text)
