"""BatchTopK (arXiv 2412.06410) and, by absolute value and with signed latents, AbsTopK (arXiv 2510.00404).

    u = (x - b_dec) W_encᵀ + b_enc      a, s = ReLU(u), 1   (BatchTopK)      a, s = |u|, sign(u), no b_enc   (AbsTopK)
    f = s·a·1[a >= T]                   T: the k·batch-th largest a of the batch        x̂ = f W_dec + b_dec,  |d_i| = 1
    loss  |x - x̂|² + ⅛ |(x - x̂)‾ - h W_dec|²             bar: no gradient

h is s·a of each token's `aux_k` largest among the latents that have been silent for `aux_after` tokens: without this
term a fifth of an AbsTopK dictionary stays dead (docs/explanation/method.md). After training a latent is active above
one threshold for all, a Bi-JumpReLU without offsets: above which k latents per token are active on a sample of the
rows trained on. During training it is the running mean of T, which lags behind and belongs to older weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from jaxtyping import Float
from torch import Tensor

from shared.saes import ARCHITECTURES, FixedL0
from train.sae.activation import Folded, one_sided
from train.sae.base import Family, StepInputs, StepMetrics, Weights, decode, first_weights
from train.sae.gated import times
from train.sae.relu import backward, products, reconstruct

AUX_WEIGHT: Final = 1 / 8
THRESHOLD_MEMORY: Final = 0.99
"""Share of the old value in the running mean of T."""


@dataclass
class BatchTopKWeights(Weights):
    b_enc: Float[Tensor, " d_sae"]
    """All zeros, and not trained, in AbsTopK: a bias has a sign."""
    threshold: Float[Tensor, ""]

    LENGTHS: ClassVar[frozenset[str]] = frozenset({"b_dec", "b_enc", "threshold"})
    KEPT: ClassVar[frozenset[str]] = frozenset({"threshold"})


class BatchTopKFamily(Family[BatchTopKWeights]):
    weights = BatchTopKWeights
    config: FixedL0

    def __init__(self, config: FixedL0) -> None:
        self.config = config
        self.signed = ARCHITECTURES[config.arch].signed
        self.batch_k = config.k

    def initial(self, d_in: int, mean: Float[Tensor, " d_in"], generator: torch.Generator) -> BatchTopKWeights:
        d_sae = self.config.d_sae
        parts = first_weights(d_in, d_sae, mean, generator)
        return BatchTopKWeights(**parts, b_enc=torch.zeros(d_sae), threshold=torch.zeros(()))

    def size(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        return (u.abs(), u.sign()) if self.signed else (torch.relu(u), None)

    def encode(self, w: BatchTopKWeights, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        a, s = self.size((x - w.b_dec) @ w.W_enc.T + w.b_enc)
        return times(torch.where(a <= w.threshold, 0.0, a), s)

    def largest(self, w: BatchTopKWeights, x: Float[Tensor, "batch d_in"], now: StepInputs) -> Float[Tensor, " n"]:
        """The sizes in this part of a batch that may be among the active ones of the whole."""
        return self.candidates(self.size(products(w, x, now)[2])[0], now)

    def candidates(self, a: Float[Tensor, "batch d_sae"], now: StepInputs) -> Float[Tensor, " n"]:
        """The largest sizes in this part, k for each token of the whole batch."""
        return torch.topk(a.reshape(-1), min(a.numel(), self.config.k * len(a) * now.parts), sorted=False).values

    def smallest(self, a: Float[Tensor, "batch d_sae"], now: StepInputs) -> Float[Tensor, ""]:
        """T: of the largest sizes in the batch, k a token."""
        found = self.candidates(a, now)
        return found.min() if now.threshold is None else now.threshold(found)

    def aux_k(self, d_in: int) -> int:
        return max(16, d_in // 8) if self.config.aux_k is None else self.config.aux_k

    def loss(self, w: BatchTopKWeights, x: Float[Tensor, "batch d_in"], now: StepInputs) -> Float[Tensor, ""]:
        a, s = self.size((x - w.b_dec) @ w.W_enc.T + (w.b_enc.detach() if self.signed else w.b_enc))
        active = (a >= self.smallest(a.detach(), now)) & (a > 0)
        rest = x - decode(w, times(torch.where(active, a, 0.0), s))
        main = rest.square().sum(1)
        silent = silent_code(a, s, now, self.aux_k(x.shape[1]), self.config.aux_after)
        if silent is None:
            return main.mean()
        aux = (rest.detach() - silent[0] @ w.W_dec).square().sum(1)
        return (main + AUX_WEIGHT * aux).mean()

    def gradients(
        self, w: BatchTopKWeights, x: Float[Tensor, "batch d_in"], now: StepInputs
    ) -> tuple[BatchTopKWeights, StepMetrics]:
        """Five matrix products, and three more while a latent is silent. Asks the device whether one is."""
        batch = len(x)
        centred, low, u = products(w, x, now)
        a, s = self.size(u)
        threshold = self.smallest(a, now)
        active = ((a >= threshold) & (a > 0)).to(a.dtype)
        f = times(a * active, s)
        error, to_f, to_W_dec = reconstruct(w, f, centred, now)
        to_a = times(to_f, s).mul_(active)
        auxiliary = torch.zeros_like(threshold)
        silent = silent_code(a, s, now, self.aux_k(x.shape[1]), self.config.aux_after)
        if silent is not None:
            h, mask = silent
            aux_error, to_h, to_W_dec_too = reconstruct(w, h, -error, now)  # the target is what is left: x - x̂
            to_a.add_(times(to_h, s).mul_(mask), alpha=AUX_WEIGHT)
            to_W_dec.add_(to_W_dec_too, alpha=AUX_WEIGHT)
            auxiliary = AUX_WEIGHT * aux_error.square().sum() / batch
        to_u = times(to_a, s) if self.signed else to_a.mul_(a.sign())
        to_b_enc = torch.zeros_like(w.b_enc) if self.signed else to_u.sum(0)
        grads = BatchTopKWeights(
            **backward(w, to_u, low, error, now), W_dec=to_W_dec, b_enc=to_b_enc, threshold=torch.zeros_like(threshold)
        )
        fired = active.amax(0) > 0
        nothing = torch.zeros_like(threshold)
        return grads, StepMetrics(
            error.square().sum() / batch, nothing, auxiliary, active.sum() / batch, fired, threshold
        )

    def constrain_(self, w: BatchTopKWeights) -> None:
        pass

    def absorb_(self, w: BatchTopKWeights, step: StepMetrics) -> None:
        assert step.threshold is not None
        mean = torch.lerp(step.threshold, w.threshold, THRESHOLD_MEMORY)
        w.threshold.copy_(torch.where(w.threshold > 0, mean, step.threshold))

    def settle_(self, w: BatchTopKWeights, batches: Iterable[Float[Tensor, "batch d_in"]], rows: int) -> float:
        """Sets the threshold above which k latents per token are active on these `rows` rows together. Returns how many
        are: fewer than k where fewer are above zero, or where sizes are equal."""
        wanted = self.config.k * rows
        largest = w.W_enc.new_empty(0)
        for x in batches:
            a = self.size((x - w.b_dec) @ w.W_enc.T + w.b_enc)[0].reshape(-1)
            floor = largest.min() if len(largest) > wanted else 0.0
            largest = torch.cat([largest, a[a > floor]])
            largest = torch.topk(largest, min(len(largest), wanted + 1), sorted=False).values
        w.threshold.copy_(largest.min() if len(largest) > wanted else torch.zeros_like(w.threshold))
        return int((largest > w.threshold).sum()) / rows

    def fold(self, w: BatchTopKWeights) -> Folded:
        threshold = w.threshold.expand_as(w.b_enc)
        b_enc = w.b_enc - w.W_enc @ w.b_dec
        if not self.signed:
            return one_sided(w.W_enc, b_enc, w.W_dec, w.b_dec, threshold)
        both = threshold.expand(2, -1).clone()
        return Folded(w.W_enc, b_enc, w.W_dec, w.b_dec, both, torch.zeros_like(both), torch.ones_like(w.b_enc))


def silent_code(
    a: Tensor, s: Tensor | None, now: StepInputs, aux_k: int, aux_after: int
) -> tuple[Tensor, Tensor] | None:
    """h and the 0/1 mask of its entries: of each token, the `aux_k` largest latents among those that were inactive for
    `aux_after` tokens. None where no latent is."""
    dead = None if now.silent is None else now.silent >= aux_after
    if dead is None or aux_k == 0 or not dead.any():
        return None
    many = min(aux_k, int(dead.sum()))
    chosen = torch.topk(a.detach().masked_fill(~dead, -1.0), many, dim=1, sorted=False).indices
    mask = torch.zeros_like(a).scatter_(1, chosen, 1.0)
    return times(a * mask, s), mask
