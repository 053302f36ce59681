"""The catalog: one row for every store in the folder, read from its zarr.json and nothing else.

A store whose zarr.json is as it was at the last look is not read again.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from harvest.reuse.key import token_key
from harvest.reuse.match import CatalogStore, Wanted
from harvest.reuse.scan import each_of, scan_store
from harvest.serve.database import LIVE, Database
from shared.errors import UserError
from shared.files.local import LocalFiles
from shared.gate import quoted
from shared.request import StoreFilter, StorePage, StoreRow, StoreSort
from shared.store.opened import STATE_FILE, spec_id
from shared.store.spec import StoreSpec

TOUCHED: Final = 60.0
"""Seconds for which a use is not noted again: an answer from the catalog then writes nothing."""
MOST_ROWS: Final = 500
"""Rows of one page."""
GONE: Final = ".gone-"
"""Begins the name of a deleted store's folder, until its files are deleted, too."""
SORTS: Final[dict[StoreSort, tuple[str, str]]] = {
    "used": ("used", "DESC"),
    "created": ("created", "DESC"),
    "bytes": ("bytes", "DESC"),
    "tokens": ("tokens", "DESC"),
    "id": ("id", "ASC"),
}
SHOWN: Final = (
    "id, key, spec, model, corpus, hooks, tokens, n_tokens, context, codec, bytes, state, environment, created, used"
)


@dataclass(frozen=True)
class FoundStore:
    """What a store's folder says."""

    about: CatalogStore
    mark: str
    created: float


class Catalog:
    """The rows of stores."""

    def __init__(self, database: Database) -> None:
        self.database, self.root, self.files = database, database.root, LocalFiles(database.root)
        self.touched: dict[str, float] = {}
        self.unreadable: dict[str, str] = {}
        """Marks of folders whose store cannot be read: they are named once."""
        self.changes = 0
        """Grows when a store comes, changes or goes."""

    def scan(self) -> int:
        """Brings the rows up to date with the folders. Returns the number of stores."""
        known = {row["id"]: row["mark"] for row in self.database.all("SELECT id, mark FROM store")}
        folders = {name: (mark, created) for name, mark, created in store_folders(self.root)}
        new = [name for name, (mark, _) in folders.items() if mark not in (known.get(name), self.unreadable.get(name))]
        found = [FoundStore(store, *folders[store.store]) for store in each_of(self.read, new) if store]
        for name in {*new} - {each.about.store for each in found}:
            self.unreadable[name] = folders[name][0]
        with self.database.transaction():
            for each in found:
                self.put(each)
            for name in known.keys() - folders.keys():
                self.forget(name)
        return self.database.number("SELECT count(*) FROM store")

    def read(self, name: str) -> CatalogStore | None:
        return scan_store(self.files, name)

    def look(self, name: str) -> CatalogStore | None:
        """Brings one row up to date. Returns what the folder says; None when it holds no store."""
        seen = mark_of(self.root / name)
        store = self.read(name) if seen else None
        with self.database.transaction():
            if store is None or seen is None:
                self.forget(name)
                return None
            self.put(FoundStore(store, *seen))
        return store

    def is_current(self, name: str) -> bool:
        """Whether a store's row still says what its folder says."""
        row, seen = self.database.one("SELECT mark FROM store WHERE id = ?", name), mark_of(self.root / name)
        return row is not None and seen is not None and row["mark"] == seen[0]

    def put(self, found: FoundStore) -> None:
        """Writes the row of a store, and asks for another look at the disk space of its key. Called in a
        transaction."""
        store, spec = found.about, found.about.spec
        values = {
            "key": store.key,
            "state": store.state,
            "spec": json.dumps(spec.as_json()),
            "model": str(spec.model.get("name", "")),
            "corpus": corpus_words(spec),
            "hooks": f" {' '.join(spec.hookpoints)} ",
            "tokens": store.rows,
            "n_tokens": spec.n_tokens,
            "context": spec.context,
            "codec": spec.codec,
            "environment": store.environment,
            "token_key": token_key(spec),
            "mark": found.mark if store.state == "final" else "",
        }
        before = self.database.one("SELECT * FROM store WHERE id = ?", store.store)
        if before is None:
            self.database.run("DELETE FROM gone WHERE id = ?", store.store)
            times = {"created": found.created, "used": found.created, "revision": self.database.revise()}
            self.database.put("store", {"id": store.store, **values, **times})
        elif any(before[name] != value for name, value in values.items()):
            self.database.change("store", store.store, values)
        else:
            return
        self.database.run("UPDATE store SET own = NULL WHERE id = ?", store.store)
        self.changes += 1

    def forget(self, name: str) -> None:
        """Removes the row of a store that is no longer there. Called in a transaction."""
        row = self.database.one("SELECT key FROM store WHERE id = ?", name)
        if row is None:
            return
        self.database.run("DELETE FROM store WHERE id = ?", name)
        self.database.run("DELETE FROM lease WHERE store = ?", name)
        self.database.run("DELETE FROM reader WHERE store = ?", name)
        self.database.run("INSERT OR REPLACE INTO gone VALUES(?, ?)", name, self.database.revise())
        self.database.run("UPDATE store SET own = NULL WHERE key = ?", row["key"])
        self.changes += 1
        self.touched.pop(name, None)

    def that_may_answer(self, wanted: Wanted) -> list[CatalogStore]:
        """The stores that can answer, or lend shards, rows or tokens."""
        keys = [key for shape in wanted.shapes for key in (shape.key, *shape.recode_keys)]
        query = "SELECT * FROM store WHERE key IN (SELECT value FROM json_each(?)) OR token_key = ?"
        return [self.about(row) for row in self.database.all(query, json.dumps(keys), wanted.token_key)]

    def about(self, row: sqlite3.Row) -> CatalogStore:
        spec = read_spec_of(row)
        size, folder = row["bytes"] or None, str(self.root / row["id"])
        return CatalogStore(row["id"], spec, row["key"], row["tokens"], row["state"], row["environment"], size, folder)

    def row(self, name: str) -> StoreRow | None:
        rows = self.rows(self.database.all(f"SELECT {SHOWN} FROM store WHERE id = ?", name))
        return rows[0] if rows else None

    def page(self, filters: StoreFilter, sort: StoreSort, cursor: str | None, limit: int) -> StorePage:
        """One part of the list. Raises UserError for a cursor that is not one of ours."""
        column, order = SORTS[sort]
        where, values = conditions(filters)
        if cursor is not None:
            last, name = read_cursor(cursor, text=column == "id")
            beyond = "<" if order == "DESC" else ">"
            where.append(f"({column}, id) {beyond} (?, ?)")
            values += [last, name]
        limit = min(max(1, limit), MOST_ROWS)
        condition = f"WHERE {' AND '.join(where)}" if where else ""
        query = f"SELECT {SHOWN} FROM store {condition} ORDER BY {column} {order}, id {order} LIMIT ?"
        found = self.database.all(query, *values, limit + 1)
        rows = found[:limit]
        following = json.dumps([rows[-1][column], rows[-1]["id"]]) if len(found) > limit else None
        return StorePage(stores=tuple(self.rows(rows)), next=following)

    def rows(self, rows: Sequence[sqlite3.Row]) -> list[StoreRow]:
        names = json.dumps([row["id"] for row in rows])
        these = "store IN (SELECT value FROM json_each(?))"
        pins: dict[str, list[str]] = {}
        for pin in self.database.all(f"SELECT store, name FROM pin WHERE {these} ORDER BY name", names):
            pins.setdefault(pin["store"], []).append(pin["name"])
        now = self.database.clock.monotonic()
        leases = self.database.all(
            f"SELECT store, count(*) FROM lease WHERE deadline > ? AND {these} GROUP BY store", now, names
        )
        jobs = self.database.all(f"SELECT store, max(id) FROM job WHERE {LIVE} AND {these} GROUP BY store", names)
        readers, writers = ({row[0]: row[1] for row in rows} for rows in (leases, jobs))
        return [
            StoreRow(
                **{name: row[name] for name in row.keys() if name not in ("spec", "hooks", "tokens", "bytes")},  # noqa: SIM118
                spec_id=spec_id(read_spec_of(row)),
                hookpoints=tuple(row["hooks"].split()),
                rows=row["tokens"],
                bytes=row["bytes"] or None,
                pins=tuple(pins.get(row["id"], ())),
                leases=readers.get(row["id"], 0),
                job=writers.get(row["id"]),
            )
            for row in rows
        ]

    def touch(self, name: str) -> None:
        """Notes that a store was used now, unless that was noted a moment ago."""
        now = self.database.clock.monotonic()
        if now - self.touched.get(name, -TOUCHED) < TOUCHED:
            return
        with self.database.transaction():
            self.database.run("UPDATE store SET used = ? WHERE id = ?", self.database.clock.now(), name)
        self.touched[name] = now


