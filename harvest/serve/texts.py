"""Stored contexts as text, for people who want to see what a store is made of. Runs in the planner, because tokenizers
need transformers."""

from pathlib import Path
from typing import Any, Final

import numpy as np

from shared.errors import DamagedError, UserError
from shared.gate import printable
from shared.model.tokenizer import Encoder
from shared.model.wrote import encoder_of
from shared.store.opened import Store

MOST_IDS: Final = 2048
"""Tokens of a context that are decoded."""


def stored_texts(folder: Path, contexts: int) -> dict[str, Any]:
    """Contexts from all over a store: `contexts`, each with its number, ids and text; `note` says why there is no text.
    Opens no connection: a tokenizer of Hugging Face is read from the local cache."""
    store = Store.open(folder)
    n = store.spec.n_contexts
    numbers = np.unique(np.linspace(0, n - 1, min(contexts, n)).astype(np.int64))
    rows = store.token_rows(check=False).take(numbers)[:, :MOST_IDS]
    try:
        encoder, note = encoder_of(store), ""
    except (UserError, DamagedError) as error:
        encoder, note = None, printable(str(error))[:500]
    found = [
        {"context": int(number), "ids": ids.tolist(), "text": text_of(encoder, ids.tolist())}
        for number, ids in zip(numbers, rows, strict=True)
    ]
    return {"contexts": found, "note": note}


def text_of(encoder: Encoder | None, ids: list[int]) -> str | None:
    return None if encoder is None or encoder.tokenizer is None else printable(str(encoder.tokenizer.decode(ids)))
