"""The disk space of the cache: how much is used and reserved, and which stores are deleted to make room.

Bytes that several stores share by hard links count once. Stores are only linked with stores of the same key.
"""

import itertools
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any, Final

from harvest.reuse.match import NewStore
from harvest.serve.catalog import GONE, Catalog
from harvest.serve.database import LIVE, Database
from harvest.serve.leases import Holds
from harvest.serve.records import Limits, Usage
from shared.errors import UserError
from shared.files.inodes import Inode, set_free, walk
from shared.files.local import LocalFiles, explained
from shared.gate import quoted
from shared.progress import gigabytes
from shared.refusals import HeldError, QuotaError

MOST_HOLDERS: Final = 20
"""Stores that a refusal names."""
RESERVED: Final = f"""SELECT job.store, max(0, max(job.expected) - coalesce(store.own, 0)) AS bytes
  FROM job LEFT JOIN store ON store.id = job.store WHERE {LIVE} GROUP BY job.store"""
"""What the jobs will still write, by store."""

KEYS_AT_ONCE: Final = 200
"""Keys whose stores are measured before their sizes are written."""
ROW_BYTES: Final = 4
"""Bytes of a token's id, which are copied for rows that are linked."""
ARRAY_BYTES: Final = 1024
"""Bytes of the description of an array."""
EVICTABLE: Final = f"""SELECT id, key FROM store WHERE state = 'final' AND used <= ?
  AND id NOT IN (SELECT store FROM pin) AND id NOT IN (SELECT store FROM lease WHERE deadline > ?)
  AND id NOT IN (SELECT store FROM job WHERE {LIVE})
  AND id NOT IN (SELECT value FROM job, json_each(job.donors) WHERE {LIVE}) ORDER BY used, id"""


