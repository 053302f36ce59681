"""One process or several: what the environment says, checked once, for everybody.

torchrun, accelerate and `--processes` set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
What is left over from another job, or set by half, would have a process believe in others that there are not.
"""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from shared.errors import BusyError, UserError

LATE: Final = 20.0
"""Seconds of waiting for the other processes after which a message says so."""
NAMES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI: Final = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
RESTARTED: Final = "SAGSAE_RESTARTED"
"""The variable in which the launcher tells processes that it starts again when it began: --overwrite may be done."""
CURE: Final = "Start with --processes, torchrun or accelerate launch; or unset {} to run one process"


@dataclass(frozen=True)
class ProcessPlace:
    """This process among all of its run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def settle() -> ProcessPlace:
    """Which process this is. Where it is alone, the environment says so afterwards: libraries look there, too. Raises
    UserError for an environment that contradicts itself."""
    place = read(os.environ)
    if place.size == 1 and not os.environ.get("MASTER_ADDR"):
        left_over = [name for name in NAMES if os.environ.pop(name, "")]
        if "RANK" in left_over and "WORLD_SIZE" not in left_over:
            from shared.progress import say

            say("RANK is set, but WORLD_SIZE is not: this is one process alone")
    elif place.size > 1:
        os.environ |= {name: str(value) for name, value in zip(NAMES, order(place), strict=True)}
    return place


def order(place: ProcessPlace) -> tuple[int, int, int, int]:
    """As in NAMES."""
    return place.rank, place.size, place.local_rank, place.local_size


def read(environment: Mapping[str, str]) -> ProcessPlace:
    """An empty variable counts as none; RANK without WORLD_SIZE means nothing. Raises UserError."""
    size = number(environment, "WORLD_SIZE", 1, at_least=1)
    if size == 1:
        check_mpi(environment)
        if environment.get("WORLD_SIZE") and environment.get("RANK"):
            number(environment, "RANK", 0, below=1, of="WORLD_SIZE")
        return ProcessPlace()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise UserError(f"WORLD_SIZE is {size}, but {name} is not set. {CURE.format('WORLD_SIZE')}")
    number(environment, "MASTER_PORT", 0, at_least=1, below=1 << 16)
    rank = number(environment, "RANK", 0, below=size, of="WORLD_SIZE")
    local_size = number(environment, "LOCAL_WORLD_SIZE", size, at_least=1, below=size + 1)
    local_rank = number(environment, "LOCAL_RANK", rank % local_size, below=local_size, of="LOCAL_WORLD_SIZE")
    return ProcessPlace(rank, size, local_rank, local_size)


def check_mpi(environment: Mapping[str, str]) -> None:
    """mpirun and srun start several processes that would each do all of the work."""
    for name in MPI:
        if number(environment, name, 1) > 1:
            raise UserError(f"{name} is {environment[name]}: started by mpirun or srun. {CURE.format(name)}")


def number(
    environment: Mapping[str, str], name: str, default: int, at_least: int = 0, below: int = 1 << 31, of: str = ""
) -> int:
    """A whole number of the environment. Raises UserError naming the variable."""
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 12 and at_least <= int(text) < below):
        limit = f"below {of} ({below})" if of else f"at most {below - 1}" if below < 1 << 31 else f"{at_least} or more"
        raise UserError(f"{name}={text[:40]}: expected a whole number {limit}. {CURE.format(name)}")
    return int(text)


# what the processes of a command know


def launched(processes: int) -> bool:
    """Whether this is one of several processes already. Raises UserError when they are not as many as asked for."""
    size = number(os.environ, "WORLD_SIZE", 1, at_least=1)
    if size not in (1, processes):
        raise UserError(f"--processes {processes}: was started as one of {size}. Leave --processes to the launcher")
    return settle().size > 1


def is_helper() -> bool:
    """Whether another process of this command does the talking."""
    return os.environ.get("RANK", "0") != "0"


def begun_by_this_command(record: Mapping[str, object]) -> bool:
    """Whether this very command began the output that has this record, before a process of it was killed and all were
    started again. It must not be overwritten once more then."""
    since = os.environ.get(RESTARTED, "")
    return bool(since) and str(record.get("started", "")) >= since  # both in UTC, to the second


def wait_briefly() -> None:
    """Has threads of a matrix product that wait for one another spin for a hundredth of the usual time. Otherwise they
    keep their core busy for milliseconds, while the writer or another program could use it
    (docs/records/experiments.md). Takes effect when torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


@contextmanager
def meeting(place: ProcessPlace) -> Iterator[None]:
    """Waits for the other processes of a run. A message says so when they do not come. SIGINT ends the process at once,
    because a wait inside a library cannot be stopped gently. Raises BusyError when they cannot be reached."""
    if place.size == 1:
        yield
        return
    from shared.progress import say

    at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    timer = threading.Timer(LATE, say, [f"waiting for the other processes of this run ({place.size} in all) at {at}"])
    timer.daemon = True
    timer.start()
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if here else None
    try:
        yield
    except (ValueError, RuntimeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BusyError(
            f"WORLD_SIZE is {place.size}, but the other processes cannot be reached at {at} ({why}). Start them with "
            "--processes, torchrun or accelerate launch"
        ) from error
    finally:
        timer.cancel()
        if before is not None:
            signal.signal(signal.SIGINT, before)
