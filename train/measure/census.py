"""Counts how often each latent fires over tokens, and with which sign, and derives statistics from these counts.

A latent is *live* when it fired with either sign, and *bipolar* when it is live and its rarer sign makes up more than
a tenth of its firings. Activation mass is Σ|f|, energy Σf². A rarer sign often holds little of the energy: it is then
noise at the threshold more than a pole.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BIPOLAR_MINORITY: Final = 0.1
"""A live latent is bipolar when its rarer sign makes up more than this share of its firings."""
RARE: Final = 1e-5
"""Share of tokens below which SAELens calls a latent dead in its logs (`sparsity/below_1e-5`)."""
DENSITY_EDGES: Final = [half / 2 for half in range(-16, 1)]
"""log10 of the share of tokens on which a latent fires, in half decades."""
MINORITY_EDGES: Final = [0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]
DECILES: Final = 10


@dataclass
class Firings:
    """Sums over tokens, float64: how often each latent was positive and negative, Σ|f|, and Σf² of each sign."""

    positive: Float[Tensor, " d_sae"]
    negative: Float[Tensor, " d_sae"]
    mass: Float[Tensor, " d_sae"]
    positive_energy: Float[Tensor, " d_sae"]
    negative_energy: Float[Tensor, " d_sae"]
    tokens: int = 0

    @classmethod
    def none(cls, d_sae: int, device: str = "cpu") -> "Firings":
        """Returns counts over no tokens: all zero."""
        return cls(*torch.zeros(5, d_sae, dtype=torch.float64, device=device))

    def add_(self, f: Float[Tensor, "batch d_sae"]) -> None:
        self.positive += (f > 0).sum(0)
        self.negative += (f < 0).sum(0)
        self.mass += f.abs().sum(0, dtype=torch.float64)
        self.positive_energy += f.clamp_min(0).square().sum(0, dtype=torch.float64)
        self.negative_energy += f.clamp_max(0).square().sum(0, dtype=torch.float64)
        self.tokens += len(f)

    @property
    def total(self) -> Float[Tensor, " d_sae"]:
        return self.positive + self.negative

    @property
    def live(self) -> Bool[Tensor, " d_sae"]:
        return self.total > 0

    @property
    def minority(self) -> Float[Tensor, " d_sae"]:
        """The share of each latent's firings that have its rarer sign, 0 to 1/2; 0 for latents that never fired."""
        return torch.minimum(self.positive, self.negative) / self.total.clamp_min(1)

    @property
    def weaker_energy(self) -> Float[Tensor, " d_sae"]:
        """The share of each latent's energy on the weaker side, 0 to 1/2; 0 for latents that never fired."""
        both = self.positive_energy + self.negative_energy
        return torch.minimum(self.positive_energy, self.negative_energy) / torch.where(both > 0, both, 1.0)

    @property
    def bipolar(self) -> Bool[Tensor, " d_sae"]:
        return self.minority > BIPOLAR_MINORITY


def dead(firings: Firings, silent: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the share of dead latents by three conventions, each with the number of tokens it was measured on.

    never    fired on none of these tokens
    rare     fired on less than 1e-5 of these tokens; equal to `never` below 100,000 tokens
    silent   was inactive for the last `dead_after_tokens` training tokens; the trainer logged it, `silent` passes it on
    """
    rare = firings.total < RARE * firings.tokens
    return {
        "never": {"fraction": share(~firings.live), "tokens": firings.tokens},
        "rare": {"fraction": share(rare | ~firings.live), "tokens": firings.tokens},
        "silent": silent,
    }


def densities(firings: Firings) -> dict[str, Any]:
    """Returns histograms of log10 of the share of tokens on which latents fire: with either sign, positive, negative;
    and how many latents never do."""
    parts = {"either": firings.total, "positive": firings.positive, "negative": firings.negative}
    return {
        "log10_edges": DENSITY_EDGES,
        **{name: histogram(torch.log10(n[n > 0] / firings.tokens), DENSITY_EDGES) for name, n in parts.items()},
        "never": {name: int((n == 0).sum()) for name, n in parts.items()},
    }


def census(firings: Firings) -> dict[str, Any]:
    """Returns how much of a signed dictionary is bipolar: the share of its live latents, the share of the activation
    mass, and both again for ten equal groups of the live latents, from those that fire most to those that fire
    least. `bipolar_energy` is the share of the live latents with more than a tenth of their energy on the weaker
    side."""
    live = torch.nonzero(firings.live).squeeze(1)
    order = live[torch.argsort(firings.total[live], descending=True, stable=True)]
    parts = torch.tensor_split(order, DECILES)
    mass = firings.mass * firings.bipolar
    everything = firings.mass.sum()
    return {
        "live": len(live),
        "bipolar": ratio(firings.bipolar.sum(), firings.live.sum()),
        "bipolar_mass": ratio(mass.sum(), everything),
        "minority_edges": MINORITY_EDGES,
        "minority": histogram(firings.minority[live], MINORITY_EDGES),
        "bipolar_energy": ratio((firings.weaker_energy > BIPOLAR_MINORITY).sum(), firings.live.sum()),
        "weaker_energy": histogram(firings.weaker_energy[live], MINORITY_EDGES),
        "deciles": {
            "firings": [ratio(firings.total[part].sum(), len(part) * firings.tokens) for part in parts],
            "bipolar": [ratio(firings.bipolar[part].sum(), len(part)) for part in parts],
            "bipolar_mass": [ratio(mass[part].sum(), firings.mass[part].sum()) for part in parts],
            "mass": [ratio(firings.mass[part].sum(), everything) for part in parts],
        },
    }


def share(which: Bool[Tensor, " n"]) -> float:
    return which.double().mean().item()


def ratio(part: Tensor, whole: Tensor | int) -> float | None:
    """Returns part / whole, or None when `whole` is zero."""
    return float(part) / float(whole) if whole else None


def histogram(values: Tensor, edges: list[float]) -> list[int]:
    """Counts values between edges. Bins are [left, right), the last one closed; values outside go to the outermost
    bins."""
    inner = torch.tensor(edges[1:-1], dtype=torch.float64, device=values.device)
    bins = torch.bucketize(values.double(), inner, right=True)
    return torch.bincount(bins, minlength=len(edges) - 1).tolist()
