"""Requests: an answer from the catalog at once, or the jobs that make one. Equal requests share their jobs."""

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from harvest.reuse.match import Found, NewStore, Wanted, find_answer
from harvest.reuse.words import answer_in_words, cost_in_words, rows_to_harvest
from harvest.serve.catalog import Catalog, mark_of, read_spec_of
from harvest.serve.database import OPEN
from harvest.serve.jobs import LIGHT, PRIORITIES, JobTable
from harvest.serve.records import Limits
from harvest.serve.space import Space, size_of
from shared.refusals import QueueFullError
from shared.request import CacheAnswer, Place, RequestPlan
from shared.store.opened import spec_id

MOST_MEMOS: Final = 10_000


@dataclass(frozen=True)
class AskedPlan:
    """What the planner made of a request, read from its JSON."""

    document: Mapping[str, Any]
    wanted: Wanted

    @property
    def request(self) -> dict[str, Any]:
        found = self.document.get("request")
        return dict(found) if isinstance(found, Mapping) else {}

    @property
    def priority(self) -> int:
        return PRIORITIES.index(self.request.get("priority") or "normal")


class Requests:
    """What is asked, and what is answered."""

    def __init__(self, jobs: JobTable, catalog: Catalog, space: Space, limits: Limits) -> None:
        self.jobs, self.catalog, self.space, self.limits = jobs, catalog, space, limits
        self.database, self.clock = jobs.database, jobs.clock

    # what a request's words mean
    def remembered(self, request_hash: str) -> dict[str, Any] | None:
        """What was planned for a request, unless that is too old or of another version."""
        row = self.database.one("SELECT planned, until FROM memo WHERE hash = ?", request_hash)
        now = self.clock.now()
        if row is None or not now < row["until"] <= now + self.limits.memo_s:
            return None
        with contextlib.suppress(KeyError, TypeError, ValueError, ValidationError):
            planned: dict[str, Any] = json.loads(row["planned"])
            Wanted.from_json(planned["wanted"])
            return planned
        return None

    def remember(self, request_hash: str, planned: Mapping[str, Any], ttl_s: float | None) -> None:
        with self.database.transaction():
            until = self.clock.now() + min(ttl_s or self.limits.memo_s, self.limits.memo_s)
            self.database.run("INSERT OR REPLACE INTO memo VALUES(?, ?, ?)", request_hash, json.dumps(planned), until)
            old = "SELECT hash FROM memo ORDER BY until DESC LIMIT -1 OFFSET ?"
            self.database.run(f"DELETE FROM memo WHERE hash IN ({old})", MOST_MEMOS)

    # answers
    def found(self, wanted: Wanted) -> Found:
        """How the catalog answers. Where it does not, or its rows are no longer true, the folders are looked at
        first."""
        found = self.answer_in(wanted)
        if found.ready and all(self.catalog.is_current(store) for store in set(found.places.values())):
            return found
        self.catalog.scan()
        self.space.measure()
        return self.answer_in(wanted)

    def answer_in(self, wanted: Wanted) -> Found:
        return find_answer(wanted, self.catalog.that_may_answer(wanted))

    def ask(self, document: Mapping[str, Any], who: str) -> CacheAnswer:
        """Answers, or attaches to open jobs, or queues new ones. Raises QuotaError, QueueFullError."""
        planned = AskedPlan(document, Wanted.from_json(document["wanted"]))
        found = self.found(planned.wanted)
        with self.database.transaction():
            found = self.answer_in(planned.wanted)  # the lock keeps the catalog as it is from here on
            jobs = [] if found.ready else self.jobs_for(planned, found, who)
            places = set(found.places.values()) if found.ready else {self.jobs.row(job)["store"] for job in jobs}
            for store in places:
                self.catalog.touch(store)
                if pin := planned.request.get("pin"):
                    self.space.holds.pin(store, str(pin))
            answer = self.ready(planned, found) if found.ready else self.underway(planned, found, jobs)
        self.space.delete_leaving()
        return answer

    def jobs_for(self, planned: AskedPlan, found: Found, who: str) -> list[int]:
        """The jobs that make what is missing, one for each store. Called in a transaction."""
        open_now = [self.attached(planned, new) for new in found.new]
        lacking = [new for new, job in zip(found.new, open_now, strict=True) if job is None]
        self.check_queue(len(lacking), who)
        keep = {*found.places.values(), *found.donors}
        self.space.make_room(sum(size_of(new, found.tokens) for new in lacking), keep)
        queued = iter([self.queue(planned, found, new, who) for new in lacking])
        return [next(queued) if job is None else job for job in open_now]

    def attached(self, planned: AskedPlan, new: NewStore) -> int | None:
        """The open job that makes this, or more than this where that will do: it is asked for once more."""
        open_jobs = self.database.all(f"SELECT * FROM job WHERE key = ? AND state IN {OPEN}", key_of(planned))
        for row in open_jobs:
            tokens, hooks = json.loads(row["extent"])
            same = row["extent"] == extent_of(planned, new)
            covers = planned.wanted.accept == "covering" and new.action not in LIGHT
            larger = (planned.wanted.tokens or 0) < (tokens or 0) and planned.wanted.tokens is not None
            if same or (covers and larger and set(hooks) >= set(new.hookpoints)):
                priority = min(row["priority"], planned.priority)
                self.jobs.set(row, asked=row["asked"] + 1, priority=priority)
                return int(row["id"])
        return None

    def queue(self, planned: AskedPlan, found: Found, new: NewStore, who: str) -> int:
        """Adds a job. Older jobs that write the same hookpoints go first, so they get its priority, too."""
        key, now = key_of(planned), self.clock.now()
        raised = f"priority > ? AND key = ? AND state IN {OPEN}"
        for row in self.database.all(f"SELECT * FROM job WHERE {raised}", planned.priority, key):
            self.jobs.set(row, priority=planned.priority)
        values = {
            "key": key,
            "extent": extent_of(planned, new),
            "state": "queued",
            "action": new.action,
            "store": new.store,
            "planned": json.dumps(planned.document),
            "request": json.dumps(planned.request),
            "model": planned.wanted.label,
            "who": who[:200],
            "priority": planned.priority,
            "donors": json.dumps(found.donors),
            "expected": self.space.own(new.store) + size_of(new, found.tokens),
            "total": found.tokens,
            "created": now,
            "not_before": self.clock.monotonic(),
            "revision": self.database.revise(),
        }
        return self.database.put("job", values)

    def check_queue(self, more: int, who: str) -> None:
        """Raises QueueFullError."""
        if not more:
            return
        open_jobs = f"SELECT count(*) FROM job WHERE state IN {OPEN}"
        there, theirs = self.database.number(open_jobs), self.database.number(f"{open_jobs} AND who = ?", who[:200])
        if there + more > self.limits.open_jobs:
            raise QueueFullError(f"{there:,} jobs are open already, which is the most. Ask again when some have ended")
        if theirs + more > self.limits.open_jobs_each:
            raise QueueFullError(
                f"{theirs} jobs that you asked for are open already, and at most {self.limits.open_jobs_each} may be. "
                "Ask again when some have ended, or cancel some"
            )

    def ready(self, planned: AskedPlan, found: Found) -> CacheAnswer:
        return CacheAnswer(
            state="ready",
            key=key_of(planned),
            hookpoints=self.places(found.places),
            exact=found.exact,
            tokens=found.tokens,
            spec_id=self.spec_id(found),
        )

    def spec_id(self, found: Found) -> str | None:
        """The id of the answer's only store; None where there are several."""
        stores = set(found.places.values())
        row = self.database.one("SELECT spec FROM store WHERE id = ?", min(stores)) if len(stores) == 1 else None
        return None if row is None else spec_id(read_spec_of(row))

    def underway(self, planned: AskedPlan, found: Found, jobs: Collection[int]) -> CacheAnswer:
        """The answer while jobs make it. Its job is the last one: when that is done, mostly all are."""
        rows = [self.jobs.row(job) for job in jobs]
        stores = {hook: row["store"] for row in rows for hook in json.loads(row["extent"])[1]}
        places = {hook: stores.get(hook, store) for hook, store in found.places.items()}
        last = max(rows, key=lambda row: (row["state"] == "queued", row["priority"], row["id"]))
        totals = {row["total"] for row in rows}
        return CacheAnswer(
            state="queued" if all(row["state"] == "queued" for row in rows) else "running",
            key=key_of(planned),
            hookpoints=self.places(places),
            exact=found.exact and totals <= {found.tokens},
            tokens=found.tokens,
            job=last["id"],
            place=self.jobs.place(last) if last["state"] == "queued" else 0,
            eta_s=self.jobs.eta(last),
            plan=self.plan(planned, found, ()),
        )

    def places(self, stores: Mapping[str, str]) -> dict[str, Place]:
        return {hook: Place(store=store, file=str(self.catalog.root / store)) for hook, store in stores.items()}

    # what it would take
    def preview(self, document: Mapping[str, Any]) -> RequestPlan:
        """What `ask` would do. Raises QuotaError."""
        planned = AskedPlan(document, Wanted.from_json(document["wanted"]))
        found = self.found(planned.wanted)
        keep = {*found.places.values(), *found.donors}
        with self.database.lock:
            need = sum(size_of(new, found.tokens) for new in found.new)
            evicts = [] if found.ready else self.space.would_evict(need, keep)
        return self.plan(planned, found, tuple(evicts))

    def plan(self, planned: AskedPlan, found: Found, evicts: tuple[str, ...]) -> RequestPlan:
        speed, rows = self.jobs.rows_per_s(planned.wanted.label), rows_to_harvest(found)
        seconds = 0.0 if rows == 0 else rows / speed if speed and rows is not None else None
        names = {*found.places.values(), *(new.store for new in found.new)}
        there = {name: found.tokens or 0 for name in names if mark_of(self.catalog.root / name)}
        cost = cost_in_words(found.bytes_to_write, seconds)
        return RequestPlan(
            action=found.action,
            tokens=found.tokens,
            shards_to_harvest=found.shards_to_harvest,
            bytes_to_write=found.bytes_to_write,
            seconds=seconds,
            from_stores=found.donors if found.new else tuple(sorted(set(found.places.values()))),
            evicts=evicts,
            text=answer_in_words(found, there, cost, evicts=evicts),
        )


def key_of(planned: AskedPlan) -> str:
    """The key of an answer. That of a whole corpus is one of two, and the first stands for both."""
    return planned.wanted.keys[0]


def extent_of(planned: AskedPlan, new: NewStore) -> str:
    return json.dumps([planned.wanted.tokens, sorted(new.hookpoints)])
