"""The state of the service: one SQLite file, which is a cache of what the folders say.

Only the server's process opens it. Every function that changes something is one transaction, and may be called from any
thread.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harvest.serve.asking import Requests
from harvest.serve.attempts import Attempts
from harvest.serve.catalog import Catalog
from harvest.serve.database import JOBS, Database
from harvest.serve.jobs import JobTable
from harvest.serve.leases import Holds
from harvest.serve.records import Changes, Clock, Limits, Usage
from harvest.serve.space import Space
from shared.errors import UserError
from shared.refusals import UnknownError
from shared.request import (
    CacheAnswer,
    Job,
    JobPage,
    JobState,
    LeaseGrant,
    RequestPlan,
    StoreFilter,
    StorePage,
    StoreRow,
    StoreSort,
    TakenJob,
    WorkerInfo,
    WorkerRow,
)

EVERYTHING = StoreFilter()
SCAN_S = 60.0
"""Seconds between two looks at the folders."""


class State:
    """The catalog, the queue, leases and pins of one folder of stores.

    A `planned` document is what harvest/reuse/plan.py plans for a request, as JSON: `wanted` (Wanted.as_json), `config`
    (the harvest's settings) and `request` (the request's own fields; priority and pin are read from it)."""

    def __init__(self, root: Path, quota: int | None, clock: Clock, limits: Limits) -> None:
        self.root, self.clock, self.limits = root, clock, limits
        self.database = Database(root, clock)
        self.holds = Holds(self.database, limits)
        self.catalog = Catalog(self.database)
        self.space = Space(self.database, self.catalog, self.holds, quota, limits)
        self.table = JobTable(self.database)
        self.attempts = Attempts(self.table, self.catalog, self.space, limits)
        self.requests = Requests(self.table, self.catalog, self.space, limits)
        self.scanned = clock.monotonic()

    @classmethod
    def open(
        cls, root: Path, quota: int | None = None, *, clock: Clock | None = None, limits: Limits | None = None
    ) -> "State":
        """Opens or makes the database of a folder, and scans the folder. Raises UserError when the folder is missing,
        and when the database is of a newer version, read-only, damaged, or another server's."""
        if not root.is_dir():
            raise UserError(f"--root {root}: no such folder. Make it, or give the folder of the stores")
        state = cls(root.resolve(), quota, clock or Clock(), limits or Limits())
        try:
            state.space.delete_leaving()
            state.holds.load_pins()
            state.holds.restart()
            state.attempts.restart()
            state.scan()
        except BaseException:
            state.close()
            raise
        return state

    def close(self) -> None:
        """Closes the database."""
        self.database.close()

    def listen(self, listener: Callable[[int], None]) -> Callable[[], None]:
        """Calls `listener` with the new revision after every change, in the thread that made it. Returns a function
        that ends this."""
        self.database.listeners.add(listener)
        return lambda: self.database.listeners.discard(listener)

    # The catalog

    def scan(self) -> int:
        """Brings the catalog up to date with the folders. Returns the number of stores."""
        self.scanned = self.clock.monotonic()
        return self.catalog.scan()

    def stores(
        self,
        filters: StoreFilter = EVERYTHING,
        sort: StoreSort = "used",
        cursor: str | None = None,
        limit: int = 100,
    ) -> StorePage:
        """One page of the catalog, at most 500 stores. Raises UserError for a cursor of another list."""
        return self.catalog.page(filters, sort, cursor, limit)

    def store(self, store: str) -> StoreRow:
        """Raises UnknownError."""
        self.holds.check_store(store)
        found = self.catalog.row(store)
        if found is None:
            raise UnknownError(f"store {store}: has just been deleted")
        return found

    def touch(self, store: str) -> None:
        """Notes that a store was used now."""
        self.catalog.touch(store)

    def remove(self, store: str, force: bool = False) -> int:
        """Deletes a store; `force` even when it is pinned or leased. Returns the bytes that became free. Raises
        UnknownError; HeldError when it is pinned, leased, needed by a job, or read or written by a process."""
        return self.space.remove(store, force)

    # Requests

    def remembered(self, request_hash: str) -> dict[str, Any] | None:
        """The planned document that `remember` kept, unless it is too old."""
        return self.requests.remembered(request_hash)

    def remember(self, request_hash: str, planned: Mapping[str, Any], ttl_s: float | None = None) -> None:
        """Keeps what a request's words mean, for at most an hour."""
        self.requests.remember(request_hash, planned, ttl_s)

    def preview(self, planned: Mapping[str, Any]) -> RequestPlan:
        """What `ask` would do, and which stores would go. Queues nothing. Raises QuotaError."""
        return self.requests.preview(planned)

    def ask(self, planned: Mapping[str, Any], who: str) -> CacheAnswer:
        """Answers from the catalog, or attaches to the open jobs that make this, or queues new ones. Raises QuotaError,
        QueueFullError."""
        return self.requests.ask(planned, who)

    # Jobs

    def take(self, worker: WorkerInfo, job: int | None = None) -> TakenJob | None:
        """Gives the next job that this worker can do, or only this one; None when there is none."""
        return self.attempts.take(worker, job)

    def beat(
        self,
        job: int,
        attempt: int,
        rows: int = 0,
        rate: float | None = None,
        note: str = "",
        verifying: bool = False,
    ) -> bool:
        """Renews an attempt and notes its progress: rows that are committed, rows per second, the command's last line,
        and whether its bytes are being checked by now. Returns False when the worker is to stop, because the job was
        cancelled or has outgrown the quota. Raises NotYoursError."""
        return self.attempts.beat(job, attempt, rows, rate, note, verifying)

    def end(self, job: int, attempt: int, code: int, words: str = "") -> Job:
        """Ends an attempt with the command's exit code (negative: a signal) and its last words. Raises
        NotYoursError."""
        return self.attempts.end(job, attempt, code, words)

    def cancel(self, job: int) -> Job:
        """Cancels an open job; what it has written stays. Raises UnknownError, WrongStateError."""
        return self.attempts.cancel(job)

    def retry(self, job: int) -> Job:
        """Queues a failed or cancelled job again. Raises UnknownError, WrongStateError, QuotaError."""
        return self.attempts.retry(job)

    def damaged(self, store: str, words: str) -> Job:
        """Queues the job that made a store again, which first drops the shards that are damaged. Raises UnknownError,
        WrongStateError when no job of this service made it."""
        self.holds.check_store(store)
        return self.attempts.damaged(store, words)

    def job(self, job: int) -> Job:
        """Raises UnknownError."""
        return self.table.job(job)

    def jobs(self, state: JobState | None = None, cursor: str | None = None, limit: int = 100) -> JobPage:
        """One page of the jobs, newest first, at most 500. Raises UserError for a cursor of another list."""
        return self.table.page(state, cursor, limit)

    def queue(self) -> list[Job]:
        """The open jobs: those that run, then the others in the order in which they will be taken."""
        return self.table.queue()

    def due(self) -> list[Job]:
        """The queued jobs that a worker could take now, in their order."""
        return self.attempts.due()

    def give_up(self, job: int, words: str) -> Job:
        """Has a queued job fail that no worker could begin. Any other job is left as it is. Raises UnknownError."""
        return self.attempts.give_up(job, words)

    def remark(self, job: int, note: str) -> None:
        """Notes what a queued job waits for. Raises UnknownError."""
        self.attempts.remark(job, note)

    def log_path(self, job: int) -> Path:
        """The file into which the job's worker writes. Raises UnknownError."""
        return self.root / JOBS / f"{self.table.row(job)['id']}.log"

    def changes_since(self, revision: int) -> Changes:
        """The last 500 jobs and stores that changed after a revision, oldest first."""
        return self.table.changes_since(revision)

    def workers(self) -> list[WorkerRow]:
        """The workers that were heard of in the last minute and a half."""
        return self.table.workers()

    # Leases and pins

    def lease(self, store: str, holder: str, ttl_s: float = 600.0) -> LeaseGrant:
        """Keeps a store from being deleted until the lease lapses. Raises UnknownError, UserError."""
        return self.holds.lease(store, holder, ttl_s)

    def renew(self, lease: str, ttl_s: float | None = None) -> LeaseGrant:
        """Renews a lease for its whole time, or another. Raises LapsedError."""
        return self.holds.renew(lease, ttl_s)

    def release(self, lease: str) -> None:
        """Ends a lease. One that is over already is no error."""
        self.holds.release(lease)

    def pin(self, store: str, name: str) -> None:
        """Keeps a store from being evicted. Raises UnknownError, UserError."""
        self.holds.check_store(store)
        self.holds.pin(store, name)

    def unpin(self, store: str, name: str) -> None:
        """Takes a pin away. Without one, nothing happens."""
        self.holds.unpin(store, name)

    # The disk

    def evict(self, need_bytes: int) -> list[str]:
        """Deletes stores, least recently used first, until so many bytes fit. Returns their ids. Raises QuotaError, and
        deletes nothing then."""
        with self.database.transaction():
            gone = self.space.make_room(need_bytes)
        self.space.delete_leaving()
        return gone

    def usage(self) -> Usage:
        """Bytes of the cache's disk, by what they are used for."""
        return self.space.usage()

    def sweep(self) -> None:
        """Called every second or so: lets attempts and leases lapse whose time is over, deletes what is left of evicted
        stores, forgets what is old; looks at the folders once a minute."""
        with self.database.transaction():
            self.attempts.lapse()
            self.holds.lapse()
            self.table.forget_workers()
        self.space.delete_leaving()
        if self.clock.monotonic() - self.scanned >= SCAN_S:
            self.scan()
            self.space.measure()
            self.table.forget_old()
