"""Watches a harvest from outside: reports what was committed since the last look."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shared.files.base import Files
from shared.store.commits import Commits
from shared.store.opened import GrowingStore, Store

NOTHING: Final = Commits.from_mapping({})


@dataclass(frozen=True)
class StoreLook:
    """A store at one moment."""

    store: Store
    new: list[int]
    """Shards committed since the previous look."""
    seconds: float
    """Seconds since the first look."""
    at_work: bool | None
    """Whether a harvest is alive on this machine; None where that cannot be seen."""


def watch_store(files: Files, every: float) -> Iterator[StoreLook]:
    """Yields one look now and one whenever something was committed; ends when the store is final. Reads only."""
    started, growing, seen = time.monotonic(), GrowingStore(files), None
    while True:
        store = growing.open()
        new = [] if seen is store.commits else store.commits.fresh(seen or NOTHING).tolist()
        if new or seen is None or store.state == "final":
            yield StoreLook(store, new if seen is not None else [], time.monotonic() - started, files.at_work())
        if store.state == "final":
            return
        seen = store.commits
        time.sleep(every)


def describe_look(look: StoreLook, first: StoreLook) -> str:
    """The progress in one line, for a person."""
    store = look.store
    size = store.commits.n_bytes
    rows = store.n_rows - first.store.n_rows
    rate = f", {rows / look.seconds:,.0f} tokens/s" if rows and look.seconds > 0 else ""
    done = f"{len(store.commits)}/{store.spec.n_shards} shards, {store.n_rows:,} tokens, {size / 1e6:,.1f} MB{rate}"
    if store.state == "final":
        return f"{done}: final"
    return done if look.at_work in (True, None) else f"{done}: no harvest is writing into it"
