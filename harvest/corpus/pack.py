"""Packs documents into rows of token ids: shuffle, tokenise, join, cut. No padding, no mask. Ids bypass the tokenizer.

A row of tokens is a pure function of the documents, the tokenizer, the context, the BOS policy and the seed.

Costs: the shuffle holds up to `buffer` documents of BUFFER_BYTES in total, the packer 64 documents of BATCH_CHARACTERS
in total; a call of the tokenizer takes CALL_CHARACTERS.

Approximate: a corpus larger than the buffer is mixed over about one buffer, not uniformly. The last partial row is
lost.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Final

import numpy as np
from jaxtyping import Int64

from harvest.corpus.documents import BadDocument, Document, Ids, LongText, OnBad
from harvest.corpus.split_text import blocks_of, pieces, tokenise_texts
from shared.errors import UserError
from shared.permute import DOCUMENTS, philox
from shared.progress import say

BUFFER_BYTES: Final = 1 << 30
"""Bytes of the documents that wait to be drawn, texts in UTF-8."""
BATCH_DOCUMENTS: Final = 64
BATCH_CHARACTERS: Final = 1 << 22
"""Documents read together: up to BATCH_DOCUMENTS, or fewer that have BATCH_CHARACTERS."""
CALL_CHARACTERS: Final = 1 << 19
"""Characters given to the tokenizer in one call."""
RAW_WORDS = 1024
"""Random words drawn at a time. Does not change which words they are."""

Part = tuple[str | Ids, bool]
"""A piece of a document's text, or its ids; and whether it is the last piece of the document."""


@dataclass
class PackCounts:
    """Counts of what `pack` has read so far; complete when its iterator is exhausted."""

    documents: int = 0
    """Documents with text."""
    empty: int = 0
    """Documents skipped: nothing but white space, no ids, or only EOS."""
    bad: int = 0
    """Documents skipped because they cannot be used."""
    tokens: int = 0
    """Ids of all documents with their EOS, without BOS."""
    rows: int = 0
    """Rows yielded."""
    dropped: int = 0
    """Ids of the last partial row, known at the end."""
    read: int = field(default=0, compare=False)
    """Documents read so far, including those that wait to be drawn."""
    rough: int = 0
    """Cuts in long texts that changed ids near them."""
    calls: int = field(default=0, compare=False)
    """Tokenizer calls whose ids were joined: a pass that starts with these counts resumes after them."""
    leftover: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64), compare=False)
    """Joined ids that do not fill a row yet."""


def skipping(counts: PackCounts) -> OnBad:
    """Counts bad documents in `counts` and prints what is wrong with the first."""

    def skip(error: BadDocument) -> None:
        counts.bad += 1
        if counts.bad == 1:
            say(f"skipped: {error}")

    return skip


def shuffled(
    documents: Iterator[Document], seed: int, buffer: int = 100_000, size: int = BUFFER_BYTES
) -> Iterator[Document]:
    """Yields every document once, in an order drawn from `seed` (at least 0). Up to `buffer` documents of `size` bytes
    it is a uniform permutation. Beyond that it is a buffer shuffle: each document drawn is replaced by the next one
    read (by several, or by none, depending on their sizes)."""
    below = _uniform_below(seed)
    held: list[Document | bytes] = []
    used = 0
    for document in documents:
        put, weight = _to_bytes(document)
        if not held or (len(held) < buffer and used + weight <= size):
            held.append(put)
            used += weight
            continue
        index = below(len(held))
        drawn, held[index] = held[index], put
        used += weight - _weight(drawn)
        yield _from_bytes(drawn)
        while used > size and len(held) > 1:
            drawn = _draw(held, below)
            used -= _weight(drawn)
            yield _from_bytes(drawn)
    while held:  # Fisher-Yates, from the back
        yield _from_bytes(_draw(held, below))


def _draw(held: list[Document | bytes], below: Callable[[int], int]) -> Document | bytes:
    index = below(len(held))
    held[index], held[-1] = held[-1], held[index]
    return held.pop()


def _to_bytes(document: Document) -> tuple[Document | bytes, int]:
    """A document as the shuffle holds it, and its bytes."""
    put = document.encode() if isinstance(document, str) else document
    return put, _weight(put)


def _from_bytes(put: Document | bytes) -> Document:
    return put.decode() if isinstance(put, bytes) else put


def _weight(put: Document | bytes) -> int:
    if isinstance(put, np.ndarray):
        return put.nbytes
    return len(put) if isinstance(put, bytes) else 0


def pack(
    documents: Iterable[Document],
    tokenizer: Callable[..., Mapping[str, Any]] | None,
    *,
    context: int,
    eos_id: int | None,
    bos_id: int | None,
    counts: PackCounts,
    vocab_size: int | None = None,
) -> Iterator[Int64[np.ndarray, "rows context"]]:
    """Yields blocks [rows, context] of token ids, rows >= 1: documents, each followed by `eos_id`, joined and cut.

    Every row begins with `bos_id` unless that is None. No padding. Documents of white space are skipped. `tokenizer` is
    a Hugging Face tokenizer; special tokens spelt out in a text become their ids. A long text is tokenised in pieces. A
    document of ids is used as it is, and gets no second `eos_id`.

    None as an argument: without a tokenizer a text is refused; without `eos_id` documents follow each other directly;
    without `vocab_size` any id is accepted.

    Resumes after the calls that `counts` has counted. Yields nothing when the corpus holds less than one row. Raises
    UserError at the end when no document has text, and at an id of `vocab_size` or more.
    """
    filled = _with_text(documents, eos_id, counts)
    calls = islice(_calls(filled, tokenizer, counts), counts.calls, None)
    joined = (_join_ids(call, tokenizer, eos_id, vocab_size) for call in calls)
    yield from cut(joined, context, bos_id, counts)
    if not counts.documents:
        bad = f", {counts.bad} bad ones" if counts.bad else ""
        raise UserError(f"the corpus has no document with text ({counts.empty} empty ones{bad}): give another --corpus")


