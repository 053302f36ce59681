"""train(config): a store's activations to trained autoencoders.

One pass over the store trains every autoencoder asked for: a batch is read and scaled once. Where they do not fit into
memory together, each wave of them has a pass of its own (train/plan/waves.py). A run that was stopped or killed resumes
from its newest checkpoint when the same call is made again, and on a CPU ends with the same bits.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from shared.config import TrainConfig
from shared.device import pick_device
from shared.errors import DamagedError, Interrupted, UserError
from shared.files.local import explained
from shared.files.locks import folder_lock
from shared.gate import BadData, members, number, text
from shared.progress import progress, say
from shared.record import provenance
from shared.saes import SAEConfig
from shared.stop import stop_requests
from shared.store.norms import sample
from train.autoencoder import Autoencoder
from train.data.loader import Loader
from train.data.norm_filter import shorten_
from train.data.order import StreamPosition, share
from train.data.stream import BatchStream, StopWaiting
from train.evaluate import last_logged_inactive
from train.fit.member import Member
from train.fit.optim import learning_rate
from train.fit.thresholds import open_negative_poles, settle
from train.measure.heldout import HeldOutRows, measure_all
from train.measure.useless import useless
from train.measure.written import write_evaluation
from train.plan.job import TrainJob, make_job
from train.plan.sweep import deal_out, shared_out
from train.plan.waves import plan_waves
from train.ranks import Ranks
from train.resume import Checkpoints, ResumePoint, find_resume_point, restore, save_autoencoder
from train.runs.folder import RunFolder, read_sealed, write_sealed
from train.runs.live_table import LiveTable
from train.runs.trackers import Tracking, check_installed
from train.sae.base import StepMetrics

AGREE_EVERY: Final = 10
"""Steps between the moments at which several ranks agree to stop."""


@dataclass(frozen=True)
class TrainSummary:
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


def train(config: TrainConfig) -> TrainSummary:
    """Trains until the tokens asked for are used. Raises UserError for unusable input, Interrupted after a signal."""
    check_installed(config.track)
    ranks = Ranks(torch.device(pick_device(config.device)))
    with ranks.raising_lost_error():
        return train_together(config, ranks)


def train_together(config: TrainConfig, ranks: Ranks) -> TrainSummary:
    """This rank's part of it. Raises LostError when another one ended without having come to its end."""
    sweep = shared_out(config, ranks.count) is not None
    job = make_job(config, ranks.device, ranks.leads, ranks.gather)
    if config.overwrite and ranks.gather(job.folder.is_begun())[0]:
        config = config.model_copy(update={"overwrite": False})
        job = make_job(config, ranks.device, ranks.leads, ranks.gather)
    set_up_torch(config)
    folder = job.folder
    if not config.overwrite and folder.exists():
        folder.check_same(job.identity)
        if folder.finished():
            say(f"{folder.path} is complete. Nothing to do (--overwrite starts again).")
            return summarise(job, 0.0, 0, 0.0)
    job = plan_waves(job, ranks, sweep)
    with ExitStack() as while_open:
        while_open.enter_context(job.store.files.reading())
        with ranks.failing_together():
            if ranks.leads:
                folder.make(config.overwrite)
                while_open.enter_context(folder_lock(folder.path))
                with explained(folder.path):
                    open_folder(job, ranks)
        while_open.enter_context(explained(folder.path))
        started, made = time.monotonic(), TrainTotals()
        with ranks.failing_together():
            here = find_resume_point(job) if ranks.leads else ResumePoint()
        at = ranks.gather(here)[0]
        for wave in range(at.wave, len(job.waves) + 1):
            at = run_wave(job.for_wave(wave), at, made, ranks, sweep)
        finish(job, at, ranks)
        ranks.end()
        return summarise(job, time.monotonic() - started, made.steps, made.waiting)


def set_up_torch(config: TrainConfig) -> None:
    """For the whole process."""
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if config.compile:  # every autoencoder has a program of its own, of one function: torch gives up after eight
        limit = torch._dynamo.config
        limit.recompile_limit = max(limit.recompile_limit, 2 * len(config.saes))
        limit.accumulated_recompile_limit = max(limit.accumulated_recompile_limit, 4 * len(config.saes))


