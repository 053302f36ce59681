"""Waiting for threads and processes, and killing them."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def wait_for(true: Callable[[], object], seconds: float = 120, what: Callable[[], object] = lambda: "") -> None:
    """Waits for something slow; `what` says what there was instead."""
    patience = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < patience, what()
        time.sleep(0.05)


def until(true: Callable[[], bool]) -> None:
    patience = time.monotonic() + 10
    while not true():
        assert time.monotonic() < patience
        time.sleep(0.001)


def children(pid: int) -> list[int]:
    """Processes below this one."""
    below: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(stat.parent.name)
            below += [child, *children(child)]
    return below


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_until_gone(command: list[str]) -> None:
    out = command[command.index("--out") + 1].encode()
    while any(out in words and b"python" in words for words in command_lines()):
        time.sleep(0.01)


def command_lines() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return found


def rank_of(pid: int) -> int | None:
    """The rank that a launcher gave to a process; None for any other process."""
    try:
        found = [word for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if word.startswith(b"RANK=")]
    except OSError:
        return None
    return int(found[0][5:]) if found else None
