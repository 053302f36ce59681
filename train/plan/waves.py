"""Groups a run's autoencoders into waves that fit into the device's memory. Each wave is trained in its own pass.

Autoencoders never depend on one another, and every wave reads the same data, so the result has the same bits as if all
were trained together. The waves are recorded when the run begins, and a resumed run keeps them.
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
from train.plan.sweep import deal_out
from train.ranks import Ranks

KEPT_FREE: Final = 0.1
"""Share of the free memory that is not used, for fragmentation and for what libraries allocate."""

FRAGMENTATION: Final = 2.5
"""Freed memory is kept for the next batch only when this many times the estimate is available: kept memory fragments,
and fragmentation once cost 1.8 times the estimate (docs/records/benchmarks.md)."""

Saes = tuple[SAEConfig, ...]


def plan_waves(job: TrainJob, ranks: Ranks, sweep: bool) -> TrainJob:
    """Returns the job with its waves and prints the estimated memory. The waves are those that the run in the folder
    recorded, or as few as fit. Raises UserError on every rank, before anything is written, when an autoencoder does not
    fit even alone or a recorded wave no longer fits. When memory is plentiful, this process keeps freed memory from now
    on."""
    conditions = circumstances(job, sweep, ranks.count)
    streams = most_streams(job.config.batch, job.streams, 1 if sweep else ranks.count)
    each, reader = needs_of(job.config, conditions), reader_bytes(job, conditions.rows * conditions.parts, streams)
    limit = smallest_known(ranks.gather(memory_limit(job, ranks.device)))

    def need(saes: Sequence[SAEConfig]) -> MemoryNeed:
        """Returns the memory of the rank that needs most."""
        shares = deal_out(saes, ranks.count) if sweep else [list(saes)]
        return max(
            (together([each[sae.name] for sae in share], reader) for share in shares if share), key=lambda n: n.total
        )

    def fits(saes: Sequence[SAEConfig]) -> bool:
        return limit is None or need(saes).total <= limit

    recorded = ranks.gather(recorded_waves(job))[0]
    waves = recorded or pack_waves(job.config.saes, fits)
    for number, wave in enumerate(waves, 1):
        if not fits(wave):
            prefix = f"wave {number} of " if recorded and len(waves) > 1 else ""
            raise too_large(job, wave, need(wave), limit or 0, prefix)
    if ranks.leads:
        say(memory_text(job, need(job.config.saes), limit, ranks))
        if len(waves) > 1:
            say(waves_text(waves, bool(recorded)))
    if limit is None or FRAGMENTATION * max(need(wave).total for wave in waves) <= limit:
        reuse_memory(ranks.device)
    return job.in_waves(tuple(waves))


def memory_limit(job: TrainJob, device: torch.device) -> int | None:
    """Returns the bytes that this process may use: the setting `memory`, or 90 % of the free memory; None when that is
    not known. Processes on one host share its memory; each GPU belongs to one process."""
    if job.config.memory != "auto":
        return job.config.memory
    free = free_memory(device)
    beside = local_processes() if device.type == "cpu" else 1
    return None if free is None else int(free * (1 - KEPT_FREE)) // beside


def smallest_known(limits: Sequence[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def recorded_waves(job: TrainJob) -> list[Saes] | None:
    """Returns the waves of the run that is resumed, or None when a new run begins. Raises DamagedError when the record
    does not fit the run's autoencoders."""
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


def pack_waves(saes: Saes, fits: Callable[[Sequence[SAEConfig]], bool]) -> list[Saes]:
    """Packs autoencoders into waves that fit: the widest first, each into the first wave that still has space for it.
    An autoencoder that fits nowhere gets its own wave. Waves, and autoencoders within a wave, keep the order of
    `saes`."""
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


def memory_text(job: TrainJob, need: MemoryNeed, limit: int | None, ranks: Ranks) -> str:
    """Says how much memory the whole run takes, item by item, and how much may be used."""
    each = " per process" if ranks.count > 1 else ""
    available = "the free memory is not known" if limit is None else limit_text(job, limit)
    memory = f"{in_words(need.total)} of {ranks.device.type.upper()} memory{each}"
    return f"{job.folder.path}: takes {memory}; {available}\n  {need}"


def waves_text(waves: Sequence[Saes], resumed: bool) -> str:
    sizes = ", ".join(str(len(wave)) for wave in waves)
    why = "The run began in waves" if resumed else "They do not fit together"
    return f"  {why}: {len(waves)} waves of {sizes} autoencoders, one after another, each in a pass over the store"


def limit_text(job: TrainJob, limit: int) -> str:
    return f"{in_words(limit)} may be used" + ("" if job.config.memory == "auto" else " (memory)")


def too_large(job: TrainJob, wave: Saes, need: MemoryNeed, limit: int, prefix: str) -> UserError:
    """Returns the error for a wave that does not fit. `prefix` names the wave when the run is resumed."""
    names = ", ".join(sae.name for sae in wave)
    way = "free some memory, or set how much to use: --set memory=BYTES"
    if prefix or len(wave) > 1:
        way += ". Or restart the run with --overwrite, in smaller waves"
    else:
        way += f". Or lower its d_sae, --batch ({job.config.batch}) or window_rows ({job.config.window_rows})"
    return UserError(
        f"{prefix}{names}: training takes {in_words(need.total)} of memory ({need}); {limit_text(job, limit)}. "
        f"To train it, {way}"
    )
