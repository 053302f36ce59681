"""The reading half of `sagsae bench store`: decoding, reading chunks, windows and batches, other readers, verifying."""

import importlib.util
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.bench.timing import Run
from shared.config import TrainConfig
from shared.errors import DamagedError
from shared.permute import permutation
from shared.schema import build
from shared.store.opened import Store
from shared.store.reader import ArrayReader
from shared.store.shard import decode_chunk, file_crc
from shared.store.verify import verify
from train.data.loader import Loader
from train.data.order import Split, StreamPosition, share
from train.data.stream import BatchStream
from train.plan.job import make_passes

BATCH_BYTES = 4 << 20
"""1,024 rows of 2,048 bfloat16 values: the usual batch on a CPU."""


def reading(store: Store, hook: str, others: bool) -> dict[str, Run]:
    """Returns the runs to time, by name. Each reads every chunk of a hookpoint once, in random order, on one thread;
    except "2 threads", and except checksums and verifying, which read the whole store in its own order."""
    reader = ArrayReader(store, hook)
    rows = reader.layout.chunk_rows
    places = [(s, c) for s, commit in store.commits.items() for c in range(commit.rows // rows)]
    places = [places[i] for i in permutation(len(places), 0, 99)]
    codec = store.spec.codec
    runs = {f"decode {codec}": decoding(reader, places), f"reader {codec}": chunks(reader, places, False)}
    runs[f"reader with crc {codec}"] = chunks(reader, places, True)
    runs[f"reader with crc, 2 threads {codec}"] = two_threads(reader, places)
    for end, checked in (("", "off"), (" with crc", "always")):
        runs[f"windows{end} {codec}"] = windows(store, hook, checked)
        runs[f"batches{end} {codec}"] = batches(store, hook, checked)
    runs[f"checksums {codec}"] = checksums(store, hook)
    runs[f"verify --full {codec}"] = verifying(store, hook)
    if others:
        starts = [(store.commits[s].start + c * rows, rows) for s, c in places]
        runs |= {f"{name} {codec}": run for name, run in other_readers(store, hook, starts).items()}
    return runs


def decoding(reader: ArrayReader, places: list[tuple[int, int]]) -> Run:
    """The lower bound: decodes chunks from memory into one buffer, without checks."""
    encoded = [encoded_chunk(reader, *place) for place in places]
    out = np.empty(reader.layout.chunk_shape, reader.layout.dtype)

    def run() -> int:
        for data in encoded:
            decode_chunk(data, reader.layout, out, "chunk", check=False)
        return len(encoded) * out.nbytes

    return run


def encoded_chunk(reader: ArrayReader, shard: int, chunk: int) -> bytes:
    offset, length = (int(number) for number in reader.index(shard)[chunk])
    return bytes(reader.file(shard).read(offset, length))


def chunks(reader: ArrayReader, places: list[tuple[int, int]], check: bool) -> Run:
    out = np.empty(reader.layout.chunk_shape, reader.layout.dtype)

    def run() -> int:
        for shard, chunk in places:
            reader.read(shard, chunk, out, check=check)
        return len(places) * out.nbytes

    return run


def two_threads(reader: ArrayReader, places: list[tuple[int, int]]) -> Run:
    halves = [chunks(reader, part, True) for part in (places[::2], places[1::2])]
    pool = ThreadPoolExecutor(2)

    def run() -> int:
        return sum(pool.map(lambda half: half(), halves))

    return run


def open_stream(store: Store, hook: str, verify: str, paced: bool = False, **settings: int) -> BatchStream:
    """Opens the stream that `sagsae train` reads with, on all rows. After the first round its memory is allocated, as
    in a long run."""
    sae = {"arch": "gated", "d_sae": 1, "sparsity": 1.0}
    batch = BATCH_BYTES // (2 * store.spec.hookpoints[hook].d_in)
    given = {"store": store.location, "saes": [sae], "batch": batch, "verify": verify, **settings}
    config = build(TrainConfig, given)
    everything = np.ones((store.spec.n_contexts, store.spec.context), bool)
    passes, streams = make_passes(config, store, hook, Split(everything, ~everything), 1, Path(), True)
    loader = Loader(passes, range(streams), config.verify, torch.device("cpu"), threads=1, paced=paced)
    return BatchStream(loader, share(batch, streams, 0, 1), batch // streams, [StreamPosition()] * streams)


def windows(store: Store, hook: str, verify: str) -> Run:
    """Reads every window of an epoch without gathering batches, which is the CPU's part of feeding a GPU. It reads the
    same epoch each time, because the cost of working out an epoch's order would be shared by only eight windows here,
    and by thousands in a large store."""
    stream = open_stream(store, hook, verify)
    settle(stream)
    loader, row_bytes = stream.loader, bytes_of_a_row(store, hook)
    order = loader.passes.get(0).order

    def run() -> int:
        moved = 0
        for stream in range(order.streams):
            for number in range(len(order.windows(0, stream))):
                moved += loader.load(stream, 0, number, number % 2, 0).rows * row_bytes
        return moved

    return warmed(run)


def batches(store: Store, hook: str, verify: str) -> Run:
    """Reads an epoch of batches, gathered on the CPU by one thread."""
    stream = open_stream(store, hook, verify)

    def run() -> int:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        rows = sum(len(stream.next_batch()) for _ in range(store.n_rows // stream.rows))
        settle(stream)  # so that the windows read ahead do not slow down the next run
        torch.set_num_threads(threads)
        return rows * bytes_of_a_row(store, hook)

    return warmed(run)


def epoch_seconds(store: Store, hook: str) -> float:
    """Returns the seconds of an epoch of batches that are taken as fast as they are read."""
    stream = open_stream(store, hook, "always", paced=True, window_rows=store.n_rows * 2 // 3)
    with closing(stream):
        return min(timed_epoch(stream, store, 0.0) for _ in range(3))


def timed_epoch(stream: BatchStream, store: Store, seconds: float) -> float:
    """Takes an epoch of batches, each `seconds` long for a simulated device. Returns the seconds that it took."""
    steps = store.n_rows // stream.rows
    began = time.monotonic()
    for _ in range(steps):
        due = time.monotonic() + seconds / steps - stream.waited
        stream.next_batch()
        time.sleep(max(0.0, due + stream.waited - time.monotonic()))
    return time.monotonic() - began


def wait_share(store: Store, hook: str, fastest: float | None = None, epochs: int = 20) -> float:
    """Returns the share of time for which a simulated device waits for data when it takes batches at half the reading
    speed: 0 when every window is read before it is needed. A window may hold two thirds of an epoch, which is the
    hardest case. `fastest`: seconds of an epoch at full reading speed. Default: as measured on this store."""
    stream = open_stream(store, hook, "always", paced=True, window_rows=store.n_rows * 2 // 3)
    with closing(stream):
        found = [timed_epoch(stream, store, 0.0) for _ in range(3)][-1]
        before = stream.waited
        seconds = sum(timed_epoch(stream, store, 2 * (fastest or found)) for _ in range(epochs))
        return round((stream.waited - before) / seconds, 4)


def checksums(store: Store, hook: str) -> Run:
    """The lower bound of verifying: reads every byte of the store's files once and computes its checksum."""
    files = [path for path in sorted(store.root.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(store.root).as_posix(): path.stat().st_size for path in files}

    def run() -> int:
        for path, size in sizes.items():
            file_crc(store.files.open(path, size), size)
        return store.n_rows * bytes_of_a_row(store, hook)

    return run


def verifying(store: Store, hook: str) -> Run:
    """Runs `sagsae store verify --full`. Raises DamagedError when it finds damage, because the time would then mean
    nothing."""

    def run() -> int:
        if lines := verify(store, full=True).lines:
            raise DamagedError("\n".join(lines))
        return store.n_rows * bytes_of_a_row(store, hook)

    return run


def settle(stream: BatchStream) -> None:
    """Waits for the windows being read ahead."""
    wait([virtual.following for virtual in stream.streams.values() if virtual.following])


def bytes_of_a_row(store: Store, hook: str) -> int:
    layout = store.spec.layouts()[hook]
    return layout.row_shape[0] * layout.dtype.itemsize


def warmed(run: Run) -> Run:
    """Runs it three times first, so that all memory is allocated, as in a long run."""
    for _ in range(3):
        run()
    return run


def other_readers(store: Store, hook: str, starts: list[tuple[int, int]]) -> dict[str, Run]:
    """Reads the same chunks with zarr-python, and with zarrs and tensorstore if they are installed."""
    path = str(store.root / hook)
    found: dict[str, Callable[[int, int], Any]] = {}
    import zarr

    plain = zarr.open_array(path, mode="r")
    found["zarr-python"] = lambda start, n: plain[start : start + n]
    if importlib.util.find_spec("zarrs"):
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1}):
            rust = zarr.open_array(path, mode="r")
        found["zarrs"] = lambda start, n: rust[start : start + n]
    if importlib.util.find_spec("tensorstore"):
        import tensorstore

        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        opened = tensorstore.open(spec, read=True, open=True).result()
        found["tensorstore"] = lambda start, n: opened[start : start + n].read().result()

    def reads(read: Callable[[int, int], Any]) -> Run:
        return lambda: sum(np.asarray(read(start, n)).nbytes for start, n in starts)

    return {name: reads(read) for name, read in found.items()}
