"""The sparse step's work entry by entry and latent by latent, on a GPU: Triton, from PyTorch's CUDA wheels.

Which entries of u are open is counted latent by latent, then written in order, into as much room as was guessed: the
lists may be longer than what is in them, and the last of the latents' bounds, on the device, says how long that is. One
program does what is left of a latent's gradients, whose sums are therefore taken in the same order every time. No
atomics. Sums are float32.
"""

from dataclasses import dataclass
from typing import Final, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_TOKENS: Final = 512
"""Entries of u that are compared together, by one warp: a multiple of 32."""
BLOCK_ENTRIES: Final = 32
"""Open entries of one latent that are summed together: few latents have more."""


@dataclass(frozen=True)
class OfLatents:
    """What `latent_gradients` gives. The first two are the weights of the rows in the gradients of W_enc and W_dec."""

    to_u: Float[Tensor, " n"]
    to_rows: Float[Tensor, " n"]
    theta: Float[Tensor, "poles d_sae"]
    r: Float[Tensor, "r_poles d_sae"]
    b: Float[Tensor, "poles d_sae"]
    total: Float[Tensor, "3 d_sae"]
    """Sums over each latent's entries of `to_u`, of the penalty and of the active ones."""


def write_entries(
    u: Float[Tensor, "latents batch"],
    theta: Float[Tensor, "poles latents"],
    signed: bool,
    bounds: Int[Tensor, " latents_and_1"],
    to: tuple[Int[Tensor, " room"], Int[Tensor, " room"], Float[Tensor, " room"]],
    offset: int,
) -> None:
    """The latent, the token and u of each entry whose gate is open, by latent, then token, into `to`, as far as there
    is room. u has the latents from `offset`; `bounds` begins with where the first entry goes and is filled with where
    each latent's end. Reads u twice, in the type that it has, and never waits for the device."""
    latents, batch = u.shape
    counts = torch.empty(latents, dtype=torch.int32, device=u.device)
    words = triton.cdiv(batch, BLOCK_TOKENS) * (BLOCK_TOKENS // 32)
    marks = torch.empty(latents, words, dtype=torch.int32, device=u.device)
    u = u.contiguous()
    count_open[(latents,)](
        u,
        theta,
        counts,
        marks,
        batch,
        words,
        theta.stride(0),
        SIGNED=signed,
        TWO=len(theta) == 2,
        BLOCK=BLOCK_TOKENS,
        num_warps=1,
    )
    torch.cumsum(counts, 0, dtype=torch.int64, out=bounds[1:])
    bounds[1:] += bounds[0]
    write_open[(latents,)](marks, bounds, *to[:2], words, len(to[0]), offset, BLOCK=32, num_warps=1)
    read_open[(triton.cdiv(len(to[0]), 512),)](u, *to, bounds, latents, batch, len(to[0]), offset, BLOCK=512)


def codes_of(
    u: Float[Tensor, " n"],
    latent: Int[Tensor, " n"],
    order: Int[Tensor, " n"],
    bounds: Int[Tensor, " d_sae_and_1"],
    scalars: tuple[Float[Tensor, "poles d_sae"], Float[Tensor, "r_poles d_sae"], Float[Tensor, "poles d_sae"]],
    signed: bool,
) -> tuple[Float[Tensor, "2 n"], Float[Tensor, "2 n"], Int[Tensor, " n"]]:
    """The code f and the soft gate g of open entries, with their signs; both once more, and the latents, in `order`.
    `scalars` are θ, r and b; the last of `bounds` is how many entries there are."""
    theta, r, b = (scalar.contiguous() for scalar in scalars)
    codes, ordered, latents = u.new_empty(2, len(u)), u.new_empty(2, len(u)), torch.empty_like(latent)
    if len(u):
        code_entries[(triton.cdiv(len(u), 512),)](
            u,
            latent,
            order,
            bounds,
            theta,
            r,
            b,
            codes[0],
            codes[1],
            ordered[0],
            ordered[1],
            latents,
            theta.shape[1],
            SIGNED=signed,
            TWO=len(theta) == 2,
            TWO_R=len(r) == 2,
            BLOCK=512,
        )
    return codes, ordered, latents


def latent_gradients(
    u: Float[Tensor, " n"],
    f: Float[Tensor, " n"],
    g: Float[Tensor, " n"],
    of_error: Float[Tensor, " n"],
    of_aux_error: Float[Tensor, " n"] | None,
    bounds: Int[Tensor, " bounds"],
    r: Float[Tensor, "r_poles d_sae"],
    poles: int,
    sparsity: Float[Tensor, ""],
    batch: int,
    signed: bool,
) -> OfLatents:
    """`of_error` and `of_aux_error` are the products of each entry's errors and its decoder row."""
    d_sae = r.shape[1]
    to_u, to_rows = torch.empty_like(u), torch.empty_like(u)
    theta, b = torch.empty(2, poles, d_sae, device=u.device)
    to_r, total = torch.empty(len(r), d_sae, device=u.device), torch.empty(3, d_sae, device=u.device)
    finish_latents[(d_sae,)](
        u, f, g, of_error, of_error if of_aux_error is None else of_aux_error, bounds, r.contiguous(), sparsity,
        to_u, to_rows, theta, to_r, b, total, batch, d_sae,
        SIGNED=signed, AUX=of_aux_error is not None, TWO=poles == 2, TWO_R=len(r) == 2, BLOCK=BLOCK_ENTRIES,
        num_warps=1,
    )  # fmt: skip
    return OfLatents(to_u, to_rows, theta, to_r, b, total)


@triton.jit
@no_type_check
def opened_in(u, theta, stride, latent, token, batch, SIGNED: tl.constexpr, TWO: tl.constexpr):
    """u at some tokens, and where its gate is open."""
    inside = token < batch
    value = tl.load(u + latent * batch + token, mask=inside, other=0.0).to(tl.float32)
    upper = tl.load(theta + latent)
    opened = value > upper
    if SIGNED:
        lower = upper
        if TWO:
            lower = tl.load(theta + stride + latent)
        opened = opened | (value < -lower)
    return value, opened & inside


@triton.jit
@no_type_check
def count_open(
    u, theta, counts, marks, batch, words, stride, SIGNED: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr
):
    """One latent's open entries: how many there are, and a bit for each token."""
    latent = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.int32)
    bit = tl.arange(0, 32)[None, :]
    for at in range(0, batch, BLOCK):
        _, opened = opened_in(u, theta, stride, latent, at + tl.arange(0, BLOCK), batch, SIGNED, TWO)
        total += opened.to(tl.int32)
        word = tl.sum(tl.reshape(opened.to(tl.int32), (BLOCK // 32, 32)) << bit, 1)
        tl.store(marks + latent * words + at // 32 + tl.arange(0, BLOCK // 32), word)
    tl.store(counts + latent, tl.sum(total, 0))


@triton.jit
@no_type_check
def ones(word):
    """How many bits are set of each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["room", "offset"])
@no_type_check
def write_open(marks, bounds, latents, tokens, words, room, offset, BLOCK: tl.constexpr):
    """One latent's open entries, from where they begin: a thread takes the bits of a word one by one."""
    latent = tl.program_id(0).to(tl.int64)
    start, end = tl.load(bounds + latent), tl.load(bounds + latent + 1)
    if end > start:
        name = (latent + offset).to(tl.int32)
        for first in range(0, words, BLOCK):
            number = first + tl.arange(0, BLOCK)
            word = tl.load(marks + latent * words + number, mask=number < words, other=0).to(tl.uint32, bitcast=True)
            count = ones(word)
            entry = start + tl.cumsum(count, 0) - count
            most = tl.max(count, 0)
            for _ in range(most):
                lowest = word & (~word + 1)
                there = (word != 0) & (entry < room)
                token = number * 32 + ones(lowest - 1)
                tl.store(tokens + entry, token.to(tokens.dtype.element_ty), mask=there)
                tl.store(latents + entry, tl.zeros((BLOCK,), tl.int32) + name, mask=there)
                word ^= lowest
                entry += 1
            start += tl.sum(count, 0)


@triton.jit(do_not_specialize=["room", "offset"])
@no_type_check
def read_open(u, latents, tokens, values, bounds, height, batch, room, offset, BLOCK: tl.constexpr):
    """u at the entries of its latents."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = (entry >= tl.load(bounds)) & (entry < tl.load(bounds + height)) & (entry < room)
    place = (tl.load(latents + entry, mask=live, other=0).to(tl.int64) - offset) * batch
    value = tl.load(u + place + tl.load(tokens + entry, mask=live, other=0), mask=live, other=0.0)
    tl.store(values + entry, value.to(tl.float32), mask=live)


@triton.jit
@no_type_check
def size_and_sign(value, SIGNED: tl.constexpr):
    size, sign = value, tl.zeros_like(value) + 1.0
    if SIGNED:
        size = tl.abs(value)
        sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))
    return size, sign


@triton.jit
@no_type_check
def code_entries(
    u, latent, order, bounds, theta, r, b, f, g, ordered_f, ordered_g, ordered_latent, d_sae,
    SIGNED: tl.constexpr, TWO: tl.constexpr, TWO_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < tl.load(bounds + d_sae)
    entry = tl.load(order + at, mask=live, other=0)
    value = tl.load(u + entry, mask=live, other=0.0)
    column = tl.load(latent + entry, mask=live, other=0)
    tl.store(ordered_latent + at, column, mask=live)
    column = column.to(tl.int64)
    size, sign = size_and_sign(value, SIGNED)
    other = column + tl.where(value < 0, d_sae, 0)
    of_gate, of_r = column, column
    if TWO:
        of_gate = other
    if TWO_R:
        of_r = other
    scale = tl.exp(tl.load(r + of_r, mask=live, other=0.0))
    code = tl.maximum(scale * size + tl.load(b + of_gate, mask=live, other=0.0), 0.0)
    code *= sign
    gate = (size - tl.load(theta + of_gate, mask=live, other=0.0)) * sign
    tl.store(f + entry, code, mask=live)
    tl.store(g + entry, gate, mask=live)
    tl.store(ordered_f + at, code, mask=live)
    tl.store(ordered_g + at, gate, mask=live)


@triton.jit(do_not_specialize=["batch"])
@no_type_check
def finish_latents(
    u, f, g, of_error, of_aux_error, bounds, r, sparsity, to_u, to_rows, theta, to_r, b, total, batch, d_sae,
    SIGNED: tl.constexpr, AUX: tl.constexpr, TWO: tl.constexpr, TWO_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One latent: the equations of `train/sae/gated.py` at its open entries. What belongs to the second pole is summed
    apart where it has scalars of its own."""
    latent = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(bounds + latent), tl.load(bounds + latent + 1)
    scale = tl.exp(tl.load(r + latent))
    second_scale = scale
    if TWO_R:
        second_scale = tl.exp(tl.load(r + d_sae + latent))
    twice = 2.0 / batch
    price = tl.load(sparsity) / batch
    gate = tl.zeros((BLOCK,), tl.float32)
    magnitude, slope, second_gate, second_magnitude, second_slope, all_u, penalty, count = (
        gate, gate, gate, gate, gate, gate, gate, gate
    )  # fmt: skip
    for at in range(begin, end, BLOCK):
        entry = at + tl.arange(0, BLOCK)
        live = entry < end
        value = tl.load(u + entry, mask=live, other=0.0)
        code = tl.load(f + entry, mask=live, other=0.0)
        size, sign = size_and_sign(value, SIGNED)
        first = live & (value >= 0)
        second = live & (value < 0)
        active = tl.where(live & (code != 0), 1.0, 0.0)
        to_magnitude = tl.load(of_error + entry, mask=live, other=0.0) * sign * active * twice
        to_gate = tl.where(live, price, 0.0)
        if AUX:
            to_gate += tl.load(of_aux_error + entry, mask=live, other=0.0) * sign * twice
        wanted = (to_gate + tl.where(second, second_scale, scale) * to_magnitude) * sign
        tl.store(to_u + entry, wanted, mask=live)
        tl.store(to_rows + entry, code * twice, mask=live)
        all_u += wanted
        penalty += tl.load(g + entry, mask=live, other=0.0) * sign
        count += active
        gate += tl.where(first, to_gate, 0.0)
        magnitude += tl.where(first, to_magnitude, 0.0)
        slope += tl.where(first, to_magnitude * size, 0.0)
        second_gate += tl.where(second, to_gate, 0.0)
        second_magnitude += tl.where(second, to_magnitude, 0.0)
        second_slope += tl.where(second, to_magnitude * size, 0.0)
    if TWO:
        tl.store(theta + d_sae + latent, -tl.sum(second_gate, 0))
        tl.store(b + d_sae + latent, tl.sum(second_magnitude, 0))
    else:
        gate += second_gate
        magnitude += second_magnitude
    if TWO_R:
        tl.store(to_r + d_sae + latent, second_scale * tl.sum(second_slope, 0))
    else:
        slope += second_slope
    tl.store(theta + latent, -tl.sum(gate, 0))
    tl.store(b + latent, tl.sum(magnitude, 0))
    tl.store(to_r + latent, scale * tl.sum(slope, 0))
    tl.store(total + latent, tl.sum(all_u, 0))
    tl.store(total + d_sae + latent, tl.sum(penalty, 0))
    tl.store(total + 2 * d_sae + latent, tl.sum(count, 0))
