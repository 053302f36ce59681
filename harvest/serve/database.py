"""The service's SQLite file: its tables, its transactions, and its errors as sentences.

It is opened once, by the server's process, which holds it exclusively. So SQLite needs no shared memory, and the file
may lie on a network's disk. Everything in it but jobs and leases can be read from the folders again.
"""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from harvest.serve.records import Clock
from shared.errors import UserError
from shared.refusals import BrokenError

DATABASE: Final = ".sagsae-service.db"
JOBS: Final = ".jobs"
"""The folder of settings and logs of the jobs."""
VERSION: Final = 1
"""`user_version` of the tables; MIGRATIONS[n] makes version n + 1 of version n."""
OPEN: Final = "('queued', 'running', 'verifying')"
LIVE: Final = f"(job.state IN {OPEN} OR job.worker IS NOT NULL)"
"""A job that has or will have a writer. A cancelled one has its worker until that has stopped."""
MIGRATIONS: Final = (
    f"""
CREATE TABLE meta(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE store(
  id TEXT PRIMARY KEY, key TEXT NOT NULL, state TEXT NOT NULL, spec TEXT NOT NULL,
  model TEXT NOT NULL, corpus TEXT NOT NULL, hooks TEXT NOT NULL, tokens INTEGER NOT NULL, n_tokens INTEGER NOT NULL,
  context INTEGER NOT NULL, codec TEXT NOT NULL, bytes INTEGER NOT NULL DEFAULT 0, own INTEGER,
  environment TEXT NOT NULL, token_key TEXT NOT NULL, mark TEXT NOT NULL, created REAL NOT NULL, used REAL NOT NULL,
  revision INTEGER NOT NULL);
CREATE INDEX store_key ON store(key);
CREATE INDEX store_tokens_of ON store(token_key);
CREATE INDEX store_used ON store(used, id);
CREATE INDEX store_created ON store(created, id);
CREATE INDEX store_bytes ON store(bytes, id);
CREATE INDEX store_tokens ON store(tokens, id);
CREATE INDEX store_revision ON store(revision);
CREATE INDEX store_sizes ON store(id, own);
CREATE INDEX store_unmeasured ON store(key) WHERE own IS NULL;
CREATE TABLE gone(id TEXT PRIMARY KEY, revision INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE job(
  id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, extent TEXT NOT NULL, state TEXT NOT NULL,
  action TEXT NOT NULL, store TEXT NOT NULL, planned TEXT NOT NULL, request TEXT NOT NULL, model TEXT NOT NULL,
  who TEXT NOT NULL, asked INTEGER NOT NULL DEFAULT 1, priority INTEGER NOT NULL, donors TEXT NOT NULL,
  expected INTEGER NOT NULL, attempt INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0,
  lost INTEGER NOT NULL DEFAULT 0, repair INTEGER NOT NULL DEFAULT 0, repairs INTEGER NOT NULL DEFAULT 0,
  worker TEXT, deadline REAL,
  not_before REAL NOT NULL DEFAULT 0, began INTEGER NOT NULL DEFAULT 0, rows INTEGER NOT NULL DEFAULT 0, total INTEGER,
  rate REAL, note TEXT NOT NULL DEFAULT '', error TEXT, created REAL NOT NULL, started REAL, ended REAL,
  revision INTEGER NOT NULL);
CREATE UNIQUE INDEX job_single_flight ON job(key, extent) WHERE state IN {OPEN};
CREATE INDEX job_live ON job(id) WHERE state IN {OPEN} OR worker IS NOT NULL;
CREATE INDEX job_state ON job(state, id);
CREATE INDEX job_revision ON job(revision);
CREATE INDEX job_model ON job(model, id) WHERE state = 'done';
CREATE TABLE lease(id TEXT PRIMARY KEY, store TEXT NOT NULL, holder TEXT NOT NULL, ttl REAL NOT NULL,
  deadline REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX lease_store ON lease(store);
CREATE TABLE pin(store TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY(store, name)) WITHOUT ROWID;
CREATE TABLE attempt(job INTEGER NOT NULL, number INTEGER NOT NULL, worker TEXT NOT NULL, began REAL NOT NULL,
  ended REAL, code INTEGER, words TEXT NOT NULL DEFAULT '', PRIMARY KEY(job, number)) WITHOUT ROWID;
CREATE TABLE reader(store TEXT NOT NULL, holder TEXT NOT NULL, seen REAL NOT NULL, PRIMARY KEY(store, holder))
  WITHOUT ROWID;
CREATE TABLE memo(hash TEXT PRIMARY KEY, planned TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE worker(name TEXT PRIMARY KEY, about TEXT NOT NULL, seen REAL NOT NULL) WITHOUT ROWID;
""",
)


