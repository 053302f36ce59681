"""Which autoencoders of a run are trained together: all of them, or as many at a time as the device's memory takes.

Autoencoders never depend on one another, so each wave, in a pass over the same data of its own, ends with the bits that
one stack would have ended with. The waves are written into the run's record when it begins, and a run that goes on
keeps to them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from shared.device import local_processes, reuse_memory
from shared.errors import UserError
from shared.memory import free_memory, in_words
from shared.progress import say
from shared.saes import SAEConfig
from train.plan.job import TrainJob
from train.plan.memory import MemoryNeed, circumstances, most_streams, needs_of, reader_bytes, together
from train.plan.sweep import dealt
from train.ranks import Ranks

KEPT_FREE: Final = 0.1
"""Share of what is free that is left alone: memory comes in pieces, and libraries take some that nobody counts."""

HOLES: Final = 2.5
"""Times what a run takes that must be there for it to keep what it frees: between large pieces there are holes, which
made one wide run take 1.8 times as much (docs/benchmarks.md)."""

Saes = tuple[SAEConfig, ...]


def planned(job: TrainJob, ranks: Ranks, sweep: bool) -> TrainJob:
    """The job with its waves, said to the user: those of the run that is here, or as few as fit. Raises UserError on
    every rank, before anything is written, for an autoencoder that does not fit even alone, and for waves of a run that
    is here which do not fit any more. Where there is plenty, the process keeps from here on what it frees."""
    at = circumstances(job, sweep, ranks.count)
    streams = most_streams(job.config.batch, job.streams, 1 if sweep else ranks.count)
    each, reader = needs_of(job.config, at), reader_bytes(job, at.rows * at.parts, streams)
    room = the_least(ranks.gather(room_of(job, ranks.device)))

    def need(saes: Sequence[SAEConfig]) -> MemoryNeed:
        """Of the rank that needs most."""
        shares = dealt(saes, ranks.count) if sweep else [list(saes)]
        return max(
            (together([each[sae.name] for sae in share], reader) for share in shares if share), key=lambda n: n.total
        )

    def fits(saes: Sequence[SAEConfig]) -> bool:
        return room is None or need(saes).total <= room

    begun = ranks.gather(recorded(job))[0]
    waves = begun or packed(job.config.saes, fits)
    for number, wave in enumerate(waves, 1):
        if not fits(wave):
            raise too_large(job, wave, need(wave), room or 0, f"wave {number} of " if begun and len(waves) > 1 else "")
    if ranks.leads:
        say(in_short(job, need(job.config.saes), room, ranks))
        if len(waves) > 1:
            say(in_waves(waves, bool(begun)))
    if room is None or HOLES * max(need(wave).total for wave in waves) <= room:
        reuse_memory(ranks.device)
    return job.in_waves(tuple(waves))


def room_of(job: TrainJob, device: torch.device) -> int | None:
    """Bytes that this process may take; None where that is not known and nobody said. Processes on one host share its
    memory; a GPU is one process's."""
    if job.config.memory != "auto":
        return job.config.memory
    free = free_memory(device)
    beside = local_processes() if device.type == "cpu" else 1
    return None if free is None else int(free * (1 - KEPT_FREE)) // beside


def the_least(rooms: Sequence[int | None]) -> int | None:
    return min((room for room in rooms if room is not None), default=None)


def recorded(job: TrainJob) -> list[Saes] | None:
    """The waves of the run that is here and goes on; None when a new one begins."""
    if job.config.overwrite or not job.folder.exists():
        return None
    by_name = {sae.name: sae for sae in job.config.saes}
    waves: Any = job.folder.read("record.json").get("waves") or [list(by_name)]
    try:
        names = [name for wave in waves for name in wave]
        if sorted(names) != sorted(by_name) or not all(waves):
            raise ValueError
        return [tuple(by_name[name] for name in wave) for wave in waves]
    except (TypeError, ValueError):
        raise job.folder.damaged("record.json", "its waves are not those of its autoencoders") from None


def packed(saes: Saes, fits: Callable[[Sequence[SAEConfig]], bool]) -> list[Saes]:
    """Waves that fit: the widest first, each into the first wave that still takes it. Within a wave, and by their first
    one among waves, autoencoders keep their order. One that fits nowhere has a wave to itself."""
    waves: list[list[SAEConfig]] = []
    for sae in sorted(saes, key=lambda sae: -sae.d_sae):
        takes = next((wave for wave in waves if fits([*wave, sae])), None)
        if takes is None:
            waves.append([sae])
        else:
            takes.append(sae)
    place = {sae.name: index for index, sae in enumerate(saes)}
    ordered = [tuple(sorted(wave, key=lambda sae: place[sae.name])) for wave in waves]
    return sorted(ordered, key=lambda wave: place[wave[0].name])


def in_short(job: TrainJob, need: MemoryNeed, room: int | None, ranks: Ranks) -> str:
    """What the whole run takes, part by part, against what there is."""
    each = " in a process" if ranks.count > 1 else ""
    there = "how much is free is not known" if room is None else f"{in_words(room)} {source(job)}"
    return f"{job.folder.path}: takes {in_words(need.total)} of {ranks.device.type} memory{each}; {there}\n  {need}"


def in_waves(waves: Sequence[Saes], begun: bool) -> str:
    sizes = ", ".join(str(len(wave)) for wave in waves)
    why = "The run began in waves" if begun else "They do not fit together"
    return f"  {why}: {len(waves)} waves of {sizes} autoencoders, one after another, each in a pass over the store"


def source(job: TrainJob) -> str:
    return "may be taken" + ("" if job.config.memory == "auto" else " (memory)")


def too_large(job: TrainJob, wave: Saes, need: MemoryNeed, room: int, which: str) -> UserError:
    """`which`: of a run that is here."""
    names = ", ".join(sae.name for sae in wave)
    way = "have more memory free, or say how much to use: --set memory=BYTES"
    if which or len(wave) > 1:
        way += ". Or start afresh with --overwrite, in smaller waves"
    else:
        way += f". Or lower its d_sae, --batch ({job.config.batch}) or window_rows ({job.config.window_rows})"
    return UserError(
        f"{which}{names}: training takes {in_words(need.total)} of memory ({need}); {in_words(room)} {source(job)}. "
        f"To train it, {way}"
    )
