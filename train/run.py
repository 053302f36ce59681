"""train(config): a store's activations to trained autoencoders.

One pass over the store trains every autoencoder asked for: a batch is read and scaled once. A run that was stopped or
killed goes on from its newest checkpoint when the same call is made again, and on a CPU ends with the same bits.
"""

import json
import math
import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from shared.config import TrainConfig
from shared.device import pick_device, reuse_memory
from shared.errors import Interrupted, UserError
from shared.files import explained, folder_lock
from shared.progress import progress, say
from shared.record import provenance, write_json
from shared.stop import stop_requests
from train.autoencoder import Autoencoder
from train.evaluate import last_silent, measure_all
from train.job import Job, make_job
from train.loader import Loader
from train.member import Member
from train.optim import learning_rate
from train.order import share
from train.ranks import Ranks
from train.resume import checkpoint, restore, save_as_it_is
from train.sae.base import Step
from train.stream import BatchStream, StopWaiting
from train.sweep import shared_out
from train.track import Tracking, check_installed
from train.watch import LiveTable

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
    waiting_for_data: float
    """Share of the time now spent in steps that was spent waiting for activations."""
    saes: list[dict[str, Any]]


def train(config: TrainConfig) -> Summary:
    """Trains until the tokens asked for are used. Raises UserError for unusable input, Interrupted after a signal."""
    check_installed(config.track)
    ranks = Ranks(torch.device(pick_device(config.device)))
    reuse_memory(ranks.device)
    shares = shared_out(config, ranks.count)
    job = make_job(config, ranks.device, ranks.leads)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    folder = job.folder
    if folder.exists() and not config.overwrite:
        folder.check_same(job.identity)
        if folder.finished():
            say(f"{folder.path} is complete. Nothing to do (--overwrite starts afresh).")
            return summarise(job, 0.0, 0, 0.0)
    if ranks.leads:
        folder.make()
    with folder_lock(folder.path) if ranks.leads else nullcontext(), explained(folder.path):
        if ranks.leads:
            open_folder(job, ranks)
        ranks.wait()
        mine, own = (config.saes, ranks) if shares is None else (shares[ranks.index], ranks.alone())
        members = [Member(sae, config, job.steps, job.matmul, job.statistics, own) for sae in mine]
        started, (steps, seconds, waiting) = time.monotonic(), run_steps(job, members, ranks, shares is not None)
        finish(job, members, seconds, ranks, shares is not None)
        ranks.wait()
        return summarise(job, time.monotonic() - started, steps, waiting)


