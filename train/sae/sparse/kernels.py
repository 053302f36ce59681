"""Weighted sums of rows over lists of entries and what follows from them, on a GPU: Triton, from PyTorch's wheels.

The lists are those of `train/sae/sparse/cpu.py`, ordered by segment: an entry names a row, a segment is a token or a
latent. One program has a segment and whole rows, so that what needs all of a row (an error, a norm, Adam's update)
follows in the same program. Sums are float32 whatever the rows are. A latent of more than `CHUNK` entries (one that is
active on the whole batch) is summed in chunks, side by side, that a last kernel adds up: no atomics, so the same blocks
give the same bits. Which blocks are fastest is tried out the first time that rows have a new length, on numbers of its
own: an update cannot be tried twice.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import Final, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from train.sae.sparse.adam import BETA1, BETA2, EPS, AdamUpdate, updated
from train.sae.sparse.open import UnsummedGradient

CHUNK: Final = 256
"""Most entries that one program sums."""
MOST: Final = 128
"""Numbers of rows that a thread may hold at once: with more, registers spill."""
INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"


def blocks(*choices: tuple[int, int]) -> list[triton.Config]:
    """(entries, warps) to choose from; Triton's interpreter has nothing to time and takes the first."""
    configs = [triton.Config({"BLOCK_N": n}, num_warps=warps) for n, warps in choices]
    return configs[:1] if INTERPRETED else configs


def fitting(configs: list[triton.Config], named: dict[str, object], **_: object) -> list[triton.Config]:
    """Those whose block a thread's registers hold; else the smallest block of the most warps."""
    width = triton.next_power_of_2(named["d_in"])
    fit = [c for c in configs if c.kwargs["BLOCK_N"] * width <= 32 * c.num_warps * MOST]
    return fit or [min(configs, key=lambda c: c.kwargs["BLOCK_N"] / c.num_warps)]


@dataclass(frozen=True)
class Decoded:
    """What `decode` gives. Of one or two decodings: the code's and, if there is one, the auxiliary's."""

    error: Float[Tensor, "batch d_in"]
    """The first decoding less x - b_dec."""
    low: Float[Tensor, "decodings batch d_in"]
    """The errors in the type of the decoder's rows."""
    squares: Float[Tensor, "decodings batch"]
    """Sums of squares of the errors' rows."""
    dots: Float[Tensor, "decodings n"]
    """Products of each entry's error and its decoder row, by latent."""


def decode(
    latent: Int[Tensor, " n"],
    order: Int[Tensor, " n"],
    codes: Float[Tensor, "decodings n"],
    bounds: Int[Tensor, " batch_and_1"],
    W_dec: Float[Tensor, "d_sae d_in"],
    centred: Float[Tensor, "batch d_in"],
) -> Decoded:
    """Each token's decodings, their errors and the products of these, from one reading of the decoder's rows (and one
    more from the cache). `latent` and `codes` are ordered by token, `order` says where each of these entries is by
    latent. Errors are rounded to the type of `W_dec` before products are taken, as in the dense form."""
    batch, d_in = centred.shape
    error = torch.empty_like(centred)
    low = torch.empty(len(codes), batch, d_in, dtype=W_dec.dtype, device=centred.device)
    squares = torch.empty(len(codes), batch, device=centred.device)
    dots = torch.empty(len(codes), len(latent), device=centred.device)
    longest_first = torch.argsort(bounds.diff(), descending=True)  # or the last one is waited for
    decode_token[(batch,)](
        longest_first,
        latent,
        order,
        codes[0],
        codes[-1],
        bounds,
        W_dec,
        centred,
        error,
        low,
        squares[0],
        squares[-1],
        dots,
        len(latent),
        batch,
        d_in,
        TWO=len(codes) == 2,
        WIDEN=INTERPRETED,
        BLOCK_D=triton.next_power_of_2(d_in),
    )
    return Decoded(error, low, squares, dots)


def sum_rows(of: UnsummedGradient, chunk: int = CHUNK) -> Float[Tensor, "d_sae d_in"]:
    """Σ over each latent's entries of weight · the token's row. Never waits for the device."""
    out = torch.empty(len(of.bounds) - 1, of.rows.shape[1], device=of.rows.device)
    launch(of, out, None, chunk)
    return out


