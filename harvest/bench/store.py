"""`sagsae bench store`, the half that writes: makes a store of real activations, and times the writer against the codec
alone."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from harvest.plan import make_plan
from harvest.recode import recode
from harvest.reuse.shape import default_chunk_rows
from harvest.run import harvest
from harvest.writer import ShardRows, ShardWriter
from shared.bench.timing import Run
from shared.config import HarvestConfig
from shared.errors import UserError
from shared.files.local import LocalFiles
from shared.permute import SHARD_ROWS, permutation
from shared.store.create import create_store, finish_store
from shared.store.manifest import read_metadata
from shared.store.opened import Store, is_store
from shared.store.reader import open_reader, read_shard
from shared.store.shard import CODECS, as_float32, encode_chunk
from shared.store.spec import HookSpec, StoreSpec, rows_that_count

CHUNKS_PER_SHARD: Final = 64
HOOKS: Final = ("resid_post", "attn_out", "mlp_out")
WIDE: Final = "layer_00/wide"


@dataclass(frozen=True)
class BenchStores:
    """Real activations, as harvested and as they are read."""

    narrow: Store
    """The resid_post, attn_out and mlp_out of some layers."""
    wide: dict[str, Store]
    """A store per codec, with one hookpoint `wide`. Its rows are the rows of several hookpoints side by side, so that
    they are as wide as in the models that people harvest. A small model's own rows are too narrow to measure."""


def make_stores(folder: Path, model: str, tokens: int, width: int) -> BenchStores:
    """Makes the stores. Raises UserError when the model has too few hookpoints for the width."""
    config = HarvestConfig(model=model, tokens=tokens, hooks=HOOKS, out=str(folder), name="narrow")
    plan = make_plan(config)
    d_in = next(iter(plan.hooks.values())).d_in
    side_by_side = max(1, width // d_in)
    n_layers = -(-side_by_side // len(HOOKS))
    if n_layers > plan.info.n_layers:
        raise UserError(f"--width {width}: {model} has at most {plan.info.n_layers * d_in * 3}, in rows of {d_in}")
    first = (plan.info.n_layers - n_layers) // 2
    rows = default_chunk_rows(2 * side_by_side * d_in)
    shape = {"chunk_rows": rows, "shard_rows": CHUNKS_PER_SHARD * rows}
    layers = tuple(range(first, first + n_layers))
    narrow = Store.open(harvest(config.model_copy(update={**shape, "layers": layers})).store)
    widened = widen(narrow, list(narrow.spec.hookpoints)[-side_by_side:], LocalFiles(folder / "zstd"))
    stores = {"zstd": widened}
    for codec in ("lz4", "none", "int8"):
        stores[codec] = Store.open(recode(widened.name, str(folder / codec), codec).store)
    return BenchStores(narrow, stores)


def widen(narrow: Store, hooks: list[str], files: LocalFiles) -> Store:
    """Writes the store whose rows are those of several hookpoints side by side."""
    if is_store(files):
        return Store.open(files)
    d_in = sum(narrow.spec.hookpoints[hook].d_in for hook in hooks)
    spec = narrow.spec.model_copy(update={"hookpoints": {WIDE: HookSpec(name=" ".join(hooks), d_in=d_in)}})
    tokens = {path: entry for path, entry in read_metadata(narrow.files).items() if path.startswith("tokens/c/")}
    for path in tokens:
        files.write(path, [narrow.files.read(path)])
    (files.root / "manifest").mkdir()
    create_store(files, spec, tokens, {"source": narrow.name})
    with closing(ShardWriter(files, spec, rows_that_count(narrow.tokens(), spec))) as writer:
        for shard in narrow.commits:
            writer.commit(shard, {WIDE: side_by_side(narrow, hooks, shard)})
    finish_store(files, spec)
    return Store.open(files)


def side_by_side(store: Store, hooks: list[str], shard: int) -> ShardRows:
    """A shard's rows in token order, several hookpoints joined into one."""
    start, stop = store.spec.shard_range(shard)
    back = np.argsort(permutation(stop - start, store.spec.seed, SHARD_ROWS, shard))
    rows = np.concatenate([read_shard(open_reader(store, hook), shard)[back] for hook in hooks], axis=1)
    total, squares = (
        np.concatenate([store.row_of_shard(f"stats/{hook}/{name}", shard) for hook in hooks])
        for name in ("sum", "sum_of_squares")
    )
    return ShardRows(rows, np.linalg.norm(as_float32(rows, store.spec.dtype), axis=1), total, squares)


Prepare = Callable[[], None]


@contextmanager
def writing(stores: BenchStores, folder: Path) -> Iterator[tuple[dict[str, Run], dict[str, Prepare]]]:
    """Yields two measurements for zstd and for lz4: encoding one shard's chunks in memory, and committing that shard
    with its files synced. The files of the previous run are deleted first, outside the measurement. The moments come
    with the rows, as in a harvest, where the model's device computes them."""
    store = stores.wide["zstd"]
    shard = next(iter(store.commits))
    part = side_by_side(store, [WIDE], shard)
    keep = rows_that_count(store.tokens(), store.spec)
    runs: dict[str, Run] = {}
    before: dict[str, Prepare] = {}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for codec in ("zstd", "lz4"):
            spec = store.spec.model_copy(update={"codec": codec})
            writer = stack.enter_context(closing(ShardWriter(LocalFiles(folder / codec), spec, keep, threads=1)))
            runs[f"encode {codec}"] = encode_run(part.rows, spec)
            runs[f"writer {codec}"] = commit_run(writer, shard, part)
            before[f"writer {codec}"] = clear_run(folder / codec)
        yield runs, before


def clear_run(place: Path) -> Prepare:
    def run() -> None:
        shutil.rmtree(place, ignore_errors=True)
        (place / "manifest").mkdir(parents=True)

    return run


def encode_run(rows: NDArray[Any], spec: StoreSpec) -> Run:
    assert CODECS[spec.codec].blosc
    whole = len(rows) // spec.chunk_rows * spec.chunk_rows
    chunks = [rows[at : at + spec.chunk_rows] for at in range(0, whole, spec.chunk_rows)]

    def run() -> int:
        for chunk in chunks:
            encode_chunk(chunk, spec.codec)
        return sum(chunk.nbytes for chunk in chunks)

    return run


def commit_run(writer: ShardWriter, shard: int, part: ShardRows) -> Run:
    def run() -> int:
        writer.commit(shard, {WIDE: part})
        return part.rows.nbytes

    return run
