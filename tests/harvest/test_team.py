"""Any number of processes, killed at any time: one and the same store. And what goes wrong in a long harvest."""

import contextlib
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.command import ROOT, Sagsae
from support.folders import before_each_file, contents
from support.models import save_corpus, sentences
from support.processes import children, kill, wait_until_gone

import harvest.capture
import harvest.disk_space
import harvest.encode
import harvest.fill
import harvest.moments
import harvest.plan
import harvest.reuse.shape
import harvest.run
from harvest.capture import Capture
from harvest.ring import Ring
from harvest.run import harvest as run_harvest
from harvest.team import Team
from shared.config import HarvestConfig, TrainConfig
from shared.errors import UserError
from shared.files.local import LocalFiles
from shared.files.locks import folder_lock
from shared.model.language_model import LanguageModel
from shared.store.opened import Store, is_store
from shared.store.reader import open_reader, read_shard
from shared.store.verify import verify
from train.run import train as run_train

Config = Callable[..., HarvestConfig]
COMMAND = [
    "harvest", "--model", "tiny", "--device", "cpu", "--tokens", "40000", "--hook", "mlp_out", "--hook", "attn_out",
    "--context", "64", "--set", "shard_rows=1024", "--set", "chunk_rows=256", "--set", "batch_tokens=512", "--json",
    "--out",
]  # fmt: skip
SHARDS = 40


