"""What a page reads of the state, in one go: each function here is called in a thread."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from harvest.serve.records import StoreOrigin, Usage
from harvest.serve.state import State
from shared.refusals import UnknownError
from shared.request import Job, JobAttempt, StoreFilter, StorePage, StoreReader, StoreRow, StoreSort, WorkerRow

STORES: Final = 50
"""Stores of one page of the catalog."""
RECENT: Final = 10
"""Ended jobs below the queue."""
NEWEST: Final = 1 << 62
"""Beyond every revision."""


@dataclass(frozen=True)
class CacheNow:
    """The state of the whole cache: the head of every page, and the queue."""

    revision: int
    usage: Usage
    workers: list[WorkerRow]
    queue: list[Job]
    recent: list[Job]
    written: dict[str, StoreRow]
    """The catalog's rows of the stores that jobs write now."""


def read_cache(state: State) -> CacheNow:
    """The revision is read first: what changes meanwhile is sent once more, and never missed."""
    revision = state.changes_since(NEWEST).revision
    queue = state.queue()
    ended = [job for job in state.jobs(limit=RECENT + len(queue)).jobs if job.ended is not None]
    written = {job.store: row for job in queue if job.state == "running" and (row := row_of(state, job.store))}
    return CacheNow(revision, state.usage(), state.workers(), queue, ended[:RECENT], written)


def row_of(state: State, store: str) -> StoreRow | None:
    with suppress(UnknownError):
        return state.store(store)
    return None


def read_catalog(state: State, filters: StoreFilter, sort: StoreSort, cursor: str | None) -> StorePage:
    return state.stores(filters, sort, cursor, STORES)


@dataclass(frozen=True)
class JobNow:
    """One job, its attempts, and the row of its store."""

    job: Job
    row: StoreRow | None
    attempts: list[JobAttempt]


def read_job(state: State, number: int) -> JobNow:
    """Raises UnknownError."""
    job = state.job(number)
    return JobNow(job, row_of(state, job.store), state.attempts_of(number))


@dataclass(frozen=True)
class StoreNow:
    """What the state knows of one store."""

    row: StoreRow
    readers: list[StoreReader]
    origin: StoreOrigin | None


def read_store_rows(state: State, store: str) -> StoreNow:
    """Raises UnknownError."""
    return StoreNow(state.store(store), state.readers(store), state.origin(store))