def cut(
    blocks: Iterable[Ids], context: int, bos_id: int | None, counts: PackCounts
) -> Iterator[Int64[np.ndarray, "rows context"]]:
    """Yields rows [rows, context], rows >= 1, of ids that are already joined, after those left over in `counts`. The
    last partial row is lost."""
    width = context - (bos_id is not None)
    for block in blocks:
        joined = np.concatenate([counts.leftover, block])
        counts.calls += 1
        counts.tokens += len(block)
        rows = len(joined) // width
        counts.rows += rows
        counts.leftover = joined[rows * width :].copy()  # a view would keep all of `joined` alive
        if rows:
            yield _with_bos(joined[: rows * width].reshape(rows, width), bos_id)
    counts.dropped = len(counts.leftover)


def _calls(
    documents: Iterator[Document], tokenizer: Callable[..., Any] | None, counts: PackCounts
) -> Iterator[list[Part]]:
    """Yields the parts of all documents, grouped into calls of the tokenizer."""
    for batch in _batches(documents):
        parts = chain.from_iterable(_parts(document, tokenizer, counts) for document in batch)
        call: list[Part] = []
        for part in parts:
            if call and sum(len(content) for content, _ in call) + len(part[0]) > CALL_CHARACTERS:
                yield call
                call = []
            call.append(part)
        yield call


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += 0 if isinstance(document, LongText) else len(document)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(document: Document, tokenizer: Callable[..., Any] | None, counts: PackCounts) -> Iterator[Part]:
    if isinstance(document, np.ndarray):
        yield document, True
        return

    def rough() -> None:
        counts.rough += 1

    blocks = blocks_of(document) if isinstance(document, str) else document.blocks()
    held = pieces(blocks, lambda texts: tokenise_texts(texts, tokenizer), rough)
    last = next(held)
    for piece in held:
        yield last, False
        last = piece
    yield last, True


def _join_ids(
    call: list[Part], tokenizer: Callable[..., Mapping[str, Any]] | None, eos_id: int | None, vocab_size: int | None
) -> Ids:
    """The ids of some parts, with `eos_id` after each document. All texts go to the tokenizer in one call."""
    texts = [content for content, _ in call if isinstance(content, str)]
    encoded = iter(tokenise_texts(texts, tokenizer) if texts else [])
    end = np.array([] if eos_id is None else [eos_id], dtype=np.int64)
    joined: list[Ids] = []
    for content, last in call:
        if isinstance(content, str):
            ids = np.array(next(encoded), dtype=np.int64)
            check_known(ids, content, vocab_size)
            joined += [ids, end] if last else [ids]
        else:
            joined += [content] if content[-1] == eos_id else [content, end]
    return np.concatenate(joined)


def check_known(ids: Ids, text: str, vocab_size: int | None) -> None:
    """Raises UserError at an id that the model has no embedding for."""
    if vocab_size is None or not len(ids) or ids.max() < vocab_size:
        return
    unknown = int(ids[ids >= vocab_size][0])
    raise UserError(
        f"the text that begins {text[:40]!r}: the tokenizer returns id {unknown}, and the model has "
        f"embeddings for 0 to {vocab_size - 1}. Leave that text out, use --set split_special_tokens=true, or give the "
        "model's own tokenizer"
    )


def _with_bos(rows: Int64[np.ndarray, "rows width"], bos_id: int | None) -> Int64[np.ndarray, "rows context"]:
    """The rows with `bos_id` in front of each; unchanged when it is None."""
    return rows if bos_id is None else np.insert(rows, 0, bos_id, axis=1)


def _with_text(documents: Iterable[Document], eos_id: int | None, counts: PackCounts) -> Iterator[Document]:
    for document in documents:
        if _is_empty(document, eos_id):
            counts.empty += 1
        else:
            counts.documents += 1
            yield document


def _is_empty(document: Document, eos_id: int | None) -> bool:
    if isinstance(document, str):
        return not document or document.isspace()
    if isinstance(document, LongText):
        return False
    return document[:2].tolist() in ([], [eos_id])


def _uniform_below(seed: int) -> Callable[[int], int]:
    """Returns a function n -> uniform integer below n. It uses nothing but Philox's raw words and rejection, so the
    order does not change with numpy's Generator methods."""
    bits = philox(seed, DOCUMENTS)
    stream: Iterator[int] = chain.from_iterable(iter(lambda: bits.random_raw(RAW_WORDS).tolist(), None))

    def below(n: int) -> int:
        limit = 2**64 - 2**64 % n
        return next(word for word in stream if word < limit) % n

    return below
