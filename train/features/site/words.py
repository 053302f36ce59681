"""The text of every token of a vocabulary, as bytes: tokens.parquet."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shared.errors import DamagedError, UserError
from shared.model.tokenizer import stored_encoder
from shared.progress import say
from shared.store.opened import Store

BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token of SentencePiece that is one byte."""
MOST: Final = 1 << 22
"""Tokens of a vocabulary. A store may come from anywhere and claim more."""
BAR: Final = "\u2581"
"""SentencePiece's sign for a space."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a store's model."""

    texts: list[bytes | None]
    """The bytes of each token; None where they are not known."""
    special: set[int]

    @classmethod
    def of(cls, store: Store, model: str | None) -> "Vocabulary":
        """Reads the tokenizer that wrote the store, and prints why where it is not on this machine. Nothing is
        downloaded. `model`: where the store's model is now."""
        size, special = min(MOST, int(store.spec.corpus.get("vocab_size", 0))), set(store.spec.special_ids)
        if store.spec.tokenizer.get("blake2b") is None:
            return cls([None] * size, special)
        try:
            encoder = stored_encoder(store.spec.model, store.spec.tokenizer, model)
        except (UserError, DamagedError) as error:
            say(f"tokens are shown as numbers: {error}")
            return cls([None] * size, special)
        return cls(vocabulary_bytes(encoder.tokenizer, size), special | encoder.special_ids())

    def write(self, path: Path, rows: NDArray[np.int64]) -> None:
        """Writes tokens.parquet. `rows`: the rows with each token that count, by token id."""
        size = max(len(self.texts), len(rows))
        marks = np.isin(np.arange(size), sorted(self.special))
        table = pa.table({
            "token": pa.array(np.arange(size, dtype=np.uint32)),
            "bytes": pa.array([*self.texts, *[None] * (size - len(self.texts))], pa.binary()),
            "special": pa.array(marks),
            "rows": pa.array(np.pad(rows, (0, size - len(rows)))),
        })  # fmt: skip
        pq.write_table(table, path, compression="zstd", compression_level=9, version="2.6")


def vocabulary_bytes(tokenizer: Any, size: int) -> list[bytes | None]:
    """The bytes of tokens 0 to size; None for ids without a token."""
    names = tokenizer.convert_ids_to_tokens(range(min(size, len(tokenizer))))
    added = {int(token): str(content) for token, content in tokenizer.added_tokens_decoder.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decode = sentencepiece if backend is None else decoder(json.loads(backend.to_str()).get("decoder"))
    texts = [
        added[n].encode() if n in added else None if name is None else decode(name) for n, name in enumerate(names)
    ]
    return [*texts, *[None] * (size - len(texts))]


def decoder(about: Any) -> Callable[[str], bytes]:
    """Returns the function from a token's name to its bytes, for a tokenizer's description of its decoder. Without a
    decoder, the names are words with spaces between them."""
    if about is None:
        return lambda name: f" {name}".encode()
    kinds = json.dumps(about)
    if '"ByteLevel"' in kinds:
        return byte_level
    if '"WordPiece"' in kinds:
        return lambda name: (name[2:] if name.startswith("##") else f" {name}").encode()
    return sentencepiece


def sentencepiece(name: str) -> bytes:
    found = BYTE.fullmatch(name)
    return bytes([int(found.group(1), 16)]) if found else name.replace(BAR, " ").encode()


def byte_level(name: str) -> bytes:
    """GPT-2's characters for bytes, turned back. A name with other characters is its own text."""
    try:
        return bytes(TABLE[character] for character in name)
    except KeyError:
        return name.encode()


def byte_characters() -> dict[str, int]:
    """GPT-2's printable character for each byte: printable bytes are themselves, others count up from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


TABLE: Final = byte_characters()
