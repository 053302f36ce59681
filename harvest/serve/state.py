"""The state of the service: one SQLite file, which is a cache of what the folders say.

Only the server's process opens it. Every function that changes something is one transaction.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harvest.serve.records import Changes, Clock, Limits, Usage
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


class State:
    """The catalog, the queue, leases and pins of one folder of stores.

    A `planned` document is what harvest/reuse/plan.py plans for a request, as JSON: `wanted` (Wanted.as_json of
    match.py), `config` (the harvest's settings) and `request` (the request's own fields: priority, pin, accept, environment are read from it)."""

    @classmethod
    def open(
        cls, root: Path, quota: int | None = None, *, clock: Clock | None = None, limits: Limits | None = None
    ) -> "State":
        """Opens or makes the database of a folder, and scans the folder. Raises UserError when the database is of a
        newer version, read-only, or damaged."""
        raise NotImplementedError

    def close(self) -> None: ...

    # the catalog
    def scan(self) -> int:
        """Brings the catalog up to date with the folders. Returns the number of stores."""
        raise NotImplementedError

    def stores(
        self,
        filters: StoreFilter = StoreFilter(),  # noqa: B008 (frozen)
        sort: StoreSort = "used",
        cursor: str | None = None,
        limit: int = 100,
    ) -> StorePage: ...
    def store(self, store: str) -> StoreRow:
        """Raises UnknownError."""
        raise NotImplementedError

    def touch(self, store: str) -> None:
        """Notes that a store was used now."""

    def remove(self, store: str, force: bool = False) -> int:
        """Deletes a store; `force` even when it is pinned or leased. Returns the bytes that became free. Raises
        UnknownError; HeldError when it is pinned, leased, written, or read by a process of this machine."""
        raise NotImplementedError

    # requests
    def remembered(self, request_hash: str) -> dict[str, Any] | None:
        """The planned document that `remember` kept, unless it is too old."""
        raise NotImplementedError

    def remember(self, request_hash: str, planned: Mapping[str, Any], ttl_s: float | None = None) -> None: ...
    def preview(self, planned: Mapping[str, Any]) -> RequestPlan:
        """What `ask` would do, and which stores would go. Changes nothing."""
        raise NotImplementedError

    def ask(self, planned: Mapping[str, Any], who: str) -> CacheAnswer:
        """Answers from the catalog, or attaches to the open job that makes this, or queues one. Raises QuotaError,
        QueueFullError."""
        raise NotImplementedError

    # jobs
    def take(self, worker: WorkerInfo, job: int | None = None) -> TakenJob | None:
        """Gives the next job that this worker can do (or only this one); None when there is none."""
        raise NotImplementedError

    def beat(self, job: int, attempt: int, rows: int = 0, rate: float | None = None, note: str = "") -> bool:
        """Renews the attempt and notes its progress. Returns False when the worker should stop, because the job was
        cancelled. Raises NotYoursError."""
        raise NotImplementedError

    def verifying(self, job: int, attempt: int) -> bool:
        """Notes that the harvest has ended and its bytes are being checked; renews the attempt as `beat` does."""
        raise NotImplementedError

    def end(self, job: int, attempt: int, code: int, words: str = "") -> Job:
        """Ends an attempt with the command's exit code and its last words. Raises NotYoursError."""
        raise NotImplementedError

    def cancel(self, job: int) -> Job: ...
    def retry(self, job: int) -> Job:
        """Queues a failed or cancelled job again. Raises WrongStateError."""
        raise NotImplementedError

    def job(self, job: int) -> Job: ...
    def jobs(self, state: JobState | None = None, cursor: str | None = None, limit: int = 100) -> JobPage:
        """Newest first."""
        raise NotImplementedError

    def queue(self) -> list[Job]:
        """The open jobs: those that run, then the others in the order in which they will be taken."""
        raise NotImplementedError

    def log_path(self, job: int) -> Path:
        """The file into which the job's worker writes; it may not exist."""
        raise NotImplementedError

    def changes_since(self, revision: int) -> Changes: ...
    def workers(self) -> list[WorkerRow]:
        """Those that were heard of lately."""
        raise NotImplementedError

    # leases and pins
    def lease(self, store: str, holder: str, ttl_s: float = 600.0) -> LeaseGrant: ...
    def renew(self, lease: str, ttl_s: float | None = None) -> LeaseGrant:
        """Raises LapsedError."""
        raise NotImplementedError

    def release(self, lease: str) -> None:
        """A lease that is over already is no error."""

    def pin(self, store: str, name: str) -> None: ...
    def unpin(self, store: str, name: str) -> None: ...

    # the disk
    def evict(self, need_bytes: int) -> list[str]:
        """Deletes stores, least recently used first, until so many bytes fit. Returns their ids. Raises QuotaError, and
        deletes nothing then."""
        raise NotImplementedError

    def usage(self) -> Usage: ...
    def sweep(self) -> int:
        """Lets attempts and leases lapse whose time is over, and deletes what is left of evicted stores. Called now and
        then. Returns the number of jobs that were queued again."""
        raise NotImplementedError