def open_folder(job: Job, ranks: Ranks) -> None:
    """Begins the run, or checks that the one that is here is the one asked for."""
    folder = job.folder
    folder.tidy()
    if folder.exists() and not job.config.overwrite:
        folder.check_same(job.identity)
        return
    folder.clear()
    spec = job.store.spec
    about = {
        "device": device_name(ranks.device),
        "processes": ranks.count,
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
    folder.begin(job.config, job.identity, {**provenance(), **about})


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def run_steps(job: Job, members: list[Member], ranks: Ranks, sweep: bool) -> tuple[int, float, float]:
    """The training loop, from the newest checkpoint or from the start. Gives the steps made now, the seconds trained
    over all sessions, and the share of those of now that were spent waiting for data."""
    config, device = job.config, ranks.device
    start, before, positions = restore(job, members)
    shares = share(config.batch, job.streams, *((0, 1) if sweep else (ranks.index, ranks.count)))
    epochs = job.steps * config.batch / job.epoch_rows
    many = len(config.saes)
    say(
        f"{job.folder.path}: {many} autoencoder{'' if many == 1 else 's'}, {job.steps * config.batch:,} tokens "
        f"({epochs:.2f} epochs), {job.identity['precision']} products on {device_name(device)}"
    )
    started = time.monotonic()

    def elapsed() -> float:
        return before + time.monotonic() - started

    def rate(done: int) -> float:
        return config.batch * (done - start) / (time.monotonic() - started)

    def waiting() -> float:
        return stream.waited / (time.monotonic() - started)

    loader = Loader(job.passes, job.streams, config.verify, device)
    table = LiveTable([sae.name for sae in config.saes], job.steps)
    with (
        closing(Tracking(config.track, job.folder, job.identity, start, ranks)) as tracking,
        stop_requests() as stop_asked,
        closing(BatchStream(loader, shares, config.batch // job.streams, positions, stop_asked)) as stream,
        progress("train", job.steps - start, "steps", shown=ranks.leads, below=table) as advance,
        torch.no_grad(),
    ):
        for step in range(start, job.steps):
            try:
                x = stream.next_batch().float() / job.statistics.scale
            except StopWaiting:
                if ranks.count == 1:  # others may be waiting for this one in a collective
                    checkpoint(job, members, stream, step, elapsed(), ranks, sweep)
                raise interrupted(job, step) from None
            if step == 0:
                begin(members, x, job, ranks)
            measured = {member: member.step_(x, step) for member in members if member.diverged is None}
            done = step + 1
            due = done % config.log_every == 0 or done == job.steps
            if due:
                line = log_line(job, measured, done, elapsed(), ranks, sweep)
                if ranks.leads:
                    job.folder.log(line)
                seen = {**line, "tokens_per_second": rate(done), "waiting_for_data": waiting()}
                table.update(seen)
                tracking.log(seen)
            stop = agree(stop_asked(), done, ranks)
            if done % config.checkpoint_every == 0 or stop or done == job.steps:
                checkpoint(job, members, stream, done, elapsed(), ranks, sweep)
            if stop and done < job.steps:
                raise interrupted(job, done)
            advance(1, f"{rate(done):,.0f} tokens/s, waiting for data {waiting():.0%}")
        return job.steps - start, elapsed(), waiting()


def begin(members: list[Member], x: Float[Tensor, "batch d_in"], job: Job, ranks: Ranks) -> None:
    """Raises UserError on every rank where an autoencoder of any could never learn; the run's folder is then as if
    nothing had been begun."""
    mine = None
    try:
        for member in members:
            member.begin(x)
    except UserError as error:
        mine = str(error)
    problems = [problem for problem in ranks.gather(mine) if problem]
    if problems:
        if ranks.leads:
            job.folder.clear()
        raise UserError(problems[0])


def interrupted(job: Job, done: int) -> Interrupted:
    return Interrupted(f"{job.folder.path}: stopped after step {done}. To continue, run the same command again")


def agree(stop: bool, done: int, ranks: Ranks) -> bool:
    """Whether all ranks stop now. Several ranks ask one another only now and then."""
    return stop if ranks.count == 1 else done % AGREE_EVERY == 0 and ranks.any(stop)


def log_line(
    job: Job, measured: dict[Member, Step], done: int, seconds: float, ranks: Ranks, sweep: bool
) -> dict[str, Any]:
    """A line of metrics.jsonl, the same on every rank. Raises UserError when no loss is finite any more."""
    config, tokens = job.config, done * job.config.batch
    saes = {member.config.name: member.progress(step, tokens) for member, step in measured.items()}
    if sweep:
        found = {name: values for part in ranks.gather(saes) for name, values in part.items()}
        saes = {sae.name: found[sae.name] for sae in config.saes if sae.name in found}
    diverged = [name for name, values in saes.items() if not math.isfinite(values["loss"])]
    if diverged:
        message = (
            f"{', '.join(diverged)}: the loss is {saes[diverged[0]]['loss']} at step {done}. Lower the learning rate "
            "(--lr), or use float32"
        )
        if len(diverged) == len(saes):
            raise UserError(message)
        say(f"{message}. It is trained no further; the others are not affected")
    return {
        "step": done,
        "tokens": tokens,
        "epoch": round(tokens / job.epoch_rows, 4),
        "lr": learning_rate(done - 1, job.steps, config.lr, config.warmup_steps, config.decay_fraction),
        "seconds": round(seconds, 2),
        "saes": saes,
    }


def finish(job: Job, members: list[Member], seconds: float, ranks: Ranks, sweep: bool) -> None:
    """Saves the autoencoders, measures them on the held-out tokens, marks the run finished."""
    folder = job.folder
    for member in members if sweep or ranks.leads else []:
        if member.diverged is None:
            save_as_it_is(job, member, job.steps, folder.sae(member.config.name))
            missed = member.sparsity.missed()
            if missed:
                say(f"{member.config.name}: {missed}")
    mine = {member.config.name: member.diverged for member in members if member.diverged is not None}
    diverged = {name: step for part in ranks.gather(mine) for name, step in part.items()}
    if not ranks.leads:
        return
    device = str(ranks.device)
    saes = [Autoencoder.load(folder.sae(sae.name), device) for sae in job.config.saes if sae.name not in diverged]
    silent = last_silent(folder, job.config.dead_after_tokens)
    with stop_requests() as stop_asked:
        store = job.heldout_store(stop_asked)
    write_json(folder.evaluation, measure_all(store, job.hook, job.parts, saes, None, device, silent))
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    ended = {"diverged": diverged, "seconds": round(seconds, 2), "finished": finished}
    write_json(folder.path / "record.json", {**folder.read("record.json"), **ended})


def summarise(job: Job, seconds: float, steps: int, waiting: float) -> Summary:
    tokens = job.steps * job.config.batch
    saes = json.loads(job.folder.evaluation.read_text(encoding="utf-8"))["saes"]
    rate = steps * job.config.batch / seconds if seconds else 0.0
    return Summary(
        job.folder.path, job.store.name, job.hook, tokens, job.steps, round(tokens / job.epoch_rows, 3),
        round(seconds, 2), round(rate, 1), round(waiting, 4), saes,
    )  # fmt: skip
