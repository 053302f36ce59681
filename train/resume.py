"""Saves and restores a run's checkpoints, from which a later process resumes with the same result."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from shared.errors import DamagedError, UserError
from shared.gate import BadData, integer, members, number, quoted
from shared.progress import say
from shared.store.spec import corpus_name
from train.autoencoder import Autoencoder
from train.data.order import StreamPosition, excluded_positions
from train.data.stream import BatchStream
from train.fit.member import Member
from train.plan.job import TrainJob
from train.ranks import Ranks
from train.runs.checkpoint import (
    BUILDING,
    DAMAGED,
    VERSION,
    begin_checkpoint,
    damaged,
    end_checkpoint,
    load_tensors,
    newest_first,
    read_state,
    save_part,
    set_aside,
)

MOST_PARTS: Final = 10_000
AUTO_EVERY: Final = 1000
AUTO_SHARE: Final = 0.1
"""checkpoint_every = auto saves every AUTO_EVERY steps, unless the last save took more than this share of the time
since it."""


@dataclass(frozen=True)
class ResumePoint:
    """The state from which a run resumes."""

    wave: int = 1
    step: int = 0
    """Number of completed steps of this wave."""
    seconds: float = 0.0
    """Training time, over all waves and sessions."""
    positions: tuple[StreamPosition, ...] = ()
    """The position of each stream; empty at the beginning of a wave."""
    diverged: Mapping[str, int] = field(default_factory=dict)
    """Autoencoders of earlier waves whose loss became NaN or infinite, with the step of each."""
    folder: Path | None = None
    """The checkpoint that holds this wave's autoencoders."""
    parts: int = 0
    """Number of parts of that checkpoint."""


