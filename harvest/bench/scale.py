"""`sagsae bench scale`, the half that writes: makes stores of any size in seconds, and begins a harvest into one.

A store is real: every file that the manifest names exists and has its length and checksums, and every row has its place
in the corpus. It is cheap because rows repeat, so that files compress well, and because files of equal content are hard
links of one another. Rows lie in the order of the corpus; no timing depends on that.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from harvest.fill import fill
from harvest.team import Team
from shared.bench.scale import ScalePoint, in_a_process
from shared.config import HarvestConfig
from shared.files.local import LocalFiles, make_folders
from shared.model.source import resolve_model
from shared.store.commits import NUMBERS, CommitColumns
from shared.store.create import create_store
from shared.store.manifest import INDEX, in_pieces
from shared.store.opened import Store, write_state
from shared.store.shard import crc32, encode_chunk, encode_shard, pad_chunk, with_crc
from shared.store.spec import HookSpec, StoreSpec, shard_file, token_layout

MODEL: Final = "tiny"
"""The shipped model, which the last shard is harvested from."""
HOOK, NAME, D_IN = "layer_02/mlp_out", "blocks.2.hook_mlp_out", 256
NARROW: Final = 8
"""d_in of stores in which nothing is harvested."""
CONTEXT: Final = 128
SHARD_ROWS, CHUNK_ROWS = 1 << 16, 1 << 12
LAST_ROWS: Final = 1 << 10
"""Rows of the shard that is left to harvest."""
LINKS: Final = 10_000
"""Hard links per file: some file systems allow at most 65,000."""


@dataclass(frozen=True)
class ShardKind:
    """The shape of a store's shards."""

    context: int
    shard_rows: int
    chunk_rows: int
    d_in: int
    hooks: tuple[str, ...] = (HOOK,)
    left: int = 0
    """Rows of a last shard that is not committed. If it is not 0, the store is unfinished."""


MANIFEST: Final = ShardKind(
    CONTEXT, SHARD_ROWS, CHUNK_ROWS, 2048, ("layer_08/attn_out", "layer_08/mlp_out", "layer_08/resid_post")
)
"""Three hookpoints as in Pythia-1b: fourteen files per shard."""
SMALL_SHARDS: Final = ShardKind(8, 8, 8, NARROW)
LARGE_SHARDS: Final = ShardKind(CONTEXT, SHARD_ROWS, CHUNK_ROWS, D_IN, left=LAST_ROWS)


def spec_of(kind: ShardKind, shards: int, digest: str) -> StoreSpec:
    hooks = {path: HookSpec(name=NAME, d_in=kind.d_in) for path in kind.hooks}
    return StoreSpec(
        model={
            "name": MODEL,
            "commit": "0" * 32,
            "local": True,
            "dtype": "float32",
            "attention": "sdpa",
            "weight_processing": "none",
        },
        tokenizer={"blake2b": None, "eos_id": 0},
        corpus={"source": "bench scale", "whole": True, "vocab_size": 256, "documents": 1, "ids_blake2b": digest},
        context=kind.context,
        bos_id=None,
        special_ids=(0,),
        n_tokens=shards * kind.shard_rows + kind.left,
        token_dtype="uint16",
        hookpoints=hooks,
        dtype="bfloat16",
        codec="zstd",
        chunk_rows=kind.chunk_rows,
        shard_rows=kind.shard_rows,
        seed=0,
    )


def make_manifest(root: Path, shards: int) -> None:
    """Writes only the description and the manifest of a store: enough to open it."""
    files, spec = LocalFiles(root), spec_of(MANIFEST, shards, "0" * 32)
    arrays, rows, rng = sorted(spec.arrays()), spec.rows_of_shards(), np.random.default_rng(0)
    sizes = np.stack(
        [
            np.full(shards, 8 * rows[array][0] + 4) if array in rows else rng.integers(10_000, 100_000_000, shards)
            for array in arrays
        ],
        axis=1,
    )
    for place, array in enumerate(arrays):
        if array.startswith(("index/", "stats/")) and array not in rows:
            sizes[:, place] //= 1000  # one number a row
    write_manifest(files, spec, sizes, rng.integers(0, 1 << 32, sizes.shape, dtype=np.uint32), "final")


