"""train(config): a store's activations to trained autoencoders. The one door to accelerate.

One pass over the store trains every autoencoder asked for: a batch is read and scaled once. A run that was stopped or
killed goes on from its newest checkpoint when the same call is made again, and on a CPU ends with the same bits.
"""

import json
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from shared.config import TrainConfig
from shared.device import pick_device
from shared.errors import Interrupted, UserError
from shared.files import explained, folder_lock
from shared.progress import progress, say
from shared.record import provenance, write_json
from shared.saes import SAEConfig
from shared.stop import stop_requests
from shared.store import Statistics
from train.autoencoder import Autoencoder
from train.checkpoint import load_checkpoint, save_checkpoint
from train.evaluate import measure_all
from train.job import Job, make_job
from train.loader import Loader
from train.optim import Optimizer, learning_rate
from train.order import Position, share
from train.sae.gated import Step, Weights, gradients, initial_weights
from train.stream import BatchStream, StopWaiting

REVIVE_EVERY: Final = 500
"""Steps between looks for decoder rows without a direction."""
AGREE_EVERY: Final = 10
"""Steps between the moments at which several ranks agree to stop."""


@dataclass(frozen=True)
class Summary:
    """What a training run did. `saes` are the entries of evaluation.json, language-model losses not yet measured."""

    run: Path
    store: str
    hook: str
    tokens: int
    steps: int
    epochs: float
    seconds: float
    tokens_per_second: float
    saes: list[dict[str, Any]]


class Member:
    """One autoencoder in training."""

    def __init__(self, config: SAEConfig, statistics: Statistics, device: torch.device) -> None:
        self.config = config
        self.signed = config.arch == "sa-gsae"
        self.generator = torch.Generator().manual_seed(config.seed)
        mean = torch.from_numpy(statistics.mean / statistics.scale).float()
        weights = initial_weights(len(mean), config.d_sae, config.theta0, mean, self.generator)
        self.weights = Weights(**{name: tensor.to(device) for name, tensor in weights.named().items()})
        self.optimizer = Optimizer(self.weights, self.signed)
        self.silent = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        """Training tokens since each latent last fired."""

    def state(self) -> dict[str, Tensor]:
        inside = {**self.weights.named(), **self.optimizer.state(), "silent": self.silent}
        inside["generator"] = self.generator.get_state()
        return {f"{self.config.name}/{key}": value for key, value in inside.items()}

    def load_(self, tensors: dict[str, Tensor]) -> None:
        prefix = f"{self.config.name}/"
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for name, tensor in self.weights.named().items():
            tensor.copy_(state[name])
        self.silent.copy_(state["silent"])
        self.generator.set_state(state["generator"])
        self.optimizer.load_({key: value for key, value in state.items() if "." in key})


def train(config: TrainConfig) -> Summary:
    """Trains until the tokens asked for are used. Raises UserError for unusable input, Interrupted after a signal."""
    device = torch.device(pick_device(config.device))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current one
    accelerator = Accelerator(cpu=device.type == "cpu")
    if config.batch % accelerator.num_processes:
        raise UserError(
            f"{accelerator.num_processes} processes cannot share a batch of {config.batch} evenly. Choose a --batch "
            "that is a multiple of their number"
        )
    job = make_job(config, accelerator.device, accelerator.is_main_process)
    folder, main = job.folder, accelerator.is_main_process
    if folder.exists() and not config.overwrite:
        folder.check_same(job.identity)
        if folder.finished():
            say(f"{folder.path} is complete. Nothing to do (--overwrite starts afresh).")
            return summarise(job, 0.0, 0)
    if main:
        folder.make()
    with folder_lock(folder.path) if main else nullcontext(), explained(folder.path):
        if main:
            open_folder(job, accelerator)
        accelerator.wait_for_everyone()
        members = [Member(sae, job.statistics, accelerator.device) for sae in config.saes]
        started, (steps, seconds) = time.monotonic(), run_steps(job, members, accelerator)
        if main:
            finish(job, members, seconds)
        accelerator.wait_for_everyone()
        return summarise(job, time.monotonic() - started, steps)


