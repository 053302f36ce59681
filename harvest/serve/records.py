"""What the state's functions take and return, beside the words of shared/request.py."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.request import Job


@dataclass(frozen=True)
class Clock:
    """The two clocks of the server's process. Deadlines are monotonic; after a restart they begin again. Times that
    people read are not."""

    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Limits:
    """How long and how many."""

    lease_s: float = 30.0
    """Seconds after which a silent worker's attempt lapses."""
    beat_s: float = 5.0
    backoff_s: float = 10.0
    """Seconds before the second attempt; doubled for each further one."""
    attempts: int = 5
    """Commands that may fail in a row and write nothing."""
    lost_attempts: int = 20
    """Workers that may be lost in a row and write nothing."""
    open_jobs: int = 1000
    open_jobs_each: int = 20
    """Open jobs of one asker."""
    min_age_s: float = 3600.0
    """A store that was used since is not evicted."""
    low_water: float = 0.9
    """Eviction goes on down to this share of the quota."""
    free_share: float = 0.05
    """Share of the disk that stays free."""
    memo_s: float = 3600.0
    """Seconds for which a request's names are trusted to mean the same."""
    most_lease_s: float = 3600.0
    light_grace_s: float = 10.0
    """A job that loads no model is left to the server's own planner for so many seconds."""
    measure_s: float = 30.0
    """Seconds between two looks at the size of a store that is being written."""


@dataclass(frozen=True)
class Usage:
    """Bytes of the cache's disk."""

    used: int
    """Of all stores; a byte that several stores share by hard links counts once."""
    reserved: int
    """Which the open jobs will still write."""
    pinned: int
    leaving: int
    """Of evicted stores whose files are being deleted."""
    quota: int | None
    free: int


@dataclass(frozen=True)
class Changes:
    """What changed after a revision."""

    revision: int
    jobs: list[Job]
    stores: list[str]
    """Ids of stores that came, changed or went."""
