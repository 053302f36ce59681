"""A run's checkpoints: everything that a later process needs to go on as if nothing had happened."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from shared.errors import DamagedError, UserError
from shared.gate import BadData, integer, members, number, quoted
from shared.progress import say
from train.autoencoder import Autoencoder
from train.data.order import StreamPosition
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
)  # fmt: skip

MOST_PARTS: Final = 10_000
AUTO_EVERY: Final = 1000
AUTO_SHARE: Final = 0.1
"""checkpoint_every = auto: every so many steps, unless less than ten times as long as the last one took has gone by."""


@dataclass(frozen=True)
class ResumePoint:
    """How far a run has come."""

    wave: int = 1
    step: int = 0
    """Steps of this wave that are made."""
    seconds: float = 0.0
    """Of training, over all waves and sessions."""
    positions: tuple[StreamPosition, ...] = ()
    """Of each stream; none at the beginning of a wave."""
    diverged: Mapping[str, int] = field(default_factory=dict)
    """Autoencoders of earlier waves whose loss is no number any more, and since which step."""
    folder: Path | None = None
    """The checkpoint that holds this wave's autoencoders, and in how many parts."""
    parts: int = 0


class Checkpoints:
    """Of one wave's autoencoders. In a sweep each rank has autoencoders of its own."""

    def __init__(
        self, job: TrainJob, members: Sequence[Member], stream: BatchStream, ranks: Ranks, sweep: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.job, self.members, self.stream, self.ranks, self.sweep = job, members, stream, ranks, sweep
        self.clock, self.written, self.took = clock, clock(), 0.0

    def due(self, done: int) -> bool:
        """After `done` steps: the same on every rank."""
        every = self.job.config.checkpoint_every
        if every != "auto":
            return done % every == 0
        if done % AUTO_EVERY:
            return False
        return self.ranks.any(self.ranks.leads and self.took <= AUTO_SHARE * (self.clock() - self.written))

    def save(self, at: ResumePoint) -> None:
        """Of how far the run has come, but for the streams' positions. Raises DamagedError, and writes nothing, when
        the store was replaced since it was opened: what was read since may be of another one."""
        began = self.clock()
        job, ranks = self.job, self.ranks
        with ranks.agreed():
            if ranks.leads:
                job.check_unchanged()
        folder, parts = job.folder.checkpoints, ranks.count if self.sweep else 1
        mine = {v: [at.epoch, at.window, at.offset] for v, at in self.stream.positions().items()}
        if ranks.leads:
            begin_checkpoint(folder)
        positions = {v: place for part in ranks.gather(mine) for v, place in part.items()}
        digest = ""
        if ranks.index < parts:
            tensors = {key: value for member in self.members for key, value in member.state().items()}
            digest = save_part(folder, ranks.index, tensors)
            for member in (member for member in self.members if member.diverged is None):
                save_as_it_is(job, member, at.step, folder / BUILDING / "saes" / member.config.name)
        digests = ranks.gather(digest)
        if ranks.leads:
            places = [positions[v] for v in sorted(positions)]
            state = {"version": VERSION, "wave": at.wave, "step": at.step, "seconds": at.seconds, "positions": places,
                     "diverged": dict(at.diverged), "parts": parts, "blake2b": digests[:parts]}  # fmt: skip
            end_checkpoint(folder, (at.wave - 1) * job.steps + at.step, state)
        ranks.wait()
        self.written = self.clock()
        self.took = self.written - began


def save_as_it_is(
    job: TrainJob, member: Member, done: int, folder: Path, more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """The autoencoder after `done` steps, with its normalisation folded in: `train.load` takes the folder. `more`
    is said of it in cfg.json."""
    spec = job.store.spec
    about = {
        "model": spec.model,
        "hook_name": spec.hookpoints[job.hook].name,
        "context": spec.context,
        "bos_id": spec.bos_id,
        "lambda": float(member.sparsity.now(done)),
        **more,
    }
    Autoencoder.of(member.config, member.weights, job.statistics.scale).save(folder, about)


def stands(job: TrainJob) -> ResumePoint:
    """The newest checkpoint's that is whole; the beginning without one. Forgets what was logged after it. Raises
    DamagedError when there are checkpoints and none is whole."""
    at = newest_whole(job)
    if at is None:
        job.folder.cut_metrics(1, 0)
        return ResumePoint()
    job.folder.cut_metrics(at.wave, at.step)
    say(f"{job.turn(at.wave).title}: going on after step {at.step}")
    return at


def newest_whole(job: TrainJob) -> ResumePoint | None:
    """Damaged ones that are newer are set aside, and said to be. None when there is no checkpoint."""
    useless: list[tuple[Path, DamagedError]] = []
    for folder in newest_first(job.folder.checkpoints):
        try:
            at = standing(job, folder, read_state(folder))
        except DamagedError as error:
            useless.append((folder, error))
            continue
        for path, why in useless:
            set_aside(path)
            say(f"{why}. It is set aside as {DAMAGED}{path.name}; going on from {folder.name}, the one before")
        return at
    if useless:
        raise DamagedError(
            f"{useless[0][1]}. There is no whole checkpoint before it. Restore it from a copy, or start afresh with "
            "--overwrite"
        )
    return None


def standing(job: TrainJob, folder: Path, state: dict[str, Any]) -> ResumePoint:
    """What a state.json says, each number within what the run can have come to. Raises DamagedError for one that is
    not, UserError for another version's."""
    if state.get("version") != VERSION:
        raise UserError(
            f"{job.folder.path}: its checkpoint is of version {quoted(state.get('version'))}; this sagsae reads "
            f"{VERSION}. Finish the run with the sagsae that began it, or start afresh with --overwrite"
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
    """One of each stream, inside its windows. Every stream gives out rows in one of three epochs. Raises BadData."""
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
            StreamPosition(integer(epoch, "epoch", 0, epochs), integer(window, "window", 0, windows),
                     integer(offset, "offset", 0, rows))
        )  # fmt: skip
    return tuple(positions)


def restore(members: Sequence[Member], at: ResumePoint) -> None:
    """Loads this wave's autoencoders as they were. Raises DamagedError when they cannot be read."""
    if at.folder is None:
        return
    tensors = load_tensors(at.folder, at.parts)
    try:
        for member in members:
            member.load_(tensors)
    except BadData as error:
        raise damaged(at.folder, error) from error
