"""One writer of a prefix at a time, in an object store: an object that only one process can create."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from obstore.exceptions import AlreadyExistsError, PreconditionError

from shared.client import Client, ServerError
from shared.errors import UserError


@contextmanager
def object_lock(client: Client, key: str, name: str) -> Iterator[None]:
    """Holds the lock that is the object `key`. It stays when its process is killed: then a process of the same
    machine takes it over. Raises UserError naming the holder."""
    mine = json.dumps({
        "pid": os.getpid(), "host": socket.gethostname(), "processes": process_space(),
        "since": datetime.now(UTC).isoformat(),
    }).encode()  # fmt: skip
    take_lock(client, key, name, mine)
    try:
        yield
    finally:
        with suppress(FileNotFoundError, ServerError):  # what else failed is the one to tell
            if client.get(key, name)[0] == mine:
                client.delete([key], name)


def take_lock(client: Client, key: str, name: str, mine: bytes) -> None:
    mode: Any = "create"
    held: Any = {}
    for _ in range(3):
        try:
            return client.put(key, name, mine, mode)
        except (AlreadyExistsError, PreconditionError):
            mode = "create"
        with suppress(FileNotFoundError):  # given back in this moment
            data, meta = client.get(key, name)
            if data == mine:  # the first of two tries had come through
                return None
            held = holder(data)
            if not is_dead(held):
                break
            mode = {tag: meta[tag] for tag in ("e_tag", "version") if meta[tag]}  # of the dead process's lock
    who = f"process {held.get('pid')} on {held.get('host')} (since {held.get('since')})" if held else "another process"
    raise UserError(
        f"{name.rpartition('/')[0]}: {who} is writing here; wait for it, or stop it first. If it is known to be dead, "
        f"delete the object {name}"
    )


def holder(data: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        held = json.loads(data)
        if isinstance(held, dict):
            return held
    return {}


def is_dead(held: dict[str, Any]) -> bool:
    """Whether it was a process of this machine, and is gone. No answer about any other machine."""
    here = held.get("host") == socket.gethostname() and held.get("processes") == process_space()
    pid = held.get("pid")
    if not here or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def process_space() -> str:
    """Which numbering of processes ours are in: two containers can have one host name."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