@dataclass
class TrainTotals:
    """What this call has done."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds in which there was no batch."""

    @property
    def waiting(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0


def run_wave(job: TrainJob, at: ResumePoint, made: TrainTotals, ranks: Ranks, sweep: bool) -> ResumePoint:
    """Trains the autoencoders of one wave to their end and saves them. Returns where the next wave begins."""
    mine, own = (deal_out(job.saes, ranks.count)[ranks.index], ranks.alone()) if sweep else (job.saes, ranks)
    members = [make_member(sae, job, own) for sae in mine]
    for member in members if at.step == 0 else ():
        if member.config.start is None:  # else its thresholds are those that it starts from
            open_negative_poles(job, member)
    restore(members, at)
    if ranks.leads:
        introduce(job, ranks.device)
    at = WaveLoop(job, members, at, ranks, sweep).run(made)
    if sweep or ranks.leads:
        save_saes(job, members)
    lost = {member.config.name: member.diverged for member in members if member.diverged is not None}
    diverged = {**at.diverged, **{name: step for part in ranks.gather(lost) for name, step in part.items()}}
    return ResumePoint(at.wave + 1, seconds=at.seconds, diverged=diverged)


def make_member(sae: SAEConfig, job: TrainJob, ranks: Ranks) -> Member:
    start = job.start.weights(sae, job.statistics.scale) if job.start else None
    return Member(sae, job.config, job.steps, job.matmul, job.statistics, ranks, start)


def open_folder(job: TrainJob, ranks: Ranks) -> None:
    """Begins the run, or checks that the one that is here is the one asked for."""
    folder = job.folder
    folder.tidy()
    if not job.config.overwrite and folder.exists():
        folder.check_same(job.identity)
        return
    folder.clear()
    spec = job.store.spec
    about = {
        "device": device_name(ranks.device),
        "processes": ranks.count,
        "precision": job.identity["precision"],
        "warmup_steps": job.config.warmup_steps,
        "steps": job.steps,
        "tokens": job.steps * job.config.batch,
        "waves": [[sae.name for sae in wave] for wave in job.waves],
        "epoch_tokens": job.epoch_rows,
        "store": {
            "path": job.store.name,
            "model": spec.model["name"],
            "commit": spec.model.get("commit"),
            "hook": job.hook,
            "hook_name": spec.hookpoints[job.hook].name,
            "tokens": job.store.spec.n_tokens if job.config.follow else job.store.n_rows,
            "d_in": spec.hookpoints[job.hook].d_in,
            "scale": job.statistics.scale,
            "heldout_tokens": job.heldout_rows,
        },
    }
    if job.start is not None:
        about["warm_start"] = {"folder": str(job.start.saved.folder), "sha256": job.start.digest}
    folder.create(job.asked, job.identity, {**provenance(), **about})


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def introduce(job: TrainJob, device: torch.device) -> None:
    tokens, many = job.steps * job.config.batch, len(job.saes)
    say(
        f"{job.title}: {many} autoencoder{'' if many == 1 else 's'}, {tokens:,} tokens "
        f"({tokens / job.epoch_rows:.2f} epochs), {job.identity['precision']} products on {device_name(device)}"
    )
    if job.wave > 1 or job.config.follow:
        return
    found = sample(job.store, job.hook)
    if job.left_out:
        say(
            f"max_norm = {job.config.max_norm:g}: {job.rows_left_out:,} rows with a norm above "
            f"{job.left_out.limit:.4g} are neither trained nor measured on"
        )
    elif found and found.massive.text:
        say(f"{job.store.name}/{job.hook}: {found.massive.text}")


class WaveLoop:
    """The training loop of one wave, from where it stands to its end."""

    tracking: Tracking
    stop_asked: Callable[[], bool]
    stream: BatchStream
    checkpoints: Checkpoints

    def __init__(self, job: TrainJob, members: list[Member], at: ResumePoint, ranks: Ranks, sweep: bool) -> None:
        self.job, self.members, self.at, self.ranks, self.sweep = job, members, at, ranks, sweep
        self.table = LiveTable([sae.name for sae in job.saes], job.steps)
        self.steps_before = (job.wave - 1) * job.steps
        """Steps of the waves before this one."""
        self.started = time.monotonic()
        mean = job.statistics.mean / job.statistics.scale
        self.mean = torch.from_numpy(mean).float().to(ranks.device)
        """The mean row at unit variance."""

    def run(self, totals: TrainTotals) -> ResumePoint:
        """Trains. Adds what it does to `totals`, and returns where the run stands then. Raises Interrupted."""
        job, config, start = self.job, self.job.config, self.at.step
        with (
            closing(
                Tracking(config.track, job.folder, job.identity, self.steps_before + start, self.ranks)
            ) as self.tracking,
            stop_requests() as self.stop_asked,
            closing(self.make_stream()) as self.stream,
            progress("train", job.steps - start, "steps", shown=self.ranks.leads, below=self.table) as advance,
            torch.no_grad(),
        ):
            self.checkpoints = Checkpoints(job, self.members, self.stream, self.ranks, self.sweep)
            for step in range(start, job.steps):
                self.step(step)
                advance(1, f"{self.rate(step + 1):,.0f} tokens/s, waiting for data {self.waiting():.0%}")
        end = self.after(job.steps)
        totals.steps += job.steps - start
        totals.seconds += end.seconds - self.at.seconds
        totals.waited += self.stream.waited
        return end

    def make_stream(self) -> BatchStream:
        """This rank's part of the batches, from where the run stands."""
        job, config, ranks = self.job, self.job.config, self.ranks
        positions = list(self.at.positions) or [StreamPosition()] * job.streams
        shares = share(config.batch, job.streams, *((0, 1) if self.sweep else (ranks.index, ranks.count)))
        loader = Loader(job.passes, [stream for stream, _, _ in shares], config.verify, ranks.device)
        return BatchStream(loader, shares, config.batch // job.streams, positions, self.waiting_ends())

    def step(self, step: int) -> None:
        """One update of every autoencoder, and what is due after it. Raises Interrupted where a stop was asked for."""
        x = self.next_batch(step)
        if step == 0 and self.job.wave == 1:
            begin(self.members, x, self.job, self.ranks)
        measured = {member: member.step_(x, step) for member in self.members if member.diverged is None}
        done, last = step + 1, step + 1 == self.job.steps
        if last or done % self.job.config.log_every == 0:
            self.log(measured, done)
        stop = agree(self.stop_asked(), done, self.ranks)
        if stop or last or self.checkpoints.due(done):
            self.checkpoints.save(self.after(done))
        if stop and not last:
            raise interrupted(self.job, done)

    def next_batch(self, step: int) -> Float[Tensor, "batch d_in"]:
        """Activations of unit variance, none longer than `longest_row`. Raises Interrupted where a stop was asked for
        while there were no rows."""
        longest = self.job.config.longest_row
        try:
            x = self.stream.next_batch().float() / self.job.statistics.scale
            if longest:
                shorten_(x, self.mean, longest)
            return x
        except StopWaiting:
            if self.ranks.count == 1:  # others may be waiting for this one in a collective
                self.checkpoints.save(self.after(step))
            raise interrupted(self.job, step) from None

    def log(self, measured: dict[Member, StepMetrics], done: int) -> None:
        """A line of metrics.jsonl, of the table and of the trackers."""
        line = log_line(self.job, measured, done, self.after(done).seconds, self.ranks, self.sweep)
        if self.ranks.leads:
            self.job.folder.log(line)
        seen = {**line, "tokens_per_second": self.rate(done), "waiting_for_data": self.waiting()}
        self.table.update(seen)
        self.tracking.log({**seen, "step": self.steps_before + done})

    def waiting_ends(self) -> Callable[[], bool]:
        """Returns what tells whether to stop waiting for rows. Others would then be left in an exchange, and nothing
        saved: several ranks stop in agreement, between steps. Only what a harvest has yet to commit may never come.

        It does not refer to this loop: the stream would keep the wave's autoencoders in memory during the next wave."""
        may_stop, stop_asked = self.ranks.count == 1 or self.job.config.follow, self.stop_asked
        return lambda: may_stop and stop_asked()

    def after(self, done: int) -> ResumePoint:
        """Where the run stands after so many steps."""
        return replace(self.at, step=done, seconds=self.at.seconds + time.monotonic() - self.started)

    def rate(self, done: int) -> float:
        """Tokens per second of this call."""
        return self.job.config.batch * (done - self.at.step) / (time.monotonic() - self.started)

    def waiting(self) -> float:
        """The share of this call's time in which there was no batch."""
        return self.stream.waited / (time.monotonic() - self.started)


def begin(members: list[Member], x: Float[Tensor, "batch d_in"], job: TrainJob, ranks: Ranks) -> None:
    """Raises UserError on every rank where an autoencoder of any, or of a later wave, could never learn; the run's
    folder is then as if nothing had been begun."""
    mine = None
    later = (make_member(sae, job, ranks) for wave in job.waves[job.wave :] for sae in wave)
    try:
        for member in chain(members, later):
            member.begin(x)
    except UserError as error:
        mine = str(error)
    problems = [problem for problem in ranks.gather(mine) if problem]
    if problems:
        if ranks.leads:
            job.folder.clear()
        raise UserError(problems[0])


def interrupted(job: TrainJob, done: int) -> Interrupted:
    return Interrupted(f"{job.title}: stopped after step {done}. To continue, run the same command again")


def agree(stop: bool, done: int, ranks: Ranks) -> bool:
    """Whether all ranks stop now. Several ranks ask one another only now and then."""
    return stop if ranks.count == 1 else done % AGREE_EVERY == 0 and ranks.any(stop)


def log_line(
    job: TrainJob, measured: dict[Member, StepMetrics], done: int, seconds: float, ranks: Ranks, sweep: bool
) -> dict[str, Any]:
    """A line of metrics.jsonl, the same on every rank. Raises UserError when all losses are NaN or infinite in a run of
    one wave."""
    config, tokens = job.config, done * job.config.batch
    saes = {member.config.name: member.progress(step, tokens) for member, step in measured.items()}
    if sweep:
        found = {name: values for part in ranks.gather(saes) for name, values in part.items()}
        saes = {sae.name: found[sae.name] for sae in job.saes if sae.name in found}
    diverged = [name for name, values in saes.items() if not math.isfinite(values["loss"])]
    if diverged:
        message = (
            f"{', '.join(diverged)}: the loss is {saes[diverged[0]]['loss']} at step {done}. Lower the learning rate "
            "(--lr), or use float32"
        )
        if len(diverged) == len(saes) and len(job.waves) == 1:
            raise UserError(message)
        say(f"{message}. It is trained no further; the others are not affected")
    return {
        "wave": job.wave,
        "step": done,
        "tokens": tokens,
        "epoch": round(tokens / job.epoch_rows, 4),
        "lr": learning_rate(done - 1, job.steps, config.lr, config.warmup_steps or 0, config.decay_fraction),
        "seconds": round(seconds, 2),
        "saes": saes,
    }


def save_saes(job: TrainJob, members: list[Member]) -> None:
    for member in members:
        member.check_weights(job.steps)
        if member.diverged is None:
            about = settle(job, member)
            save_autoencoder(job, member, job.steps, job.folder.sae(member.config.name), about)
            missed = member.sparsity.missed()
            if missed:
                say(f"{member.config.name}: {missed}")


def finish(job: TrainJob, at: ResumePoint, ranks: Ranks) -> None:
    """Measures the autoencoders on the held-out tokens, marks the run finished. Raises UserError when none is left."""
    torch.set_float32_matmul_precision("highest")  # measured as `sagsae eval` would
    folder, names = job.folder, [sae.name for sae in job.config.saes]
    good = [name for name in names if name not in at.diverged]
    if not good:
        raise UserError(
            f"{', '.join(names)}: all losses are NaN or infinite. Lower the learning rate (--lr), or use float32"
        )
    if not ranks.leads:
        return
    device = str(ranks.device)
    saes = (
        (name, Autoencoder.load(folder.sae(name), device)) for name in good
    )  # they may not fit into memory together
    silent = last_logged_inactive(folder, job.config.dead_after_tokens)
    with stop_requests() as stop_asked:
        store = job.heldout_store(stop_asked)
    limit = job.left_out.limit if job.left_out else None
    rows = HeldOutRows(store, job.hook, job.parts, limit)
    found = measure_all(rows, saes, len(good), None, device, silent)
    job.check_unchanged(thorough=True)
    write_evaluation(folder, found.results, found.firings)
    for line in useless(found.results["saes"], steered=False):
        say(line)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    ended = {"diverged": dict(at.diverged), "seconds": round(at.seconds, 2), "finished": finished}
    write_sealed(folder.path / "record.json", {**folder.read("record.json"), **ended})
    if not job.config.keep_checkpoints:
        folder.drop_checkpoints()


def summarise(job: TrainJob, seconds: float, steps: int, waiting: float) -> TrainSummary:
    tokens = job.steps * job.config.batch
    saes = measured_of(job.folder)
    rate = steps * job.config.batch / seconds if seconds else 0.0
    return TrainSummary(
        job.folder.path,
        job.store.name,
        job.hook,
        tokens,
        job.steps,
        round(tokens / job.epoch_rows, 3),
        round(seconds, 2),
        round(rate, 1),
        round(waiting, 4),
        saes,
    )


def measured_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The entries of evaluation.json. Raises DamagedError when it is missing, or no evaluation."""
    again = f"Measure the run again with: sagsae eval {folder.path}"
    try:
        found = read_sealed(folder.evaluation)
        saes = found.get("saes")
        if not isinstance(saes, list) or not saes:
            raise BadData("lists no autoencoders")
        for sae in saes:
            check_entry(sae)
    except FileNotFoundError as error:
        raise DamagedError(f"{folder.evaluation}: is missing. {again}") from error
    except BadData as error:
        raise DamagedError(f"{folder.evaluation}: {error}. {again}") from error
    return saes


NUMBERS: Final = ("r2", "l0", "l0_pos", "l0_neg", "dead_fraction", "ce_recovered", "tokens", "d_sae", "seed")
NUMBERS_OF_SOME: Final = ("rec", "mcs", "k", "l0_target", "sparsity", "r2_rest")


def check_entry(sae: Any) -> None:
    """What of an entry is shown. Raises BadData."""
    members(sae, ("name", "arch", *NUMBERS), None)
    text(sae["name"], "name")
    text(sae["arch"], "arch")
    for key in (*NUMBERS, *NUMBERS_OF_SOME):
        if sae.get(key) is not None:
            number(sae[key], key)
