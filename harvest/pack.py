"""Documents to rows of token ids: shuffle, tokenise, join, cut. No padding, no mask. Ids pass by the tokenizer.

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

from harvest.documents import BadDocument, Document, Ids, OnBad
from shared.errors import UserError
from shared.permute import DOCUMENTS, philox
from shared.progress import say

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
    """Documents skipped: nothing but white space, no ids, or only EOS."""
    bad: int = 0
    """Documents skipped because they cannot be used."""
    tokens: int = 0
    """Ids of all documents with their EOS, without BOS."""
    rows: int = 0
    """Rows given out."""
    dropped: int = 0
    """Ids of the last partial row, known at the end."""


def skipping(counts: Counts) -> OnBad:
    """Counts bad documents in `counts` and says what is wrong with the first."""

    def skip(error: BadDocument) -> None:
        counts.bad += 1
        if counts.bad == 1:
            say(f"skipped: {error}")

    return skip


def shuffled(documents: Iterator[Document], seed: int, buffer: int = 100_000) -> Iterator[Document]:
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
    documents: Iterable[Document],
    tokenizer: Callable[..., Mapping[str, Any]],
    *,
    context: int,
    eos_id: int,
    bos_id: int | None,
    counts: Counts,
) -> Iterator[Int64[np.ndarray, "rows context"]]:
    """Blocks [rows, context] of token ids, rows >= 1: documents, each followed by `eos_id`, joined and cut.

    Every row begins with `bos_id` unless that is None. No padding. Documents of white space are skipped. `tokenizer`
    is a Hugging Face tokenizer; special tokens spelt out in a text become their ids. A document is tokenised whole;
    one of ids is taken as it is, and gets no second `eos_id`.
    Gives nothing when the corpus holds less than one row. Raises UserError at the end when no document has text.
    """
    filled = _with_text(documents, eos_id, counts)
    batches = iter(lambda: list(islice(filled, DOCUMENTS_PER_CALL)), [])
    yield from cut((_joined(batch, tokenizer, eos_id) for batch in batches), context, bos_id, counts)
    if not counts.documents:
        bad = f", {counts.bad} bad ones" if counts.bad else ""
        raise UserError(f"the corpus has no document with text ({counts.empty} empty ones{bad}): give another --corpus")


def cut(
    blocks: Iterable[Ids], context: int, bos_id: int | None, counts: Counts
) -> Iterator[Int64[np.ndarray, "rows context"]]:
    """Rows [rows, context], rows >= 1, of ids that are already joined. The last partial row is lost."""
    width = context - (bos_id is not None)
    leftover = np.empty(0, dtype=np.int64)
    for block in blocks:
        joined = np.concatenate([leftover, block])
        counts.tokens += len(block)
        rows = len(joined) // width
        leftover = joined[rows * width :].copy()  # a copy, so as not to keep `joined`
        if rows:
            counts.rows += rows
            yield _begun(joined[: rows * width].reshape(rows, width), bos_id)
    counts.dropped = len(leftover)


def _joined(batch: list[Document], tokenizer: Callable[..., Mapping[str, Any]], eos_id: int) -> Ids:
    """The ids of some documents, each followed by `eos_id`. All texts go to the tokenizer in one call."""
    texts = [document for document in batch if isinstance(document, str)]
    encoded = iter(_encoded(texts, tokenizer))
    end = np.array([eos_id], dtype=np.int64)
    parts: list[Ids] = []
    for document in batch:
        if isinstance(document, str):
            parts += [next(encoded), end]
        else:
            parts += [document] if document[-1] == eos_id else [document, end]
    return np.concatenate(parts)


def _encoded(texts: list[str], tokenizer: Callable[..., Mapping[str, Any]]) -> list[Any]:
    if not texts:
        return []
    encoded = tokenizer(  # verbose: a document longer than the model's context is no reason to warn
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]


def _begun(rows: Int64[np.ndarray, "rows width"], bos_id: int | None) -> Int64[np.ndarray, "rows context"]:
    """The rows with `bos_id` in front of each; None: as they are."""
    return rows if bos_id is None else np.insert(rows, 0, bos_id, axis=1)


def _with_text(documents: Iterable[Document], eos_id: int, counts: Counts) -> Iterator[Document]:
    for document in documents:
        if _is_empty(document, eos_id):
            counts.empty += 1
        else:
            counts.documents += 1
            yield document


def _is_empty(document: Document, eos_id: int) -> bool:
    if isinstance(document, str):
        return not document or document.isspace()
    return document[:2].tolist() in ([], [eos_id])


def _uniform(seed: int) -> Callable[[int], int]:
    """A function n -> uniform integer below n. Philox's raw words and the rejection below are all there is to it, so
    the order does not change with numpy's Generator methods."""
    bits = philox(seed, DOCUMENTS)
    stream: Iterator[int] = chain.from_iterable(iter(lambda: bits.random_raw(RAW_WORDS).tolist(), None))

    def below(n: int) -> int:
        limit = 2**64 - 2**64 % n
        return next(word for word in stream if word < limit) % n

    return below
