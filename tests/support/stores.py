"""Stores taken back to an earlier state, and read in other orders."""

import json
import threading
import time
from pathlib import Path

import numpy as np

from shared.files.local import LocalFiles
from shared.store.create import finish_store
from shared.store.opened import Store
from shared.store.reader import open_reader, read_shard
from shared.store.spec import seal


def unfinished(root: Path) -> tuple[Path, list[str]]:
    """Takes a final store back to the moment after its last commit. Gives the writer's log and its lines."""
    document = json.loads((root / "zarr.json").read_text())
    about = {key: value for key, value in document["attributes"]["sagsae"].items() if key != "crc32c"}
    document["attributes"]["sagsae"] = seal({**about, "state": "writing"})
    (root / "zarr.json").write_text(json.dumps(document, indent=2) + "\n")
    (root / "manifest" / "index.jsonl").rename(root / "manifest" / "rank-00000.jsonl")
    log = root / "manifest" / "rank-00000.jsonl"
    return log, log.read_text().splitlines(keepends=True)


def in_token_order(store: Store, hook: str) -> np.ndarray:
    """[n_tokens, d_in]: the stored rows, back where they came from."""
    readers = [open_reader(store, array) for array in (hook, "index/context", "index/position")]
    rows, contexts, positions = (np.concatenate([read_shard(r, k) for k in store.commits]) for r in readers)
    ordered = np.empty_like(rows)
    ordered[contexts.astype(int) * store.spec.context + positions] = rows
    return ordered


def manifest_lines(root: Path) -> int:
    path = root / "manifest" / "rank-00000.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def commit(root: Path, store: Store, shards: list[int]) -> None:
    log = root / "manifest" / "rank-00000.jsonl"
    with log.open("a") as file:
        file.writelines(store.commits[shard].line() for shard in shards)


def in_steps(root: Path, store: Store, steps: list[list[int]], seconds: float) -> threading.Thread:
    """A harvest that commits a few shards at a time, then ends."""

    def work() -> None:
        for shards in steps:
            time.sleep(seconds)
            commit(root, store, shards)
        finish_store(LocalFiles(root), Store.open(root).spec)

    thread = threading.Thread(target=work)
    thread.start()
    return thread
