"""Random schedules of requests, workers, readers, kills and restarts against the service's state."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.cache import HOOKS, SHARD, FakeHarvest, TestClock, disk_bytes, planned, spec_of

from harvest.serve.database import DATABASE
from harvest.serve.records import Limits
from harvest.serve.state import State
from shared.refusals import HeldError, LapsedError, NotYoursError, QuotaError, WrongStateError
from shared.request import TakenJob, WorkerInfo

QUOTA = 330_000
"""Room for about ten shards."""
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where syncing costs nothing."""
KEYS, SHARDS = st.integers(0, 2), st.integers(1, 5)
OPEN = ("queued", "running", "verifying")


@dataclass
class Attempt:
    """What a worker is doing: it is given a job, and writes its store."""

    taken: TakenJob
    store: FakeHarvest
    worker: WorkerInfo


class Schedules(RuleBasedStateMachine):
    """The quota is never exceeded; what is pinned or leased stays; a job has one attempt at a time and is never lost;
    the revision grows."""

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="schedules-", dir=MEMORY))
        self.clock = TestClock(wall=4_000_000_000.0)
        self.open()
        self.running: dict[int, Attempt] = {}
        self.lapsed: list[TakenJob] = []
        self.leases: dict[str, str] = {}
        self.pins: set[str] = set()
        self.asked: set[int] = set()
        self.revision = 0

    def open(self) -> None:
        limits = Limits(free_share=0.0, attempts=3, min_age_s=600.0, light_grace_s=0.0, measure_s=1.0)
        self.state = State.open(self.root, QUOTA, clock=self.clock.clock, limits=limits)

    def teardown(self) -> None:
        if hasattr(self, "state"):
            try:
                self.finish()
            finally:
                self.state.close()
                shutil.rmtree(self.root)

    # people
    @rule(key=KEYS, shards=SHARDS, covering=st.booleans(), low=st.booleans(), pin=st.booleans())
    def ask(self, key: int, shards: int, covering: bool, low: bool, pin: bool) -> None:
        words = {"priority": "low"} if low else {}
        words |= {"pin": "p"} if pin and len(self.pins) < 2 else {}
        document = planned(spec_of(shards * SHARD, seed=key), "covering" if covering else "exact", **words)
        try:
            answer = self.state.ask(document, "ann")
        except QuotaError:
            return
        store = answer.hookpoints[HOOKS[0]].store
        if "pin" in words:
            self.pins.add(store)
        if answer.state == "ready":
            assert answer.job is None
            assert self.state.store(store).state == "final"
            assert (answer.tokens == shards * SHARD) is answer.exact
            assert (answer.tokens or 0) >= shards * SHARD
        else:
            assert answer.job is not None
            self.asked.add(answer.job)

    @rule(data=st.data())
    def cancel_or_retry(self, data: st.DataObject) -> None:
        if not self.asked:
            return
        job = data.draw(st.sampled_from(sorted(self.asked)))
        before = self.state.job(job).state
        try:
            after = (self.state.cancel if before in OPEN else self.state.retry)(job)
            assert after.state == ("cancelled" if before in OPEN else "queued")
        except (WrongStateError, QuotaError):
            assert before not in OPEN

    @rule(data=st.data(), force=st.booleans())
    def remove(self, data: st.DataObject, force: bool) -> None:
        names = sorted(row.id for row in self.state.stores().stores)
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        held = name in self.pins or name in self.leases.values()
        try:
            self.state.remove(name, force)
            assert force or not held
            self.pins.discard(name)
            self.leases = {lease: store for lease, store in self.leases.items() if store != name}
        except HeldError:
            assert held or self.state.space.jobs_of(name)

    # readers
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        names = sorted(row.id for row in self.state.stores().stores)
        if names and len(self.leases) < 2:
            store = data.draw(st.sampled_from(names))
            self.leases[self.state.lease(store, "train", 1000.0).id] = store

    @rule(data=st.data(), renew=st.booleans())
    def renew_or_release(self, data: st.DataObject, renew: bool) -> None:
        if self.leases:
            lease = data.draw(st.sampled_from(sorted(self.leases)))
            if renew:
                self.state.renew(lease)
            else:
                self.state.release(lease)
                del self.leases[lease]

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        if self.pins:
            store = data.draw(st.sampled_from(sorted(self.pins)))
            self.state.unpin(store, "p")
            self.pins.discard(store)

    # workers
    @rule(number=st.integers(0, 2))
    def take(self, number: int) -> None:
        worker = WorkerInfo(name=f"box:{number}")
        if any(attempt.worker.name == worker.name for attempt in self.running.values()):
            return
        taken = self.state.take(worker)
        if taken is None:
            return
        assert taken.job not in self.running
        assert taken.store not in {attempt.taken.store for attempt in self.running.values()}
        self.running[taken.job] = Attempt(taken, self.begun(taken), worker)

    def begun(self, taken: TakenJob) -> FakeHarvest:
        """What `sagsae harvest` does first: it begins or finds its store, and links what others hold."""
        rows = {row.id: row for row in self.state.stores().stores}
        request = self.state.table.row(taken.job)["planned"]
        seed = next(seed for seed in range(3) if planned(spec_of(seed=seed))["wanted"]["shapes"][0]["key"] in request)
        lenders = [self.root / name for name, row in rows.items() if name != taken.store]
        key = self.state.job(taken.job).key
        lenders = [path for path in lenders if rows[path.name].key == key and rows[path.name].state == "final"]
        spec = spec_of(taken.settings["tokens"], seed=seed)
        store = FakeHarvest(self.root, taken.store, spec, 20_000, tuple(lenders))
        return store if taken.store in rows else store.begin()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        attempt = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        self.next_shard(attempt)

    def next_shard(self, attempt: Attempt) -> bool:
        there = len(list((self.root / attempt.taken.store).glob(f"{HOOKS[0]}/c/*/0")))
        if there < attempt.store.spec.n_shards:
            attempt.store.shard(there)
            return True
        attempt.store.finish()
        return False

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.running)))
        if not self.state.beat(job, self.running[job].taken.attempt, 1, 10.0, "at work"):
            assert self.state.job(job).state in ("cancelled", "failed")
            self.end(job, 130)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), code=st.sampled_from([0, 0, 0, 1, 2, 3, 75, -9, 130]))
    def stop(self, data: st.DataObject, code: int) -> None:
        job = data.draw(st.sampled_from(sorted(self.running)))
        if code == 0:
            while self.next_shard(self.running[job]):
                pass
        self.end(job, code)

    def end(self, job: int, code: int) -> None:
        attempt = self.running.pop(job)
        cancelled = self.state.job(job).state
        ended = self.state.end(job, attempt.taken.attempt, code, "words")
        if cancelled not in OPEN:
            assert ended.state == cancelled
        elif code == 0:
            assert ended.state == "done"
        else:
            assert ended.state in ("queued", "failed")

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        """A worker is killed, with its command."""
        self.lapsed.append(self.running.pop(data.draw(st.sampled_from(sorted(self.running)))).taken)
        self.pass_time(31.0)

    @precondition(lambda self: self.lapsed)
    @rule(data=st.data())
    def wake(self, data: st.DataObject) -> None:
        """A worker that was stopped goes on, too late."""
        taken = data.draw(st.sampled_from(self.lapsed))
        with pytest.raises(NotYoursError):
            self.state.beat(taken.job, taken.attempt, 99)
        with pytest.raises(NotYoursError):
            self.state.end(taken.job, taken.attempt, 0)

    # time, and the server
    @rule(seconds=st.sampled_from([1.0, 20.0, 700.0]))
    def pass_time(self, seconds: float) -> None:
        """Workers that are at work beat in time, and readers renew."""
        while seconds > 0:
            self.clock.move(min(20.0, seconds))
            seconds -= 20.0
            for job in list(self.running):
                self.state.beat(job, self.running[job].taken.attempt, 1)
            for lease in self.leases:
                self.state.renew(lease)
            self.state.sweep()

    @rule(hours=st.sampled_from([-1, 1]))
    def set_clock(self, hours: int) -> None:
        self.clock.wall += 3600 * hours

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        if killed:  # the files as a process leaves them that is killed now: the log of the last changes, not joined
            copies = {path.name: path.read_bytes() for path in self.root.glob(f"{DATABASE}*")}
        self.state.close()
        if killed:
            for name, data in copies.items():
                (self.root / name).write_bytes(data)
        self.open()

    @rule()
    def lose_database(self) -> None:
        self.state.close()
        for path in self.root.glob(f"{DATABASE}*"):
            path.unlink()
        self.open()
        for attempt in self.running.values():
            with pytest.raises(NotYoursError):
                self.state.beat(attempt.taken.job, attempt.taken.attempt)
            self.lapsed.append(attempt.taken)
        for lease in self.leases:
            with pytest.raises(LapsedError):
                self.state.renew(lease)
        self.running, self.leases, self.asked = {}, {}, set()
        self.revision = 0  # here the clock may have been set back

    # what holds at any moment
    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "state"):
            return
        assert disk_bytes(self.root) <= QUOTA
        self.state.scan()
        usage = self.state.usage()
        assert usage.used == disk_bytes(self.root) - usage.leaving
        assert usage.used + usage.reserved + usage.leaving <= QUOTA
        now = self.state.changes_since(0).revision
        assert now >= self.revision
        self.revision = now
        rows = {row.id: row for row in self.state.stores().stores}
        for store in {*self.pins, *self.leases.values()} & self.seen:
            assert store in rows
            assert (self.root / store / "zarr.json").exists()
        self.seen = set(rows)
        jobs = {job.id: job for job in self.state.jobs(limit=500).jobs}
        assert self.asked <= jobs.keys()
        for job, attempt in self.running.items():
            assert jobs[job].attempt == attempt.taken.attempt
            assert jobs[job].worker == attempt.worker.name
        assert {job.id for job in jobs.values() if job.state in ("running", "verifying")} <= self.running.keys()

    seen: set[str] = set()  # noqa: RUF012 (of one machine: it is replaced, never changed)

    def finish(self) -> None:
        """Every open job can be done, unless what is held leaves no space."""
        for job in list(self.running):
            self.end(job, 130)
        for store in list(self.pins):
            self.state.unpin(store, "p")
        for lease in self.leases:
            self.state.release(lease)
        self.leases, self.pins = {}, set()
        for _ in range(60):
            self.pass_time(700.0)
            self.take(0)
            for job in list(self.running):
                self.stop_well(job)
            if not self.state.queue():
                break
        for job in self.state.queue():
            assert "do not fit" in job.note, job

    def stop_well(self, job: int) -> None:
        while self.next_shard(self.running[job]):
            pass
        self.end(job, 0)


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestSchedules.pytestmark = [pytest.mark.timeout(280)]