def update_(of: UnsummedGradient, update: AdamUpdate, chunk: int = CHUNK) -> None:
    """Adam's update by that sum, in one pass over the weights: the gradient is never in memory."""
    tune(of.rows.shape[1], of.rows.dtype, of.rows.device, update.unit, update.copy is not None)
    launch(of, update.weight, update, chunk)


@cache
def tune(d_in: int, dtype: torch.dtype, device: torch.device, unit: bool, copies: bool) -> None:
    """Finds the fastest blocks of an update, on random rows."""
    if INTERPRETED:
        return
    height, each = 4096, 8
    index = torch.randint(0, height, (height * each,), dtype=torch.int16, device=device)
    latent = torch.arange(height, dtype=torch.int32, device=device).repeat_interleave(each)
    bounds = torch.arange(height + 1, device=device) * each
    rows = torch.randn(height, d_in, device=device).to(dtype)
    weight, m, v = (torch.rand(height, d_in, device=device) for _ in range(3))
    copy = torch.empty_like(weight, dtype=dtype) if copies else None
    weights = torch.randn(len(index), device=device)
    launch(
        UnsummedGradient(index, latent, bounds, weights, rows),
        weight,
        AdamUpdate(weight, m, v, copy, 1e-3, 1, unit),
        CHUNK,
    )


