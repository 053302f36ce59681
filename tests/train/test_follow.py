"""Training while the harvest goes on: segments, what they promise, and the waits."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.command import Sagsae
from support.folders import contents
from support.stores import commit, in_steps, unfinished

from harvest.run import harvest as run_harvest
from shared.config import EvalConfig, HarvestConfig, TrainConfig
from shared.errors import UserError
from shared.files.local import LocalFiles
from shared.files.locks import LOCK_FILE
from shared.store.commits import sealed
from shared.store.create import finish_store
from shared.store.opened import Store
from train.data.follow import SEGMENTS, segment_with
from train.data.snapshot import content_of
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


@given(n_shards=st.integers(1, 200), least=st.integers(1, 300))
def test_segments_are_cut_beforehand(n_shards: int, least: int) -> None:
    """Neighbours in order, every shard once, none with too few, none with twice as many."""
    found = list(dict.fromkeys(segment_with(shard, n_shards, least) for shard in range(n_shards)))
    assert [shard for part in found for shard in part] == list(range(n_shards))
    assert all(shard in segment_with(shard, n_shards, least) for shard in range(n_shards))
    assert all(min(least, n_shards) <= len(part) < 2 * least for part in found)
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_segments_hold_every_shard_once_then_all(train_config: Config, store: Store, growing: Path) -> None:
    config = train_config(store=str(growing), follow=True, window_rows=1024)
    job = make_job(config, CPU)
    job.folder.path.mkdir(parents=True)
    commit(growing, store, [1, 3, 0])
    assert list(job.passes.get(0).rows.store.commits) == [0, 1], "1,024 rows are one window of every stream"
    commit(growing, store, [4, 5])
    assert job.passes.freeze(Store.open(growing)) is None, "3 is committed, 2 is not"  # type: ignore[attr-defined]
    commit(growing, store, [2])
    assert list(job.passes.get(1).rows.store.commits) == [2, 3]
    assert list(job.passes.get(2).rows.store.commits) == [4, 5]
    commit(growing, store, [6, 7, 8, 9])
    finish_store(LocalFiles(growing), store.spec)
    assert [list(job.passes.get(epoch).rows.store.commits) for epoch in (3, 4)] == [[6, 7], [8, 9]]
    assert list(job.passes.get(5).rows.store.commits) == list(range(10)), "then all of it"
    again = make_job(config, CPU, leads=False)
    for epoch in range(6):
        assert again.passes.get(epoch).rows.store.commits == job.passes.get(epoch).rows.store.commits
    assert job.statistics.n < store.statistics("layer_01/mlp_out").n, "normalised by the first segment"
    np.testing.assert_array_equal(again.statistics.mean, job.statistics.mean)


def test_what_is_committed_when_does_not_change_the_weights(
    train_config: Config, store: Store, growing: Path, tmp_path: Path
) -> None:
    """Followed from its first shard, out of order, and read when it was complete: the same bits, over two epochs."""
    options: dict[str, Any] = {"follow": True, "window_rows": 1024, "tokens": 64 * 80}
    harvest = in_steps(growing, store, [[3, 1], [9, 0], [2, 5], [4, 8, 7], [6]], 0.5)
    followed = run_train(train_config(store=str(growing), out=tmp_path / "followed", **options)).run
    harvest.join()
    complete = run_train(train_config(out=tmp_path / "complete", **options)).run
    assert segments_of(followed) == segments_of(complete)
    assert contents(followed / "saes") == contents(complete / "saes")
    assert contents(followed)["evaluation.json"] == contents(complete)["evaluation.json"]


def test_a_run_of_an_earlier_version_goes_on_with_what_it_has_not_read(train_config: Config, store: Store) -> None:
    """It took the shards in the order of their commits."""
    job = make_job(train_config(follow=True, window_rows=1024), CPU)
    job.folder.path.mkdir(parents=True)
    body = {
        "v": 1,
        "segment": 0,
        "shards": [0, 3, 4],
        "snapshot": content_of(store.only([0, 3, 4]), "layer_01/mlp_out"),
    }
    (job.folder.path / SEGMENTS).write_text(sealed(body))
    found = [list(job.passes.get(epoch).rows.store.commits) for epoch in range(6)]
    assert found == [[0, 3, 4], [1], [2], [5], [6, 7], [8, 9]]


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
    """Killed while it waited for a harvest that had stopped; went on after it: the weights of a run on the complete
    store."""
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
        time.sleep(15)
        return True

    stopped = sagsae(*command("killed"), stop=(signal.SIGTERM, started))
    assert stopped.returncode == 130, stopped.stderr
    assert "To continue, run the same command again" in stopped.stderr
    commit(growing, whole, list(range(3, 10)))
    finish_store(LocalFiles(growing), whole.spec)
    assert sagsae(*command("killed")).returncode == 0
    straight = sagsae(*command("straight"))
    assert straight.returncode == 0, straight.stderr
    assert contents(tmp_path / "killed" / "saes") == contents(tmp_path / "straight" / "saes")
