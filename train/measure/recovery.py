"""Measures how many of a synthetic store's known features an autoencoder recovered (shared/synthetic.py).

Directed features are +a_i and, for a bipolar feature, -a_i as well. They are matched against the poles of latents: a
decoder row and, for signed latents, its negative. Only poles that fire on more than 1e-4 of the held-out rows count.

    rec     share of the directed features whose best pole has a cosine above 0.9
    mcs     mean over the directed features of that best cosine
    slope   slope of f over the true coefficient, by least squares through the origin, over the active directed features
            with a match: below 1 when latents are shrunk or miss an active feature
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from shared.synthetic import SyntheticCodes, TrueFeatures, truth_of
from train.autoencoder import Autoencoder
from train.data.row_mask import RowMask
from train.data.rows import HookRows, norms_and_places

MATCHED: Final = 0.9
FIRES: Final = 1e-4
ROWS_AT_A_TIME: Final = 4096
FEATURES_AT_A_TIME: Final = 1024


@dataclass(frozen=True)
class Recovery:
    """The metrics above, for one autoencoder."""

    rec: float
    mcs: float
    slope: float | None
    """None when nothing matched."""


@dataclass(frozen=True)
class FeatureMatches:
    """The best-matching pole for every directed feature."""

    cosine: Float[Tensor, " directed"]
    """Cosine of the feature and the pole; 0 when no pole fires."""
    latent: Int[Tensor, " directed"]
    sign: Float[Tensor, " directed"]
    """The pole's sign, 1 or -1."""


@dataclass(frozen=True)
class KnownFeatures:
    """The features that the held-out rows were made from."""

    truth: TrueFeatures
    codes: SyntheticCodes
    """The true coefficients of the rows, in the order of `read_heldout`."""

    @classmethod
    def of(cls, rows: HookRows, keep: NDArray[np.bool_] | RowMask) -> "KnownFeatures | None":
        """Returns the features of the committed rows marked in `keep` [contexts, context], or None for a store that was
        harvested."""
        truth = truth_of(rows.store.spec.model)
        return None if truth is None else cls(truth, truth.codes(places(rows, keep)))

    def recovery(self, sae: Autoencoder, rows: Float[Tensor, "rows d_in"], device: str) -> Recovery:
        """Measures one autoencoder on the held-out rows."""
        fired = torch.zeros(2, sae.config.d_sae, dtype=torch.float64, device=device)
        for _, f in encoded(sae, rows, device):
            fired += torch.stack([(f > 0).sum(0), (f < 0).sum(0)])
        W_dec = sae.weights.W_dec.to(device)
        directed = torch.from_numpy(self.truth.directed).float().to(device)
        found = best_poles(directed, W_dec, fired > FIRES * len(rows))
        matched = found.cosine > MATCHED
        return Recovery(
            rec=matched.double().mean().item(),
            mcs=found.cosine.double().mean().item(),
            slope=self.slope(sae, rows, device, found, matched),
        )

    def slope(
        self, sae: Autoencoder, rows: Tensor, device: str, found: FeatureMatches, matched: Bool[Tensor, " directed"]
    ) -> float | None:
        lengths = sae.weights.W_dec.to(device).norm(dim=1)
        directed = torch.from_numpy(self.truth.directed_numbers(self.codes)).to(device)
        sizes = torch.from_numpy(np.abs(self.codes.values)).to(device)
        active = torch.from_numpy(self.codes.rows).to(device)
        product = square = 0.0
        for start, f in encoded(sae, rows, device):
            first, last = np.searchsorted(self.codes.rows, [start, start + len(f)])
            which, size = directed[first:last], sizes[first:last]
            latent = found.latent[which]
            value = (f[active[first:last] - start, latent] * found.sign[which]).relu() * lengths[latent]
            product += (value.double() * size)[matched[which]].sum().item()
            square += size.square()[matched[which]].sum().item()
        return product / square if square else None


def places(rows: HookRows, keep: NDArray[np.bool_] | RowMask) -> NDArray[np.int64]:
    """Returns the positions in the token stream of the rows that `read_heldout` returns, in the same order."""
    return norms_and_places(rows, keep)[1]


def encoded(sae: Autoencoder, rows: Tensor, device: str) -> Iterator[tuple[int, Float[Tensor, "part d_sae"]]]:
    """Yields the codes of some rows at a time, each with the index of its first row."""
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        yield start, sae.encode(rows[start : start + ROWS_AT_A_TIME].to(device).float())


def best_poles(
    directed: Float[Tensor, "directed d_in"], W_dec: Float[Tensor, "d_sae d_in"], fires: Bool[Tensor, "2 d_sae"]
) -> FeatureMatches:
    """Finds the pole with the largest cosine for every directed feature. `fires` says which positive and negative poles
    fire; the others match nothing."""
    unit = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
    poles = torch.cat([unit, -unit])
    inactive = ~fires.reshape(-1)
    cosines, numbers = [], []
    for part in torch.split(directed, FEATURES_AT_A_TIME):
        best = (part @ poles.T).masked_fill(inactive, -2.0).max(dim=1)
        cosines.append(best.values)
        numbers.append(best.indices)
    cosine, number = torch.cat(cosines), torch.cat(numbers)
    return FeatureMatches(
        cosine=torch.where(cosine < -1.5, 0.0, cosine),
        latent=number % len(unit),
        sign=torch.where(number < len(unit), 1.0, -1.0),
    )