class Checkpoints:
    """Writes the checkpoints of one wave. In a sweep, each rank writes the autoencoders that it trains."""

    def __init__(
        self,
        job: TrainJob,
        members: Sequence[Member],
        stream: BatchStream,
        ranks: Ranks,
        sweep: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job, self.members, self.stream, self.ranks, self.sweep = job, members, stream, ranks, sweep
        self.clock, self.written, self.took = clock, clock(), 0.0

    def due(self, done: int) -> bool:
        """Whether to save after `done` steps; the same on every rank."""
        every = self.job.config.checkpoint_every
        if every != "auto":
            return done % every == 0
        if done % AUTO_EVERY:
            return False
        return self.ranks.any(self.ranks.leads and self.took <= AUTO_SHARE * (self.clock() - self.written))

    def save(self, point: ResumePoint) -> None:
        """Writes a checkpoint at `point`; the positions come from the stream. Raises DamagedError, and writes nothing,
        when the store was replaced since it was opened, because rows read since may be another store's."""
        began = self.clock()
        job, ranks = self.job, self.ranks
        with ranks.failing_together():
            if ranks.leads:
                job.check_unchanged()
        folder, parts = job.folder.checkpoints, ranks.count if self.sweep else 1
        mine = {v: [place.epoch, place.window, place.offset] for v, place in self.stream.positions().items()}
        if ranks.leads:
            begin_checkpoint(folder)
        positions = {v: place for part in ranks.gather(mine) for v, place in part.items()}
        digest = ""
        if ranks.index < parts:
            tensors = {key: value for member in self.members for key, value in member.state().items()}
            digest = save_part(folder, ranks.index, tensors)
            for member in (member for member in self.members if member.diverged is None):
                save_autoencoder(job, member, point.step, folder / BUILDING / "saes" / member.config.name)
        digests = ranks.gather(digest)
        if ranks.leads:
            places = [positions[v] for v in sorted(positions)]
            state = {
                "version": VERSION,
                "wave": point.wave,
                "step": point.step,
                "seconds": point.seconds,
                "positions": places,
                "diverged": dict(point.diverged),
                "parts": parts,
                "blake2b": digests[:parts],
            }
            end_checkpoint(folder, (point.wave - 1) * job.steps + point.step, state)
        ranks.wait()
        self.written = self.clock()
        self.took = self.written - began


def save_autoencoder(
    job: TrainJob, member: Member, done: int, folder: Path, more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Writes an autoencoder as it is after `done` steps, with the normalisation folded in, to a folder that
    `train.load` reads. `more` is added to its cfg.json."""
    spec = job.store.spec
    about = {
        "model": spec.model,
        "hook_name": spec.hookpoints[job.hook].name,
        "context": spec.context,
        "bos_id": spec.bos_id,
        "lambda": float(member.sparsity.now(done)),
        "corpus": corpus_name(spec.corpus.get("source")),
        "exclude_special": job.config.exclude_special,
        "exclude_positions": excluded_positions(spec, job.config),
        **more,
    }
    Autoencoder.of(member.config, member.weights, job.statistics.scale).save(folder, about)


def find_resume_point(job: TrainJob) -> ResumePoint:
    """Returns the state of the newest undamaged checkpoint, or the beginning when there is none, and deletes what was
    logged after it. Raises DamagedError when there are checkpoints but all are damaged."""
    point = newest_whole(job)
    if point is None:
        job.folder.cut_metrics(1, 0)
        return ResumePoint()
    job.folder.cut_metrics(point.wave, point.step)
    say(f"{job.for_wave(point.wave).title}: resuming after step {point.step}")
    return point


def newest_whole(job: TrainJob) -> ResumePoint | None:
    """Returns the state of the newest undamaged checkpoint, or None when there is none at all. Damaged ones that are
    newer are set aside with a message. Raises DamagedError when all are damaged."""
    unusable: list[tuple[Path, DamagedError]] = []
    for folder in newest_first(job.folder.checkpoints):
        try:
            point = resume_point_of(job, folder, read_state(folder))
        except DamagedError as error:
            unusable.append((folder, error))
            continue
        for path, why in unusable:
            set_aside(path)
            say(f"{why}. It is set aside as {DAMAGED}{path.name}; resuming from {folder.name}, the one before")
        return point
    if unusable:
        raise DamagedError(
            f"{unusable[0][1]}. There is no undamaged checkpoint before it. Restore it from a copy, or restart the run "
            "with --overwrite"
        )
    return None


def resume_point_of(job: TrainJob, folder: Path, state: dict[str, Any]) -> ResumePoint:
    """Returns the state in a state.json. Raises DamagedError when a number is outside what this run can have reached,
    UserError when another version of sagsae wrote it."""
    if state.get("version") != VERSION:
        raise UserError(
            f"{job.folder.path}: its checkpoint is of version {quoted(state.get('version'))}; this sagsae reads "
            f"{VERSION}. Finish the run with the sagsae that began it, or restart it with --overwrite"
        )
    try:
        members(state, ("wave", "step", "seconds", "positions", "diverged", "parts"), None)
        step = integer(state["step"], "step", 0, job.steps)
        wave = integer(state["wave"], "wave", 1, len(job.waves))
        positions = positions_of(job, state["positions"], step)
        diverged = members(state["diverged"], (), [sae.name for sae in job.config.saes])
        for name, since in diverged.items():
            integer(since, f"diverged of {name}", 1, job.steps)
        parts = integer(state["parts"], "parts", 1, MOST_PARTS)
        return ResumePoint(wave, step, number(state["seconds"], "seconds", 0.0), positions, diverged, folder, parts)
    except BadData as error:
        raise damaged(folder, error) from error


def positions_of(job: TrainJob, found: Any, step: int) -> tuple[StreamPosition, ...]:
    """Returns the position of each stream. Raises BadData unless there is one per stream, each inside the stream's
    windows. A stream gives out at least one row in any three epochs, which bounds its epoch."""
    if not isinstance(found, list) or len(found) != job.streams:
        raise BadData(f"positions is {quoted(found)} instead of {job.streams} of them")
    epochs = 3 * (step * job.config.batch // job.streams + 1)
    windows, rows = job.most_windows, job.longest_window
    positions = []
    for place in found:
        if not isinstance(place, list) or len(place) != 3:
            raise BadData(f"a position is {quoted(place)} instead of three numbers")
        epoch, window, offset = place
        positions.append(
            StreamPosition(
                integer(epoch, "epoch", 0, epochs),
                integer(window, "window", 0, windows),
                integer(offset, "offset", 0, rows),
            )
        )
    return tuple(positions)


def restore(members: Sequence[Member], point: ResumePoint) -> None:
    """Loads this wave's autoencoders from the checkpoint, if there is one. Raises DamagedError when it cannot be
    read."""
    if point.folder is None:
        return
    tensors = load_tensors(point.folder, point.parts)
    try:
        for member in members:
            member.load_(tensors)
    except BadData as error:
        raise damaged(point.folder, error) from error
