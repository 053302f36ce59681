"""Weighted sums of rows and dot products of rows over lists of entries, on a GPU: Triton, from PyTorch's CUDA wheels.

The lists are those of `train/sae/sparse.py`, ordered by segment: an entry names a row, a segment is a token or a
latent. A row is read in stretches of neighbouring numbers and used for every sum it is part of; sums are float32
whatever the rows are. A segment of more than `CHUNK` entries (a latent that is active on the whole batch) is cut into
chunks that are summed side by side and added up by a second kernel: no atomics, so the same blocks give the same bits.
Which blocks are fastest is tried out the first time that rows have a new length.
"""

import os
from collections.abc import Sequence
from typing import Final, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

CHUNK: Final = 256
"""Most entries that one program sums."""
PIECES: Final = 256
"""Segments that one program cuts."""
PARTS_N, PARTS_D = 4, 1024
"""The block of `sum_parts`, which has little to do."""


def blocks(*choices: tuple[int, int, int]) -> list[triton.Config]:
    """(entries, columns, warps) to choose from; Triton's interpreter has nothing to time and takes the first."""
    configs = [triton.Config({"BLOCK_N": n, "BLOCK_D": d}, num_warps=warps) for n, d, warps in choices]
    return configs[:1] if os.environ.get("TRITON_INTERPRET") == "1" else configs


def sum_rows(
    index: Int[Tensor, " n"],
    bounds: Int[Tensor, " bounds"],
    weights: Sequence[Float[Tensor, " n"]],
    rows: Sequence[Float[Tensor, "height d_in"]],
    chunk: int = CHUNK,
) -> list[Float[Tensor, "segments d_in"]]:
    """For one or two weights: Σ over each segment's entries of weight · the row that `index` names, in one launch.
    `bounds` are where segments begin, last the number of entries.
    A table that both weights share (the same tensor twice) is read once. Never waits for the device."""
    entries, segments, d_in = len(index), len(bounds) - 1, rows[0].shape[1]
    if not entries:
        return list(torch.zeros(len(weights), segments, d_in, device=index.device))
    out = torch.empty(len(weights), segments, d_in, device=index.device)
    weights = [weight.contiguous() for weight in weights]
    shared = rows[0] is rows[-1]
    first_rows = rows[0].contiguous()
    second_rows = first_rows if shared else rows[-1].contiguous()
    programs, slots = segments + entries // chunk, max(1, 2 * entries // chunk)
    segment, first, slot = pieces(bounds, chunk, programs)
    parts = torch.empty(len(weights), slots, d_in, device=index.device)
    two = len(weights) == 2
    sum_pieces[lambda meta: (programs, triton.cdiv(d_in, meta["BLOCK_D"]))](
        index, weights[0], weights[-1], first_rows, second_rows, bounds, segment, first, slot,
        out[0], out[-1], parts[0], parts[-1], segments, d_in, CHUNK=chunk, TWO=two, OWN=not shared,
    )  # fmt: skip
    if entries > chunk:
        sum_parts[(segments, triton.cdiv(d_in, PARTS_D))](
            parts[0], parts[-1], bounds, slot, out[0], out[-1], d_in,
            CHUNK=chunk, TWO=two, BLOCK_N=PARTS_N, BLOCK_D=PARTS_D,
        )  # fmt: skip
    return list(out)


def pieces(
    bounds: Int[Tensor, " bounds"], chunk: int, programs: int
) -> tuple[Int[Tensor, " programs"], Int[Tensor, " segments"], Int[Tensor, " segments"]]:
    """Which segment each program works on (the number of segments: on none), each segment's first program, and where
    its chunks' sums are kept if it has several. Computed on the device: how long segments are is never asked for."""
    segments, device = len(bounds) - 1, bounds.device
    counts = torch.empty(2, segments, dtype=torch.int64, device=device)
    grid = (triton.cdiv(segments, PIECES),)
    count_pieces[grid](bounds, counts[0], counts[1], segments, CHUNK=chunk, BLOCK=PIECES)
    ends, kept_ends = counts[0].cumsum(0), counts[1].cumsum(0)
    segment = torch.full((programs,), segments, device=device)
    first, slot = torch.empty_like(counts)
    place_pieces[grid](counts[0], counts[1], ends, kept_ends, segment, first, slot, segments, BLOCK=PIECES)
    return segment, first, slot


def dot_rows(
    order: Int[Tensor, " n"],
    token: Int[Tensor, " n"],
    latent: Int[Tensor, " n"],
    tokens: Sequence[Float[Tensor, "batch d_in"]],
    latents: Float[Tensor, "d_sae d_in"],
) -> list[Float[Tensor, " n"]]:
    """For one or two tables of tokens' rows: the product of each entry's row in it and its row of `latents`, which is
    read once. `order` is the order of work: by token, neighbours share the tokens' rows."""
    entries, d_in = len(order), latents.shape[1]
    out = torch.empty(len(tokens), entries, device=order.device)
    if entries:
        tokens = [table.contiguous() for table in tokens]
        dot_entries[lambda meta: (triton.cdiv(entries, meta["BLOCK_N"]),)](
            order, token, latent, tokens[0], tokens[-1], latents.contiguous(), out[0], out[-1], entries, d_in,
            TWO=len(tokens) == 2,
        )  # fmt: skip
    return list(out)