def read_spec_of(row: sqlite3.Row) -> StoreSpec:
    """The spec in a store's row."""
    return StoreSpec.model_validate(json.loads(row["spec"]))


def conditions(filters: StoreFilter) -> tuple[list[str], list[Any]]:
    """The conditions of a filter, and their values."""
    where, values = list[str](), list[Any]()
    for column in ("model", "corpus"):
        if (text := getattr(filters, column)) is not None:
            where.append(f"instr(lower({column}), ?) > 0")
            values.append(text.lower())
    if filters.layer is not None:
        where.append("instr(hooks, ?) > 0")
        values.append(f" layer_{filters.layer:02d}/")
    if filters.hook is not None:
        where.append("(instr(hooks, ?) > 0 OR instr(hooks, ?) > 0)")
        values += [f"/{filters.hook} ", f" {filters.hook} "]
    for column in ("state", "key"):
        if (text := getattr(filters, column)) is not None:
            where.append(f"{column} = ?")
            values.append(text)
    return where, values


def read_cursor(cursor: str, text: bool) -> tuple[Any, str]:
    """The place in a sorted list that a cursor names. Raises UserError."""
    with contextlib.suppress(ValueError, RecursionError):
        match json.loads(cursor[:1000]):
            case [str() | int() | float() as last, str() as name] if isinstance(last, str) is text and last is not True:
                return last, name
    raise UserError(f"cursor {quoted(cursor)}: expected the `next` of an earlier page of the same list, unchanged")


def corpus_words(spec: StoreSpec) -> str:
    """The corpus in a few words: the dataset's name, or that of its first file."""
    source = spec.corpus.get("source")
    if not isinstance(source, dict):
        return str(source or "")
    if isinstance(name := source.get("name"), str):
        return " ".join(str(part) for part in (name, source.get("config")) if part)
    files = source.get("files")
    if isinstance(files, list) and files and isinstance(files[0], dict):
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        return f"{files[0].get('name', '')}{more}"
    return str(source.get("kind", ""))


def store_folders(root: Path) -> Iterator[tuple[str, str, float]]:
    """The folders that hold a zarr.json: name, a mark that changes with the file, and when the folder was made."""
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    for name in names:
        if (found := mark_of(root / name)) is not None:
            yield name, *found


def mark_of(folder: Path) -> tuple[str, float] | None:
    """A mark that changes with a store's zarr.json, and when that was written; None when there is none."""
    try:
        about = os.stat(folder / STATE_FILE)
    except OSError:
        return None
    return f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns}", about.st_mtime
