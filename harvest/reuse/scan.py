"""The catalog of a folder of stores, read from the folders themselves."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from harvest.reuse.key import environment_in, environment_of, store_key
from harvest.reuse.match import CatalogStore
from shared.errors import DamagedError, UserError
from shared.files.base import Files
from shared.files.local import LocalFiles
from shared.files.open import open_files
from shared.progress import say
from shared.store.create import RECORD
from shared.store.manifest import read_manifest
from shared.store.opened import STATE_FILE, is_store, read_state

Read = TypeVar("Read")
AT_ONCE: Final = 8
"""Folders read in parallel on a slow disk."""
FEW: Final = 32
"""Folders whose time tells how fast the disk is."""
SLOW_S: Final = 0.002
"""Seconds for a folder from which the disk counts as slow; a fast one takes a tenth."""


def scan_stores(root: str | Path, *, sizes: bool = False, tell: bool = True) -> list[CatalogStore]:
    """Every store in the folder `root`, in order of their names; a folder that holds no readable store is left out, and
    a damaged one is named if `tell`. With `sizes` the manifest of a finished store is read, too, which takes longer."""
    files = open_files(root)
    if isinstance(files, LocalFiles) and not files.root.is_dir():
        return []
    found = each_of(lambda name: scan_store(files, name, sizes=sizes, tell=tell), files.folders())
    return [store for store in found if store]


def each_of(read: Callable[[str], Read], names: Sequence[str]) -> list[Read]:
    """What `read` returns for each folder. On a disk that answers at once one thread is fastest: several would wait for
    the GIL (5,000 stores: 0.7 s, and 1.5 s with eight threads). Where a folder takes longer, several are read in
    parallel."""
    began = time.monotonic()
    found = [read(name) for name in names[:FEW]]
    if time.monotonic() - began < SLOW_S * len(found):
        return found + [read(name) for name in names[FEW:]]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return found + list(pool.map(read, names[FEW:]))


def scan_store(root: Files, name: str, *, sizes: bool = False, tell: bool = True) -> CatalogStore | None:
    """One store of the folder `root`; None where there is none that can be read."""
    files = root.at(name)
    if isinstance(files, LocalFiles) and not (files.root / STATE_FILE).is_file():
        return None
    try:
        return catalog_store(files, name, sizes)
    except (UserError, DamagedError, OSError) as error:
        if tell and not is_foreign(files):
            say(f"{files.name}: left out. {error}")
        return None


def is_foreign(files: Files) -> bool:
    """Whether another program wrote what is in a folder: an array of ids, for example."""
    try:
        return not is_store(files)
    except (DamagedError, UserError):
        return False


def catalog_store(files: Files, name: str, sizes: bool) -> CatalogStore:
    spec, state = read_state(files)
    commits = read_manifest(files, spec, state == "final") if sizes or state == "writing" else None
    rows = spec.n_tokens if commits is None else commits.n_rows
    size = None if commits is None else commits.n_bytes
    folder = str(files.root.resolve()) if isinstance(files, LocalFiles) else files.name
    return CatalogStore(name, spec, store_key(spec), rows, state, read_environment(files), size, folder)


def read_environment(files: Files) -> str:
    try:
        return environment_in(files.read(RECORD))
    except OSError:  # verify reports it
        return environment_of({})
