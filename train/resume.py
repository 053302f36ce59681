"""A run's checkpoints: everything that a later process needs to go on as if nothing had happened."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from shared.errors import UserError
from shared.progress import say
from train.autoencoder import Autoencoder
from train.checkpoint import BUILDING, begin_checkpoint, damaged, end_checkpoint, load_tensors, newest, save_part
from train.job import Job
from train.member import Member
from train.order import Position
from train.ranks import Ranks
from train.stream import BatchStream

VERSION: Final = 4
AUTO_EVERY: Final = 1000
AUTO_SHARE: Final = 0.1
"""checkpoint_every = auto: every so many steps, unless less than ten times as long as the last one took has gone by."""


@dataclass(frozen=True)
class Standing:
    """How far a run has come."""

    wave: int = 1
    step: int = 0
    """Steps of this wave that are made."""
    seconds: float = 0.0
    """Of training, over all waves and sessions."""
    positions: tuple[Position, ...] = ()
    """Of each stream; none at the beginning of a wave."""
    diverged: Mapping[str, int] = field(default_factory=dict)
    """Autoencoders of earlier waves whose loss is no number any more, and since which step."""
    folder: Path | None = None
    """The checkpoint that holds this wave's autoencoders, and in how many parts."""
    parts: int = 0


class Checkpoints:
    """Of one wave's autoencoders. In a sweep each rank has autoencoders of its own."""

    def __init__(
        self, job: Job, members: Sequence[Member], stream: BatchStream, ranks: Ranks, sweep: bool,
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

    def save(self, at: Standing) -> None:
        """Of how far the run has come, but for the streams' positions."""
        began = self.clock()
        job, ranks = self.job, self.ranks
        folder, parts = job.folder.checkpoints, ranks.count if self.sweep else 1
        mine = {v: [at.epoch, at.window, at.offset] for v, at in self.stream.positions().items()}
        if ranks.leads:
            begin_checkpoint(folder)
        positions = {v: place for part in ranks.gather(mine) for v, place in part.items()}
        if ranks.index < parts:
            tensors = {key: value for member in self.members for key, value in member.state().items()}
            save_part(folder, ranks.index, tensors)
            for member in (member for member in self.members if member.diverged is None):
                save_as_it_is(job, member, at.step, folder / BUILDING / "saes" / member.config.name)
        ranks.wait()
        if ranks.leads:
            places = [positions[v] for v in sorted(positions)]
            state = {"version": VERSION, "wave": at.wave, "step": at.step, "seconds": at.seconds, "positions": places,
                     "diverged": dict(at.diverged), "parts": parts}  # fmt: skip
            end_checkpoint(folder, (at.wave - 1) * job.steps + at.step, state)
        ranks.wait()
        self.written = self.clock()
        self.took = self.written - began


def save_as_it_is(
    job: Job, member: Member, done: int, folder: Path, more: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """The autoencoder after `done` steps, with its normalisation folded in: `train.sae.load` takes the folder. `more`
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


def stands(job: Job) -> Standing:
    """The newest checkpoint's; the beginning without one. Forgets what was logged after it."""
    found = newest(job.folder.checkpoints)
    if found is None:
        job.folder.cut_metrics(1, 0)
        return Standing()
    folder, state = found
    if state.get("version") != VERSION:
        raise UserError(
            f"{job.folder.path}: its checkpoint is of version {state.get('version')}; this sagsae reads {VERSION}. "
            "Finish the run with the sagsae that began it, or start afresh with --overwrite"
        )
    try:
        positions = tuple(Position(*at) for at in state["positions"])
        at = Standing(state["wave"], state["step"], state["seconds"], positions, state["diverged"], folder,
                      state["parts"])  # fmt: skip
    except (KeyError, TypeError) as error:
        raise damaged(folder, error) from error
    job.folder.cut_metrics(at.wave, at.step)
    say(f"{job.turn(at.wave).title}: going on after step {at.step}")
    return at


def restore(members: Sequence[Member], at: Standing) -> None:
    """Loads this wave's autoencoders as they were. Raises DamagedError when they cannot be read."""
    if at.folder is None:
        return
    tensors = load_tensors(at.folder, at.parts)
    try:
        for member in members:
            member.load_(tensors)
    except KeyError as error:
        raise damaged(at.folder, error) from error