class Database:
    """One connection behind a lock. Every change happens inside `transaction`."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self.root, self.path, self.clock = root, root / DATABASE, clock
        self.lock = threading.RLock()
        self.listeners: set[Callable[[int], None]] = set()
        """Called with the new revision after every change, in the thread that made it."""
        self.changed = 0
        self.connection = self.connect()

    def connect(self) -> sqlite3.Connection:
        """Opens the file and brings its tables up to date. Raises UserError."""
        if not os.access(self.path if self.path.exists() else self.root, os.W_OK):
            raise self.read_only("it is read-only")
        connection = None
        try:
            connection = sqlite3.connect(self.path, timeout=1.0, isolation_level=None, check_same_thread=False)
            connection.row_factory = sqlite3.Row
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "cache_size=-8000"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            self.migrate(connection)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, sqlite3.Error):
                raise self.explained(error) from error
            raise
        return connection

    def migrate(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            connection.execute("ROLLBACK")
            raise UserError(
                f"{self.path}: is of version {version}, and this sagsae knows up to {VERSION}. Start the newer sagsae "
                "that wrote it; or stop it for good and delete the file, which the stores' folders fill again"
            )
        for step in MIGRATIONS[version:]:
            for statement in step.split(";"):
                connection.execute(statement)
        if version == 0:
            self.first_numbers(connection)
        connection.execute(f"PRAGMA user_version={VERSION}")
        connection.execute("INSERT OR REPLACE INTO meta VALUES('writable', 1)")  # a read-only file is noticed here
        connection.execute("COMMIT")

    def first_numbers(self, connection: sqlite3.Connection) -> None:
        """Numbers a new database's jobs and revisions above those of a database that was here before: a worker that
        still runs a forgotten job must not hold the attempt of another."""
        names = (path.name.partition(".")[0] for path in (self.root / JOBS).glob("[0-9]*.*"))
        last = max((int(name) for name in names if name.isdecimal() and len(name) < 16), default=0)
        connection.execute("INSERT INTO sqlite_sequence VALUES('job', ?)", (last,))
        connection.execute("INSERT INTO meta VALUES('revision', ?)", (int(self.clock.now() * 1000),))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what the block changes; blocks can be nested. Raises UserError where the file cannot be
        written."""
        with self.lock:
            if self.connection.in_transaction:
                yield
                return
            self.changed = 0
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self.connection.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        self.connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self.explained(error) from error
            changed = self.changed
        if changed:
            for listener in list(self.listeners):
                listener(changed)

    def all(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self.lock:
            try:
                return self.connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise self.explained(error) from error

    def one(self, query: str, *values: object) -> sqlite3.Row | None:
        rows = self.all(query, *values)
        return rows[0] if rows else None

    def number(self, query: str, *values: object) -> int:
        """The first column of the first row; 0 when it is NULL."""
        row = self.one(query, *values)
        return int(row[0] or 0) if row is not None else 0

    def run(self, query: str, *values: object) -> int:
        """Changes something inside a transaction. Returns the number of rows that changed."""
        assert self.connection.in_transaction, query
        return self.connection.execute(query, values).rowcount

    def put(self, table: str, values: Mapping[str, object]) -> int:
        """Adds a row. Returns its number."""
        assert self.connection.in_transaction, table
        marks = ", ".join("?" * len(values))
        query = f"INSERT INTO {table}({', '.join(values)}) VALUES({marks})"
        return self.connection.execute(query, tuple(values.values())).lastrowid or 0

    def change(self, table: str, row: object, values: Mapping[str, object]) -> None:
        """Changes columns of the row of this id, and gives it a new revision."""
        columns = ", ".join(f"{name} = ?" for name in (*values, "revision"))
        self.run(f"UPDATE {table} SET {columns} WHERE id = ?", *values.values(), self.revise(), row)

    def revise(self) -> int:
        """The next revision."""
        self.run("UPDATE meta SET value = value + 1 WHERE name = 'revision'")
        self.changed = self.revision()
        return self.changed

    def revision(self) -> int:
        return self.number("SELECT value FROM meta WHERE name = 'revision'")

    def close(self) -> None:
        with self.lock, contextlib.suppress(sqlite3.Error):
            self.connection.close()

    def read_only(self, why: str) -> BrokenError:
        return BrokenError(f"{self.path}: cannot be written to ({why}). Make the file and its folder writable")

    def explained(self, error: sqlite3.Error) -> UserError:
        code = getattr(error, "sqlite_errorname", "") or ""
        if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")):
            return BrokenError(
                f"{self.path}: another sagsae serve works in this folder. Stop it, or use another --root"
            )
        if code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return BrokenError(
                f"{self.path}: is damaged ({error}). It is a cache of what the stores' folders say: stop the service, "
                "delete the file, start again"
            )
        if code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            return self.read_only(str(error))
        if code.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
            return BrokenError(f"{self.path}: cannot be written to ({error}). Free space on this disk, then try again")
        raise error
