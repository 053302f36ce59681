"""Leases and pins: what keeps a store from being deleted.

A lease is held by a program that reads the store, and lapses when it is not renewed in time. A pin is set by a person
and stays; pins.json beside the stores holds all pins, and the database only a copy.
"""

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any, Final

from harvest.serve.database import Database
from harvest.serve.records import Limits
from shared.errors import DamagedError, UserError
from shared.files.local import explained, read_whole, write_file
from shared.gate import BadData, parse_json, quoted
from shared.refusals import LapsedError, UnknownError
from shared.request import LeaseGrant, StoreReader

PINS: Final = "pins.json"
PIN_BYTES: Final = 16 << 20
"""Largest pins.json."""
PIN_NAME: Final = re.compile(r"[\w.-]{1,64}")
MOST_HOLDER: Final = 200
MOST_READERS: Final = 20
"""Holders of leases that are remembered for each store."""
MOST_LEASES: Final = 10_000
"""Leases at one time."""


class Holds:
    """The leases and the pins."""

    def __init__(self, database: Database, limits: Limits) -> None:
        self.database, self.limits, self.clock = database, limits, database.clock
        self.file = database.root / PINS

    def lease(self, store: str, holder: str, ttl_s: float) -> LeaseGrant:
        """Raises UnknownError when there is no such store."""
        ttl = self.bounded(ttl_s)
        with self.database.transaction():
            self.check_store(store)
            self.lapse()
            if self.database.number("SELECT count(*) FROM lease") >= MOST_LEASES:
                raise UserError(f"there are {MOST_LEASES:,} leases already. Release some, or wait until they lapse")
            name, deadline = uuid.uuid4().hex, self.clock.monotonic() + ttl
            self.database.put(
                "lease",
                {"id": name, "store": store, "holder": holder[:MOST_HOLDER], "ttl": ttl, "deadline": deadline},
            )
            self.note_reader(store, holder[:MOST_HOLDER])
            self.used(store)
        return LeaseGrant(id=name, store=store, ttl_s=ttl)

    def renew(self, lease: str, ttl_s: float | None) -> LeaseGrant:
        """Raises LapsedError."""
        with self.database.transaction():
            now = self.clock.monotonic()
            row = self.database.one("SELECT * FROM lease WHERE id = ? AND deadline > ?", lease, now)
            if row is None:
                raise LapsedError(f"lease {quoted(lease)}: has run out or was released. Take a new lease of the store")
            ttl = self.bounded(row["ttl"] if ttl_s is None else ttl_s)
            self.database.run("UPDATE lease SET ttl = ?, deadline = ? WHERE id = ?", ttl, now + ttl, lease)
        return LeaseGrant(id=lease, store=row["store"], ttl_s=ttl)

    def release(self, lease: str) -> None:
        with self.database.transaction():
            row = self.database.one("SELECT store FROM lease WHERE id = ?", lease)
            if row is not None:
                self.database.run("DELETE FROM lease WHERE id = ?", lease)
                self.used(row["store"])

    def lapse(self) -> None:
        """Forgets leases whose time is over. Their stores count as used until now. Called in a transaction."""
        now = self.clock.monotonic()
        over = "SELECT store FROM lease WHERE deadline <= ?"
        if self.database.one(over, now) is not None:
            self.database.run(f"UPDATE store SET used = ? WHERE id IN ({over})", self.clock.now(), now)
            self.database.run("DELETE FROM lease WHERE deadline <= ?", now)

    def restart(self) -> None:
        """Renews every lease: another process measured the deadlines."""
        with self.database.transaction():
            self.database.run("UPDATE lease SET deadline = ttl + ?", self.clock.monotonic())

    def bounded(self, ttl_s: float) -> float:
        """Raises UserError for a time that no lease has."""
        if not 0 < ttl_s <= self.limits.most_lease_s:
            raise UserError(f"ttl_s: must be above 0 and at most {self.limits.most_lease_s:,.0f} (got {ttl_s})")
        return float(ttl_s)

    def used(self, store: str) -> None:
        """Called in a transaction."""
        if self.database.one("SELECT id FROM store WHERE id = ?", store) is not None:
            self.database.change("store", store, {"used": self.clock.now()})

    def check_store(self, store: str) -> None:
        """Raises UnknownError."""
        if self.database.one("SELECT id FROM store WHERE id = ?", store) is None:
            raise UnknownError(f"store {quoted(store)}: there is none of this name. List them with: sagsae store ls")

    def holders(self, store: str) -> list[str]:
        """Who holds leases of a store."""
        now = self.clock.monotonic()
        query = "SELECT holder FROM lease WHERE store = ? AND deadline > ? ORDER BY holder"
        return [row["holder"] for row in self.database.all(query, store, now)]

    def note_reader(self, store: str, holder: str) -> None:
        """Keeps who leased a store, of each the last MOST_READERS. Called in a transaction."""
        self.database.run("INSERT OR REPLACE INTO reader VALUES(?, ?, ?)", store, holder, self.clock.now())
        newest = "SELECT holder FROM reader WHERE store = ? ORDER BY seen DESC LIMIT ?"
        self.database.run(
            f"DELETE FROM reader WHERE store = ? AND holder NOT IN ({newest})", store, store, MOST_READERS
        )

    def readers(self, store: str) -> list[StoreReader]:
        """Who leased a store, the last first."""
        now = set(self.holders(store))
        query = "SELECT holder, seen FROM reader WHERE store = ? ORDER BY seen DESC"
        rows = self.database.all(query, store)
        return [StoreReader(holder=row["holder"], since=row["seen"], reads=row["holder"] in now) for row in rows]

    def pins(self, store: str) -> list[str]:
        return [row["name"] for row in self.database.all("SELECT name FROM pin WHERE store = ? ORDER BY name", store)]

    def pin(self, store: str, name: str) -> None:
        """Pins a store, or one that a job is going to make. Raises UserError for a name that no pin has."""
        if not PIN_NAME.fullmatch(name):
            raise UserError(f"pin {quoted(name)}: expected 1 to 64 letters, digits, dots, dashes or underscores")
        with self.database.transaction():
            if self.database.run("INSERT OR IGNORE INTO pin VALUES(?, ?)", store, name):
                self.save_pins()
                self.shown(store)

    def unpin(self, store: str, name: str) -> None:
        """Removes a pin; without one, nothing happens."""
        with self.database.transaction():
            if self.database.run("DELETE FROM pin WHERE store = ? AND name = ?", store, name):
                self.save_pins()
                self.shown(store)

    def unpin_all(self, store: str) -> None:
        """Called in a transaction."""
        if self.database.run("DELETE FROM pin WHERE store = ?", store):
            self.save_pins()

    def shown(self, store: str) -> None:
        """Raises the revision of the store's row. Called in a transaction."""
        if self.database.one("SELECT id FROM store WHERE id = ?", store) is not None:
            self.database.change("store", store, {})

    def save_pins(self) -> None:
        """Writes pins.json. Called in a transaction, which fails with it."""
        pins: dict[str, list[str]] = {}
        for row in self.database.all("SELECT store, name FROM pin ORDER BY store, name"):
            pins.setdefault(row["store"], []).append(row["name"])
        with explained(self.file, "then pin again"):
            write_file(self.file, json.dumps({"version": 1, "pins": pins}, indent=2).encode() + b"\n")

    def load_pins(self) -> None:
        """Reads pins.json into the table. Raises UserError when it cannot be read: without it, pinned stores would be
        deleted."""
        try:
            pins = read_pins(parse_json(read_whole(self.file, PIN_BYTES)))
        except FileNotFoundError:
            pins = []
        except (BadData, DamagedError, OSError) as error:
            raise UserError(
                f"{self.file}: cannot be read ({error}). It says which stores must not be deleted: mend it, restore it "
                "from a copy, or delete it to have no pins"
            ) from error
        with self.database.transaction():
            if pins != [(row["store"], row["name"]) for row in self.database.all("SELECT * FROM pin")]:
                self.database.run("DELETE FROM pin")
                for store, name in pins:
                    self.database.run("INSERT OR IGNORE INTO pin VALUES(?, ?)", store, name)


def read_pins(document: Any) -> list[tuple[str, str]]:
    """Store and name of every pin, sorted. Raises BadData."""
    match document:
        case {"version": 1, "pins": Mapping() as pins} if all(isinstance(names, list) for names in pins.values()):
            found = {(store, name) for store, names in pins.items() for name in names}
            if all(isinstance(name, str) and PIN_NAME.fullmatch(name) for _, name in found):
                return sorted(found)
    raise BadData('expected {"version": 1, "pins": {"STORE": ["NAME", …]}}')
