"""λ through a training run: a warm-up, and a controller that steers the number of active latents to a target.

log λ += RATE·log(L0 / target) every `EVERY` steps of the first `STEERED` of the run, L0 being a running mean. λ is then
left alone, so that the end of the run has the loss of an ordinary one. It stays within a factor `SPAN` of where it
began: a target that lies outside is missed, and said to be.
"""

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from shared.saes import Penalised, SAEConfig

EVERY: Final = 10
RATE: Final = 0.05
STEERED: Final = 0.7
MEMORY: Final = 0.9
"""Share of the old value in the running mean of L0."""
SPAN: Final = 1000.0
MISSED: Final = 0.2
"""A run whose L0 ends further from the target than this share of it says so."""


class SparsityController:
    """λ of one autoencoder, on its device; zero for an architecture without a penalty."""

    def __init__(self, config: SAEConfig, steps: int, device: torch.device) -> None:
        settings = config if isinstance(config, Penalised) else None
        self.start = settings.known_sparsity if settings else 0.0
        self.target = settings.l0_target if settings else None
        self.warmup = settings.sparsity_warmup * steps if settings else 0.0
        self.steered = int(STEERED * steps)
        self.value = torch.tensor(self.start, device=device)
        self.l0 = torch.tensor(-1.0, device=device)
        """Running mean; negative before the first step."""

    def now(self, step: int) -> float | Float[Tensor, ""]:
        """λ of this step."""
        factor = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.value * factor if self.target else self.start * factor

    def observe_(self, step: int, l0: Float[Tensor, ""]) -> None:
        """Takes in what a step measured. Never waits for the device."""
        self.l0.copy_(torch.where(self.l0 < 0, l0, torch.lerp(l0, self.l0, MEMORY)))
        if self.target and (step + 1) % EVERY == 0 and step < self.steered:
            off = torch.log(self.l0.clamp_min(1e-3) / self.target).clamp(-3.0, 3.0)
            self.value.mul_(torch.exp(RATE * off)).clamp_(self.start / SPAN, self.start * SPAN)

    def missed(self) -> str | None:
        """What to say of a target that was not reached. Waits for the device."""
        if self.target is None:
            return None
        l0, value = self.l0.item(), self.value.item()
        if abs(l0 - self.target) <= MISSED * self.target:
            return None
        edge = ""
        if value >= 0.99 * self.start * SPAN or value <= 1.01 * self.start / SPAN:
            edge = f", as far as it goes from {self.start:g}"
        return f"l0_target {self.target:g} was missed: L0 ended at {l0:.3g} with λ at {value:.3g}{edge}"

    def state(self) -> dict[str, Tensor]:
        return {"lambda": self.value, "mean_l0": self.l0}

    def load_(self, state: dict[str, Tensor]) -> None:
        self.value.copy_(state["lambda"])
        self.l0.copy_(state["mean_l0"])
