"""The sparse step's work entry by entry and latent by latent, on a GPU: Triton, from PyTorch's CUDA wheels.

Which entries of u are open is counted latent by latent, then written in order; one program does what is left of a
latent's gradients, whose sums are therefore taken in the same order every time. No atomics. Sums are float32.
"""

from dataclasses import dataclass
from typing import Any, Final, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_TOKENS: Final = 512
"""Entries of u that are compared together, by one warp."""
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


def find_open(
    u: Float[Tensor, "latents batch"], theta: Float[Tensor, "poles latents"], signed: bool
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The latent, the token (int32) and u (float32) of each entry whose gate is open, by latent, then token. Reads u
    twice, in the type that it has. Waits for the device once."""
    latents, batch = u.shape
    device = u.device
    counts = torch.empty(latents, dtype=torch.int32, device=device)
    shape: dict[str, Any] = {"SIGNED": signed, "TWO": len(theta) == 2, "BLOCK": BLOCK_TOKENS}
    shape["num_warps"] = 1
    u = u.contiguous()
    count_open[(latents,)](u, theta, counts, batch, theta.stride(0), **shape)
    bounds = torch.zeros(latents + 1, dtype=torch.int64, device=device)
    torch.cumsum(counts, 0, out=bounds[1:])
    total = int(bounds[-1].item())
    latent, token = (torch.empty(total, dtype=torch.int32, device=device) for _ in range(2))
    value = torch.empty(total, device=device)
    write_open[(latents,)](u, theta, bounds, latent, token, batch, theta.stride(0), **shape)
    if total:
        read_open[(triton.cdiv(total, 512),)](u, latent, token, value, batch, total, BLOCK=512)
    return latent, token, value


def codes_of(
    u: Float[Tensor, " n"],
    latent: Int[Tensor, " n"],
    order: Int[Tensor, " n"],
    scalars: tuple[Float[Tensor, "poles d_sae"], Float[Tensor, "r_poles d_sae"], Float[Tensor, "poles d_sae"]],
    signed: bool,
) -> tuple[Float[Tensor, "2 n"], Float[Tensor, "2 n"], Int[Tensor, " n"]]:
    """The code f and the soft gate g of open entries, with their signs; both once more, and the latents, in `order`.
    `scalars` are θ, r and b."""
    theta, r, b = (scalar.contiguous() for scalar in scalars)
    codes, ordered, latents = u.new_empty(2, len(u)), u.new_empty(2, len(u)), torch.empty_like(latent)
    if len(u):
        code_entries[(triton.cdiv(len(u), 512),)](
            u, latent, order, theta, r, b, codes[0], codes[1], ordered[0], ordered[1], latents, len(u), theta.shape[1],
            SIGNED=signed, TWO=len(theta) == 2, TWO_R=len(r) == 2, BLOCK=512,
        )  # fmt: skip
    return codes, ordered, latents


def finish_errors(
    sums: list[Float[Tensor, "batch d_in"]], centred: Float[Tensor, "batch d_in"], dtype: torch.dtype
) -> tuple[list[Float[Tensor, "batch d_in"]], Float[Tensor, "tables batch"]]:
    """Subtracts `centred` from one or two tables, in place in the first; gives the differences in `dtype` and the
    float32 sum of squares of each row."""
    batch, d_in = centred.shape
    low = list(torch.empty(len(sums), batch, d_in, dtype=dtype, device=centred.device))
    squares = torch.empty(len(sums), batch, device=centred.device)
    subtract_rows[(batch,)](
        sums[0], sums[-1], centred.contiguous(), low[0], low[-1], squares[0], squares[-1], d_in,
        TWO=len(sums) == 2, BLOCK=1024,
    )  # fmt: skip
    return low, squares


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
def opened_in(
    u, theta, stride, latent, token, batch, SIGNED: tl.constexpr, TWO: tl.constexpr
):  # fmt: skip
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
    u, theta, counts, batch, stride, SIGNED: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One latent's open entries."""
    latent = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, batch, BLOCK):
        _, opened = opened_in(u, theta, stride, latent, at + tl.arange(0, BLOCK), batch, SIGNED, TWO)
        total += opened.to(tl.int32)
    tl.store(counts + latent, tl.sum(total, 0))


@triton.jit
@no_type_check
def write_open(
    u, theta, bounds, latents, tokens, batch, stride, SIGNED: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One latent's open entries, from where they begin. Most blocks have none or few: stores are what costs."""
    latent = tl.program_id(0).to(tl.int64)
    start, end = tl.load(bounds + latent), tl.load(bounds + latent + 1)
    for at in range(start, end, BLOCK):
        entry = at + tl.arange(0, BLOCK)
        tl.store(latents + entry, tl.zeros((BLOCK,), tl.int32) + latent.to(tl.int32), mask=entry < end)
    if end > start:
        for first in range(0, batch, BLOCK):
            token = first + tl.arange(0, BLOCK)
            _, opened = opened_in(u, theta, stride, latent, token, batch, SIGNED, TWO)
            number = opened.to(tl.int32)
            count = tl.sum(number, 0)
            if count > 0:
                tl.store(tokens + start + tl.cumsum(number, 0) - 1, token, mask=opened)
            start += count


@triton.jit(do_not_specialize=["entries"])
@no_type_check
def read_open(u, latents, tokens, values, batch, entries, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = entry < entries
    place = tl.load(latents + entry, mask=live, other=0).to(tl.int64) * batch
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


@triton.jit(do_not_specialize=["entries"])
@no_type_check
def code_entries(
    u, latent, order, theta, r, b, f, g, ordered_f, ordered_g, ordered_latent, entries, d_sae,
    SIGNED: tl.constexpr, TWO: tl.constexpr, TWO_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < entries
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


@triton.jit
@no_type_check
def subtract_rows(
    sums, second_sums, centred, low, second_low, squares, second_squares, d_in, TWO: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One token's row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    second_total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, d_in, BLOCK):
        column = at + tl.arange(0, BLOCK)
        inside = column < d_in
        place = row * d_in + column
        target = tl.load(centred + place, mask=inside, other=0.0)
        error = tl.load(sums + place, mask=inside, other=0.0) - target
        tl.store(sums + place, error, mask=inside)
        tl.store(low + place, error.to(low.dtype.element_ty), mask=inside)
        total += error * error
        if TWO:
            error = tl.load(second_sums + place, mask=inside, other=0.0) - target
            tl.store(second_low + place, error.to(second_low.dtype.element_ty), mask=inside)
            second_total += error * error
    tl.store(squares + row, tl.sum(total, 0))
    if TWO:
        tl.store(second_squares + row, tl.sum(second_total, 0))


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