@pytest.fixture(scope="module")
def whole(sagsae: Sagsae, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of one process that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    assert sagsae(*COMMAND, out).returncode == 0
    return contents(out / "tiny")


def commits(root: Path) -> int:
    return len(Store.open(root).commits) if is_store(LocalFiles(root)) else 0


def test_two_processes_write_the_store_of_one(sagsae: Sagsae, whole: dict[str, bytes], tmp_path: Path) -> None:
    done = sagsae(*COMMAND, tmp_path, "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 40_000, "one document, from rank 0"
    assert contents(tmp_path / "tiny") == whole
    assert not list((tmp_path / "tiny").glob(".lock.*"))


@pytest.mark.parametrize(("begin", "finish"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_several_processes_resumed_by_fewer(
    sagsae: Sagsae, whole: dict[str, bytes], tmp_path: Path, begin: int, finish: int
) -> None:
    root = tmp_path / "tiny"

    def two_have_written() -> bool:
        return len(list((root / "manifest").glob("rank-*.jsonl"))) > 1

    stopped = sagsae(*COMMAND, tmp_path, "--processes", begin, stop=(signal.SIGTERM, two_have_written))
    assert stopped.returncode == 130, stopped.stderr
    assert "To continue, run the same command again" in stopped.stderr
    half = Store.open(root)
    assert 2 <= len(half.commits) < SHARDS
    assert verify(half, full=True).lines == []
    done = sagsae(*COMMAND, tmp_path, "--processes", finish)
    assert done.returncode == 0, done.stderr
    assert contents(root) == whole


@pytest.mark.slow
@pytest.mark.timeout(900)  # forty starts of Python and torch
def test_killed_twenty_times(sagsae: Sagsae, whole: dict[str, bytes], tmp_path: Path) -> None:
    """SIGKILL to all processes of a harvest at random moments, with 1, 2 and 3 processes in turn."""
    root, rng, killed = tmp_path / "tiny", random.Random(0), 0
    while killed < 20:
        processes = ("1", "2", "3")[killed % 3]
        command = [sys.executable, str(ROOT / "cli.py"), *COMMAND, str(tmp_path), "--processes", processes]
        before = commits(root)
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while commits(root) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        if process.poll() is None:
            for pid in (process.pid, *children(process.pid)):
                kill(pid)
            process.wait()
            killed += 1
            wait_until_gone(command)
            assert verify(Store.open(root), full=True).lines == []
        if commits(root) > SHARDS - 4:  # nearly done: once more from the beginning
            shutil.rmtree(root)
    assert sagsae(*COMMAND, tmp_path).returncode == 0
    assert contents(root) == whole


def noted(shards: list[int]) -> Callable[..., Any]:
    """Capture.shard, which first notes the shard's number."""
    run = Capture.shard

    def shard(self: Capture, number: int, *rest: Any) -> Any:
        shards.append(number)
        return run(self, number, *rest)

    return shard


def test_a_writer_that_fails_stops_the_model_at_once(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards: list[int] = []

    def no_third_shard(path: Path) -> None:
        if path.as_posix().endswith("layer_01/mlp_out/c/2/0"):
            raise RuntimeError("a bug")

    monkeypatch.setattr(Capture, "shard", noted(shards))
    before_each_file(monkeypatch, no_third_shard)
    with pytest.raises(RuntimeError, match="a bug"):
        run_harvest(harvest_config(tmp_path))
    assert len(shards) <= 2 + harvest.fill.SLOTS
    assert 2 not in Store.open(tmp_path / "s").commits


def test_on_a_cpu_batches_are_computed_side_by_side(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at once, each by a wrapper of its own; the next shard is begun while the last batches are computed. The
    store is that of one after another, byte for byte."""
    monkeypatch.setattr("harvest.fill.stream_count", lambda *_: 1)
    expected = contents(Path(run_harvest(harvest_config(tmp_path / "one", batch_tokens=64)).store))
    monkeypatch.setattr("harvest.fill.stream_count", lambda *_: 3)
    meet, calls, models, began = threading.Barrier(3), itertools.count(), set(), []
    next_shard = threading.Event()
    run_to, compute, threads = LanguageModel.run_to, Capture.compute, harvest.capture.model_threads

    def run(self: LanguageModel, *arguments: Any) -> None:
        if next(calls) < 3:
            meet.wait(60)
        models.add(self)
        assert torch.get_num_threads() == 1
        run_to(self, *arguments)

    def watched(self: Capture, tokens: Any, sinks: Any, begin: int) -> None:
        began.append(begin)
        if began.count(0) == 2:
            next_shard.set()
        if begin == 512 - 64:
            assert next_shard.wait(60), "the next shard is begun"
        compute(self, tokens, sinks, begin)

    monkeypatch.setattr(harvest.capture, "model_threads", lambda count, _: threads(count, 1))
    monkeypatch.setattr(LanguageModel, "run_to", run)
    monkeypatch.setattr(Capture, "compute", watched)
    before = torch.get_num_threads()
    found = contents(Path(run_harvest(harvest_config(tmp_path / "three", batch_tokens=64)).store))
    assert found == expected
    assert len(models) == 3
    assert torch.get_num_threads() == before


def test_how_many_batches_side_by_side(harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a core, as far as memory goes; a GPU has one."""
    config = harvest_config(tmp_path, batch_tokens=1000)
    spec = Store.open(run_harvest(harvest_config(tmp_path, tokens=512)).store).spec
    each = 160 * 1000 * 32
    for free, cores, streams in ((None, 3, 3), (4 * each, 8, 1), (4 * each * 5, 8, 5), (0, 8, 1), (10**15, 99, 16)):
        monkeypatch.setattr("harvest.fill.host_memory", lambda free=free: free)
        assert harvest.fill.stream_count("cpu", spec, config, cores) == streams
    assert harvest.fill.stream_count("cuda:1", spec, config, 8) == 1


@pytest.mark.parametrize("where", ["harvest.encode.encode_chunk", "harvest.moments.segment_moments"])
def test_what_fails_behind_the_model_stops_the_harvest(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """No shard is begun after the failure: the batches of the second one wait for it here."""
    failed, began = threading.Event(), itertools.count()

    def fail(*_: Any) -> None:
        failed.set()
        raise RuntimeError("a bug")

    def compute(self: Capture, tokens: Any, sinks: Any, begin: int) -> None:
        if next(began) >= 4:
            assert failed.wait(60)
            time.sleep(0.3)
        computed(self, tokens, sinks, begin)

    shards: list[int] = []
    computed = Capture.compute
    monkeypatch.setattr(Capture, "compute", compute)
    monkeypatch.setattr(Capture, "shard", noted(shards))
    monkeypatch.setattr(where, fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run_harvest(harvest_config(tmp_path, batch_tokens=128))
    assert shards == [0, 1]
    assert Store.open(tmp_path / "s").commits == {}


def test_memory_that_goes_round() -> None:
    made: list[int] = []
    worked: list[bool] = []

    def make() -> int:
        made.append(0)
        return len(made)

    def work() -> None:
        time.sleep(0.5)
        worked.append(True)

    ring = Ring(make, 2, work)
    assert [ring.take(lambda: None), ring.take(lambda: None)] == [1, 2]
    looked = 0

    def look() -> None:
        nonlocal looked
        looked += 1
        if looked == 2:
            ring.give_back(1)

    assert not worked, "there was one"
    assert ring.take(look) == 1
    assert made == [0, 0], "nothing more is made"
    assert worked == [True]
    assert ring.waited < 0.45, "the model works on: it does not wait"
    with pytest.raises(UserError, match="stop"):
        ring.take(lambda: (_ for _ in ()).throw(UserError("stop")))


def test_out_of_memory_halves_the_batch(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for a GPU: this model refuses more than 3 contexts at once."""
    monkeypatch.setattr("harvest.fill.stream_count", lambda *_: 1)
    exact = {"dtype": "float32", "store_dtype": "float32"}
    expected = Store.open(run_harvest(harvest_config(tmp_path, name="whole", batch_tokens=32, **exact)).store)
    capturing = LanguageModel.capturing

    def small(self: LanguageModel, sinks: Any, widths: Any) -> Any:
        @contextlib.contextmanager
        def limited() -> Any:
            with capturing(self, sinks, widths) as run:

                def refuse(tokens: torch.Tensor) -> None:
                    if len(tokens) > 3:
                        raise torch.OutOfMemoryError("CUDA out of memory")
                    run(tokens)

                yield refuse

        return limited()

    monkeypatch.setattr(LanguageModel, "capturing", small)
    found = Store.open(run_harvest(harvest_config(tmp_path, name="halved", batch_tokens=128, **exact)).store)
    said = capsys.readouterr().err
    assert said.count("out of memory") == 2
    assert "continuing with 32 tokens per batch" in said
    assert {path: file for path, file in contents(found.root).items() if "/c/" in path} == {
        path: file for path, file in contents(expected.root).items() if "/c/" in path
    }
    monkeypatch.setattr(
        LanguageModel,
        "capturing",
        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    )
    with pytest.raises(UserError, match=r"its memory is too small for one context of 16 tokens\. Lower --context"):
        run_harvest(harvest_config(tmp_path, name="none"))


def test_whatever_ends_a_helper_the_first_process_is_told(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the others; not every launcher ends it."""
    told: list[str] = []
    keys = SimpleNamespace(set=lambda key, _: told.append(key), check=lambda _: True, get=lambda _: b"[")
    monkeypatch.setattr(Team, "join", lambda: Team(1, 2, 1, 2, keys))
    with pytest.raises(json.JSONDecodeError):
        run_harvest(harvest_config(tmp_path))
    assert told == ["failed"]


def test_rows_with_nan_are_kept_when_that_is_asked_for(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are left out of statistics and of training; everything else is as without them."""
    good = Store.open(run_harvest(harvest_config(tmp_path, name="good")).store)
    push, bad = harvest.capture.HookSink.push, torch.arange(3, 5000, 97)
    monkeypatch.setattr("harvest.fill.stream_count", lambda *_: 1)  # else two shards may be under way

    first_row = 0

    def poisoned(self: Any, begin: int, activations: torch.Tensor) -> None:
        start = first_row + begin
        rows = torch.arange(start, start + len(activations))
        activations = activations.clone()
        activations[torch.isin(rows, bad), 5] = float("nan")
        push(self, begin, activations)

    def shard(self: Capture, number: int, *rest: Any) -> Any:
        nonlocal first_row
        first_row = self.spec.shard_range(number)[0]
        return run(self, number, *rest)

    run = Capture.shard
    monkeypatch.setattr(Capture, "shard", shard)
    monkeypatch.setattr(harvest.capture.HookSink, "push", poisoned)
    with pytest.raises(UserError, match=r"in 6 rows, the first of them row 3 \(context 0, position 3\)"):
        run_harvest(harvest_config(tmp_path, name="refused"))
    store = Store.open(run_harvest(harvest_config(tmp_path, name="kept", allow_nonfinite=True)).store)
    norms = np.concatenate([read_shard(open_reader(store, "stats/layer_01/mlp_out/norm"), k) for k in store.commits])
    assert np.isnan(norms).sum() == len(bad)
    counted = [commit.kept - commit.nonfinite["layer_01/mlp_out"] for commit in store.commits.values()]
    assert store.statistics("layer_01/mlp_out").n == sum(counted) < good.statistics("layer_01/mlp_out").n
    rows = np.concatenate([read_shard(open_reader(good, "layer_01/mlp_out"), k) for k in good.commits])
    assert rows.shape[0] == 5000
    sae = {"arch": "gated", "d_sae": 48, "sparsity": 0.2}
    config = {"store": str(store.root), "hook": "mlp_out", "saes": [sae], "tokens": 1280, "batch": 64, "device": "cpu"}
    trained = run_train(TrainConfig(**config, streams=4, window_rows=1024, heldout_tokens=320, out=tmp_path / "run"))
    assert all(np.isfinite(result["r2"]) for result in trained.saes)


def test_a_second_layer_over_the_same_tokens(
    harvest_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of both stores are in the same order, whatever their widths; the corpus is not tokenised again."""
    first = Store.open(run_harvest(harvest_config(tmp_path, name="first", hooks=("mlp_out",), chunk_rows=None,
                                                  shard_rows=None)).store)  # fmt: skip
    capsys.readouterr()
    other = {"chunk_rows": None, "shard_rows": None, "layers": (2,), "hooks": ("mlp_out", "blocks.0.mlp.hook_post")}
    second = Store.open(run_harvest(harvest_config(tmp_path, name="second", **other)).store)
    said = capsys.readouterr().err
    assert "copied the tokens of" in said
    assert "tokenising" not in said
    assert set(second.spec.hookpoints) == {"layer_02/mlp_out", "layer_00/mlp.hook_post"}
    for name in ("context", "position"):
        assert contents(first.root / "index" / name) == contents(second.root / "index" / name)
    assert contents(first.root / "tokens") == contents(second.root / "tokens")
    alone = Store.open(run_harvest(harvest_config(tmp_path / "alone", name="second", **other)).store)
    assert second.spec.corpus == alone.spec.corpus
    both = Store.open(run_harvest(harvest_config(tmp_path, name="both", layers=(1, 2), hooks=("mlp_out",),
                                                 chunk_rows=None, shard_rows=None)).store)  # fmt: skip
    for hook, store in (("layer_01/mlp_out", first), ("layer_02/mlp_out", second)):
        for shard in store.commits:
            ours, theirs = (read_shard(open_reader(each, hook), shard) for each in (both, store))
            assert np.array_equal(ours, theirs), hook
    run_harvest(harvest_config(tmp_path, name="third", seed=1))
    assert "tokenising" in capsys.readouterr().err, "another order of documents is another corpus"


def test_skipped_positions(harvest_config: Config, tmp_path: Path) -> None:
    store = Store.open(run_harvest(harvest_config(tmp_path, skip_positions=4, hooks=("mlp_out",))).store)
    ids = store.tokens().reshape(-1)[:5000]
    kept = (ids != 0) & (np.arange(5000) % 16 >= 4)
    assert store.statistics("layer_01/mlp_out").n == kept.sum()
    assert store.n_rows == 5000, "all are stored"
    with pytest.raises(UserError, match="skip_positions: the store has 4, this asks for 1"):
        run_harvest(harvest_config(tmp_path, hooks=("mlp_out",)))


def test_an_unfinished_corpus_is_kept_on_a_signal(sagsae: Sagsae, tmp_path: Path) -> None:
    corpus = save_corpus(tmp_path / "corpus.jsonl", sentences(60_000))
    root = tmp_path / "out" / "tiny"
    stopped = sagsae("harvest", "--model", "tiny", "--corpus", corpus, "--out", tmp_path / "out", "--context", "64",
                     stop=(signal.SIGINT, (root / "tokens.building").is_dir))  # fmt: skip
    assert stopped.returncode == 130, stopped.stderr
    assert "To continue, run the same command again" in stopped.stderr
    assert (root / "tokens.building" / "progress.json").is_file()
    assert not is_store(LocalFiles(root))


def test_the_rest_of_a_killed_harvest_is_found(harvest_config: Config, tmp_path: Path) -> None:
    """Its first process is dead, another one is still writing: nobody else may."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harvest.run, "finish_store", lambda *_: (_ for _ in ()).throw(UserError("killed")))
        with pytest.raises(UserError, match="killed"):
            run_harvest(harvest_config(tmp_path))
    with folder_lock(tmp_path / "s", ".lock.3"), pytest.raises(UserError, match=r"process \d+ on .* is writing here"):
        run_harvest(harvest_config(tmp_path))
    assert run_harvest(harvest_config(tmp_path)).tokens == 5000


def test_advice_after_overwrite_does_not_lose_the_work(harvest_config: Config, tmp_path: Path) -> None:
    run_harvest(harvest_config(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFiles, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="run the same command again without --overwrite"):
            run_harvest(harvest_config(tmp_path, overwrite=True, seed=1))
    assert run_harvest(harvest_config(tmp_path, seed=1)).tokens == 5000


def test_a_part_is_not_the_whole(harvest_config: Config, tmp_path: Path) -> None:
    run_harvest(harvest_config(tmp_path, hooks=("mlp_out",)))
    with pytest.raises(UserError, match="n_tokens: the store has 5000, this asks for all tokens of the corpus"):
        run_harvest(harvest_config(tmp_path, hooks=("mlp_out",), tokens=None))


@pytest.mark.parametrize("what", ["damage", "shape", "wide"])
def test_a_store_beside_it_is_no_hindrance(
    harvest_config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """Neither when its tokens are damaged, nor when its shards do not suit."""
    own = {"chunk_rows": None, "shard_rows": None, "hooks": ("attn_out",)}
    run_harvest(harvest_config(tmp_path, name="beside"))
    changes: dict[str, Any] = {"name": "s", **own}
    if what == "damage":
        path = tmp_path / "beside" / "tokens" / "c" / "0" / "0"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif what == "shape":
        changes["chunk_rows"] = 48
    else:
        for module in (harvest.plan, harvest.reuse.shape):
            monkeypatch.setattr(module, "SHARD_BYTES", 8192)
    store = Store.open(run_harvest(harvest_config(tmp_path, **changes)).store)
    said = capsys.readouterr().err
    assert ("cannot be read" if what == "damage" else "rows are in another order") in said
    alone = Store.open(run_harvest(harvest_config(tmp_path / "alone", **changes)).store)
    assert store.spec == alone.spec
    assert contents(store.root) == contents(alone.root)


def test_room_is_counted_without_what_is_there(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full when the store is complete, and not a byte before."""
    size = sum(path.stat().st_size for path in Path(run_harvest(harvest_config(tmp_path)).store).rglob("*"))
    shutil.rmtree(tmp_path / "s")
    there = shutil.disk_usage(tmp_path)

    def usage(_path: Any) -> Any:
        used = sum(path.stat().st_size for path in (tmp_path / "s").rglob("*") if path.is_file())
        return there._replace(free=int(1.1 * size) - used)

    monkeypatch.setattr("harvest.disk_space.shutil.disk_usage", usage)
    assert run_harvest(harvest_config(tmp_path)).tokens == 5000


def test_processes_and_their_launcher_agree(sagsae: Sagsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = sagsae(*COMMAND, tmp_path, "--processes", 2)
    assert (done.returncode, "was started as one of 3" in done.stderr) == (2, True)
