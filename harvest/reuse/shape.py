"""The fixed shape of shards: it follows from the model's width alone, so that stores of any number of tokens share
whole shards."""

from typing import Final

from shared.errors import UserError

CHUNK_BYTES: Final = 2 << 20
SHARD_BYTES: Final = 2 << 30
"""Bytes of one shard of all hookpoints together, in memory. A harvest holds three."""
FEW_TOKENS: Final = 1 << 20
"""A store of fewer tokens has the small shape."""
CHUNKS_PER_SHARD: Final = 128
"""Chunks of the large shape. With fewer, the rows that a training holds at a time come from fewer documents: with 32
chunks (of 4,096 rows) twice as many pairs in a batch share a document (tests/train/test_shuffle.py)."""
SMALL_ROWS: Final = 16_384
SMALL_CHUNKS: Final = 16
"""Rows and most chunks of the small shape."""


def default_chunk_rows(row_bytes: int) -> int:
    """The largest power of two for which a chunk has at most 2 MiB."""
    return max(1, 1 << (CHUNK_BYTES // row_bytes).bit_length() - 1)


def fixed_shape(
    model_row: int, together: int, n_tokens: int, chunk_rows: int | None = None, shard_rows: int | None = None
) -> tuple[int, int]:
    """Rows per chunk and per shard. `model_row` are the bytes of a row as wide as the model, `together` those of a row
    of all hookpoints. Shards are smaller only where all hookpoints together would be too large for memory. Raises
    UserError when a configured `shard_rows` is no multiple of the chunks."""
    chunk_rows = chunk_rows or default_chunk_rows(model_row)
    chunks = CHUNKS_PER_SHARD if n_tokens >= FEW_TOKENS else min(SMALL_CHUNKS, max(1, SMALL_ROWS // chunk_rows))
    chunks = min(chunks, max(1, SHARD_BYTES // (chunk_rows * together)))
    shard_rows = shard_rows or chunk_rows * chunks
    if shard_rows % chunk_rows:
        raise UserError(f"shard_rows: {shard_rows} is not a multiple of chunk_rows = {chunk_rows}")
    return chunk_rows, shard_rows
