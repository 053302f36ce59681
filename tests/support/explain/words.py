"""A tokenizer whose every token is one word, w0, w1, …: what was sent can be read back to token ids."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.model.tokenizer import open_encoder, resolve_tokenizer


def make_tokenizer(folder: Path, words: int) -> str:
    """Writes the tokenizer, and returns its digest as a store records it."""
    vocabulary = {f"w{number}": number for number in range(words)} | {"The": words, "[UNK]": words + 1}
    folder.mkdir(parents=True)
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    about: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(about))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    digest = open_encoder(resolve_tokenizer(str(folder))).digest
    assert digest is not None
    return digest


@dataclass(frozen=True)
class SentWindow:
    """A window as it was sent."""

    ids: list[int]
    marked: list[int]
    """Indexes between << and >>."""


def windows_in(body: dict[str, Any]) -> list[SentWindow]:
    """The numbered texts of a request, as token ids."""
    found = []
    for line in body["messages"][1]["content"].splitlines():
        numbered = re.match(r'\d+\. (?:\(\d+\) )?(".*")$', line)
        if numbered:
            pieces = re.findall(r"<<|>>|w\d+", json.loads(numbered[1]))
            ids: list[int] = []
            marked: list[int] = []
            inside = False
            for piece in pieces:
                if piece in ("<<", ">>"):
                    inside = piece == "<<"
                    continue
                marked += [len(ids)] if inside else []
                ids.append(int(piece[1:]))
            found.append(SentWindow(ids, marked))
    return found


def places_of(ids: list[int], stored: NDArray[Any], context: int) -> list[int]:
    """Where a window begins in the token stream: every place inside one context with these ids."""
    n = len(ids)
    views = np.lib.stride_tricks.sliding_window_view(stored, n)
    begins = np.flatnonzero((views == np.array(ids)).all(1))
    return [int(at) for at in begins if at % context + n <= context]
