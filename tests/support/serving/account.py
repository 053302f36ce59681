"""What must hold of a cache's stores and its disk, by what people, readers and workers did there.

It is kept beside the service and asks it nothing: it looks at the disk, and remembers who holds which store.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shared.request import Job, StoreRow, TakenJob, WorkerInfo
from support.serving.cache import HOOKS, SHARD, FakeHarvest, TestClock, disk_bytes, spec_of

QUOTA = 330_000
"""Room for about eleven shards."""
SHARD_BYTES = 27_000
"""Almost as much as the service expects of a shard, so that what it does not count exceeds the quota."""
MIN_AGE_S, LEASE_S = 300.0, 500.0
UNNOTED_S = 60.0
"""Seconds for which a further use of a store need not be noted."""


@dataclass
class Lease:
    store: str
    deadline: float
    renewed: bool = True
    """Whether its reader is still at work."""


@dataclass
class Attempt:
    """What a worker is doing: it was given a job, and writes its store."""

    taken: TakenJob
    worker: str
    seed: int
    store: FakeHarvest
    lenders: set[str]
    """The stores with most of its shards; one of them stays while it works."""


@dataclass
class Account:
    """Who holds which store, who writes which key, what was used lately, and what lies on the disk, by inode."""

    root: Path
    clock: TestClock
    pins: set[str] = field(default_factory=set)
    leases: dict[str, Lease] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    """The seed of each store: stores of one seed hold the same rows."""
    finished: set[str] = field(default_factory=set)
    used: dict[str, float] = field(default_factory=dict)
    """When each store was used, where the clock was not set since."""
    running: dict[int, Attempt] = field(default_factory=dict)
    there: set[str] = field(default_factory=set)
    """The stores that were there at the last look."""
    evicted: int = 0

    # what is done
    def old_stores(self, *shards: int) -> None:
        """Makes stores of so many shards, of a key each, that were there before the service."""
        for seed, count in enumerate(shards):
            store = FakeHarvest(self.root, f"old-{seed}", spec_of(count * SHARD, seed=seed), SHARD_BYTES).whole().name
            self.date(store)
            self.seeds[store] = seed
            self.finished.add(store)
            self.use(store)
        self.there = self.folders()

    def use(self, store: str) -> None:
        self.used[store] = self.clock.wall

    def forget(self, store: str) -> None:
        """Notes that a store is gone, and its pins and leases with it."""
        self.pins.discard(store)
        self.finished.discard(store)
        self.used.pop(store, None)
        self.leases = {name: lease for name, lease in self.leases.items() if lease.store != store}

    def begin(self, taken: TakenJob, worker: WorkerInfo, seed: int) -> None:
        """Does what `sagsae harvest` does first: it begins or finds its store, and looks what it can link."""
        assert seed not in {attempt.seed for attempt in self.running.values()}, "two workers write the same"
        self.check_disk()
        spec = spec_of(taken.settings["tokens"], seed=seed)
        alike = [name for name in sorted(self.there - {taken.store}) if self.seeds[name] == seed]
        lent = {name: min(spec.n_shards, self.shards(name)) for name in alike}
        most = max(lent.values(), default=0)
        best = {name for name, shards in lent.items() if shards == most > 0}
        paths = tuple(self.root / name for name in sorted(alike, key=lambda name: -lent[name]))
        store = FakeHarvest(self.root, taken.store, spec, SHARD_BYTES, paths)
        if taken.store not in self.there:
            store.begin()
            self.date(taken.store)
            self.seeds[taken.store] = seed
        self.running[taken.job] = Attempt(taken, worker.name, seed, store, best)
        self.check_disk()

    def next_shard(self, job: int) -> bool:
        """Writes one shard, or finishes the store and returns False."""
        attempt = self.running[job]
        name, there = attempt.taken.store, self.shards(attempt.taken.store)
        if there < attempt.store.spec.n_shards:
            attempt.store.shard(there)
            assert disk_bytes(self.root) <= QUOTA
            return True
        if name not in self.finished:
            attempt.store.finish()
            self.date(name)
            self.finished.add(name)
        return False

    def date(self, store: str) -> None:
        """Gives a store's description the time of the clock."""
        os.utime(self.root / store / "zarr.json", (self.clock.wall, self.clock.wall))

    # what lies on the disk
    def folders(self) -> set[str]:
        return {path.parent.name for path in self.root.glob("*/zarr.json") if not path.parent.name.startswith(".")}

    def shards(self, store: str) -> int:
        return len(list((self.root / store).glob(f"{HOOKS[0]}/c/*/0")))

    def still_to_write(self, attempt: Attempt) -> int:
        """Bytes that a worker will yet write, beside what it links."""
        have = max(self.shards(store) for store in {attempt.taken.store, *attempt.lenders & self.folders()})
        return max(0, attempt.store.spec.n_shards - have) * SHARD_BYTES

    # what must hold
    def leased(self) -> list[str]:
        """Stores with a lease that has not lapsed; once for each lease."""
        return [each.store for each in self.leases.values() if each.deadline > self.clock.since]

    def held(self, store: str) -> bool:
        return store in self.pins or store in self.leased()

    def why_kept(self, store: str) -> str | None:
        """Why a store must not be evicted now; None when it may be."""
        age = self.clock.wall - self.used.get(store, -MIN_AGE_S)
        reasons = {
            "pinned": store in self.pins,
            "leased": store in self.leased(),
            "unfinished": store not in self.finished,
            "used lately": age < MIN_AGE_S - UNNOTED_S,
        }
        return next((why for why, so in reasons.items() if so), None)

    def check_disk(self) -> None:
        """Whatever was evicted since the last look was free to go, and the quota holds even when all workers end."""
        now = self.folders()
        for store in self.there - now:
            assert self.why_kept(store) is None, (store, self.why_kept(store))
            self.forget(store)
            self.evicted += 1
        self.there = now
        for attempt in self.running.values():
            assert not attempt.lenders or attempt.lenders & now, "a worker's shards were evicted before it linked them"
        assert disk_bytes(self.root) + sum(map(self.still_to_write, self.running.values())) <= QUOTA

    def check_refusal(self, named: Mapping[str, str]) -> None:
        """Nothing went, and every store is named with what holds it."""
        assert self.folders() == self.there
        assert self.there <= named.keys()
        assert {named[store] for store in self.there & self.pins} <= {"pin"}
        assert {named[store] for store in {*self.leased()} - self.pins} <= {"lease"}

    def check_stores(self, rows: Sequence[StoreRow]) -> None:
        """The catalog lists the stores that are there, with their holders."""
        assert {row.id for row in rows} == self.there
        for row in rows:
            assert bool(row.pins) is (row.id in self.pins)
            assert row.leases == self.leased().count(row.id)

    def check_jobs(self, jobs: Mapping[int, Job]) -> None:
        """Every attempt is its worker's, and no other job counts as running."""
        for job, attempt in self.running.items():
            assert jobs[job].attempt == attempt.taken.attempt
            assert jobs[job].worker == attempt.worker
        assert {job for job, row in jobs.items() if row.state in ("running", "verifying")} <= self.running.keys()
