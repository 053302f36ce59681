"""Control directions, and the arithmetic that sets a latent's slope against theirs.

An interval over contexts proves nothing: the slope of any direction is well determined. What counts is where a latent's
slope lies among the slopes of other directions, judged by the same tokens and at the same size.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from shared.schemas.steer import DialControl

SIZES: Final = 3
"""Sizes at which each control direction is measured, at most."""
SAME_SIZE: Final = 1.01
"""The ratio up to which two sizes count as one."""


def draw_controls(
    W_dec: Float[Tensor, "d_sae d_in"], others: NDArray[np.int64], many: int, rng: np.random.Generator
) -> tuple[list[DialControl], Float[Tensor, "controls d_in"]]:
    """Returns `many` unit vectors, and what they are: in turn random ones and decoder rows of `others`, with random
    signs, as long as there are some."""
    chosen = rng.permutation(others)[: many // 2]
    d_in = W_dec.shape[1]
    controls, rows = [], []
    for number in range(many):
        if number % 2 and number // 2 < len(chosen):
            latent, sign = int(chosen[number // 2]), 1 if rng.random() < 0.5 else -1
            controls.append(DialControl(kind="other", latent=latent, sign=1 if sign == 1 else -1))
            rows.append(sign * W_dec[latent].float().cpu())
        else:
            controls.append(DialControl(kind="random"))
            rows.append(torch.from_numpy(rng.standard_normal(d_in)).float())
    found = torch.stack(rows) if rows else torch.zeros(0, d_in)
    return controls, (found / found.norm(dim=1, keepdim=True).clamp_min(1e-12)).to(W_dec.device)


def control_sizes(sizes: Sequence[float]) -> list[float]:
    """Returns the smallest, the median and the largest of some sizes, without those that are nearly equal."""
    if not len(sizes):
        return []
    found: list[float] = []
    for size in np.quantile(np.asarray(sizes, np.float64), np.linspace(0, 1, SIZES)).tolist():
        if not found or size > SAME_SIZE * found[-1]:
            found.append(size)
    return found


def at_size(slopes: NDArray[np.float64], sizes: Sequence[float], size: float) -> NDArray[np.float64]:
    """Interpolates slopes [sizes, controls] per unit of dial at one size. A direction of length 0 has the slope 0."""
    known, rows = np.concatenate([[0.0], sizes]), np.concatenate([np.zeros((1, slopes.shape[1])), slopes])
    if len(sizes) == 1:  # nearly equal sizes were measured as one
        size = float(sizes[0])
    return np.array([np.interp(size, known, column) for column in rows.T])


def p_value(slope: float, controls: NDArray[np.float64]) -> float | None:
    """Returns the probability of a slope as large as this one for a direction like the controls; None without
    controls. A control and its opposite are equally likely, so both count."""
    if not len(controls):
        return None
    larger = int((controls >= slope).sum() + (-controls >= slope).sum())
    return (1 + larger) / (1 + 2 * len(controls))


def discoveries(p: Sequence[float], rate: float) -> list[bool]:
    """Returns which of several tests pass at a false discovery rate (Benjamini and Hochberg)."""
    many = len(p)
    ranks = np.argsort(np.argsort(p, kind="stable"), kind="stable") + 1
    below = [each for each, rank in zip(p, ranks, strict=True) if each <= rate * rank / many]
    limit = max(below, default=-1.0)
    return [each <= limit for each in p]