def launch(of: UnsummedGradient, out: Float[Tensor, "d_sae d_in"], update: AdamUpdate | None, chunk: int) -> None:
    d_in, entries, rows = of.rows.shape[1], len(of.index), of.rows.contiguous()
    moments = (out, out, out) if update is None else (update.exp_avg, update.exp_avg_sq, update.copied)
    pace, widen = (0.0, 0.0) if update is None else update.scales()
    shape = {
        "CHUNK": chunk,
        "UPDATE": update is not None,
        "UNIT": update is not None and update.unit,
        "COPY": update is not None and update.copy is not None,
        "BETA1": BETA1,
        "BETA2": BETA2,
        "EPS": EPS,
        "BLOCK_D": triton.next_power_of_2(d_in),
    }
    weight = of.weight.contiguous()
    sum_latent[(len(out),)](of.index, weight, rows, of.bounds, out, *moments, pace, widen, d_in, **shape)
    chunks = triton.cdiv(entries, chunk)
    if chunks > 1:
        parts = torch.empty(2 * chunks, d_in, device=rows.device)
        warps = max(1, min(16, shape["BLOCK_D"] // 512))
        sum_chunk[(chunks,)](
            of.index,
            of.latent,
            weight,
            rows,
            of.bounds,
            parts,
            len(out),
            d_in,
            CHUNK=chunk,
            BLOCK_N=4,
            BLOCK_D=shape["BLOCK_D"],
            num_warps=warps,
        )
        sum_parts[(chunks,)](
            parts, of.latent, of.bounds, out, *moments, pace, widen, len(out), d_in, **shape, num_warps=warps
        )


@triton.autotune(
    blocks((4, 4), (2, 4), (8, 4), (4, 8)),
    key=["d_in", "TWO"],
    prune_configs_by={"early_config_prune": fitting},
)
@triton.jit(do_not_specialize=["room"])
@no_type_check
def decode_token(
    longest_first, latent, order, code, second_code, bounds, W_dec, centred, error, low, squares, second_squares, dots,
    room, batch, d_in, TWO: tl.constexpr, WIDEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token. The products are a matrix product of the entries' rows and the one or two errors, which a tensor core
    takes 16 of. Offsets are int64: they may pass 2^31."""
    token = tl.load(longest_first + tl.program_id(0))
    begin, end = tl.load(bounds + token), tl.load(bounds + token + 1)
    column = tl.arange(0, BLOCK_D)
    inside = column < d_in
    place = token * d_in + column
    target = tl.load(centred + place, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    second_total = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(begin, end, BLOCK_N):
        rows = rows_of(latent, W_dec, at, end, column, inside, d_in, BLOCK_N)
        total += weighted(code, rows, at, end, BLOCK_N)
        if TWO:
            second_total += weighted(second_code, rows, at, end, BLOCK_N)
    total -= target
    tl.store(error + place, total, mask=inside)
    tl.store(squares + token, tl.sum(total * total, 0))
    tl.store(low + place, total.to(low.dtype.element_ty), mask=inside)
    table = batch.to(tl.int64) * d_in
    if TWO:
        second_total -= target
        tl.store(second_squares + token, tl.sum(second_total * second_total, 0))
        tl.store(low + table + place, second_total.to(low.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # other threads of this program read them
    which = tl.arange(0, 16)
    real = which < 1 + TWO
    for at in range(begin, end, 64):
        entry = at + tl.arange(0, 64)
        live = entry < end
        source = tl.load(latent + entry, mask=live, other=0).to(tl.int64) * d_in
        products = tl.zeros((64, 16), tl.float32)
        for first in range(0, d_in, 64):
            some = first + tl.arange(0, 64)
            there = some < d_in
            errors = tl.load(
                low + token * d_in + which[None, :] * table + some[:, None],
                mask=there[:, None] & real[None, :],
                other=0.0,
            )
            row = tl.load(W_dec + source[:, None] + some[None, :], mask=live[:, None] & there[None, :], other=0.0)
            if WIDEN:  # Triton's interpreter multiplies no bfloat16
                row, errors = row.to(tl.float32), errors.to(tl.float32)
            products = tl.dot(row, errors, products, input_precision="ieee")
        goes = tl.load(order + entry, mask=live, other=0)[:, None] + which[None, :].to(tl.int64) * room
        tl.store(dots + goes, products, mask=live[:, None] & real[None, :])


@triton.jit
@no_type_check
def rows_of(index, table, begin, end, column, inside, d_in, BLOCK_N: tl.constexpr):
    """The rows that entries from `begin` name, as they are stored; zeros from `end` on."""
    entry = begin + tl.arange(0, BLOCK_N)
    live = entry < end
    source = tl.load(index + entry, mask=live, other=0).to(tl.int64)[:, None] * d_in + column[None, :]
    return tl.load(table + source, mask=live[:, None] & inside[None, :], other=0.0)


@triton.jit
@no_type_check
def weighted(weight, rows, begin, end, BLOCK_N: tl.constexpr):
    """Σ weight · row of the entries from `begin`."""
    entry = begin + tl.arange(0, BLOCK_N)
    return tl.sum(tl.load(weight + entry, mask=entry < end, other=0.0)[:, None] * rows.to(tl.float32), 0)


@triton.jit
@no_type_check
def sum_of(index, weight, rows, begin, end, column, inside, d_in, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Σ over entries begin to end of weight · row."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(begin, end, BLOCK_N):
        total += weighted(weight, rows_of(index, rows, at, end, column, inside, d_in, BLOCK_N), at, end, BLOCK_N)
    return total


@triton.jit
@no_type_check
def write_row(
    total, w, m, v, place, inside, out, exp_avg, exp_avg_sq, copy, pace, widen, UPDATE: tl.constexpr,
    UNIT: tl.constexpr, COPY: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """The sum, or the row that it leads to."""
    if UPDATE:
        w, m, v = updated(total, w, m, v, pace, widen, UNIT, BETA1, BETA2, EPS)
        tl.store(out + place, w, mask=inside)
        tl.store(exp_avg + place, m, mask=inside)
        tl.store(exp_avg_sq + place, v, mask=inside)
        if COPY:
            tl.store(copy + place, w.to(copy.dtype.element_ty), mask=inside)
    else:
        tl.store(out + place, total, mask=inside)


@triton.autotune(
    blocks((4, 4), (2, 4), (4, 8), (2, 8)),
    key=["d_in", "UPDATE", "UNIT", "COPY"],
    prune_configs_by={"early_config_prune": fitting},
)
@triton.jit(do_not_specialize=["pace", "widen"])
@no_type_check
def sum_latent(
    index, weight, rows, bounds, out, exp_avg, exp_avg_sq, copy, pace, widen, d_in,
    CHUNK: tl.constexpr, UPDATE: tl.constexpr, UNIT: tl.constexpr, COPY: tl.constexpr, BETA1: tl.constexpr,
    BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One latent, if it has few entries. What it needs of memory is asked for first, the sum comes from the cache."""
    latent = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(bounds + latent), tl.load(bounds + latent + 1)
    if end - begin > CHUNK:
        return
    column = tl.arange(0, BLOCK_D)
    inside = column < d_in
    place = latent * d_in + column
    w = tl.zeros((BLOCK_D,), tl.float32)
    m, v = w, w
    if UPDATE:
        w = tl.load(out + place, mask=inside, other=0.0)
        m = tl.load(exp_avg + place, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
    total = sum_of(index, weight, rows, begin, end, column, inside, d_in, BLOCK_N, BLOCK_D)
    write_row(
        total,
        w,
        m,
        v,
        place,
        inside,
        out,
        exp_avg,
        exp_avg_sq,
        copy,
        pace,
        widen,
        UPDATE,
        UNIT,
        COPY,
        BETA1,
        BETA2,
        EPS,
    )


@triton.jit
@no_type_check
def sum_chunk(
    index, latent, weight, rows, bounds, parts, d_sae, d_in, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums, of `CHUNK` entries, those that belong to long latents: at most two, the one at the beginning and the one at
    the end. Their sums are kept apart."""
    program = tl.program_id(0).to(tl.int64)
    entries = tl.load(bounds + d_sae)
    first = program * CHUNK
    if first >= entries:
        return
    stop = tl.minimum(first + CHUNK, entries)
    column = tl.arange(0, BLOCK_D)
    inside = column < d_in
    head, tail = tl.load(latent + first).to(tl.int64), tl.load(latent + stop - 1).to(tl.int64)
    end = tl.load(bounds + head + 1)
    if end - tl.load(bounds + head) > CHUNK:
        total = sum_of(index, weight, rows, first, tl.minimum(end, stop), column, inside, d_in, BLOCK_N, BLOCK_D)
        tl.store(parts + 2 * program * d_in + column, total, mask=inside)
    begin = tl.load(bounds + tail)
    if (tail != head) & (tl.load(bounds + tail + 1) - begin > CHUNK):
        total = sum_of(index, weight, rows, begin, stop, column, inside, d_in, BLOCK_N, BLOCK_D)
        tl.store(parts + (2 * program + 1) * d_in + column, total, mask=inside)


@triton.jit(do_not_specialize=["pace", "widen"])
@no_type_check
def sum_parts(
    parts, latent, bounds, out, exp_avg, exp_avg_sq, copy, pace, widen, d_sae, d_in,
    CHUNK: tl.constexpr, UPDATE: tl.constexpr, UNIT: tl.constexpr, COPY: tl.constexpr, BETA1: tl.constexpr,
    BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The long latent that ends among these `CHUNK` entries, if one does: it began before them, so it is the first."""
    program = tl.program_id(0).to(tl.int64)
    if program * CHUNK >= tl.load(bounds + d_sae):
        return
    row = tl.load(latent + program * CHUNK).to(tl.int64)
    begin, end = tl.load(bounds + row), tl.load(bounds + row + 1)
    if (end - begin <= CHUNK) | ((end - 1) // CHUNK != program):
        return
    column = tl.arange(0, BLOCK_D)
    inside = column < d_in
    place = row * d_in + column
    w = tl.zeros((BLOCK_D,), tl.float32)
    m, v = w, w
    if UPDATE:
        w = tl.load(out + place, mask=inside, other=0.0)
        m = tl.load(exp_avg + place, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for part in range(begin // CHUNK, program + 1):
        slot = 2 * part + (part * CHUNK < begin).to(tl.int64)
        total += tl.load(parts + slot * d_in + column, mask=inside, other=0.0)
    write_row(total, w, m, v, place, inside, out, exp_avg, exp_avg_sq, copy, pace, widen, UPDATE, UNIT, COPY, BETA1,
              BETA2, EPS)  # fmt: skip