def open_folder(job: Job, accelerator: Accelerator) -> None:
    """Begins the run, or checks that the one that is here is the one asked for."""
    folder = job.folder
    folder.tidy()
    if folder.exists() and not job.config.overwrite:
        folder.check_same(job.identity)
        return
    folder.clear()
    spec = job.store.spec
    about = {
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": job.identity["precision"],
        "steps": job.steps,
        "tokens": job.steps * job.config.batch,
        "epoch_tokens": job.epoch_rows,
        "store": {
            "path": job.store.name,
            "model": spec.model["name"],
            "commit": spec.model["commit"],
            "hook": job.hook,
            "hook_name": spec.hookpoints[job.hook].name,
            "tokens": job.store.spec.n_tokens if job.config.follow else job.store.n_rows,
            "d_in": spec.hookpoints[job.hook].d_in,
            "scale": job.statistics.scale,
            "heldout_tokens": job.heldout_rows,
        },
    }
    folder.begin(job.identity, {**provenance(), **about})


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def run_steps(job: Job, members: list[Member], accelerator: Accelerator) -> tuple[int, float]:
    """The training loop, from the newest checkpoint or from the start. Gives the steps made now and the seconds trained
    over all sessions."""
    config, device = job.config, accelerator.device
    start, before, positions = restore(job, members)
    shares = share(config.batch, job.streams, accelerator.process_index, accelerator.num_processes)
    epochs = job.steps * config.batch / job.epoch_rows
    plural = "" if len(members) == 1 else "s"
    say(
        f"{job.folder.path}: {len(members)} autoencoder{plural}, {job.steps * config.batch:,} tokens "
        f"({epochs:.2f} epochs), {job.identity['precision']} products on {device_name(device)}"
    )
    started = time.monotonic()

    def elapsed() -> float:
        return before + time.monotonic() - started

    loader = Loader(job.passes, job.streams, config.verify, device)
    with (
        stop_requests() as stop_asked,
        closing(BatchStream(loader, shares, config.batch // job.streams, positions, stop_asked)) as stream,
        progress("train", job.steps - start, "steps") as advance,
        torch.no_grad(),
    ):
        for step in range(start, job.steps):
            try:
                x = stream.next_batch().float() / job.statistics.scale
            except StopWaiting:
                if accelerator.num_processes == 1:  # others may be waiting for this one in a collective
                    checkpoint(job, members, stream, step, elapsed(), accelerator)
                raise interrupted(job, step) from None
            lr = learning_rate(step, job.steps, config.lr, config.warmup_steps, config.decay_fraction)
            measured = [update_(member, x, lr, job.matmul, config.batch, accelerator) for member in members]
            done = step + 1
            if done % REVIVE_EVERY == 0:
                for member in members:
                    member.optimizer.revive_(member.generator)
            due = done % config.log_every == 0 or done == job.steps
            if due and accelerator.is_main_process:
                job.folder.log(log_line(job, members, measured, done, lr, elapsed()))
            stop = agree(stop_asked(), done, accelerator)
            if done % config.checkpoint_every == 0 or stop or done == job.steps:
                checkpoint(job, members, stream, done, elapsed(), accelerator)
            if stop and done < job.steps:
                raise interrupted(job, done)
            seconds = time.monotonic() - started
            rate, waiting = config.batch * (done - start) / seconds, stream.waited / seconds
            advance(1, f"{rate:,.0f} tokens/s, waiting for data {waiting:.0%}")
    return job.steps - start, elapsed()


def interrupted(job: Job, done: int) -> Interrupted:
    return Interrupted(f"{job.folder.path}: stopped after step {done}. To continue, run the same command again")


def update_(
    member: Member, x: Float[Tensor, "batch d_in"], lr: float, matmul: torch.dtype, batch: int, accelerator: Accelerator
) -> Step:
    """One step of one autoencoder on this rank's share of the batch."""
    grads, step = gradients(member.weights, x, member.config.sparsity, member.signed, matmul)
    if accelerator.num_processes > 1:
        grads, step = averaged(grads, step, accelerator)
    member.optimizer.step_(grads, lr)
    member.silent += batch
    member.silent.masked_fill_(step.fired, 0)  # never a wait for the device
    return step


def averaged(grads: Weights, step: Step, accelerator: Accelerator) -> tuple[Weights, Step]:
    """Means over the ranks, in one collective: every rank then makes the same update."""
    named = grads.named()
    scalars = torch.stack([step.reconstruction, step.sparsity, step.auxiliary, step.l0])
    parts = [*named.values(), scalars, step.fired.float()]
    flat = accelerator.reduce(torch.cat([part.reshape(-1) for part in parts]), "mean")
    pieces: Iterator[Tensor] = iter(flat.split([part.numel() for part in parts]))
    means = Weights(**{name: next(pieces).view_as(tensor) for name, tensor in named.items()})
    reconstruction, sparsity, auxiliary, l0 = next(pieces).unbind()
    return means, Step(reconstruction, sparsity, auxiliary, l0, next(pieces) > 0)


def agree(stop: bool, done: int, accelerator: Accelerator) -> bool:
    """Whether all ranks stop now. Several ranks ask one another only now and then."""
    if accelerator.num_processes == 1:
        return stop
    if done % AGREE_EVERY:
        return False
    return bool(accelerator.reduce(torch.tensor([float(stop)], device=accelerator.device), "sum").item())


def log_line(
    job: Job, members: list[Member], measured: list[Step], done: int, lr: float, seconds: float
) -> dict[str, Any]:
    tokens = done * job.config.batch
    saes = {}
    for member, step in zip(members, measured, strict=True):
        dead = (member.silent >= min(tokens, job.config.dead_after_tokens)).float().mean()
        loss = step.reconstruction + member.config.sparsity * step.sparsity + step.auxiliary
        values = torch.stack([loss, step.reconstruction, step.auxiliary, step.l0, dead]).tolist()
        saes[member.config.name] = dict(zip(("loss", "fvu", "aux_fvu", "l0", "dead_fraction"), values, strict=True))
        if not np.isfinite(values[0]):
            raise UserError(f"{member.config.name}: the loss is {values[0]} at step {done}. Lower --lr, or use float32")
    epoch = tokens / job.epoch_rows
    return {
        "step": done,
        "tokens": tokens,
        "epoch": round(epoch, 4),
        "lr": lr,
        "seconds": round(seconds, 2),
        "saes": saes,
    }


def checkpoint(
    job: Job, members: list[Member], stream: BatchStream, done: int, seconds: float, accelerator: Accelerator
) -> None:
    """Everything that a later process needs to go on as if nothing had happened, and the autoencoders as they are."""
    mine = {v: [at.epoch, at.window, at.offset] for v, at in stream.positions().items()}
    positions = {v: at for part in gather(mine, accelerator) for v, at in part.items()}
    if accelerator.is_main_process:
        tensors = {key: value for member in members for key, value in member.state().items()}
        state = {"version": 1, "step": done, "seconds": seconds, "positions": [positions[v] for v in sorted(positions)]}
        save_checkpoint(job.folder.checkpoints, done, tensors, state)
    accelerator.wait_for_everyone()


def gather(value: dict[int, list[int]], accelerator: Accelerator) -> list[dict[int, list[int]]]:
    if accelerator.num_processes == 1:
        return [value]
    gathered: list[dict[int, list[int]] | None] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, value)
    return [part for part in gathered if part is not None]


def restore(job: Job, members: list[Member]) -> tuple[int, float, list[Position]]:
    """(step, seconds, positions) of the newest checkpoint, loaded into the members; the beginning without one."""
    found = load_checkpoint(job.folder.checkpoints)
    if found is None:
        job.folder.cut_metrics(0)
        return 0, 0.0, [Position()] * job.streams
    tensors, state = found
    if state["version"] != 1:
        raise UserError(f"{job.folder.path}: its checkpoint is of version {state['version']}; this sagsae reads 1")
    for member in members:
        member.load_(tensors)
    job.folder.cut_metrics(state["step"])
    say(f"{job.folder.path}: going on after step {state['step']}")
    return state["step"], state["seconds"], [Position(*at) for at in state["positions"]]


def finish(job: Job, members: list[Member], seconds: float) -> None:
    """Saves the autoencoders, measures them on the held-out tokens, marks the run finished."""
    spec = job.store.spec
    hook = {
        "model": spec.model,
        "hook_name": spec.hookpoints[job.hook].name,
        "context": spec.context,
        "bos_id": spec.bos_id,
    }
    saes = [Autoencoder(member.config, member.weights, job.statistics.scale) for member in members]
    for sae in saes:
        sae.save(job.folder.sae(sae.config.name), hook)
    device = str(members[0].silent.device)
    with stop_requests() as stop_asked:
        store = job.heldout_store(stop_asked)
    write_json(job.folder.evaluation, measure_all(store, job.hook, job.parts, saes, None, device))
    record = job.folder.read("record.json")
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(job.folder.path / "record.json", {**record, "seconds": round(seconds, 2), "finished": finished})


def summarise(job: Job, seconds: float, steps: int) -> Summary:
    tokens = job.steps * job.config.batch
    saes = json.loads(job.folder.evaluation.read_text(encoding="utf-8"))["saes"]
    rate = steps * job.config.batch / seconds if seconds else 0.0
    return Summary(
        job.folder.path, job.store.name, job.hook, tokens, job.steps, round(tokens / job.epoch_rows, 3),
        round(seconds, 2), round(rate, 1), saes,
    )  # fmt: skip
