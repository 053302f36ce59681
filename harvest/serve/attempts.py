"""The attempts of workers: how a job is given out, kept and ended.

An attempt is one run of a command by one worker. It lapses when nothing is heard of it for `lease_s`; then the job goes
to the next worker, which resumes the store where it is. Whatever an earlier worker says after that is refused.
"""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from harvest.reuse.match import Found, NewStore, Wanted, find_answer, harvest_of
from harvest.serve.catalog import Catalog
from harvest.serve.database import OPEN
from harvest.serve.jobs import LIGHT, JobTable, job_of, overlap
from harvest.serve.records import Limits
from harvest.serve.space import Space, size_of
from shared.config import HarvestConfig
from shared.refusals import NotYoursError, QuotaError, WrongStateError
from shared.request import Job, TakenJob, WorkerInfo

MOST_WORDS: Final = 2000
REPAIRABLE: Final = 3
WRONG: Final = 2
STOPPED: Final = 130


class Attempts:
    """Every transition of a job that is open."""

    def __init__(self, jobs: JobTable, catalog: Catalog, space: Space, limits: Limits) -> None:
        self.jobs, self.catalog, self.space, self.limits = jobs, catalog, space, limits
        self.database, self.clock = jobs.database, jobs.clock
        self.measured: dict[int, float] = {}
        """When each running job's store was looked at."""

    # giving out
    def take(self, worker: WorkerInfo, job: int | None = None) -> TakenJob | None:
        """The next job for a worker, or only this one; None when there is none."""
        with self.database.transaction():
            self.lapse()
            self.jobs.greet(worker)
            if not worker.light:  # it has no job: it was restarted, or what it was given has not arrived
                for row in self.database.all("SELECT * FROM job WHERE worker = ?", worker.name):
                    self.lose(row, f"its worker {worker.name} was restarted")
            for row in self.waiting():
                if job in (None, row["id"]) and self.is_for(row, worker) and (taken := self.give(row, worker)):
                    return taken
        return None

    def waiting(self) -> list[sqlite3.Row]:
        """The queued jobs whose time has come, in order. A job waits for older ones that write the same hookpoints, and
        for a newer one that began while it was failed."""
        live = self.jobs.live()
        return [
            row
            for row in live
            if row["state"] == "queued" and row["worker"] is None and row["not_before"] <= self.clock.monotonic()
            if not any(
                (other["id"] < row["id"] or other["worker"] is not None)
                and other["id"] != row["id"]
                and overlap(other, row)
                for other in live
            )
        ]

    def is_for(self, row: sqlite3.Row, worker: WorkerInfo) -> bool:
        """Whether a worker can do a job, and may have it now."""
        if worker.light:
            return row["action"] in LIGHT
        device = json.loads(row["planned"]).get("config", {}).get("device") or "auto"
        if device.partition(":")[0] not in ("auto", "map", worker.device.partition(":")[0]):
            return False
        return not self.is_left_to_planner(row)

    def is_left_to_planner(self, row: sqlite3.Row) -> bool:
        """Whether the server's own planner is about to make this store, which needs no model."""
        if row["action"] not in LIGHT or self.clock.now() - row["created"] >= self.limits.light_grace_s:
            return False
        return any(other.worker.light for other in self.jobs.workers())

    def due(self) -> list[Job]:
        """The jobs that a worker could take now, in their order."""
        with self.database.lock:
            return [job_of(row) for row in self.waiting() if not self.is_left_to_planner(row)]

    def give(self, row: sqlite3.Row, worker: WorkerInfo) -> TakenJob | None:
        """Begins an attempt; None when nothing is left to do, or there is no space yet. What is left to do is decided
        only now: since the job was queued, another may have made a part of it."""
        found = self.found(row)
        repaired = self.repaired(row) if found.ready and row["repair"] else None
        if found.ready and repaired is None:
            self.done(row, next(iter(found.places.values())))
            return None
        new = repaired or found.new[0]
        if not self.reserve(row, found, new):
            return None
        self.jobs.start_log(row["id"])
        values = {
            "state": "running",
            "attempt": row["attempt"] + 1,
            "worker": worker.name,
            "deadline": self.clock.monotonic() + self.limits.lease_s,
            "began": self.rows_in(new.store),
            "started": row["started"] or self.clock.now(),
            "note": "",
            "rate": None,
        }
        self.jobs.set(row, **values)
        self.jobs.begin_attempt(row["id"], row["attempt"] + 1, worker.name)
        return self.taken(self.jobs.row(row["id"]), new)

    def reserve(self, row: sqlite3.Row, found: Found, new: NewStore) -> bool:
        """Keeps space for what is left to do, and the stores that it needs. False while there is no space yet: other
        stores must stay, or what was evicted is still being deleted."""
        left = size_of(new, found.tokens)
        expected = self.space.own(new.store) + left
        try:
            more = expected - row["expected"]
            self.space.make_room(max(0, more), {*found.donors, *found.places.values(), row["store"]})
        except QuotaError as error:
            self.jobs.set(row, note=str(error)[:MOST_WORDS], not_before=self.clock.monotonic() + self.limits.backoff_s)
            return False
        values = {"action": new.action, "store": new.store, "donors": json.dumps(found.donors), "expected": expected}
        if any(row[name] != value for name, value in values.items()):
            self.jobs.set(row, **values)
        return self.space.fits_now(left)

    def repaired(self, row: sqlite3.Row) -> NewStore | None:
        """The store of a job that is to be repaired, as one to make: the catalog still calls it whole."""
        store = self.catalog.look(row["store"])
        if store is None:
            return None
        spec = store.spec
        shape = (spec.hookpoints, spec.chunk_rows, spec.shard_rows)
        return NewStore(row["store"], *shape, None, spec.n_shards, 0, row["action"])

    def found(self, row: sqlite3.Row) -> Found:
        """What is left to do for a job."""
        planned, (_, hookpoints) = json.loads(row["planned"]), json.loads(row["extent"])
        wanted = Wanted.from_json(planned["wanted"])
        wanted = replace(wanted, hookpoints={hook: wanted.hookpoints[hook] for hook in hookpoints})
        return find_answer(wanted, self.catalog.that_may_answer(wanted))

    def taken(self, row: sqlite3.Row, new: NewStore) -> TakenJob:
        return TakenJob(
            job=row["id"],
            attempt=row["attempt"],
            action=new.action,
            store=new.store,
            command="store recode" if new.recode_from else "harvest",
            settings=settings_for(json.loads(row["planned"]), new),
            repair=bool(row["repair"]),
            lease_s=self.limits.lease_s,
            beat_s=self.limits.beat_s,
        )

    def rows_in(self, store: str) -> int:
        """Rows that are committed in a store, as far as the catalog knows."""
        return self.database.number("SELECT tokens FROM store WHERE id = ?", store)

    # while it runs
    def beat(self, job: int, attempt: int, rows: int, rate: float | None, note: str, verifying: bool) -> bool:
        """Renews an attempt. False: the worker is to stop. Raises NotYoursError."""
        with self.database.transaction():
            row = self.mine(job, attempt)
            self.jobs.heard[row["worker"]] = self.clock.monotonic()
            values: dict[str, Any] = {"deadline": self.clock.monotonic() + self.limits.lease_s}
            if row["state"] in ("running", "verifying"):
                state = "verifying" if verifying else "running"
                values |= {"state": state, "rows": max(0, rows), "rate": rate, "note": note[:MOST_WORDS]}
            self.jobs.set(row, **values)
        return row["state"] in ("running", "verifying") and self.has_room(job)

    def has_room(self, job: int) -> bool:
        """Looks now and then how large a running job's store has grown. False when it outgrows the quota; the job has
        failed then."""
        now = self.clock.monotonic()
        if now - self.measured.get(job, -self.limits.measure_s) < self.limits.measure_s:
            return True
        self.measured[job] = now
        row = self.jobs.row(job)
        self.catalog.look(row["store"])
        self.space.measure()
        with self.database.transaction():
            row = self.jobs.row(job)
            stored, own = self.rows_in(row["store"]), self.space.own(row["store"])
            expected = max(own, int(own / stored * row["total"]) if stored and row["total"] else 0)
            try:
                self.space.make_room(max(0, expected - row["expected"]), {row["store"], *json.loads(row["donors"])})
            except QuotaError as error:
                if own <= row["expected"]:
                    return True  # it may still compress better
                self.jobs.set(row, state="failed", error=str(error)[:MOST_WORDS], ended=self.clock.now())
                return False
            if expected > row["expected"]:
                self.jobs.set(row, expected=expected)
        self.space.delete_leaving()
        return True

    def mine(self, job: int, attempt: int) -> sqlite3.Row:
        """The row of a running attempt. Raises NotYoursError."""
        found = self.database.one("SELECT * FROM job WHERE id = ? AND attempt = ? AND worker IS NOT NULL", job, attempt)
        if found is None or found["deadline"] <= self.clock.monotonic():
            raise NotYoursError(
                f"job {job}, attempt {attempt}: is over. Nothing was heard of it in time, or it has ended; stop its "
                "command, and take another job"
            )
        return found

    def lapse(self) -> None:
        """Takes jobs from workers that were not heard of in time. Called in a transaction."""
        silent = "SELECT * FROM job WHERE worker IS NOT NULL AND deadline <= ?"
        for row in self.database.all(silent, self.clock.monotonic()):
            self.lose(row, f"its worker {row['worker']} was not heard of for {self.limits.lease_s:g} s")

    def lose(self, row: sqlite3.Row, words: str) -> None:
        """Ends an attempt whose worker is gone. That is mostly not the job's fault, so it may happen more often than a
        failure. Called in a transaction."""
        self.jobs.end_attempt(row, None, words)
        if row["state"] not in ("running", "verifying"):
            self.jobs.set(row, worker=None)
            return
        self.catalog.look(row["store"])
        lost = 1 if self.rows_in(row["store"]) > row["began"] else row["lost"] + 1
        if lost >= self.limits.lost_attempts:
            self.failed(row, f"given up after {lost} workers were lost that wrote nothing. The last: {words}")
            return
        later = self.clock.monotonic() + self.limits.backoff_s
        self.jobs.set(row, state="queued", worker=None, lost=lost, not_before=later, note=words, rate=None)

    def restart(self) -> None:
        """Renews every attempt: another process measured the deadlines."""
        with self.database.transaction():
            now = self.clock.monotonic()
            self.database.run("UPDATE job SET deadline = ? WHERE worker IS NOT NULL", now + self.limits.lease_s)
            self.database.run(f"UPDATE job SET not_before = ? WHERE state IN {OPEN}", now)

    # how it ends
    def end(self, job: int, attempt: int, code: int, words: str) -> Job:
        """Ends an attempt with its command's exit code. Raises NotYoursError."""
        with self.database.transaction():
            store = self.mine(job, attempt)["store"]
        self.catalog.look(store)
        self.space.measure()
        with self.database.transaction():
            row = self.mine(job, attempt)
            self.measured.pop(job, None)
            self.jobs.end_attempt(row, code, words.strip()[:MOST_WORDS])
            if row["state"] not in ("running", "verifying"):
                self.jobs.set(row, worker=None)
            else:
                self.judge(row, code, words.strip()[:MOST_WORDS])
            return self.jobs.job(job)

    def judge(self, row: sqlite3.Row, code: int, words: str) -> None:
        """What an exit code means for a job. Called in a transaction."""
        stored = self.rows_in(row["store"])
        if code == 0:
            found = self.found(row)
            if found.ready:
                self.done(row, row["store"])
            elif row["store"] not in {new.store for new in found.new}:  # one of several stores is made
                self.jobs.set(row, state="queued", worker=None, failures=0, repair=0)
            else:
                self.again(row, f"the command ended well, but {row['store']} is not complete", stored)
        elif code == STOPPED:
            self.jobs.set(row, state="queued", worker=None, note="its worker was stopped")
        elif code == REPAIRABLE and not row["repairs"]:
            self.jobs.set(row, state="queued", worker=None, repair=1, repairs=1, note=words)
        elif code in (WRONG, REPAIRABLE):
            self.failed(row, words or f"the command ended with exit code {code}")
        else:
            self.again(row, words or f"the command ended with exit code {code}", stored)

    def again(self, row: sqlite3.Row, words: str, stored: int) -> None:
        """Queues a job for another attempt, later each time; after several that wrote nothing it has failed. Called in
        a transaction."""
        failures = 1 if stored > row["began"] else row["failures"] + 1
        if failures >= self.limits.attempts:
            self.failed(row, f"given up after {failures} attempts that wrote nothing. The last: {words}")
            return
        wait = self.limits.backoff_s * 2.0 ** (failures - 1)
        later = self.clock.monotonic() + wait
        self.jobs.set(
            row, state="queued", worker=None, failures=failures, lost=0, not_before=later, note=words, rate=None
        )

    def done(self, row: sqlite3.Row, store: str) -> None:
        rows = self.rows_in(store)
        ended = {"ended": self.clock.now(), "error": None, "note": "", "rows": rows, "total": rows}
        self.jobs.set(row, state="done", worker=None, store=store, **ended)
        self.catalog.touch(store)

    def failed(self, row: sqlite3.Row, words: str) -> None:
        self.jobs.set(row, state="failed", worker=None, error=words, ended=self.clock.now())

    def cancel(self, job: int) -> Job:
        """Raises WrongStateError for a job that has ended otherwise."""
        with self.database.transaction():
            row = self.jobs.row(job)
            if row["state"] in ("done", "failed"):
                raise WrongStateError(f"job {job}: is {row['state']} already, so there is nothing to cancel")
            if row["state"] != "cancelled":
                self.jobs.set(row, state="cancelled", ended=self.clock.now())
            return self.jobs.job(job)

    def give_up(self, job: int, words: str) -> Job:
        """Has a queued job fail that no worker could begin. Another job is left as it is."""
        with self.database.transaction():
            row = self.jobs.row(job)
            if row["state"] == "queued" and row["worker"] is None:
                self.failed(row, words[:MOST_WORDS])
            return self.jobs.job(job)

    def remark(self, job: int, note: str) -> None:
        """Notes what a queued job waits for."""
        with self.database.transaction():
            row = self.jobs.row(job)
            if row["state"] == "queued" and row["note"] != note[:MOST_WORDS]:
                self.jobs.set(row, note=note[:MOST_WORDS])

    def damaged(self, store: str, words: str) -> Job:
        """Queues the last job of a store again, to repair it first; the job itself where it is open. Raises
        WrongStateError where there is none, or another one makes the same."""
        with self.database.transaction():
            row = self.database.one("SELECT * FROM job WHERE store = ? ORDER BY id DESC LIMIT 1", store)
            if row is None:
                raise WrongStateError(
                    f"store {store}: no job of this service made it, so none can repair it. Run: sagsae store verify "
                    "--repair on the server's machine, then the harvest again"
                )
            if row["state"] in ("done", "failed", "cancelled"):
                twin = f"SELECT id FROM job WHERE key = ? AND extent = ? AND state IN {OPEN}"
                if (other := self.database.one(twin, row["key"], row["extent"])) is not None:
                    return self.jobs.job(other["id"])
                fresh = {"failures": 0, "repair": 1, "repairs": 1, "error": None, "ended": None, "note": words[:500]}
                self.jobs.set(row, state="queued", not_before=self.clock.monotonic(), **fresh)
            return self.jobs.job(row["id"])

    def retry(self, job: int) -> Job:
        """Raises WrongStateError for a job that is open or done, or has an open twin; QuotaError."""
        with self.database.transaction():
            row = self.jobs.row(job)
            if row["state"] not in ("failed", "cancelled") or row["worker"] is not None:
                state = "still being stopped" if row["worker"] is not None and row["ended"] else row["state"]
                raise WrongStateError(f"job {job}: is {state}. Only failed and cancelled jobs can be queued again")
            twin = f"SELECT id FROM job WHERE key = ? AND extent = ? AND state IN {OPEN}"
            if (other := self.database.one(twin, row["key"], row["extent"])) is not None:
                raise WrongStateError(f"job {job}: job {other['id']} makes the same already")
            self.space.make_room(max(0, row["expected"] - self.space.own(row["store"])), {row["store"]})
            fresh = {"failures": 0, "lost": 0, "repair": 0, "repairs": 0, "error": None, "ended": None, "note": ""}
            self.jobs.set(row, state="queued", not_before=self.clock.monotonic(), **fresh)
        self.space.delete_leaving()
        return self.jobs.job(job)


def settings_for(planned: Mapping[str, Any], new: NewStore) -> dict[str, Any]:
    """The settings of the command that makes a store, without the folder of the stores."""
    if new.recode_from:
        return {"source": new.recode_from, "codec": planned["wanted"]["codec"]}
    config = harvest_of(HarvestConfig.model_validate(planned["config"]), new)
    return config.model_dump(mode="json", exclude_none=True, exclude={"out"})
