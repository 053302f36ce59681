"""Adam's update of a matrix row by row, on a GPU: Triton, from PyTorch's CUDA wheels.

Reads the weights, the gradient and both moments once and writes what changes once. With unit rows, the gradient loses
its radial part before the update and the row gets its norm back after it, in the same pass.
"""

import math
from typing import Final, no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BETA1: Final = 0.9
BETA2: Final = 0.999
EPS: Final = 1e-8


def adam_rows_(
    weight: Float[Tensor, "d_sae d_in"],
    grad: Float[Tensor, "d_sae d_in"],
    exp_avg: Float[Tensor, "d_sae d_in"],
    exp_avg_sq: Float[Tensor, "d_sae d_in"],
    lr: float,
    step: int,
    unit: bool,
) -> None:
    """Update number `step`, from 1, as torch's Adam(0.9, 0.999) has it, in place. All tensors are contiguous float32;
    one program holds a row in registers."""
    height, d_in = weight.shape
    block = triton.next_power_of_2(d_in)
    pace, widen = lr / (1 - BETA1**step), 1 / math.sqrt(1 - BETA2**step)
    adam_row[(height,)](
        weight, grad, exp_avg, exp_avg_sq, pace, widen, d_in,
        BETA1=BETA1, BETA2=BETA2, EPS=EPS, UNIT=unit, BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip


@triton.jit(do_not_specialize=["pace", "widen"])
@no_type_check
def adam_row(
    weight, grad, exp_avg, exp_avg_sq, pace, widen, d_in,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < d_in
    place = tl.program_id(0).to(tl.int64) * d_in + column
    w = tl.load(weight + place, mask=inside, other=0.0)
    g = tl.load(grad + place, mask=inside, other=0.0)
    m = tl.load(exp_avg + place, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
    if UNIT:
        g -= tl.sum(g * w, 0) * w
    m += (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    w -= pace * m / (tl.sqrt(v) * widen + EPS)
    if UNIT:
        w /= tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-8)
    tl.store(weight + place, w, mask=inside)
    tl.store(exp_avg + place, m, mask=inside)
    tl.store(exp_avg_sq + place, v, mask=inside)
