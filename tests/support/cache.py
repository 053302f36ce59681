"""Stores of no numbers for the tests of the service: their descriptions and manifests are real, their shards are zeros.

A "harvest" here writes one shard after another, as a worker's command does.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harvest.reuse.key import rows_key, store_key, token_key
from harvest.reuse.match import Shape, Wanted
from harvest.serve.records import Clock
from shared.files.local import LocalFiles
from shared.request import WorkerInfo
from shared.store.commits import Commit, size_bounds
from shared.store.opened import write_state
from shared.store.spec import HookSpec, StoreSpec, shard_file

SHARD = 1024
HOOKS = ("layer_01/mlp_out",)
WORKER = WorkerInfo(name="box:1")
PLANNER = WorkerInfo(name="planner", light=True)


@dataclass
class TestClock:
    """Two clocks that stand still until they are moved."""

    __test__ = False
    wall: float = 1_000_000.0
    since: float = 50.0

    def move(self, seconds: float) -> None:
        self.wall += seconds
        self.since += seconds

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.since)


def spec_of(tokens: int = 4 * SHARD, hooks: Iterable[str] = HOOKS, seed: int = 0, model: str = "tiny") -> StoreSpec:
    """A store of four shards, unless said otherwise. Another `seed` is another key."""
    names = {path: HookSpec(name=f"blocks.{int(path[6:8])}.hook_{path[9:]}", d_in=8) for path in hooks}
    source = {"kind": "files", "files": [{"name": "corpus.jsonl", "bytes": 9, "blake2b": "00"}], "text_field": "text"}
    return StoreSpec(
        model={"name": model, "commit": "c0", "dtype": "float32", "attention": "sdpa", "weight_processing": "none"},
        tokenizer={"blake2b": "ab", "eos_id": 0},
        corpus={"source": source, "shuffled": True, "whole": False, "vocab_size": 64, "ids_blake2b": "0" * 32},
        context=128,
        bos_id=None,
        special_ids=(0,),
        n_tokens=tokens,
        token_dtype="uint16",
        hookpoints=names,
        dtype="bfloat16",
        codec="zstd",
        chunk_rows=SHARD,
        shard_rows=SHARD,
        seed=seed,
    )


def planned(spec: StoreSpec, accept: str = "exact", **request: Any) -> dict[str, Any]:
    """What the planner says of a request for the activations of a spec, as it comes out of the planner's pipe."""
    wanted = Wanted(
        label=spec.model["name"],
        shapes=(Shape(store_key(spec), (), spec.chunk_rows, spec.shard_rows),),
        rows_key=rows_key(spec),
        token_key=token_key(spec),
        hookpoints=spec.hookpoints,
        tokens=spec.n_tokens,
        context=spec.context,
        accept="covering" if accept == "covering" else "exact",
        environment=None,
        codec=spec.codec,
        dtype=spec.dtype,
    )
    config = {"model": "tiny", "tokens": spec.n_tokens, "device": "auto"}
    document: dict[str, Any] = json.loads(
        json.dumps({"wanted": wanted.as_json(), "config": config, "request": request})
    )
    return document


@dataclass
class FakeHarvest:
    """Writes a store, shard by shard."""

    root: Path
    name: str
    spec: StoreSpec
    shard_bytes: int = 10_000
    linked: tuple[Path, ...] = ()
    """Stores of the same key whose shards are linked instead of written."""
    files: LocalFiles = field(init=False)

    def __post_init__(self) -> None:
        self.files = LocalFiles(self.root / self.name)

    def begin(self) -> "FakeHarvest":
        (self.files.root / "manifest").mkdir(parents=True, exist_ok=True)
        (self.files.root / "record.json").write_text("{}")
        write_state(self.files, self.spec, "writing")
        return self

    def shard(self, number: int) -> None:
        """Commits one shard: its bytes stand in the file of its first hookpoint."""
        start, stop = self.spec.shard_range(number)
        arrays = tuple(sorted(self.spec.arrays()))
        files = {array: (int(size), 0) for array, size in zip(arrays, size_bounds(self.spec, arrays)[0], strict=True)}
        path = shard_file(next(iter(self.spec.hookpoints)), number, True)
        target = self.files.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        lender = next((folder / path for folder in self.linked if (folder / path).exists()), None)
        if lender is not None and stop - start == self.spec.shard_rows:
            os.link(lender, target)
        else:
            target.write_bytes(b"\0" * self.shard_bytes)
        with (self.files.root / "manifest" / "rank-00000.jsonl").open("a") as log:
            log.write(Commit(number, stop - start, start, stop, stop - start, files).line())

    def finish(self) -> None:
        write_state(self.files, self.spec, "final")

    def whole(self) -> Path:
        self.begin()
        for number in range(self.spec.n_shards):
            self.shard(number)
        self.finish()
        return self.files.root


def fake_store(root: Path, name: str, spec: StoreSpec | None = None, **options: Any) -> Path:
    """A finished store."""
    return FakeHarvest(root, name, spec or spec_of(), **options).whole()


def disk_bytes(root: Path) -> int:
    """Bytes of everything that is in the stores of a folder, linked files once."""
    found = {}
    for folder, _, names in os.walk(root):
        inside = Path(folder).relative_to(root).parts
        if not inside or inside[0] == ".jobs":
            continue
        for name in names:
            about = os.lstat(Path(folder) / name)
            found[about.st_ino] = about.st_size
    return sum(found.values())
