"""Adam with the recipe's schedule, on hand-written gradients."""

from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Bool
from torch import Tensor

from train.sae.base import SMALLEST_NORM, Weights
from train.sae.sparse.open import Gradients, UnsummedGradient, has_kernels
from train.sae.sparse.step import summed

USUAL_WARMUP: Final = 100


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, decay_fraction: float) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay_fraction`."""
    decay = decay_fraction * steps
    rising = (step + 1) / (warmup_steps + 1)
    falling = (steps - step) / decay if decay else 1.0
    return peak * min(1.0, rising, falling)


def usual_warmup(steps: int) -> int:
    """The default warmup: 100 steps, or 5 % of a shorter run."""
    return min(USUAL_WARMUP, steps // 20)


class Optimizer:
    """Adam(0.9, 0.999) over the trained weights of one autoencoder.

    With `unit_decoder`, decoder rows stay on the unit sphere: their gradient loses its radial part before the moments
    see it, and rows are normalised after each update.
    """

    def __init__(self, weights: Weights, unit_decoder: bool, clip_norm: float | None = None) -> None:
        self.weights, self.unit_decoder, self.clip_norm = weights, unit_decoder, clip_norm
        self.adam = torch.optim.Adam(list(weights.trained().values()), lr=0.0, betas=(0.9, 0.999), fused=True)
        self.done = 0
        """Updates so far, which `state` has as tensors."""
        self.copies: dict[str, Tensor] = {}
        """See `rounded`: of the weights as they are, or there is none."""

    def rounded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_enc and W_dec in the type of matrix products. Kept from step to step where Triton updates them: it writes
        both at once."""
        matrices = {"W_enc": self.weights.W_enc, "W_dec": self.weights.W_dec}
        if dtype == torch.float32:
            return matrices["W_enc"], matrices["W_dec"]
        for name, matrix in matrices.items():
            if name not in self.copies:
                self.copies[name] = matrix.to(dtype)
        return self.copies["W_enc"], self.copies["W_dec"]

    def step_(self, gradients: Gradients, lr: float) -> None:
        """One update of the weights in place; `gradients` are used up."""
        W_dec = self.weights.W_dec
        by_rows = self.rows() if self.clip_norm is None else {}
        if by_rows:
            self.step_rows_(by_rows, gradients, lr)
        else:
            self.copies.clear()
        grads = summed({name: part for name, part in gradients.items() if name not in by_rows})
        if self.unit_decoder and not by_rows:
            to_W_dec = grads["W_dec"]
            to_W_dec.addcmul_((to_W_dec * W_dec).sum(1, keepdim=True), W_dec, value=-1)
        if self.clip_norm is not None:
            norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
            for grad in grads.values():
                grad.mul_((self.clip_norm / (norm + 1e-12)).clamp_max(1.0))
        for name, parameter in self.weights.trained().items():
            parameter.grad = None if name in by_rows else grads[name]
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.done += 1
        if self.unit_decoder and not by_rows:
            W_dec /= W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)

    def rows(self) -> dict[str, Tensor]:
        """The matrices that Triton updates row by row, on CUDA where it is installed; else none."""
        W_dec = self.weights.W_dec
        if not has_kernels(W_dec.device.type, W_dec.shape[1]):
            return {}
        return {"W_enc": self.weights.W_enc, "W_dec": W_dec}

    def step_rows_(self, matrices: dict[str, Tensor], gradients: Gradients, lr: float) -> None:
        """The update of `matrices`, whose moments and step counts are kept where torch's Adam keeps them."""
        from train.sae.sparse.adam import AdamUpdate, adam_rows_
        from train.sae.sparse.kernels import update_

        for name, matrix in matrices.items():
            state = self.adam.state[matrix]
            if not state:
                state["step"] = torch.zeros((), device=matrix.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(matrix), torch.zeros_like(matrix)
            state["step"] += 1
            unit, copy = self.unit_decoder and name == "W_dec", self.copies.get(name)
            update = AdamUpdate(matrix, state["exp_avg"], state["exp_avg_sq"], copy, lr, self.done + 1, unit)
            gradient = gradients[name]
            if isinstance(gradient, UnsummedGradient):
                update_(gradient, update)
            else:
                adam_rows_(gradient, update)

    def revive_(self, generator: torch.Generator) -> int:
        """Redraws latents whose decoder row has lost its direction (not finite, or nearly zero); returns how many.
        Done between steps, rarely: it waits for the device."""
        norm = self.weights.W_dec.norm(dim=1)
        lost = torch.nonzero(~(norm > SMALLEST_NORM)).flatten()
        if len(lost):
            self.copies.clear()
            fresh = torch.randn(len(lost), self.weights.W_dec.shape[1], generator=generator)
            fresh = (fresh / fresh.norm(dim=1, keepdim=True)).to(self.weights.W_dec.device)
            for parameter in (self.weights.W_dec, self.weights.W_enc):
                parameter[lost] = fresh
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.adam.state[parameter][moment][lost] = 0.0
        return len(lost)

    def refresh_(self, names: Sequence[str], which: Bool[Tensor, " d_sae"]) -> None:
        """After scalars `names` [poles, d_sae] of the latents in `which` were set: no momentum, and the mean second
        moment of the other latents. With a second moment of zero the next updates would be several times as large as
        any other, and kill the latent again (docs/explanation/method.md, resets)."""
        others = (~which).float()
        for name in names:
            moments = self.adam.state[self.weights.trained()[name]]
            moments["exp_avg"].masked_fill_(which, 0.0)
            mean = (moments["exp_avg_sq"] * others).sum(-1, keepdim=True) / others.sum().clamp_min(1.0)
            moments["exp_avg_sq"].copy_(torch.where(which, mean, moments["exp_avg_sq"]))

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter, empty before the first step."""
        named = self.weights.trained()
        return {f"{name}.{key}": value for name, p in named.items() for key, value in self.adam.state[p].items()}

    def state_like(self) -> dict[str, Tensor]:
        """Tensors of the types and shapes of `state` after the first step."""
        named = self.weights.trained()
        steps = {f"{name}.step": torch.zeros((), dtype=torch.float32) for name in named}
        return {**steps, **{f"{name}.{key}": p for name, p in named.items() for key in ("exp_avg", "exp_avg_sq")}}

    def load_(self, state: dict[str, Tensor]) -> None:
        self.copies.clear()
        for name, parameter in self.weights.trained().items():
            held = {key.rpartition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")}
            self.adam.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in held.items()}
        self.done = int(self.adam.state[self.weights.W_dec]["step"].item()) if state else 0
