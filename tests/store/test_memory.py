"""What reading a store costs in memory, measured on a real process."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.command import ROOT
from support.crash_writer import Size, begin, rows_of

from harvest.writer import ShardWriter
from shared.files.local import LocalFiles
from shared.store.create import finish_store
from shared.store.opened import Store
from shared.store.spec import rows_that_count

D_IN, CHUNK_ROWS, CHUNKS, SHARDS = 512, 1024, 16, 12
WINDOW_ROWS = 65_536
STREAMS, THREADS = 4, 2

READ = """
import gc, json, sys
import numpy as np, torch
from shared.config import TrainConfig
from shared.store.opened import Store
from train.plan.job import make_passes
from train.data.order import Split, StreamPosition, share
from train.data.loader import Loader
from train.data.stream import BatchStream

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

folder, window_rows, streams, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
store = Store.open(folder)
hook = next(iter(store.spec.hookpoints))
sae = {"arch": "gated", "d_sae": 1, "sparsity": 1.0}
all_rows = np.ones((store.spec.n_contexts, store.spec.context), bool)

def read(window_rows, epochs):
    about = {"store": folder, "saes": [sae], "streams": streams, "window_rows": window_rows}
    config = TrainConfig.model_validate(about)
    passes, v = make_passes(config, store, hook, Split(all_rows, ~all_rows), 1, store.root, True)
    loader = Loader(passes, range(v), "always", torch.device("cpu"), threads)
    stream = BatchStream(loader, share(512, v, 0, 1), 512 // v, [StreamPosition()] * v)
    for _ in range(epochs * store.n_rows // 512):
        stream.next_batch()
    stream.close()
    return v, stream.streams[0].at.epoch

read(4 * 1024, 1)  # with windows of one chunk: the libraries' code and their own memory are there now
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = peak()
v, epoch = read(window_rows, 2)
print(json.dumps({"grew": peak() - before, "streams": v, "epoch": epoch}))
"""


def test_a_reader_holds_two_windows_and_a_chunk_a_thread(tmp_path: Path) -> None:
    """Two epochs of a store of three windows: the process grows by no more than two windows, a compressed chunk a
    thread, and small change (indexes, the order of rows, one batch, the threads themselves)."""
    size = Size(CHUNK_ROWS * CHUNKS * SHARDS, CHUNK_ROWS, CHUNK_ROWS * CHUNKS, (D_IN,))
    files = LocalFiles(tmp_path)
    begin(files, size)
    store = Store.open(files)
    keep = rows_that_count(store.tokens(), store.spec)
    writer = ShardWriter(files, store.spec, keep)
    for shard in range(SHARDS):
        writer.commit(shard, {hook: rows_of(store.spec, hook, shard, keep) for hook in store.spec.hookpoints})
    writer.close()
    finish_store(files, store.spec)
    command = [sys.executable, "-c", READ, str(tmp_path), *map(str, (WINDOW_ROWS, STREAMS, THREADS))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["streams"] == STREAMS
    assert found["epoch"] >= 1
    window, chunk = WINDOW_ROWS * D_IN * 2, CHUNK_ROWS * D_IN * 2
    small_change = 4 << 20
    assert found["grew"] < 2 * window + THREADS * chunk + small_change
    assert found["grew"] > 1.2 * window, "else this measured nothing"
