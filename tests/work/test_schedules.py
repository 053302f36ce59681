"""Random schedules of requests, workers, readers, kills and restarts against the service's state.

Four stores fill most of the quota at the start, so most schedules evict some. A slow disk deletes nothing for a while.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.serving.account import LEASE_S, MIN_AGE_S, QUOTA, Account, Lease
from support.serving.cache import HOOKS, SHARD, TestClock, disk_bytes, planned, spec_of

from harvest.serve.database import DATABASE
from harvest.serve.records import Limits
from harvest.serve.state import State
from shared.refusals import HeldError, LapsedError, NotYoursError, QuotaError, WrongStateError
from shared.request import TakenJob, WorkerInfo

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where syncing costs nothing."""
KEYS, SHARDS = st.integers(0, 3), st.integers(1, 5)
OPEN = ("queued", "running", "verifying")
DELETE = shutil.rmtree


class Schedules(RuleBasedStateMachine):
    """The quota is never exceeded; what is pinned, leased, unfinished or just used stays; a key has one writer at a
    time; a job is never lost; the revision grows."""

    evicting: ClassVar = 0
    """Schedules that evicted a store."""

    @initialize(slow=st.booleans(), old=st.integers(0, 3), why=st.sampled_from(["", "pin", "lease", "used"]), key=KEYS)
    def begin(self, slow: bool, old: int, why: str, key: int) -> None:
        """A server starts; a store is held, or all were just used, and more is asked than there is room for."""
        self.root = Path(tempfile.mkdtemp(prefix="schedules-", dir=MEMORY))
        self.clock = TestClock(wall=4_000_000_000.0)
        self.account = Account(self.root, self.clock)
        self.account.old_stores(3, 3, 3, 2)
        self.running = self.account.running
        self.lapsed: list[TakenJob] = []
        self.asked: dict[int, int] = {}
        """The seed of each job."""
        self.revision = 0
        self.open()
        self.slow = slow
        """Whether the disk deletes nothing for now."""
        self.deleting = patch("shutil.rmtree", lambda path, **how: None if self.slow else DELETE(path, **how))
        self.deleting.start()
        if why in ("pin", "lease"):
            (self.hold_by_pin if why == "pin" else self.hold_by_lease)(f"old-{old}")
        if why != "used":
            self.pass_time(MIN_AGE_S + 20.0)
        self.want(key, 5, False)

    def open(self) -> None:
        limits = Limits(free_share=0.0, attempts=3, min_age_s=MIN_AGE_S, light_grace_s=0.0, measure_s=1.0)
        self.state = State.open(self.root, QUOTA, clock=self.clock.clock, limits=limits)

    def teardown(self) -> None:
        if hasattr(self, "deleting"):
            try:
                self.finish()
            finally:
                Schedules.evicting += self.account.evicted > 0
                self.deleting.stop()
                self.state.close()
                shutil.rmtree(self.root)

    # people
    @rule(key=KEYS, shards=SHARDS, covering=st.booleans(), low=st.booleans(), pin=st.booleans())
    def ask(self, key: int, shards: int, covering: bool, low: bool, pin: bool) -> None:
        words = {"priority": "low"} if low else {}
        words |= {"pin": "p"} if pin and len(self.account.pins) < 2 else {}
        document = planned(spec_of(shards * SHARD, seed=key), "covering" if covering else "exact", **words)
        going = self.previewed(document)
        try:
            answer = self.state.ask(document, "ann")
        except QuotaError as error:
            self.account.check_refusal({each["store"]: each["why"] for each in error.held_by})
            return
        assert self.account.there - self.account.folders() <= going
        store = answer.hookpoints[HOOKS[0]].store
        if "pin" in words:
            self.account.pins.add(store)
        self.account.use(store)
        if answer.state == "ready":
            assert answer.job is None
            assert self.state.store(store).state == "final"
            assert (answer.tokens == shards * SHARD) is answer.exact
            assert (answer.tokens or 0) >= shards * SHARD
        else:
            assert answer.job is not None
            self.asked[answer.job] = key

    def previewed(self, document: dict[str, object]) -> set[str]:
        """The stores that would go, all of which may."""
        try:
            going = set(self.state.preview(document).evicts)
        except QuotaError:
            return set()  # unless it attaches to a job, it is refused
        assert self.account.folders() == self.account.there
        assert not {store: why for store in going if (why := self.account.why_kept(store))}
        return going

    @rule(key=KEYS, shards=SHARDS, pin=st.booleans())
    def want(self, key: int, shards: int, pin: bool) -> None:
        """Somebody asks, and a worker makes it."""
        self.ask(key, shards, False, False, pin)
        self.account.check_disk()
        self.make(0)

    @rule(shards=st.integers(3, 5), key=KEYS)
    def want_much(self, key: int, shards: int) -> None:
        """Somebody asks for a large store, long after the last use of the others."""
        self.pass_time(MIN_AGE_S + 20.0)
        self.want(key, shards, False)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel_or_retry(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.asked)))
        before = self.state.job(job).state
        try:
            after = (self.state.cancel if before in OPEN else self.state.retry)(job)
            assert after.state == ("cancelled" if before in OPEN else "queued")
        except (WrongStateError, QuotaError):
            assert before not in OPEN

    @precondition(lambda self: self.account.there)
    @rule(data=st.data(), force=st.booleans())
    def remove(self, data: st.DataObject, force: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.account.there)))
        held = self.account.held(name)
        try:
            self.state.remove(name, force)
        except HeldError:
            assert held or self.state.space.jobs_of(name)
            return
        assert force or not held
        assert name not in {attempt.taken.store for attempt in self.running.values()}
        self.account.forget(name)
        self.account.there.remove(name)

    @precondition(lambda self: self.account.there and len(self.account.pins) < 2)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        self.hold_by_pin(data.draw(st.sampled_from(sorted(self.account.there))))

    def hold_by_pin(self, store: str) -> None:
        self.state.pin(store, "p")
        self.account.pins.add(store)

    @precondition(lambda self: self.account.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        store = data.draw(st.sampled_from(sorted(self.account.pins)))
        self.state.unpin(store, "p")
        self.account.pins.discard(store)

    # readers
    @precondition(lambda self: self.account.there and len(self.account.leases) < 2)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        self.hold_by_lease(data.draw(st.sampled_from(sorted(self.account.there))))

    def hold_by_lease(self, store: str) -> None:
        lease = self.state.lease(store, "train", LEASE_S).id
        self.account.leases[lease] = Lease(store, self.clock.since + LEASE_S)
        self.account.use(store)

    @precondition(lambda self: self.account.leases)
    @rule(data=st.data(), way=st.sampled_from(["renew", "release", "leave"]))
    def read(self, data: st.DataObject, way: str) -> None:
        """A reader renews its lease, gives it back, or is killed and does neither."""
        name = data.draw(st.sampled_from(sorted(self.account.leases)))
        lease = self.account.leases[name]
        lease.renewed = way == "renew"
        if way == "renew":
            self.renew(name)
        elif way == "release":
            self.state.release(name)
            del self.account.leases[name]
            self.account.use(lease.store)

    def renew(self, name: str) -> None:
        self.state.renew(name)
        self.account.leases[name].deadline = self.clock.since + LEASE_S

    # workers
    @rule(number=st.integers(0, 2))
    def take(self, number: int) -> None:
        worker = WorkerInfo(name=f"box:{number}")
        if any(attempt.worker == worker.name for attempt in self.running.values()):
            return
        taken = self.state.take(worker)
        if taken is not None:
            self.account.begin(taken, worker, self.asked[taken.job])

    @rule(number=st.integers(0, 2))
    def make(self, number: int) -> None:
        """A worker does a whole job."""
        before = set(self.running)
        self.take(number)
        for job in set(self.running) - before:
            self.stop_well(job)

    def a_job(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.running)))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), shards=st.integers(1, 3))
    def write(self, data: st.DataObject, shards: int) -> None:
        job = self.a_job(data)
        for _ in range(shards):
            self.account.next_shard(job)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        job = self.a_job(data)
        if not self.state.beat(job, self.running[job].taken.attempt, 1, 10.0, "at work"):
            assert self.state.job(job).state in ("cancelled", "failed")
            self.end(job, 130)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), code=st.sampled_from([0, 0, 0, 1, 2, 3, 75, -9, 130]))
    def stop(self, data: st.DataObject, code: int) -> None:
        if code == 0:
            self.stop_well(self.a_job(data))
        else:
            self.end(self.a_job(data), code)

    def stop_well(self, job: int) -> None:
        while self.account.next_shard(job):
            pass
        self.end(job, 0)

    def end(self, job: int, code: int) -> None:
        attempt = self.running.pop(job)
        before = self.state.job(job).state
        ended = self.state.end(job, attempt.taken.attempt, code, "words")
        if before not in OPEN:
            assert ended.state == before
        elif code == 0:
            assert ended.state == "done"
            self.account.use(attempt.taken.store)
        else:
            assert ended.state in ("queued", "failed")

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        """A worker is killed, with its command."""
        self.lapsed.append(self.running.pop(self.a_job(data)).taken)
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

    # time, the disk, and the server
    @rule(seconds=st.sampled_from([1.0, 20.0, MIN_AGE_S + 20.0]))
    def pass_time(self, seconds: float) -> None:
        """Workers that are at work beat in time, and readers renew."""
        while seconds > 0:
            self.clock.move(min(20.0, seconds))
            seconds -= 20.0
            for job in self.running:
                self.state.beat(job, self.running[job].taken.attempt, 1)
            for name, lease in list(self.account.leases.items()):
                if lease.renewed:
                    self.renew(name)
                elif lease.deadline <= self.clock.since:
                    with pytest.raises(LapsedError):
                        self.state.renew(name)
                    del self.account.leases[name]
                    self.account.use(lease.store)
            self.state.sweep()
            self.account.check_disk()

    @rule(hours=st.sampled_from([-1, 1]))
    def set_clock(self, hours: int) -> None:
        self.clock.wall += 3600 * hours
        self.account.used.clear()

    @rule(slow=st.booleans())
    def slow_down(self, slow: bool) -> None:
        """The disk begins or ends to delete nothing."""
        self.slow = slow

    @rule(killed=st.booleans())
    def restart(self, killed: bool) -> None:
        if killed:  # the files as a process leaves them that is killed now: the log of the last changes, not joined
            copies = {path.name: path.read_bytes() for path in self.root.glob(f"{DATABASE}*")}
        self.state.close()
        if killed:
            for name, data in copies.items():
                (self.root / name).write_bytes(data)
        self.open()
        for lease in self.account.leases.values():
            lease.deadline = self.clock.since + LEASE_S

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
        for lease in self.account.leases:
            with pytest.raises(LapsedError):
                self.state.renew(lease)
        for lost in (self.account.leases, self.account.used, self.running, self.asked):
            lost.clear()
        self.revision = 0  # here the clock may have been set back

    # what holds at any moment
    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "deleting"):
            return
        self.account.check_disk()
        self.state.scan()
        usage = self.state.usage()
        assert 0 <= usage.used + usage.leaving - disk_bytes(self.root) < 1000  # the words in the locks of what goes
        assert usage.used + usage.reserved <= QUOTA
        now = self.state.changes_since(0).revision
        assert now >= self.revision
        self.revision = now
        self.account.check_stores(self.state.stores().stores)
        jobs = {job.id: job for job in self.state.jobs(limit=500).jobs}
        assert self.asked.keys() <= jobs.keys()
        self.account.check_jobs(jobs)

    def finish(self) -> None:
        """Every open job can be done, unless what is held leaves no space."""
        self.slow = False
        for job in list(self.running):
            self.end(job, 130)
        for store in self.account.pins:
            self.state.unpin(store, "p")
        for lease in self.account.leases:
            self.state.release(lease)
        self.account.leases.clear()
        self.account.pins.clear()
        for _ in range(60):
            self.pass_time(MIN_AGE_S + 20.0)
            self.make(0)
            if not self.state.queue():
                break
        for left in self.state.queue():
            assert "do not fit" in left.note, left


SETTINGS = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.mark.timeout(280)
def test_what_must_hold_in_random_schedules() -> None:
    Schedules.evicting = 0
    run_state_machine_as_test(Schedules, settings=SETTINGS)
    assert Schedules.evicting >= 10, "too few schedules evict a store to say what stays"
