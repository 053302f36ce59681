"""Measures autoencoders by other tools' definitions of R², L0 and dead latents, for comparison with their numbers.

Our definitions are in metrics.py. Each class implements one tool's definitions and names the release it follows. Where
a definition depends on the batch, a batch is `metrics.ROWS_AT_A_TIME` rows here. Tests compare the classes with numbers
from the tools' own code (tests/golden/peers.py).
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Final

import torch
from jaxtyping import Float
from torch import Tensor

from train.autoencoder import Autoencoder
from train.measure.metrics import reconstructions

Numbers = dict[str, float | None]
"""r2, l0 and dead; and r2_legacy for a tool that defines R² twice."""


class PeerMetrics(ABC):
    """One tool's metrics of one autoencoder: call `add` with each batch, then `result`."""

    name: ClassVar[str]

    @abstractmethod
    def add(
        self, x: Float[Tensor, "batch d_in"], f: Float[Tensor, "batch d_sae"], x_hat: Float[Tensor, "batch d_in"]
    ) -> None: ...

    @abstractmethod
    def result(self) -> Numbers: ...


class SAELensMetrics(PeerMetrics):
    """SAELens 6.54.12, sae_lens/evals.py and sae_lens/training/sae_trainer.py.

    r2         `explained_variance`: 1 - mean |x - x̂|² / (mean |x|² - |mean x|²) over all batches: our R²
    r2_legacy  `explained_variance_legacy`: mean over tokens of 1 - |x - x̂|² / |x - batch mean|², a ratio per token
    l0         non-zero latents per token
    dead       `sparsity/below_1e-5`: latents that fire on less than 1e-5 of the tokens. (Its `dead_features` counts
               training steps: inactive for more than `dead_feature_window`, 1000 steps.)

    SAELens counts every position of a context but special tokens, position 0 too, where activations are unlike all
    others. `by_peers` says what that gives.
    """

    name = "SAELens"

    def __init__(self) -> None:
        self.rows = 0
        self.sum_x = self.fired = torch.zeros(())
        self.squares = self.residuals = self.ratios = 0.0

    def add(self, x: Tensor, f: Tensor, x_hat: Tensor) -> None:
        self.rows += len(x)
        self.sum_x = self.sum_x + x.sum(0, dtype=torch.float64)
        self.squares += x.double().square().sum().item()
        self.residuals += (x - x_hat).double().square().sum().item()
        self.ratios += legacy_ratios(x, x_hat)
        self.fired = self.fired + (f != 0).sum(0, dtype=torch.float64)

    def result(self) -> Numbers:
        variance = self.squares / self.rows - (self.sum_x / self.rows).square().sum().item()
        return {
            "r2": 1 - self.residuals / self.rows / variance if variance > 1e-10 else None,
            "r2_legacy": self.ratios / self.rows,
            "l0": self.fired.sum().item() / self.rows,
            "dead": (self.fired / self.rows < 1e-5).double().mean().item(),
        }


class DictionaryLearningMetrics(PeerMetrics):
    """dictionary_learning 0.1.0, dictionary_learning/evaluation.py.

    r2    `frac_variance_explained`: mean over batches of 1 - Σ Var(x - x̂) / Σ Var(x). A constant bias of the
          reconstruction costs nothing, because the residual's variance ignores its mean
    l0    mean over batches of the non-zero latents per token
    dead  1 - `frac_alive`: latents whose activations sum to zero. A live signed latent can sum to zero too
    """

    name = "dictionary_learning"

    def __init__(self) -> None:
        self.r2: list[float] = []
        self.l0: list[float] = []
        self.activity = torch.zeros(())

    def add(self, x: Tensor, f: Tensor, x_hat: Tensor) -> None:
        if len(x) > 1:  # the variance of one row is not defined
            self.r2.append(1 - ((x - x_hat).double().var(0).sum() / x.double().var(0).sum()).item())
        self.l0.append((f != 0).sum(1).double().mean().item())
        self.activity = self.activity + f.sum(0)

    def result(self) -> Numbers:
        return {
            "r2": sum(self.r2) / len(self.r2) if self.r2 else None,
            "l0": sum(self.l0) / len(self.l0),
            "dead": (self.activity == 0).double().mean().item(),
        }


class SAEBench(PeerMetrics):
    """SAEBench 0.6.0, sae_bench/evals/core/main.py.

    r2         `explained_variance`: 1 - A / (B - C²) with batch means A of |x - x̂|² and B of |x|², averaged over
               batches, and C the mean over batches *and dimensions* of x², where the mean of x would be right
    r2_legacy  `explained_variance_legacy`: the same as in SAELens
    l0         non-zero latents per token
    dead       1 - `frac_alive`: latents that are never *positive*, including those that only fire negatively
    """

    name = "SAEBench"

    def __init__(self) -> None:
        self.rows, self.ratios, self.active = 0, 0.0, 0.0
        self.squares: list[float] = []
        self.means: list[float] = []
        self.residuals: list[float] = []
        self.positive = torch.zeros(())

    def add(self, x: Tensor, f: Tensor, x_hat: Tensor) -> None:
        self.rows += len(x)
        self.squares.append(x.double().square().sum(1).mean().item())
        self.means.append(x.double().square().mean().item())
        self.residuals.append((x - x_hat).double().square().sum(1).mean().item())
        self.ratios += legacy_ratios(x, x_hat)
        self.active += (f != 0).sum().item()
        self.positive = self.positive + (f > 0).sum(0)

    def result(self) -> Numbers:
        batches = len(self.squares)
        variance = sum(self.squares) / batches - (sum(self.means) / batches) ** 2
        return {
            "r2": 1 - sum(self.residuals) / batches / variance if variance else None,
            "r2_legacy": self.ratios / self.rows,
            "l0": self.active / self.rows,
            "dead": (self.positive == 0).double().mean().item(),
        }


PEERS: tuple[type[PeerMetrics], ...] = (SAELensMetrics, DictionaryLearningMetrics, SAEBench)


def legacy_ratios(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> float:
    """Returns the sum over tokens of 1 - |x - x̂|² / |x - batch mean|²."""
    residuals = (x - x_hat).double().square().sum(1)
    return (1 - residuals / (x - x.mean(0)).double().square().sum(1)).sum().item()


EVERY_POSITION: Final = "SAELens, every position"
"""SAELens' metrics on all rows that SAELens would count."""


def by_peers(
    sae: Autoencoder,
    rows: Float[Tensor, "rows d_in"],
    device: str,
    every_position: Float[Tensor, "more d_in"] | None = None,
) -> dict[str, Numbers]:
    """Returns each tool's metrics of an autoencoder on raw activations, by the tool's name. `every_position`: the rows
    of the same contexts with the excluded positions, on which SAELens' metrics are given a second time."""
    found = {peer.name: numbers for peer, numbers in zip(PEERS, measured_by(PEERS, sae, rows, device), strict=True)}
    if every_position is not None:
        (found[EVERY_POSITION],) = measured_by((SAELensMetrics,), sae, every_position, device)
    return found


def measured_by(
    tools: tuple[type[PeerMetrics], ...], sae: Autoencoder, rows: Float[Tensor, "rows d_in"], device: str
) -> list[Numbers]:
    """Returns the metrics of each tool, in their order."""
    peers = [tool() for tool in tools]
    for x, f, x_hat in reconstructions(sae, rows, device):
        for peer in peers:
            peer.add(x, f, x_hat)
    return [{key: finite(value) for key, value in peer.result().items()} for peer in peers]


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
