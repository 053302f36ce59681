"""Adam with the recipe's schedule, on hand-written gradients."""

import torch
from torch import Tensor

from train.sae.gated import SMALLEST_NORM, Weights, constrain_, project_gradient_


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, decay_fraction: float) -> float:
    """Linear warm-up (at most 5 % of the run), constant, then linear to zero over the last `decay_fraction`."""
    warmup = min(warmup_steps, steps // 20)
    decay = decay_fraction * steps
    rising = (step + 1) / (warmup + 1)
    falling = (steps - step) / decay if decay else 1.0
    return peak * min(1.0, rising, falling)


class Optimizer:
    """Adam(0.9, 0.999) over the weights of one autoencoder."""

    def __init__(self, weights: Weights, signed: bool) -> None:
        self.weights, self.signed = weights, signed
        self.adam = torch.optim.Adam(list(weights.named().values()), lr=0.0, betas=(0.9, 0.999), fused=True)

    def step_(self, grads: Weights, lr: float) -> None:
        """One update of the weights in place; `grads` is used up."""
        project_gradient_(self.weights, grads)
        for parameter, grad in zip(self.weights.named().values(), grads.named().values(), strict=True):
            parameter.grad = grad
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        constrain_(self.weights, self.signed)

    def revive_(self, generator: torch.Generator) -> int:
        """Draws latents anew whose decoder row has lost its direction (not finite, or nearly zero); says how many.
        Done between steps, rarely: it waits for the device."""
        norm = self.weights.W_dec.norm(dim=1)
        lost = torch.nonzero(~(norm > SMALLEST_NORM)).flatten()
        if len(lost):
            fresh = torch.randn(len(lost), self.weights.W_dec.shape[1], generator=generator)
            fresh = (fresh / fresh.norm(dim=1, keepdim=True)).to(self.weights.W_dec.device)
            for parameter in (self.weights.W_dec, self.weights.W_enc):
                parameter[lost] = fresh
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.adam.state[parameter][moment][lost] = 0.0
        return len(lost)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter, empty before the first step."""
        named = self.weights.named()
        return {f"{name}.{key}": value for name, p in named.items() for key, value in self.adam.state[p].items()}

    def load_(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.weights.named().items():
            held = {key.rpartition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")}
            self.adam.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device).clone()
                for key, value in held.items()
            }
