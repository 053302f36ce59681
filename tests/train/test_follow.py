"""Training while the harvest goes on: segments, what they promise, and the waits."""

import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command import Sagsae
from support.folders import contents
from support.stores import commit, in_steps, unfinished

from harvest.run import harvest as run_harvest
from shared.config import EvalConfig, HarvestConfig, TrainConfig
from shared.errors import UserError
from shared.files.local import LocalFiles
from shared.files.locks import LOCK_FILE
from shared.store.create import finish_store
from shared.store.opened import Store
from train.data.follow import SEGMENTS
from train.evaluate import evaluate
from train.plan.job import make_job
from train.run import train as run_train

Config = Callable[..., TrainConfig]
CPU = torch.device("cpu")


def segments_of(run: Path) -> list[list[int]]:
    return [json.loads(line)["shards"] for line in (run / SEGMENTS).read_text().splitlines()]


def test_a_run_follows_a_harvest_to_its_end(train_config: Config, store: Store, growing: Path) -> None:
    """Started on an empty store, it ends with one epoch of everything, measured on all held-out rows."""
    config = train_config(store=str(growing), follow=True, tokens=None, window_rows=1024)
    steps = [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    harvest = in_steps(growing, store, steps, 1.2)
    summary = run_train(config)
    harvest.join()
    assert summary.steps == make_job(train_config(tokens=None), CPU).steps
    segments = [part for part in segments_of(summary.run) if len(part) < 10]
    assert sorted(shard for part in segments for shard in part) == list(range(10))
    assert len(segments) >= 3
    heldout = json.loads((summary.run / "record.json").read_text())["store"]["heldout_tokens"]
    assert summary.saes[0]["tokens"] == heldout
    assert evaluate(EvalConfig(run=summary.run, ce=False)).results["tokens"] == heldout


def test_segments_hold_every_shard_once_then_all(train_config: Config, store: Store, growing: Path) -> None:
    config = train_config(store=str(growing), follow=True, window_rows=1024)
    job = make_job(config, CPU)
    job.folder.path.mkdir(parents=True)
    commit(growing, store, [3, 0])
    assert list(job.passes.get(0).rows.store.commits) == [0, 3], "1,024 rows are one window of every stream"
    commit(growing, store, [1])
    commit(growing, store, [2, 4, 5])
    assert list(job.passes.get(1).rows.store.commits) == [1, 2, 4, 5]
    commit(growing, store, [6, 7, 8, 9])
    finish_store(LocalFiles(growing), store.spec)
    assert list(job.passes.get(2).rows.store.commits) == [6, 7, 8, 9]
    assert list(job.passes.get(3).rows.store.commits) == list(range(10)), "then all of it"
    again = make_job(config, CPU, leads=False)
    for epoch in range(4):
        assert again.passes.get(epoch).rows.store.commits == job.passes.get(epoch).rows.store.commits
    assert job.statistics.n < store.statistics("layer_01/mlp_out").n, "normalised by what there was at first"
    np.testing.assert_array_equal(again.statistics.mean, job.statistics.mean)


def test_a_segment_that_changed_is_refused(train_config: Config, store: Store, growing: Path) -> None:
    config = train_config(store=str(growing), follow=True, window_rows=512)
    commit(growing, store, [0])
    job = make_job(config, CPU)
    job.folder.path.mkdir(parents=True)
    job.passes.get(0)
    log = growing / "manifest" / "rank-00000.jsonl"
    log.write_text("")
    commit(growing, store, [1])
    with pytest.raises(UserError, match=r"shards \[0\], which this run has trained on, are no longer committed"):
        make_job(config, CPU).passes.get(0)


@pytest.mark.slow
def test_a_followed_run_that_was_killed_ends_with_the_same_bits(
    sagsae: Sagsae, harvest_config: Callable[..., HarvestConfig], tmp_path: Path
) -> None:
    """Killed while it waited for a harvest that had stopped; went on after it: the weights of a run that was never
    killed, given the same segments."""
    whole = Store.open(run_harvest(harvest_config(tmp_path / "whole", hooks=("mlp_out",))).store)
    growing = Path(shutil.copytree(whole.root, tmp_path / "growing"))
    unfinished(growing)[0].write_text("")
    commit(growing, whole, [0, 1, 2])

    def command(out: str) -> list[str]:
        return ["train", "--store", str(growing), "--follow", "--arch", "sa-gsae:32", "--sparsity", "0.2",
                "--batch", "64", "--tokens", "4000", "--device", "cpu", "--set", "window_rows=1024",
                "--set", "streams=4", "--set", "heldout_tokens=160", "--set", "checkpoint_every=5",
                "--json", "--out", str(tmp_path / out)]  # fmt: skip

    def waits() -> bool:
        return any((tmp_path / "killed").glob("checkpoints/step-0000001*"))

    done = sagsae(*command("killed"), stop=(signal.SIGKILL, waits))
    assert done.returncode == -signal.SIGKILL
    lock = tmp_path / "killed" / LOCK_FILE
    before = lock.read_bytes()

    def started() -> bool:
        if lock.read_bytes() == before:
            return False
        time.sleep(8)
        return True

    stopped = sagsae(*command("killed"), stop=(signal.SIGTERM, started))
    assert stopped.returncode == 130, stopped.stderr
    assert "To continue, run the same command again" in stopped.stderr
    commit(growing, whole, list(range(3, 10)))
    finish_store(LocalFiles(growing), whole.spec)
    assert sagsae(*command("killed")).returncode == 0
    (tmp_path / "straight").mkdir()
    shutil.copy(tmp_path / "killed" / SEGMENTS, tmp_path / "segments")
    straight = sagsae(*command("straight"))
    assert straight.returncode == 0, straight.stderr
    first, second = (Counter(map(tuple, segments_of(tmp_path / name))) for name in ("killed", "straight"))
    assert (tmp_path / "killed" / SEGMENTS).read_text() == (tmp_path / "segments").read_text()
    if first == second:  # the harvest was complete when it began: one segment, unlike the killed run's
        assert contents(tmp_path / "killed" / "saes") == contents(tmp_path / "straight" / "saes")