def write_manifest(
    files: LocalFiles, spec: StoreSpec, sizes: NDArray[np.int64], crcs: NDArray[np.uint32], state: Any
) -> None:
    """Writes the manifest of the first shards; each has as many rows as a shard can have."""
    shard = np.arange(len(sizes))
    numbers = np.empty((len(sizes), NUMBERS), np.int64)
    numbers[:, 0], numbers[:, 1] = shard, spec.shard_rows
    numbers[:, 2], numbers[:, 3] = shard * spec.shard_rows, (shard + 1) * spec.shard_rows
    numbers[:, 4] = spec.shard_rows // spec.context * (spec.context - 1)
    columns = CommitColumns(tuple(sorted(spec.arrays())), tuple(sorted(spec.hookpoints)), numbers, sizes, crcs)
    files.write(INDEX if state == "final" else "manifest/rank-00000.jsonl", in_pieces(columns.lines()))
    write_state(files, spec, state)


def make_store(root: Path, shards: int, kind: ShardKind) -> None:
    """Writes a store of `shards` full shards. Their rows lie in the order of the tokens, so that shards can share
    files: `verify --full` would report that they are not permuted."""
    files = LocalFiles(root)
    n_contexts = -(-(shards * kind.shard_rows + kind.left) // kind.context)
    digest, tokens = write_token_chunks(root, n_contexts, kind.context)
    spec = spec_of(kind, shards, digest)
    create_store(files, spec, tokens, {"command": "bench scale"})
    arrays, fixed = sorted(spec.arrays()), same_in_every_shard(spec)
    sizes, crcs = np.empty((shards, len(arrays)), np.int64), np.empty((shards, len(arrays)), np.uint32)
    for place, array in enumerate(arrays):
        if array in fixed:
            sizes[:, place], crcs[:, place] = len(fixed[array]), crc32(fixed[array])
            link(root, array, shards, fixed[array], array in spec.rows_of_shards() or array in spec.hookpoints)
        else:
            for shard, data in enumerate(contexts_of_shards(spec, shards)):
                sizes[shard, place], crcs[shard, place] = len(data), crc32(data)
                write(root / shard_file(array, shard, False), data)
    write_manifest(files, spec, sizes, crcs, "writing" if kind.left else "final")


def write_token_chunks(root: Path, n_contexts: int, context: int) -> tuple[str, dict[str, tuple[int, int]]]:
    """Writes equal contexts without special ids. Returns the digest and the files."""
    layout, digest, files = token_layout(context, "uint16"), hashlib.blake2b(digest_size=16), {}
    block = np.tile((np.arange(context) % 200 + 1).astype("<u2"), (min(layout.chunk_rows, n_contexts), 1))
    whole, at = with_crc(encode_chunk(pad_chunk(block, layout), layout.codec)), 0
    for number in range(-(-n_contexts // layout.chunk_rows)):
        rows = block[: n_contexts - at]
        data = whole if len(rows) == len(block) else with_crc(encode_chunk(pad_chunk(rows, layout), layout.codec))
        write(root / shard_file("tokens", number, True), data)
        files[shard_file("tokens", number, True)] = len(data), crc32(data)
        digest.update(rows.tobytes())
        at += len(rows)
    return digest.hexdigest(), files


def same_in_every_shard(spec: StoreSpec) -> dict[str, bytes]:
    """The files that have the same content in every shard, by array."""
    n, layouts, rng = spec.shard_rows, spec.layouts(), np.random.default_rng(0)
    found = {
        "index/position": b"".join(encode_shard((np.arange(n) % spec.context).astype("<u2"), layouts["index/position"]))
    }
    for hook, about in spec.hookpoints.items():
        few = (rng.standard_normal((16, about.d_in)).astype("<f4").view("<u4") >> 16).astype("<u2")
        x, which = (few.astype("<u4") << 16).view("<f4").astype("<f8"), np.arange(n) % len(few)
        counts = np.bincount(which[np.arange(n) % spec.context >= spec.skip_positions], minlength=len(few))
        norms = np.sqrt(np.square(x).sum(axis=1))[which].astype("<f4")
        found[hook] = b"".join(encode_shard(few[which], layouts[hook]))
        found[f"stats/{hook}/norm"] = b"".join(encode_shard(norms, layouts[f"stats/{hook}/norm"]))
        found[f"stats/{hook}/sum"] = with_crc((counts @ x).tobytes())
        found[f"stats/{hook}/sum_of_squares"] = with_crc((counts @ np.square(x)).tobytes())
    return found


def contexts_of_shards(spec: StoreSpec, shards: int) -> Iterator[bytes]:
    """Yields the file of index/context of each shard."""
    layout, within = spec.layouts()["index/context"], np.arange(spec.shard_rows) // spec.context
    for shard in range(shards):
        yield b"".join(encode_shard((within + shard * (spec.shard_rows // spec.context)).astype("<u4"), layout))


def link(root: Path, array: str, shards: int, data: bytes, matrix: bool) -> None:
    """Writes the same file for every shard, as hard links."""
    first = root / array
    for shard in range(shards):
        path = root / shard_file(array, shard, matrix)
        if shard % LINKS == 0:
            write(path, data)
            first = path
        else:
            if matrix:
                path.parent.mkdir()
            os.link(first, path)


def write(path: Path, data: bytes) -> None:
    make_folders(path.parent)
    path.write_bytes(data)


def harvest_the_rest(place: str) -> Store:
    """Harvests the missing last shard, as a resumed harvest process does."""
    store, source = Store.open(place), resolve_model(MODEL)
    config = HarvestConfig(
        model=MODEL, tokens=store.spec.n_tokens, out=str(Path(place).parent), device="cpu", reuse="none"
    )
    with store.files.lock():
        fill(store, config, source, Team(), lambda: None, store.missing)
    return store


def measure_growth(
    folder: Path, quick: bool, command: Sequence[str], advance: Callable[[int, str], None]
) -> list[ScalePoint]:
    """Everything that is measured, once with each of the stores, which are made in `folder`. `command` with what to do
    and `--place STORE` behind it runs one measurement in a process of its own."""
    shards, rows = sizes(quick)
    points = []

    def measure(axis: str, size: int, store: Path, what: str) -> None:
        points.append(ScalePoint(axis, what, size, in_a_process([*command, what, "--place", str(store)])))
        advance(1, f"{what}, {size:,} {axis}")

    for size in shards:
        make_manifest(folder / "manifest" / str(size), size)
        measure("shards", size, folder / "manifest" / str(size), "open")
        make_store(folder / "shards" / str(size), size, SMALL_SHARDS)
        for what in ("info", "verify", "train"):
            measure("shards", size, folder / "shards" / str(size), what)
    for size in rows:
        make_store(folder / "rows" / str(size), max(1, size // SHARD_ROWS), LARGE_SHARDS)
        for what in ("open", "info", "verify", "train", "harvest"):
            measure("rows", size, folder / "rows" / str(size), what)
    return points


def sizes(quick: bool) -> tuple[list[int], list[int]]:
    """Numbers of shards and of rows that stores are made with."""
    if quick:
        return [10, 100, 400], [10**5, 10**6]
    return [10, 100, 1000, 10_000, 100_000], [10**5, 10**6, 10**7, 10**8, 10**9]


def measurements(quick: bool) -> int:
    """How many measurements `measure_growth` makes."""
    shards, rows = sizes(quick)
    return 4 * len(shards) + 5 * len(rows)
