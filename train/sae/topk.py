"""TopK (arXiv 2406.04093) and, by absolute value and with signed latents, SignedTopK (AbsTopK of arXiv 2510.00404).

    u = (x - b_dec) W_encᵀ + b_enc      a, s = ReLU(u), 1   (TopK)      a, s = |u|, sign(u)   (SignedTopK)
    f = s·a at the token's k largest a, else 0                          x̂ = f W_dec + b_dec,  |d_i| = 1
    loss  |x - x̂|² + 1/32 |(x - x̂)‾ - h W_dec|²             bar: no gradient

h is s·a at the `aux_k` largest a of each token among the latents that were inactive for `aux_after` tokens. Whether a
latent is active depends on the token's other latents: no threshold per latent does the same, so there is no `fold`.
"""

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from shared.saes import ARCHITECTURES, FixedL0
from train.sae.base import Family, StepInputs, StepMetrics, decode, first_weights
from train.sae.batch_topk import silent_code
from train.sae.gated import times
from train.sae.relu import ReluWeights, backward, pre_activations, products, reconstruct

AUX_WEIGHT: Final = 1 / 32


class TopKFamily(Family[ReluWeights]):
    weights = ReluWeights
    config: FixedL0

    def __init__(self, config: FixedL0) -> None:
        self.config = config
        self.signed = ARCHITECTURES[config.arch].signed

    def initial(self, d_in: int, mean: Float[Tensor, " d_in"], generator: torch.Generator) -> ReluWeights:
        d_sae = self.config.d_sae
        return ReluWeights(**first_weights(d_in, d_sae, mean, generator), b_enc=torch.zeros(d_sae))

    def size(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """a and s; None stands for ones."""
        return (u.abs(), u.sign()) if self.signed else (torch.relu(u), None)

    def chosen(self, a: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """1 at each token's k largest, unless they are zero; 0 elsewhere."""
        largest = torch.topk(a, self.config.k, dim=1, sorted=False)
        return torch.zeros_like(a).scatter_(1, largest.indices, largest.values.sign())

    def aux_k(self, d_in: int) -> int:
        return max(1, d_in // 2) if self.config.aux_k is None else self.config.aux_k

    def encode(self, w: ReluWeights, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        a, s = self.size(pre_activations(w, x))
        return times(a * self.chosen(a), s)

    def loss(self, w: ReluWeights, x: Float[Tensor, "batch d_in"], now: StepInputs) -> Float[Tensor, ""]:
        a, s = self.size(pre_activations(w, x))
        rest = x - decode(w, times(a * self.chosen(a.detach()), s))
        main = rest.square().sum(1)
        silent = silent_code(a, s, now, self.aux_k(x.shape[1]), self.config.aux_after)
        if silent is None:
            return main.mean()
        aux = (rest.detach() - silent[0] @ w.W_dec).square().sum(1)
        return (main + AUX_WEIGHT * aux).mean()

    def gradients(
        self, w: ReluWeights, x: Float[Tensor, "batch d_in"], now: StepInputs
    ) -> tuple[ReluWeights, StepMetrics]:
        """Five matrix products, and three more while a latent is inactive. Asks the device whether one is."""
        batch = len(x)
        centred, low, u = products(w, x, now)
        a, s = self.size(u)
        del u
        active = self.chosen(a)
        error, to_f, to_W_dec = reconstruct(w, times(a * active, s), centred, now)
        to_f.mul_(active)
        nothing = auxiliary = error.new_zeros(())
        silent = silent_code(a, s, now, self.aux_k(x.shape[1]), self.config.aux_after)
        if silent is not None:
            h, mask = silent
            aux_error, to_h, to_W_dec_too = reconstruct(w, h, -error, now)  # the target is what is left: x - x̂
            to_f.add_(to_h.mul_(mask), alpha=AUX_WEIGHT)
            to_W_dec.add_(to_W_dec_too, alpha=AUX_WEIGHT)
            auxiliary = AUX_WEIGHT * aux_error.square().sum() / batch
        to_u = to_f.mul_(a.sign())  # f = u wherever it is not zero
        grads = ReluWeights(**backward(w, to_u, low, error, now), W_dec=to_W_dec, b_enc=to_u.sum(0))
        fired = active.amax(0) > 0
        return grads, StepMetrics(error.square().sum() / batch, nothing, auxiliary, active.sum() / batch, fired)

    def constrain_(self, w: ReluWeights) -> None:
        pass
