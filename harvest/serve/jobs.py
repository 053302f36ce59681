"""The rows of jobs and of workers, and what clients see of them."""

import json
import sqlite3
from typing import Any, Final

from harvest.serve.catalog import MOST_ROWS, read_cursor
from harvest.serve.database import JOBS, LIVE, OPEN, Database
from harvest.serve.records import Changes, StoreOrigin
from shared.files.local import explained, touch
from shared.refusals import UnknownError
from shared.request import Action, Job, JobAttempt, JobPage, JobState, WorkerInfo, WorkerRow

PRIORITIES: Final = ("normal", "low")
LIGHT: Final[tuple[Action, ...]] = ("view",)
"""Jobs that load no model."""
HEARD_S: Final = 90.0
"""Seconds for which a worker counts as being there."""
MOST_ATTEMPTS: Final = 20
"""Attempts of a job that are shown."""
KEPT_JOBS: Final = 20_000
"""Ended jobs that are remembered."""
KEPT_GONE: Final = 10_000
"""Deleted stores that are remembered, for those who follow the changes."""
SHOWN: Final = (
    "id, state, action, key, store, request, asked, attempt, priority, worker, rows, total, rate, note, error, "
    "created, started, ended, revision"
)


class JobTable:
    """The rows of jobs and workers."""

    def __init__(self, database: Database) -> None:
        self.database, self.clock = database, database.clock
        self.heard: dict[str, float] = {}
        """When each worker was heard of, by the monotonic clock."""

    def row(self, job: int) -> sqlite3.Row:
        """Raises UnknownError."""
        found = self.database.one("SELECT * FROM job WHERE id = ?", job)
        if found is None:
            raise UnknownError(f"job {job}: there is none of this number. List them with: sagsae jobs ls")
        return found

    def set(self, row: sqlite3.Row, **values: Any) -> None:
        """Changes a job. Called in a transaction."""
        self.database.change("job", row["id"], values)

    def live(self) -> list[sqlite3.Row]:
        """Open jobs in the order in which they are taken, and ended ones that are still being stopped."""
        return self.database.all(f"SELECT * FROM job WHERE {LIVE} ORDER BY priority, id")

    def job(self, job: int) -> Job:
        """Raises UnknownError."""
        return job_of(self.row(job))

    def page(self, state: JobState | None, cursor: str | None, limit: int) -> JobPage:
        """One part of the list, newest first. Raises UserError for a cursor that is not one of ours."""
        where, values = list[str](), list[Any]()
        if state is not None:
            where.append("state = ?")
            values.append(state)
        if cursor is not None:
            where.append("id < ?")
            values.append(read_cursor(cursor, text=False)[0])
        limit = min(max(1, limit), MOST_ROWS)
        condition = f"WHERE {' AND '.join(where)}" if where else ""
        query = f"SELECT {SHOWN} FROM job {condition} ORDER BY id DESC LIMIT ?"
        found = self.database.all(query, *values, limit + 1)
        jobs = tuple(job_of(row) for row in found[:limit])
        return JobPage(jobs=jobs, next=json.dumps([jobs[-1].id, ""]) if len(found) > limit else None)

    def queue(self) -> list[Job]:
        """The open jobs: those that run, then the others in the order in which they will be taken."""
        order = "ORDER BY state = 'queued', priority, id"
        return [job_of(row) for row in self.database.all(f"SELECT {SHOWN} FROM job WHERE state IN {OPEN} {order}")]

    def place(self, row: sqlite3.Row) -> int:
        """How many queued jobs are before this one; those that run are not counted."""
        before = "(priority < ? OR (priority = ? AND id < ?))"
        query = f"SELECT count(*) FROM job WHERE state = 'queued' AND {before}"
        return self.database.number(query, row["priority"], row["priority"], row["id"])

    def rows_per_s(self, model: str) -> float | None:
        """How fast the last harvests of a model were; None when there was none."""
        query = """SELECT avg(rate) FROM (SELECT rate FROM job
            WHERE model = ? AND state = 'done' AND rate > 0 ORDER BY id DESC LIMIT 5)"""
        row = self.database.one(query, model)
        return None if row is None else row[0]

    def eta(self, row: sqlite3.Row) -> float | None:
        """Seconds until a job is done, if those before it in the queue are done one after another; None where one of
        them has an unknown speed or size."""
        before = [
            each
            for each in self.live()
            if (each["state"] == "queued", each["priority"], each["id"])
            <= (row["state"] == "queued", row["priority"], row["id"])
        ]
        times = [self.seconds_left(each) for each in before]
        return None if None in times else sum(each or 0.0 for each in times)

    def seconds_left(self, row: sqlite3.Row) -> float | None:
        speed = row["rate"] or self.rows_per_s(row["model"])
        if row["action"] in LIGHT:
            return 2.0
        return max(0, row["total"] - row["rows"]) / speed if speed and row["total"] else None

    def start_log(self, job: int) -> None:
        """Makes the log's file, so that this number is never given to another job."""
        folder = self.database.root / JOBS
        with explained(folder):
            folder.mkdir(exist_ok=True)
            touch(folder / f"{job}.log")

    def changes_since(self, revision: int) -> Changes:
        """The jobs and stores that changed after a revision. A revision that was never reached means all."""
        with self.database.lock:
            now = self.database.revision()
            since = revision if revision <= now else 0
            query = f"SELECT {SHOWN} FROM job WHERE revision > ? ORDER BY revision DESC LIMIT {MOST_ROWS}"
            jobs = [job_of(row) for row in self.database.all(query, since)]
            query = f"""SELECT id FROM (SELECT id, revision FROM store UNION ALL SELECT id, revision FROM gone)
                WHERE revision > ? ORDER BY revision DESC LIMIT {MOST_ROWS}"""
            stores = [row["id"] for row in self.database.all(query, since)]
        return Changes(now, jobs[::-1], stores[::-1])

    def forget_old(self) -> None:
        """Forgets the oldest ended jobs, with their logs, and the oldest deleted stores."""
        old = f"state NOT IN {OPEN} AND worker IS NULL ORDER BY id DESC LIMIT -1 OFFSET {KEPT_JOBS}"
        with self.database.transaction():
            jobs = [row["id"] for row in self.database.all(f"SELECT id FROM job WHERE {old}")]
            for table, column in (("job", "id"), ("attempt", "job")):
                these = f"{column} IN (SELECT value FROM json_each(?))"
                self.database.run(f"DELETE FROM {table} WHERE {these}", json.dumps(jobs))
            gone = f"SELECT id FROM gone ORDER BY revision DESC LIMIT -1 OFFSET {KEPT_GONE}"
            self.database.run(f"DELETE FROM gone WHERE id IN ({gone})")
        for job in jobs:
            for path in (self.database.root / JOBS).glob(f"{job}.*"):
                path.unlink(missing_ok=True)

    # attempts
    def begin_attempt(self, job: int, number: int, worker: str) -> None:
        """Notes who makes an attempt. Called in a transaction."""
        query = "INSERT OR REPLACE INTO attempt(job, number, worker, began) VALUES(?, ?, ?, ?)"
        self.database.run(query, job, number, worker, self.clock.now())

    def end_attempt(self, row: sqlite3.Row, code: int | None, words: str) -> None:
        """Notes how the attempt of a job ended; no code where its worker fell silent. Called in a transaction."""
        query = "UPDATE attempt SET ended = ?, code = ?, words = ? WHERE job = ? AND number = ? AND ended IS NULL"
        self.database.run(query, self.clock.now(), code, words, row["id"], row["attempt"])

    def attempts(self, job: int) -> list[JobAttempt]:
        """The last attempts of a job, the newest first."""
        query = "SELECT * FROM attempt WHERE job = ? ORDER BY number DESC LIMIT ?"
        rows = self.database.all(query, job, MOST_ATTEMPTS)
        return [JobAttempt(**{name: row[name] for name in JobAttempt.model_fields}) for row in rows]

    def origin(self, store: str) -> StoreOrigin | None:
        """The last job that wrote a store; None for one that was harvested without the service."""
        query = "SELECT id, action, donors FROM job WHERE store = ? AND attempt > 0 ORDER BY id DESC LIMIT 1"
        row = self.database.one(query, store)
        return None if row is None else StoreOrigin(row["id"], row["action"], tuple(json.loads(row["donors"])))

    # workers
    def greet(self, worker: WorkerInfo) -> None:
        """Notes a worker. Called in a transaction."""
        self.heard[worker.name] = self.clock.monotonic()
        about = worker.model_dump_json()
        query = """INSERT INTO worker VALUES(?, ?, ?)
            ON CONFLICT(name) DO UPDATE SET about = excluded.about, seen = excluded.seen"""
        self.database.run(query, worker.name, about, self.clock.now())

    def workers(self) -> list[WorkerRow]:
        """The workers that were heard of lately."""
        now, found = self.clock.monotonic(), list[WorkerRow]()
        query = f"""SELECT name, about, seen, (SELECT max(id) FROM job WHERE {LIVE} AND worker = name) AS job
            FROM worker ORDER BY name"""
        for row in self.database.all(query):
            if now - self.heard.get(row["name"], -HEARD_S) < HEARD_S:
                worker = WorkerInfo.model_validate_json(row["about"])
                found.append(WorkerRow(worker=worker, job=row["job"], seen=row["seen"]))
        return found

    def forget_workers(self) -> None:
        """Forgets the workers that are gone. Called in a transaction."""
        now = self.clock.monotonic()
        self.heard = {name: seen for name, seen in self.heard.items() if now - seen < HEARD_S}
        self.database.run(
            "DELETE FROM worker WHERE name NOT IN (SELECT value FROM json_each(?))", json.dumps([*self.heard])
        )


def job_of(row: sqlite3.Row) -> Job:
    """What clients see of a job."""
    return Job(
        **{name: row[name] for name in Job.model_fields if name not in ("request", "priority", "rows_per_s")},
        request=json.loads(row["request"]),
        priority=PRIORITIES[row["priority"]],
        rows_per_s=row["rate"],
    )


def overlap(one: sqlite3.Row, other: sqlite3.Row) -> bool:
    """Whether two jobs write a hookpoint of the same key."""
    hooks = (set(json.loads(row["extent"])[1]) for row in (one, other))
    return bool(one["key"] == other["key"] and set.intersection(*hooks))
