"""Documents to rows of token ids: shuffle, tokenise, join, cut. No padding, no mask.

A row of tokens is a pure function of the documents, the tokenizer, the context, the BOS policy and the seed.
Costs: the shuffle holds `buffer` documents, the packer 64. Approximate: a corpus larger than the buffer is mixed over
about one buffer, not uniformly. The last partial row is lost.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from jaxtyping import Int64

from shared.errors import UserError
from shared.permute import DOCUMENTS, philox

DOCUMENTS_PER_CALL = 64
"""Documents given to the tokenizer at a time."""
RAW_WORDS = 1024
"""Random words drawn at a time. Does not change which words they are."""


@dataclass
class Counts:
    """What `pack` has read so far; complete when its iterator is exhausted."""

    documents: int = 0
    """Documents with text."""
    empty: int = 0
    """Documents skipped: nothing but white space."""
    tokens: int = 0
    """Ids of all documents with their EOS, without BOS."""
    rows: int = 0
    """Rows given out."""
    dropped: int = 0
    """Ids of the last partial row, known at the end."""


def shuffled(documents: Iterator[str], seed: int, buffer: int = 100_000) -> Iterator[str]:
    """Every document once, in an order drawn from `seed` (at least 0): a uniform permutation of up to `buffer`
    documents, beyond that a buffer shuffle (each document drawn replaces itself by the next one read)."""
    below = _uniform(seed)
    held = list(islice(documents, buffer))
    for document in documents:
        index = below(len(held))
        chosen, held[index] = held[index], document
        yield chosen
    while held:  # Fisher-Yates, from the back
        index = below(len(held))
        held[index], held[-1] = held[-1], held[index]
        yield held.pop()


def pack(
    documents: Iterable[str],
    tokenizer: Callable[..., Mapping[str, Any]],
    *,
    context: int,
    eos_id: int,
    bos_id: int | None,
    counts: Counts,
) -> Iterator[Int64[np.ndarray, "rows context"]]:
    """Blocks [rows, context] of token ids, rows >= 1: documents, each followed by `eos_id`, joined and cut.

    Every row begins with `bos_id` unless that is None. No padding. Documents of white space are skipped. `tokenizer`
    is a Hugging Face tokenizer; special tokens spelt out in a text become their ids. A document is tokenised whole.
    Gives nothing when the corpus holds less than one row. Raises UserError at the end when no document has text.
    """
    width = context - (bos_id is not None)
    leftover = np.empty(0, dtype=np.int64)
    texts = _with_text(documents, counts)
    while batch := list(islice(texts, DOCUMENTS_PER_CALL)):
        encoded = tokenizer(  # verbose: a document longer than the model's context is no reason to warn
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids = [np.array([*document, eos_id], dtype=np.int64) for document in encoded["input_ids"]]
        joined = np.concatenate([leftover, *ids])
        counts.tokens += len(joined) - len(leftover)
        rows = len(joined) // width
        leftover = joined[rows * width :].copy()  # a copy, so as not to keep `joined`
        if rows:
            counts.rows += rows
            yield _begun(joined[: rows * width].reshape(rows, width), bos_id)
    counts.dropped = len(leftover)
    if not counts.documents:
        raise UserError(f"the corpus has no document with text ({counts.empty} empty ones): give another --corpus")


def _begun(rows: Int64[np.ndarray, "rows width"], bos_id: int | None) -> Int64[np.ndarray, "rows context"]:
    """The rows with `bos_id` in front of each; None: as they are."""
    return rows if bos_id is None else np.insert(rows, 0, bos_id, axis=1)


def _with_text(documents: Iterable[str], counts: Counts) -> Iterator[str]:
    for text in documents:
        if not text or text.isspace():
            counts.empty += 1
        else:
            counts.documents += 1
            yield text


def _uniform(seed: int) -> Callable[[int], int]:
    """A function n -> uniform integer below n. Philox's raw words and the rejection below are all there is to it, so
    the order does not change with numpy's Generator methods."""
    bits = philox(seed, DOCUMENTS)
    stream: Iterator[int] = chain.from_iterable(iter(lambda: bits.random_raw(RAW_WORDS).tolist(), None))

    def below(n: int) -> int:
        limit = 2**64 - 2**64 % n
        return next(word for word in stream if word < limit) % n

    return below
