"""A lock on a prefix of an object store, for one writer at a time: an object that only one process can create."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Final

from obstore.exceptions import AlreadyExistsError, PreconditionError

from shared.errors import BusyError
from shared.files.client import ObjectClient, ServerError
from shared.files.locks import is_dead, lock_content, process_space

LOCK_BYTES: Final = 1 << 16


@contextmanager
def object_lock(client: ObjectClient, key: str, name: str) -> Iterator[None]:
    """Holds the lock, which is the object `key`. It stays when its process is killed; a process of the same machine
    then takes it over. Raises BusyError naming the holder."""
    since = datetime.now(UTC).isoformat()
    mine = json.dumps(
        {"pid": os.getpid(), "host": socket.gethostname(), "processes": process_space(), "since": since}
    ).encode()
    take_lock(client, key, name, mine)
    try:
        yield
    finally:
        with suppress(FileNotFoundError, ServerError):  # an earlier failure is the one to report
            if client.get(key, name, LOCK_BYTES)[0] == mine:
                client.delete([key], name)


def take_lock(client: ObjectClient, key: str, name: str, mine: bytes) -> None:
    mode: Any = "create"
    held: Any = {}
    for _ in range(3):
        try:
            return client.put(key, name, mine, mode)
        except (AlreadyExistsError, PreconditionError):
            mode = "create"
        with suppress(FileNotFoundError):  # released meanwhile
            data, meta = client.get(key, name, LOCK_BYTES)
            if data == mine:  # the first of two tries succeeded after all
                return None
            held = lock_content(data)
            if not is_dead(held):
                break
            mode = {tag: meta[tag] for tag in ("e_tag", "version") if meta[tag]}  # replace only the dead process's lock
    who = f"process {held.get('pid')} on {held.get('host')} (since {held.get('since')})" if held else "another process"
    raise BusyError(
        f"{name.rpartition('/')[0]}: {who} is writing here; wait for it, or stop it first. If it is known to be dead, "
        f"delete the object {name}"
    )
