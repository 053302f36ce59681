"""One autoencoder in training: its weights, optimiser, λ, and which of its latents are silent."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from shared.config import TrainConfig
from shared.errors import UserError
from shared.gate import BadData, quoted
from shared.progress import say
from shared.saes import SAEConfig, Thresholded
from shared.store.opened import Statistics
from train.fit.control import SparsityController
from train.fit.optim import Optimizer, learning_rate, usual_warmup
from train.fit.step_kind import DECIDE_EVERY, SPARSE_BELOW, StepKind, allowed_kinds, say_no_triton, sparse_kind
from train.ranks import PairwiseSum, Ranks
from train.sae.base import StepInputs, StepMetrics, Weights
from train.sae.families import family
from train.sae.sparse.open import BLOCK, GPU_BLOCK, Gradients, on_device
from train.sae.sparse.step import sparse_gradients, summed

REVIVE_EVERY: Final = 500
"""Steps between looks for decoder rows without a direction."""


class Member:
    """Its updates depend on the data, its own configuration and the run's schedule; never on other members."""

    def __init__(
        self,
        config: SAEConfig,
        run: TrainConfig,
        steps: int,
        matmul: torch.dtype,
        statistics: Statistics,
        ranks: Ranks,
        start: Weights | None = None,
    ) -> None:
        """`start`: the first weights, in units of unit variance. Default: random ones."""
        self.config, self.run, self.steps, self.matmul, self.ranks = config, run, steps, matmul, ranks
        self.family = family(config)
        self.parts = run.parts or ranks.count
        """Micro-batches of every batch, on all ranks together."""
        compiles = run.compile and not self.needs_threshold  # which is another function in every step
        self.dense = torch.compile(self.family.gradients, dynamic=False) if compiles else self.family.gradients
        self.generator = torch.Generator().manual_seed(config.seed)
        mean = torch.from_numpy(statistics.mean / statistics.scale).float()
        weights = self.family.initial(len(mean), mean, self.generator) if start is None else start
        self.weights: Weights = replace(
            weights, **{name: value.to(ranks.device) for name, value in weights.named().items()}
        )
        self.optimizer = Optimizer(self.weights, self.family.unit_decoder, run.clip_norm)
        self.sparsity = SparsityController(config, steps, ranks.device)
        device = ranks.device.type
        self.sparse_kind = sparse_kind(self.family, device, len(mean))
        self.kinds = allowed_kinds(run.step, self.sparse_kind, device)
        self.kind = self.kinds[0]
        """What computes the next step. A checkpoint remembers it."""
        self.steps_on_gpu: Any = None
        """See `SparseSteps`, from the first sparse step on a GPU."""
        if device == "cuda" and self.sparse_kind is StepKind.SPARSE and run.step != "dense" and ranks.leads:
            say_no_triton()
        self.diverged: int | None = None
        """The step after which its loss was seen not to be finite. It is left alone from there on."""
        self.silent = torch.zeros(config.d_sae, dtype=torch.int64, device=ranks.device)
        """Training tokens since each latent last fired."""

    @property
    def needs_threshold(self) -> bool:
        """See `StepInputs.threshold`."""
        return self.parts > 1 and self.family.batch_k > 0

    def begin(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Raises UserError when no latent opens on the first batch: none of them could ever learn. A few rows at a
        time, in less memory than a step takes."""
        theta0 = getattr(self.config, "theta0", None)
        rows = torch.split(x, max(1, (BLOCK if x.device.type == "cpu" else GPU_BLOCK) // self.config.d_sae))
        if theta0 is None or any(self.family.encode(self.weights, part).any() for part in rows):
            return
        if self.config.start is not None:
            raise UserError(
                f"{self.config.name}: no latent of the autoencoder that it starts from opens on the first batch, and a "
                "closed latent learns nothing. Train it on the activations that it was made for"
            )
        opened = replace(self.weights, theta=torch.zeros_like(self.weights.theta))  # type: ignore[attr-defined,call-arg]
        largest = max(self.family.encode(opened, part).abs().max().item() for part in rows) * x.shape[1] ** 0.5
        raise UserError(
            f"{self.config.name}: theta0 = {theta0:g} closes every latent on the first batch, and a closed latent "
            f"learns nothing. The largest pre-activation there is {largest:.3g} in the same units; choose a --theta0 "
            "well below it, such as 0.4"
        )

    def step_(self, x: Float[Tensor, "batch d_in"], step: int) -> StepMetrics:
        """Step number `step` on this rank's share of the batch, in units of unit variance."""
        trained, measured = self.gradients(x, step)
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
        if len(self.kinds) > 1 and done % DECIDE_EVERY == 0:
            dense, sparse = self.kinds
            few = self.sparsity.l0.item() < SPARSE_BELOW[x.device.type] * self.config.d_sae
            self.kind = sparse if few else dense
            if not few:
                self.steps_on_gpu = None  # and the memory of what it recorded
        if done % REVIVE_EVERY == 0:
            self.optimizer.revive_(self.generator)
        return measured

    def lr(self, step: int) -> float:
        peak = self.config.lr or self.run.lr
        warmup = usual_warmup(self.steps) if self.run.warmup_steps is None else self.run.warmup_steps
        return learning_rate(step, self.steps, peak, warmup, self.run.decay_fraction)

    def gradients(self, x: Float[Tensor, "batch d_in"], step: int) -> tuple[Gradients, StepMetrics]:
        """Means over the batch's parts, here and on other ranks."""
        count, sparsity = self.parts, self.sparsity.now(step)
        if self.run.compile:  # a number would be a part of the program, and each other one a program of its own
            sparsity = on_device(sparsity, x.device)
        now = StepInputs(sparsity, self.matmul, self.silent, count)
        parts = x.chunk(count // self.ranks.count)
        if self.needs_threshold:
            now = replace(now, threshold=self.threshold(parts, now))
        if count == 1:
            return self.gradients_of(x, now)
        sums = PairwiseSum()
        for part in parts:
            sums.add(tensors_of(*self.gradients_of(part, now)))
        *means, scalars, fired = self.ranks.sum(sums.total())
        means = [mean.div_(count) for mean in means]
        reconstruction, penalty, auxiliary, l0, threshold = scalars.div_(count).unbind()
        measured = StepMetrics(reconstruction, penalty, auxiliary, l0, fired > 0, threshold)
        return dict(zip(self.weights.trained(), means, strict=True)), measured

    def gradients_of(self, part: Float[Tensor, "batch d_in"], now: StepInputs) -> tuple[Gradients, StepMetrics]:
        names = self.weights.trained()
        if self.kind is StepKind.KERNELS:
            unsummed, measured = self.by_kernels(part, now)
            return {name: unsummed[name] for name in names}, measured
        if self.kind is StepKind.SPARSE:
            grads, measured = sparse_gradients(self.family, self.weights, part, now)  # type: ignore[arg-type]
        else:
            grads, measured = self.dense(self.weights, part, now)
        return {name: getattr(grads, name) for name in names}, measured

    def by_kernels(self, part: Float[Tensor, "batch d_in"], now: StepInputs) -> tuple[Gradients, StepMetrics]:
        """Returns the gradients and metrics of one micro-batch, computed by Triton kernels. With several micro-batches
        the step is not recorded as CUDA graphs, because the gradients of each are kept for a while."""
        from train.sae.sparse.gpu import SparseSteps, kernel_gradients

        if self.steps_on_gpu is None:
            self.steps_on_gpu = SparseSteps(self.family, self.weights)  # type: ignore[arg-type]
        rounded = self.optimizer.rounded(now.matmul)
        if self.parts == 1:
            return self.steps_on_gpu.gradients(part, now, rounded)  # type: ignore[no-any-return]
        return kernel_gradients(self.family, self.weights, part, now, rounded, self.steps_on_gpu.room)  # type: ignore[arg-type]

    def threshold(self, parts: Sequence[Tensor], now: StepInputs) -> Callable[[Tensor], Tensor]:
        """See `StepInputs.threshold`. Several parts on one rank are computed twice: the first time for this alone."""

        def smallest(found: Tensor) -> Tensor:
            everywhere = self.ranks.all(found)
            many = min(len(everywhere), self.family.batch_k * self.run.batch)
            return torch.topk(everywhere, many, sorted=False).values.min()

        if len(parts) == 1:
            return smallest
        common = smallest(torch.cat([self.family.largest(self.weights, part, now) for part in parts]))
        return lambda _: common

    def reset_(self, x: Float[Tensor, "batch d_in"], done: int) -> None:
        """New thresholds for latents that were silent since the last look, from the batch as a whole. Not while the
        learning rate falls: a latent that can no longer learn only adds noise."""
        assert isinstance(self.config, Thresholded)
        if done > (1 - self.run.decay_fraction) * self.steps:
            return
        which = self.silent >= self.config.reset_every * self.run.batch
        self.family.reset_(self.weights, self.ranks.all(x), which)
        self.optimizer.refresh_(self.family.resets, which)
        self.silent.masked_fill_(which, 0)

    def progress(self, step: StepMetrics, tokens: int) -> dict[str, Any]:
        """Its part of a line of metrics.jsonl after `tokens` training tokens. Waits for the device."""
        dead = (self.silent >= min(tokens, self.run.dead_after_tokens)).float().mean()
        value = torch.as_tensor(self.sparsity.now(tokens // self.run.batch - 1), device=step.l0.device)
        loss = step.reconstruction + value * step.sparsity + step.auxiliary
        values = torch.stack([loss, step.reconstruction, step.auxiliary, step.l0, dead, value]).tolist()
        names = ("loss", "fvu", "aux_fvu", "l0", "dead_fraction", "lambda")
        if not all(map(math.isfinite, values)):
            self.diverged = tokens // self.run.batch
        return {**dict(zip(names, values, strict=True)), "sparse": self.kind is not StepKind.DENSE}

    def check_weights(self, done: int) -> None:
        """Checks after the last step, whose loss was finite, whether the weights are finite too."""
        if self.diverged is None and not all(bool(part.isfinite().all()) for part in self.weights.named().values()):
            self.diverged = done
            say(f"{self.config.name}: its weights are NaN or infinite after step {done}. Lower the learning rate")

    def state(self) -> dict[str, Tensor]:
        inside = {**self.weights.named(), **self.optimizer.state(), **self.sparsity.state(), "silent": self.silent}
        inside |= {"generator": self.generator.get_state(), "sparse": torch.tensor(self.kind is not StepKind.DENSE)}
        inside["diverged"] = torch.tensor(self.diverged or -1)
        return {f"{self.config.name}/{key}": value for key, value in inside.items()}

    def load_(self, tensors: dict[str, Tensor]) -> None:
        """As `state` gave it. Raises BadData, before anything is taken, for tensors that are not this one's."""
        prefix = f"{self.config.name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        self.check_state(state)
        for name, tensor in self.weights.named().items():
            tensor.copy_(state[name])
        self.silent.copy_(state["silent"])
        self.kind = self.sparse_kind if self.sparse_kind and state["sparse"] else StepKind.DENSE
        self.diverged = int(state["diverged"]) if state["diverged"] > 0 else None
        self.sparsity.load_(state)
        self.optimizer.load_({key: value for key, value in state.items() if "." in key})

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Takes the generator's state, which is checked by that. Raises BadData."""
        name = self.config.name
        named = {key.removeprefix(f"{name}/"): value for key, value in self.state().items()}
        own = {key: value for key, value in named.items() if "." not in key}
        updated = {key: value for key, value in state.items() if "." in key}
        like = {**own, **(self.optimizer.state_like() if updated else {})}
        if state.keys() != like.keys():
            other = sorted(state.keys() ^ like.keys())[0]
            raise BadData(f"{name}: {quoted(other)} is missing, or is not of its state")
        for key, wanted in like.items():
            found = state[key]
            if found.dtype != wanted.dtype or found.shape != wanted.shape:
                raise BadData(
                    f"{name}: {key} is {found.dtype} {list(found.shape)} instead of {wanted.dtype} {list(wanted.shape)}"
                )
        since, steps = int(state["diverged"]), [state[key] for key in updated if key.endswith(".step")]
        if not (since == -1 or 1 <= since <= self.steps) or any(not 1 <= step <= self.steps for step in steps):
            raise BadData(f"{name}: its counts of steps are not those of a run of {self.steps}")
        if (state["silent"] < 0).any() or (since == -1 and not 0 <= state["lambda"] < math.inf):
            raise BadData(f"{name}: λ, or how long its latents were silent, is no number that it can be")
        if bool(state["sparse"]) and self.sparse_kind is None:
            raise BadData(f"{name}: was computed by a sparse step, which this architecture does not have")
        try:
            self.generator.set_state(state["generator"])
        except (RuntimeError, TypeError) as error:
            raise BadData(f"{name}: its random generator's state is none") from error


def tensors_of(gradients: Gradients, step: StepMetrics) -> list[Tensor]:
    """What is summed over the parts of a batch."""
    threshold = torch.zeros_like(step.l0) if step.threshold is None else step.threshold
    scalars = torch.stack([step.reconstruction, step.sparsity, step.auxiliary, step.l0, threshold])
    return [*summed(gradients).values(), scalars, step.fired.float()]
