"""`sagsae bench store`, the half that writes: a store of real activations, and the writer against the codec alone."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harvest.recode import recode
from harvest.run import harvest
from harvest.writer import ShardRows, ShardWriter, rows_that_count
from shared.bench import Run
from shared.config import HarvestConfig
from shared.files import LocalFiles
from shared.reader import open_reader, read_shard
from shared.shard import CODECS, as_float32, encode_chunk
from shared.spec import StoreSpec
from shared.store import Store

CHUNKS_PER_SHARD = 32


def make_stores(folder: Path, model: str, tokens: int) -> dict[str, Store]:
    """The same activations in every codec, by codec."""
    config = HarvestConfig(model=model, tokens=tokens, out=str(folder), name="zstd", shard_rows=None)
    first = harvest(config.model_copy(update={"shard_rows": shard_rows(config)})).store
    stores = {"zstd": Store.open(first)}
    for codec in ("lz4", "none", "int8"):
        stores[codec] = Store.open(recode(first, str(folder / codec), codec).store)
    return stores


def shard_rows(config: HarvestConfig) -> int:
    from harvest.plan import default_chunk_rows, make_plan

    widest = max(hook.d_in for hook in make_plan(config).hooks.values())
    return CHUNKS_PER_SHARD * default_chunk_rows(2 * widest)


Prepare = Callable[[], None]


@contextmanager
def writing(stores: dict[str, Store], hook: str, folder: Path) -> Iterator[tuple[dict[str, Run], dict[str, Prepare]]]:
    """For zstd and lz4: encoding one shard's chunks that lie in memory, and committing that shard, files synced. What
    was written before is deleted first, which is not measured."""
    store = stores["zstd"]
    shard = next(iter(store.commits))
    rows = read_shard(open_reader(store, hook), shard)
    keep = rows_that_count(store.tokens(), store.spec.special_ids)
    part = shard_of(store, hook, shard, rows)
    runs: dict[str, Run] = {}
    before: dict[str, Prepare] = {}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for codec in ("zstd", "lz4"):
            spec = store.spec.model_copy(update={"codec": codec, "hookpoints": {hook: store.spec.hookpoints[hook]}})
            place = folder / codec
            writer = stack.enter_context(closing(ShardWriter(LocalFiles(place), spec, keep, threads=1)))
            runs[f"encode {codec}"] = encoding(rows, spec)
            runs[f"writer {codec}"] = committing(writer, hook, shard, part)
            before[f"writer {codec}"] = emptying(place)
        yield runs, before


def emptying(place: Path) -> Prepare:
    def run() -> None:
        shutil.rmtree(place, ignore_errors=True)
        (place / "manifest").mkdir(parents=True)

    return run


def encoding(rows: NDArray[Any], spec: StoreSpec) -> Run:
    assert CODECS[spec.codec]
    whole = len(rows) // spec.chunk_rows * spec.chunk_rows
    chunks = [rows[at : at + spec.chunk_rows] for at in range(0, whole, spec.chunk_rows)]

    def run() -> int:
        for chunk in chunks:
            encode_chunk(chunk, spec.codec)
        return sum(chunk.nbytes for chunk in chunks)

    return run


def committing(writer: ShardWriter, hook: str, shard: int, part: ShardRows) -> Run:
    def run() -> int:
        writer.submit(shard, {hook: part})
        writer.wait()
        return part.rows.nbytes

    return run


def shard_of(store: Store, hook: str, shard: int, rows: NDArray[Any]) -> ShardRows:
    """A shard as the model gives it: the moments are taken on the model's device, before the writer."""
    norms = np.linalg.norm(as_float32(rows, store.spec.dtype), axis=1)
    total, squares = (store.row_of_shard(f"stats/{hook}/{name}", shard) for name in ("sum", "sum_of_squares"))
    return ShardRows(rows, norms, total, squares)