class Space:
    """What the stores take of the disk, and what may go."""

    def __init__(self, database: Database, catalog: Catalog, holds: Holds, quota: int | None, limits: Limits) -> None:
        self.database, self.catalog, self.holds, self.quota, self.limits = database, catalog, holds, quota, limits
        self.root, self.clock = database.root, database.clock
        self.leaving: dict[str, int] = {}
        """Folders whose files are being deleted, with their bytes."""
        self.numbers = itertools.count()

    def usage(self) -> Usage:
        self.measure()
        with self.database.lock:
            pinned = "SELECT sum(own) FROM store WHERE id IN (SELECT store FROM pin)"
            return Usage(
                used=self.database.number("SELECT sum(own) FROM store"),
                reserved=self.database.number(f"SELECT sum(bytes) FROM ({RESERVED})"),
                pinned=self.database.number(pinned),
                leaving=sum(self.leaving.values()),
                quota=self.quota,
                free=shutil.disk_usage(self.root).free,
            )

    # sizes
    def measure(self) -> None:
        """Looks how large the stores are that came or changed since the last look."""
        query = f"SELECT DISTINCT key FROM store WHERE own IS NULL LIMIT {KEYS_AT_ONCE}"
        while rows := self.database.all(query):
            changes, sizes = self.catalog.changes, dict[str, tuple[int, int]]()
            for row in rows:
                sizes |= self.sizes_of(row["key"])
            with self.database.transaction():
                if changes == self.catalog.changes:  # or else they are looked at again
                    for store, (size, own) in sizes.items():
                        self.database.run("UPDATE store SET bytes = ?, own = ? WHERE id = ?", size, own, store)

    def sizes_of(self, key: str) -> dict[str, tuple[int, int]]:
        """All bytes and own bytes of the stores of one key that are unmeasured; of all its stores where those have
        files that others may have, too. A linked file counts for the first store that has it."""
        rows = self.database.all("SELECT id, own FROM store WHERE key = ? ORDER BY state, created, id", key)
        files = {row["id"]: list(walk(self.root / row["id"])) for row in rows if row["own"] is None}
        names = Counter(file.inode for each in files.values() for file in each)
        if len(files) < len(rows) and any(names[file.inode] < file.links for each in files.values() for file in each):
            files = {row["id"]: files.get(row["id"]) or list(walk(self.root / row["id"])) for row in rows}
        counted, sizes = set[Inode](), dict[str, tuple[int, int]]()
        for store, each in files.items():
            new = {file.inode: file.bytes for file in each if file.inode not in counted}
            counted |= new.keys()
            sizes[store] = (sum(file.bytes for file in each), sum(new.values()))
        return sizes

    def own(self, store: str) -> int:
        """Bytes that a store alone has; 0 when it is not there yet."""
        self.measure()
        return self.database.number("SELECT own FROM store WHERE id = ?", store)

    # room
    def missing(self, need: int) -> tuple[int, int]:
        """Bytes that must go before `need` more fit, and those that should go when any must."""
        now = self.usage()
        planned = now.used + now.reserved + need
        total = shutil.disk_usage(self.root).total
        must = now.reserved + need + int(total * self.limits.free_share) - now.free - now.leaving if need else 0
        want = must
        if self.quota is not None:
            must = max(must, planned - self.quota)
            want = max(must, planned - int(self.quota * self.limits.low_water))
        return must, want

    def fits_now(self, need: int) -> bool:
        """Whether a job may begin to write so much: what is being deleted still takes space."""
        if self.quota is None or not self.leaving:
            return True
        self.measure()
        running = self.database.number(f"SELECT sum(bytes) FROM ({RESERVED.replace(LIVE, 'job.worker IS NOT NULL')})")
        used = self.database.number("SELECT sum(own) FROM store")
        return used + sum(self.leaving.values()) + running + need <= self.quota

    def would_evict(self, need: int, keep: Collection[str]) -> list[str]:
        """The stores that `make_room` would delete. Raises QuotaError."""
        with ExitStack() as locks:
            return [store for store, _ in self.choose(need, keep, locks)]

    def make_room(self, need: int, keep: Collection[str] = ()) -> list[str]:
        """Takes stores out of the folder until `need` more bytes fit; `delete_leaving` deletes their files. Called in a
        transaction. Raises QuotaError before anything is changed."""
        with ExitStack() as locks:
            chosen = self.choose(need, keep, locks)
            for store, size in chosen:
                self.take_out(store, size)
        return [store for store, _ in chosen]

    def choose(self, need: int, keep: Collection[str], locks: ExitStack) -> list[tuple[str, int]]:
        """The stores to delete, least recently used first, with the bytes that each sets free. `locks` keeps their
        readers away. Raises QuotaError."""
        must, want = self.missing(need)
        if must <= 0:
            return []
        chosen, freed, links = list[tuple[str, int]](), 0, dict[str, Counter[Inode]]()
        before, now = self.clock.now() - self.limits.min_age_s, self.clock.monotonic()
        for row in self.database.all(EVICTABLE, before, now):
            if freed >= want:
                break
            if row["id"] in keep or not self.lock(row["id"], locks):
                continue
            if row["key"] not in links:
                links[row["key"]] = self.links(row["key"])
            size = set_free(self.root / row["id"], links[row["key"]])
            chosen.append((row["id"], size))
            freed += size
        if freed < must:
            raise self.refusal(need, must - freed, keep)
        return chosen

    def links(self, key: str) -> Counter[Inode]:
        """How many stores of a key have each file."""
        stores = self.database.all("SELECT id FROM store WHERE key = ?", key)
        return Counter(file.inode for row in stores for file in walk(self.root / row["id"]))

    def lock(self, store: str, locks: ExitStack) -> bool:
        """Keeps writers and readers away from a store. False when there is one."""
        files, mine = LocalFiles(self.root / store), ExitStack()
        try:
            with explained(files.root):
                mine.enter_context(files.lock())
                mine.enter_context(files.unread())
        except UserError:
            mine.close()
            return False
        locks.push(mine)
        return True

    def reasons(self, row: Any) -> list[tuple[str, str]]:
        """Why a store is not evicted: kinds and names."""
        store = row["id"]
        found = [("pin", name) for name in self.holds.pins(store)]
        found += [("lease", holder) for holder in self.holds.holders(store)]
        found += [("job", str(job)) for job in self.jobs_of(store)]
        if row["state"] != "final":
            found.append(("unfinished", ""))
        age = self.clock.now() - row["used"]
        if age < self.limits.min_age_s:
            found.append(("used lately", f"{max(0.0, age) / 60:.0f} minutes ago"))
        return found

    def jobs_of(self, store: str) -> list[int]:
        """The jobs that write a store, or take something from it."""
        query = f"""SELECT id FROM job WHERE {LIVE}
            AND (store = ? OR EXISTS (SELECT 1 FROM json_each(job.donors) WHERE value = ?)) ORDER BY id"""
        return [row["id"] for row in self.database.all(query, store, store)]

    def take_out(self, store: str, size: int) -> None:
        """Renames a store's folder, after which it is no store any longer. Called in a transaction."""
        gone = f"{GONE}{store}"
        while (self.root / gone).exists():
            gone = f"{GONE}{store}-{next(self.numbers)}"
        with explained(self.root / store, "nothing was deleted; then try again"):
            (self.root / store).rename(self.root / gone)
        self.leaving[gone] = size
        self.holds.unpin_all(store)
        self.catalog.forget(store)

    def delete_leaving(self) -> None:
        """Deletes the files of stores that were taken out, now or before the server was stopped."""
        folders = sorted(self.root.glob(f"{GONE}*"))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        left = {folder.name: list(walk(folder)) for folder in folders if folder.exists()}
        names, counted = Counter(file.inode for files in left.values() for file in files), set[Inode]()
        for name, files in left.items():  # what no store has any longer
            own = {file.inode: file.bytes for file in files if names[file.inode] >= file.links}
            self.leaving[name] = sum(size for inode, size in own.items() if inode not in counted)
            counted |= own.keys()
        for name in self.leaving.keys() - left.keys():
            if not (self.root / name).exists():
                self.leaving.pop(name, None)

    def remove(self, store: str, force: bool) -> int:
        """Deletes a store. Returns the bytes that become free. Raises UnknownError, HeldError."""
        with self.database.transaction(), ExitStack() as locks:
            self.holds.check_store(store)
            row = self.database.all("SELECT * FROM store WHERE id = ?", store)[0]
            holding = [(why, name) for why, name in self.reasons(row) if why in ("pin", "lease", "job")]
            if any(why == "job" for why, _ in holding) or (holding and not force):
                raise HeldError(f"store {quoted(store)}: {in_words(holding)}", (holder(row, holding),))
            if not self.lock(store, locks):
                raise HeldError(
                    f"store {quoted(store)}: a process of this machine reads or writes it. Wait for it, or stop it",
                    (holder(row, [("read", "")]),),
                )
            size = set_free(self.root / store, self.links(row["key"]))
            self.take_out(store, size)
        self.delete_leaving()
        return size

    def refusal(self, need: int, short: int, keep: Collection[str]) -> QuotaError:
        """Says what holds the space."""
        now, holders = self.usage(), list[dict[str, Any]]()
        for row in self.database.all("SELECT * FROM store ORDER BY own DESC, id"):
            why = self.reasons(row) or ([("answer", "")] if row["id"] in keep else [("read", "")])
            holders.append(holder(row, why))
        for row in self.database.all(f"{RESERVED} ORDER BY bytes DESC"):
            if row["bytes"]:
                holders.append({"store": row["store"], "bytes": row["bytes"], "why": "reserved", "name": ""})
        holders = sorted(holders, key=lambda each: -each["bytes"])[:MOST_HOLDERS]
        limit = f"of the quota of {gigabytes(now.quota)}" if now.quota is not None else "of the disk"
        named = "; ".join(f"{each['store']} {gigabytes(each['bytes'])} ({each['why']})" for each in holders[:3])
        return QuotaError(
            f"{gigabytes(need)} more do not fit: {gigabytes(now.used)} {limit} are used and {gigabytes(now.reserved)} "
            f"reserved, and {gigabytes(short)} too few may be deleted{f'. The largest: {named}' if named else ''}. "
            "Unpin or delete stores, wait for jobs and trainings, or raise --quota",
            tuple(holders),
        )


def size_of(new: NewStore, tokens: int | None) -> int:
    """Bytes that making a store takes, with what comes beside shards."""
    return (new.bytes_to_write or 0) + ROW_BYTES * (tokens or 0) + ARRAY_BYTES * (4 + 6 * len(new.hookpoints))


def holder(row: Any, why: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What holds a store, for a refusal."""
    kind, name = why[0]
    return {"store": row["id"], "bytes": row["own"] or 0, "why": kind, "name": name}


def in_words(holding: Sequence[tuple[str, str]]) -> str:
    """Why a store is not deleted, and what to do."""
    kinds = {kind: [name for each, name in holding if each == kind] for kind, _ in holding}
    words = {"pin": "it is pinned as", "lease": "it is read by", "job": "it is needed by job"}
    cures = {"pin": "Unpin it", "lease": "wait for its readers", "job": "cancel or wait for the job"}
    said = " and ".join(f"{words[kind]} {', '.join(names)}" for kind, names in kinds.items())
    cure = " and ".join(cures[kind] for kind in kinds)
    return f"{said}. {cure[0].upper()}{cure[1:]}"
