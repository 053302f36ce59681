"""One autoencoder in training: its weights, optimiser, λ, and which of its latents are silent."""

import math
from dataclasses import replace
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from shared.config import TrainConfig
from shared.errors import UserError
from shared.saes import SAEConfig, Thresholded
from shared.store import Statistics
from train.control import Sparsity
from train.optim import Optimizer, learning_rate
from train.ranks import Ranks
from train.sae import family
from train.sae.base import Now, Step, Weights
from train.sae.gated import GatedFamily
from train.sae.sparse import sparse_gradients

REVIVE_EVERY: Final = 500
"""Steps between looks for decoder rows without a direction."""
DECIDE_EVERY: Final = 20
"""Steps between decisions for the sparse or the dense step."""
SPARSE_BELOW: Final = 0.06
"""Share of the dictionary that is active, below which the sparse step is faster on a CPU (docs/benchmarks.md)."""


class Member:
    """Its updates depend on the data, its own configuration and the run's schedule; never on other members."""

    def __init__(
        self, config: SAEConfig, run: TrainConfig, steps: int, matmul: torch.dtype, statistics: Statistics, ranks: Ranks
    ) -> None:
        self.config, self.run, self.steps, self.matmul, self.ranks = config, run, steps, matmul, ranks
        self.family = family(config)
        self.generator = torch.Generator().manual_seed(config.seed)
        mean = torch.from_numpy(statistics.mean / statistics.scale).float()
        weights = self.family.initial(len(mean), mean, self.generator)
        self.weights: Weights = replace(
            weights, **{name: value.to(ranks.device) for name, value in weights.named().items()}
        )
        self.optimizer = Optimizer(self.weights, self.family.unit_decoder, run.clip_norm)
        self.sparsity = Sparsity(config, steps, ranks.device)
        has_sparse = isinstance(self.family, GatedFamily) and self.family.unit_decoder
        self.chooses = has_sparse and run.step == "auto" and ranks.device.type == "cpu"
        self.sparse = has_sparse and run.step == "sparse"
        """Whether steps are computed from open gates alone."""
        self.diverged: int | None = None
        """The step after which its loss was seen not to be finite. It is left alone from there on."""
        self.silent = torch.zeros(config.d_sae, dtype=torch.int64, device=ranks.device)
        """Training tokens since each latent last fired."""

    def begin(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Raises UserError when no latent opens on the first batch: none of them could ever learn."""
        theta0 = getattr(self.config, "theta0", None)
        if theta0 is None or self.family.encode(self.weights, x).any():
            return
        opened = replace(self.weights, theta=torch.zeros_like(self.weights.theta))  # type: ignore[attr-defined,call-arg]
        largest = self.family.encode(opened, x).abs().max().item() * x.shape[1] ** 0.5
        raise UserError(
            f"{self.config.name}: theta0 = {theta0:g} closes every latent on the first batch, and a closed latent "
            f"learns nothing. The largest pre-activation there is {largest:.3g} in the same units; choose a --theta0 "
            "well below it, such as 0.4"
        )

    def step_(self, x: Float[Tensor, "batch d_in"], step: int) -> Step:
        """Step number `step` on this rank's share of the batch, in units of unit variance."""
        now = Now(self.sparsity.now(step), self.matmul, self.silent)
        if self.sparse:
            grads, measured = sparse_gradients(self.family, self.weights, x, now)  # type: ignore[arg-type]
        else:
            grads, measured = self.family.gradients(self.weights, x, now)
        trained = {name: getattr(grads, name) for name in self.weights.trained()}
        trained, measured = self.agreed(trained, measured)
        self.optimizer.step_(trained, self.lr(step))
        self.optimizer.adam.zero_grad()  # or the gradients of every autoencoder of the run would stay
        self.family.constrain_(self.weights)
        self.family.absorb_(self.weights, measured)
        self.sparsity.observe_(step, measured.l0)
        self.silent += self.run.batch
        self.silent.masked_fill_(measured.fired, 0)  # never a wait for the device
        done = step + 1
        if isinstance(self.config, Thresholded) and self.config.reset_every and done % self.config.reset_every == 0:
            self.reset_(x, done)
        if self.chooses and done % DECIDE_EVERY == 0:
            self.sparse = self.sparsity.l0.item() < SPARSE_BELOW * self.config.d_sae
        if done % REVIVE_EVERY == 0:
            self.optimizer.revive_(self.generator)
        return measured

    def lr(self, step: int) -> float:
        peak = self.config.lr or self.run.lr
        return learning_rate(step, self.steps, peak, self.run.warmup_steps, self.run.decay_fraction)

    def agreed(self, grads: dict[str, Tensor], step: Step) -> tuple[dict[str, Tensor], Step]:
        """Means over the ranks."""
        if self.ranks.count == 1:
            return grads, step
        scalars = torch.stack([step.reconstruction, step.sparsity, step.auxiliary, step.l0, step.threshold])
        *means, scalars, fired = self.ranks.mean([*grads.values(), scalars, step.fired.float()])
        reconstruction, sparsity, auxiliary, l0, threshold = scalars.unbind()
        return dict(zip(grads, means, strict=True)), Step(
            reconstruction, sparsity, auxiliary, l0, fired > 0, threshold
        )  # fmt: skip

    def reset_(self, x: Float[Tensor, "batch d_in"], done: int) -> None:
        """New thresholds for latents that were silent since the last look, from rank 0's share of the batch. Not while
        the learning rate falls: a latent that cannot learn any more only adds noise."""
        assert isinstance(self.config, Thresholded)
        assert isinstance(self.family, GatedFamily)
        if done > (1 - self.run.decay_fraction) * self.steps:
            return
        which = self.silent >= self.config.reset_every * self.run.batch
        self.family.reset_(self.weights, x, which)  # type: ignore[arg-type]
        for name in self.family.SCALARS:
            self.ranks.first_(getattr(self.weights, name))
        self.optimizer.refresh_(self.family.SCALARS, which)
        self.silent.masked_fill_(which, 0)

    def progress(self, step: Step, tokens: int) -> dict[str, Any]:
        """Its part of a line of metrics.jsonl after `tokens` training tokens. Waits for the device."""
        dead = (self.silent >= min(tokens, self.run.dead_after_tokens)).float().mean()
        value = torch.as_tensor(self.sparsity.now(tokens // self.run.batch - 1), device=step.l0.device)
        loss = step.reconstruction + value * step.sparsity + step.auxiliary
        values = torch.stack([loss, step.reconstruction, step.auxiliary, step.l0, dead, value]).tolist()
        names = ("loss", "fvu", "aux_fvu", "l0", "dead_fraction", "lambda")
        if not all(map(math.isfinite, values)):
            self.diverged = tokens // self.run.batch
        return {**dict(zip(names, values, strict=True)), "sparse": self.sparse}

    def state(self) -> dict[str, Tensor]:
        inside = {**self.weights.named(), **self.optimizer.state(), **self.sparsity.state(), "silent": self.silent}
        inside |= {"generator": self.generator.get_state(), "sparse": torch.tensor(self.sparse)}
        inside["diverged"] = torch.tensor(self.diverged or -1)
        return {f"{self.config.name}/{key}": value for key, value in inside.items()}

    def load_(self, tensors: dict[str, Tensor]) -> None:
        prefix = f"{self.config.name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for name, tensor in self.weights.named().items():
            tensor.copy_(state[name])
        self.silent.copy_(state["silent"])
        self.sparse = bool(state["sparse"])
        self.diverged = int(state["diverged"]) if state["diverged"] > 0 else None
        self.sparsity.load_(state)
        self.generator.set_state(state["generator"])
        self.optimizer.load_({key: value for key, value in state.items() if "." in key})