@triton.jit
@no_type_check
def count_pieces(bounds, count, kept, segments, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """How many programs work on each segment, and of how many the sums are kept apart."""
    which = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = which < segments
    length = tl.load(bounds + which + 1, mask=inside, other=0) - tl.load(bounds + which, mask=inside, other=0)
    number = tl.maximum((length + CHUNK - 1) // CHUNK, 1)
    tl.store(count + which, number, mask=inside)
    tl.store(kept + which, tl.where(number > 1, number, 0), mask=inside)


@triton.jit
@no_type_check
def place_pieces(count, kept, ends, kept_ends, segment, first, slot, segments, BLOCK: tl.constexpr):
    which = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = which < segments
    number = tl.load(count + which, mask=inside, other=0)
    begin = tl.load(ends + which, mask=inside, other=0) - number
    tl.store(first + which, begin, mask=inside)
    at = tl.load(kept_ends + which, mask=inside, other=0) - tl.load(kept + which, mask=inside, other=0)
    tl.store(slot + which, at, mask=inside)
    for more in range(0, tl.max(number, 0)):
        tl.store(segment + begin + more, which.to(tl.int64), mask=inside & (more < number))


@triton.autotune(
    blocks((8, 128, 1), (4, 256, 1), (8, 256, 1), (4, 512, 2), (8, 512, 2), (4, 1024, 4)),
    key=["d_in", "TWO", "OWN"],
)  # so many columns a warp that a thread has its columns of all the entries: their sum needs no other thread
@triton.jit
@no_type_check
def sum_pieces(
    index, weight, second_weight, rows, second_rows, bounds, segment, first, slot,
    out, second_out, parts, second_parts, segments, d_in,
    CHUNK: tl.constexpr, TWO: tl.constexpr, OWN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of one segment, one stretch of columns. Offsets are int64: they may pass 2^31."""
    program = tl.program_id(0)
    which = tl.load(segment + program)
    if which >= segments:
        return
    begin, stop = tl.load(bounds + which), tl.load(bounds + which + 1)
    number = program - tl.load(first + which)
    whole = stop - begin <= CHUNK
    begin += number * CHUNK
    end = tl.minimum(begin + CHUNK, stop)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d_in
    total = tl.zeros((BLOCK_D,), tl.float32)
    second_total = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(begin, end, BLOCK_N):
        entry = at + tl.arange(0, BLOCK_N)
        live = entry < end
        source = tl.load(index + entry, mask=live, other=0).to(tl.int64)[:, None] * d_in + columns[None, :]
        mask = live[:, None] & inside[None, :]
        row = tl.load(rows + source, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tl.load(weight + entry, mask=live, other=0.0)[:, None] * row, 0)
        if TWO:
            if OWN:
                row = tl.load(second_rows + source, mask=mask, other=0.0).to(tl.float32)
            second_total += tl.sum(tl.load(second_weight + entry, mask=live, other=0.0)[:, None] * row, 0)
    if whole:
        place = which * d_in + columns
        tl.store(out + place, total, mask=inside)
        if TWO:
            tl.store(second_out + place, second_total, mask=inside)
    else:
        place = (tl.load(slot + which) + number) * d_in + columns
        tl.store(parts + place, total, mask=inside)
        if TWO:
            tl.store(second_parts + place, second_total, mask=inside)


@triton.jit
@no_type_check
def sum_parts(
    parts, second_parts, bounds, slot, out, second_out, d_in,
    CHUNK: tl.constexpr, TWO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of one segment's chunks, where it has several."""
    which = tl.program_id(0).to(tl.int64)
    length = tl.load(bounds + which + 1) - tl.load(bounds + which)
    if length <= CHUNK:
        return
    count = (length + CHUNK - 1) // CHUNK
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d_in
    begin = tl.load(slot + which)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    second_total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for at in range(begin, begin + count, BLOCK_N):
        part = at + tl.arange(0, BLOCK_N)
        mask = (part < begin + count)[:, None] & inside[None, :]
        place = part[:, None] * d_in + columns[None, :]
        total += tl.load(parts + place, mask=mask, other=0.0)
        if TWO:
            second_total += tl.load(second_parts + place, mask=mask, other=0.0)
    tl.store(out + which * d_in + columns, tl.sum(total, 0), mask=inside)
    if TWO:
        tl.store(second_out + which * d_in + columns, tl.sum(second_total, 0), mask=inside)


@triton.autotune(
    blocks((8, 128, 2), (16, 128, 4), (4, 256, 2), (8, 256, 4), (4, 512, 4), (4, 1024, 4)),
    key=["d_in", "TWO"],
)
@triton.jit(do_not_specialize=["entries"])
@no_type_check
def dot_entries(
    order, token, latent, tokens, second_tokens, latents, out, second_out, entries, d_in,
    TWO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of entries, column by column."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = place < entries
    entry = tl.load(order + place, mask=live, other=0)
    left = tl.load(token + entry, mask=live, other=0).to(tl.int64)[:, None] * d_in
    right = tl.load(latent + entry, mask=live, other=0).to(tl.int64)[:, None] * d_in
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    second_total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for at in range(0, d_in, BLOCK_D):
        columns = (at + tl.arange(0, BLOCK_D))[None, :]
        mask = live[:, None] & (columns < d_in)
        row = tl.load(latents + right + columns, mask=mask, other=0.0).to(tl.float32)
        total += row * tl.load(tokens + left + columns, mask=mask, other=0.0).to(tl.float32)
        if TWO:
            second_total += row * tl.load(second_tokens + left + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + entry, tl.sum(total, 1), mask=live)
    if TWO:
        tl.store(second_out + entry, tl.sum(second_total, 1), mask=live)
