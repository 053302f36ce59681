"""A command that a worker runs: its settings, its log, how it is stopped, and how far it is."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from harvest.serve.database import JOBS
from harvest.serve.planner import child_environment
from shared.command.parent import parent_variable
from shared.errors import DamagedError, UserError
from shared.files.handles import close, open_regular
from shared.files.local import LocalFiles, explained, write_file
from shared.gate import printable
from shared.store.opened import GrowingStore

LOG_BYTES: Final = 8 << 20
"""A longer log is moved to N.log.1, and begins again."""
PROGRAM: Final = (sys.executable, "-P", "-m", "cli")
TAIL_BYTES: Final = 16 << 10
LINE: Final = 500
"""Characters of the last line that is shown."""
STOP_S: Final = 60.0
"""Seconds that a command has to commit what it has after SIGTERM; then it is killed. What is committed stays."""


class JobFiles:
    """The files of one job beside the stores."""

    def __init__(self, root: Path, job: int) -> None:
        self.folder = root / JOBS
        self.log, self.settings = self.folder / f"{job}.log", self.folder / f"{job}.toml"

    def write_settings(self, values: Mapping[str, Any]) -> Path:
        with explained(self.settings):
            write_file(self.settings, as_toml(values).encode())
        return self.settings

    def empty(self) -> Path:
        """An empty folder, for commands to run in."""
        folder = self.folder / "empty"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def open_log(self) -> int:
        """A handle for the command's stderr. Raises UserError where the log is a link."""
        return open_regular(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def rotate(self) -> None:
        """Moves a log that is too long aside. The command writes on at the beginning."""
        with contextlib.suppress(OSError):
            if self.log.stat().st_size <= LOG_BYTES:
                return
            write_file(self.log.with_suffix(".log.1"), self.tail(LOG_BYTES))
            os.truncate(self.log, 0)

    def tail(self, length: int = TAIL_BYTES, start: int = 0) -> bytes:
        """The last bytes of the log, of what was written after `start`."""
        try:
            handle = open_regular(self.log)
        except OSError:
            return b""
        try:
            size = os.fstat(handle).st_size
            first = start if start <= size else 0  # it was moved aside meanwhile
            return os.pread(handle, length, max(first, size - length))
        finally:
            close(handle)

    def size(self) -> int:
        try:
            return self.log.stat().st_size
        except OSError:
            return 0


def last_line(data: bytes) -> str:
    """The last line of a log that says something, without the word that begins an error."""
    lines = data.decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
    line = next((line for line in reversed(lines) if line.strip()), "")
    return printable(line.strip().removeprefix("error: ").removeprefix("stopped: "))


def as_toml(values: Mapping[str, Any]) -> str:
    """Settings as lines of TOML. None is left out: it is no value there."""
    return "".join(f"{name} = {toml_value(value)}\n" for name, value in values.items() if value is not None)


def toml_value(value: Any) -> str:
    """Raises UserError for what no setting can be."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    raise UserError(f"a job's settings hold {type(value).__name__}, which no setting is. Update this worker")


class Command:
    """A running command of ours. It is given to the main thread's care: it ends when that thread's process does."""

    def __init__(
        self,
        words: Sequence[str],
        files: JobFiles,
        environment: Mapping[str, str],
        killed: bool,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        """`killed`: it is killed when this process ends; otherwise it gets SIGTERM, which it passes on to others.
        `program` is what runs the words."""
        self.files, self.start = files, files.size()
        number = signal.SIGKILL if killed else signal.SIGTERM
        handle = files.open_log()
        try:
            self.process = subprocess.Popen(
                [*program, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=handle,
                cwd=files.empty(),  # no name in a job can be one of a file in it
                env={**child_environment(), **environment, **parent_variable(number)},
                start_new_session=True,  # Ctrl-C in a terminal is the worker's
            )
        finally:
            close(handle)
        self.stopped: float | None = None

    @property
    def code(self) -> int | None:
        """Its exit code; negative: the signal that ended it; None: it runs."""
        return self.process.poll()

    def stop(self) -> None:
        """Asks it to commit and end; kills it when it takes too long."""
        now = time.monotonic()
        if self.code is not None:
            return
        if self.stopped is None:
            self.stopped = now
            self.signal(signal.SIGTERM, group=False)
        elif now - self.stopped > STOP_S:
            self.kill()

    def kill(self) -> None:
        self.signal(signal.SIGKILL, group=True)

    def signal(self, number: int, group: bool) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if group else os.kill)(self.process.pid, number)

    def wait(self, seconds: float) -> int | None:
        """Waits for its end, at most so long. Returns `code`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def words(self) -> str:
        """Its last line."""
        return last_line(self.files.tail(start=self.start))


class StoreGrowth:
    """How many rows a store has, and how fast it grows."""

    def __init__(self, folder: Path) -> None:
        self.store = GrowingStore(LocalFiles(folder))
        self.first: tuple[float, int] | None = None
        self.rows = 0
        self.rate: float | None = None

    def look(self) -> None:
        """Counts the rows that are committed by now. A store that cannot be read yet keeps the last count."""
        with contextlib.suppress(UserError, DamagedError, OSError):
            self.rows = self.store.open(lenient=True).n_rows
            now = time.monotonic()
            if self.first is None:
                self.first = now, self.rows
            elif self.rows > self.first[1]:
                self.rate = (self.rows - self.first[1]) / (now - self.first[0])
