"""Encodes rows in blocks of rows and of latents, so that [rows, d_sae] is never in memory as a whole.

The shape of a block depends on the autoencoder alone, and each block is computed by one thread: the latents then have
the same bits with any number of threads and processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from train.autoencoder import Autoencoder
from train.sae.families import family
from train.sae.gated import GatedFamily, GatedWeights, pre_activations

VALUES: Final = 1 << 20
"""Latents of all rows of a block together: 4 MiB in float32."""
Triple = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.float32]]
NARROWEST, WIDEST = 512, 4096
"""Latents of a block, at least and at most."""


@dataclass(frozen=True)
class BlockCode:
    """The latents of one block that are not zero on the rows of one shard, by latent and then in token order."""

    first: int
    """The number of the block's first latent."""
    latent: NDArray[np.uint16]
    """Within the block."""
    row: NDArray[np.int32]
    value: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.value)


class BlockEncoder:
    """Encodes the rows of a shard block by block."""

    def __init__(self, sae: Autoencoder) -> None:
        self.sae, self.mathematics = sae, family(sae.config)
        self.d_sae = sae.config.d_sae
        self.width = min(WIDEST, max(NARROWEST, 1 << (self.d_sae // 16).bit_length() - 1 if self.d_sae >= 16 else 0))
        self.whole = not self.mathematics.folds
        """Whether a latent depends on the others, so that a row is encoded with all latents at once."""

    @property
    def firsts(self) -> list[int]:
        """The first latent of each block."""
        return list(range(0, self.d_sae, self.width))

    def block(self, first: int, values: Shaped[Tensor, "rows d_in"]) -> BlockCode:
        """Encodes all rows with the latents of one block. Raises UserError when a latent is infinite."""
        weights = self.sliced(first)
        rows = max(1, VALUES // min(self.width, self.d_sae - first))
        if isinstance(gated := self.mathematics, GatedFamily):
            found = gathered(lambda x: open_gates(gated, weights, x.float()), values, rows)
            return finite(coded(gated, weights, by_latent(first, found)))
        found = gathered(lambda x: nonzero(self.mathematics.encode(weights, x.float())), values, rows)
        return finite(by_latent(first, found))

    def blocks(self, values: Shaped[Tensor, "rows d_in"]) -> Iterator[BlockCode]:
        """Encodes all rows with all latents, and yields the latents block by block. Raises UserError when a latent is
        infinite."""
        rows = max(1, VALUES // self.d_sae)
        row, latent, value = gathered(lambda x: nonzero(self.sae.encode(x)), values, rows)
        order = np.argsort((latent // self.width).astype(np.uint16), kind="stable")
        edges = np.searchsorted((latent // self.width)[order], np.arange(len(self.firsts) + 1))
        for first, begin, end in zip(self.firsts, edges[:-1], edges[1:], strict=True):
            some = order[begin:end]
            yield finite(by_latent(first, (row[some], latent[some] - first, value[some])))

    def sliced(self, first: int) -> Any:
        """The weights of one block of latents, as views."""
        weights = self.sae.weights
        found = {}
        for field in fields(weights):
            axes = field.type.dim_str.split()  # type: ignore[union-attr]
            tensor = getattr(weights, field.name)
            at = axes.index("d_sae") if "d_sae" in axes else None
            found[field.name] = tensor if at is None else tensor.narrow(at, first, min(self.width, self.d_sae - first))
        return replace(weights, **found)


def open_gates(gated: GatedFamily, weights: GatedWeights, x: Float[Tensor, "rows d_in"]) -> Triple:
    """Row, latent and pre-activation of the latents whose gate may be open, row by row."""
    u = pre_activations(weights, x)
    flat = marked(~gated.closed(comparable(u), comparable(weights.theta)))
    row, latent = np.divmod(flat.cpu().numpy(), u.shape[1])
    return row.astype(np.int32), latent, u.reshape(-1)[flat].cpu().numpy()


def coded(gated: GatedFamily, weights: GatedWeights, found: BlockCode) -> BlockCode:
    """The code, given pre-activations as values."""
    latent = torch.from_numpy(found.latent.astype(np.int64))
    theta, r, b = (each.cpu()[:, latent] for each in (weights.theta, weights.r, weights.b))
    value = gated.code(torch.from_numpy(found.value), theta, r, b).numpy()
    some = np.flatnonzero(value)
    return BlockCode(found.first, found.latent[some], found.row[some], value[some])


def gathered(encode: Callable[[Tensor], Triple], values: Shaped[Tensor, "rows d_in"], rows: int) -> Triple:
    """Returns row, latent and value of what `encode` finds, in the order of the rows. `rows`: encoded at a time."""
    found: list[Triple] = [(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.float32))]
    for at in range(0, len(values), rows):
        row, latent, value = encode(values[at : at + rows])
        found.append(((row + at).astype(np.int32), latent, value))
    row, latent, value = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return row, latent, value


def nonzero(f: Shaped[Tensor, "rows latents"]) -> Triple:
    """Returns row, latent and value of the entries that are not zero, row by row."""
    places = marked(comparable(f) != 0)
    value, flat = f.reshape(-1)[places].cpu().numpy(), places.cpu().numpy()
    return (flat // f.shape[1]).astype(np.int32), flat % f.shape[1], value


def comparable(values: Tensor) -> Any:
    """The same as numpy's array where that is possible: comparisons and searches there take a third of torch's time."""
    return values.numpy() if values.device.type == "cpu" else values


def marked(marks: Any) -> Int[Tensor, " n"]:
    """Where marks are set, counted row by row."""
    if isinstance(marks, np.ndarray):
        return torch.from_numpy(np.flatnonzero(marks))
    return torch.nonzero(marks.reshape(-1)).squeeze(1)


def finite(code: BlockCode) -> BlockCode:
    """The same. Raises UserError when a latent is infinite or NaN."""
    if not np.isfinite(code.value).all():
        at = int(code.latent[~np.isfinite(code.value)][0]) + code.first
        raise UserError(f"latent {at} is infinite or NaN on a row of the store. Train this autoencoder again")
    return code


def by_latent(first: int, code: Triple) -> BlockCode:
    """Sorts by latent and keeps the order of the rows. numpy sorts 16-bit numbers by radix."""
    row, latent, value = code
    narrow = latent.astype(np.uint16)
    order = np.argsort(narrow, kind="stable")
    return BlockCode(first, narrow[order], row[order], value[order])
