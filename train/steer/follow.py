"""Counts the tokens that follow the firings of some latents, over the rows that a run trained on."""

from collections.abc import Callable

import numpy as np

from shared.errors import Interrupted
from shared.progress import progress
from shared.store.tokens import TokenRows
from train.data.row_mask import RowMask
from train.data.rows import HookRows, KeptRows
from train.features.shard_rows import OrderedRows, RowSource, contexts_within
from train.steer.contrast import NextTokens
from train.steer.intervene import LatentReader
from train.steer.subject import SteeringSubject

ROWS_AT_A_TIME = 1 << 14


def next_tokens(
    subject: SteeringSubject, train: RowMask, latents: list[int], tokens: int | None, stop_asked: Callable[[], bool]
) -> NextTokens:
    """Reads the rows marked in `train`; with `tokens`, only those of the first whole contexts that hold so many. Raises
    Interrupted when `stop_asked` says so."""
    source = row_source(subject, train, tokens)
    reader, size = LatentReader(subject.sae, latents), int(subject.store.spec.corpus["vocab_size"])
    total, end = NextTokens.joined([], size), subject.store.spec.n_tokens
    with progress("next tokens", source.count(), "rows") as advance:
        for shard in source.shards:
            if stop_asked():
                raise Interrupted("stopped before the end: nothing was written. Run the same command again")
            rows = source.read(shard)
            parts = [
                counted_rows(rows, at, reader, end, subject, size) for at in range(0, len(rows.places), ROWS_AT_A_TIME)
            ]
            total = NextTokens.joined([total, *parts], size)
            advance(len(rows.places), "")
    return total


def counted_rows(
    rows: OrderedRows, first: int, reader: LatentReader, end: int, subject: SteeringSubject, size: int
) -> NextTokens:
    """Counts the next tokens of some rows of a shard, but those at the end of a context."""
    places = rows.places[first : first + ROWS_AT_A_TIME]
    context = subject.store.spec.context
    inside = (places % context < context - 1) & (places + 1 < end)
    after = rows.ids[places[inside] + 1 - rows.first].astype(np.int64)
    values = rows.values[first : first + ROWS_AT_A_TIME].to(reader.which.device)
    return NextTokens.counted(reader(values).float().cpu().numpy()[inside], after, size)


def row_source(subject: SteeringSubject, train: RowMask, tokens: int | None) -> RowSource:
    store = subject.store
    ids: TokenRows = store.token_rows(check=False)
    rows, mask = HookRows.of(store, subject.rows.hook), first_contexts(train, contexts_within(store, tokens))
    return RowSource(rows, KeptRows(rows, mask), mask, ids)


def first_contexts(mask: RowMask, contexts: int) -> RowMask:
    """Returns a mask without the rows from context `contexts` on."""
    end = contexts * mask.shape[1]
    found = RowMask(mask.shape, mask.bits.copy())
    found.bits[-(-end // 8) :] = 0
    if end % 8 and end // 8 < len(found.bits):
        found.bits[end // 8] &= np.uint8(0xFF << (8 - end % 8) & 0xFF)
    return found
