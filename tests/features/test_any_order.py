"""The same bytes whatever the order of the shards, the number of processes and the interruptions."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.command import ROOT, Sagsae
from support.exact.runs import all_latents, make_run, make_sae, make_store
from support.folders import before_each_file

import train.features.pairs
import train.features.run
from shared.errors import Interrupted
from shared.schemas.features import FeaturesConfig
from train.data.rows import HookRows
from train.features.arrays import read_arrays
from train.features.job import FeaturesJob
from train.features.run import features
from train.features.tables import FILES
from train.features.tally import Tally, done_in

TOKENS = 6000
PAGE_FILES = ("app.js", "data", "index.html", "style.css")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves after every shard, and pairs that are written to many files."""
    monkeypatch.setattr(train.features.run, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(train.features.run, "SAVE_SHARE", 0.0)
    monkeypatch.setattr(train.features.pairs, "SPILLED", 500)
    monkeypatch.setattr(train.features.pairs, "RUNS", 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    store = make_store(folder / "s", TOKENS, nan=(700,))
    return make_run(folder / "run", store, [make_sae("sa-gsae", 300)])


@pytest.fixture(scope="module")
def whole(run: Path) -> dict[str, bytes]:
    """The result of one process that nothing interrupted."""
    return result_of(run)


def result_of(run: Path, **changes: Any) -> dict[str, bytes]:
    done = features(FeaturesConfig(run=run, device="cpu", overwrite=True, **changes))
    return bytes_of(done.folder)


def emptied(run: Path) -> Path:
    """Removes the result, and what is left of an earlier test; returns where the result will be."""
    folder = run / "features" / make_sae("sa-gsae", 300).config.name
    shutil.rmtree(run / "features", ignore_errors=True)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "about.json", *PAGE_FILES])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing is left of the work"
    page = [path for name in PAGE_FILES for path in [folder / name, *(folder / name).rglob("*")] if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in [*map(folder.joinpath, FILES), *page]}


def counted_by(run: Path, order: Callable[[list[int]], list[list[int]]]) -> dict[str, bytes]:
    """The result when the shards are counted as `order` deals them to processes."""
    real = train.features.run.count

    def count(job: FeaturesJob, tally: Tally, shards: list[int], *rest: Any) -> None:
        first, *others = order(shards)
        for number, some in enumerate(others, 1):
            real(job, Tally(job.shape, job.work, f"rank-{number:05d}"), some, *rest)
        real(job, tally, first, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.features.run, "count", count)
        return result_of(run)


ORDERS: dict[str, Callable[[list[int]], list[list[int]]]] = {
    "backwards": lambda shards: [shards[::-1]],
    "shuffled": lambda shards: [random.Random(3).sample(shards, len(shards))],
    "two": lambda shards: [shards[::2], shards[1::2]],
    "four": lambda shards: [shards[at::4] for at in range(4)],
    "uneven": lambda shards: [shards[5:], [], shards[:5][::-1]],
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_shards_does_not_matter(order: str, run: Path, whole: dict[str, bytes]) -> None:
    assert counted_by(run, ORDERS[order]) == whole


def test_files_of_pairs_and_threads_do_not_matter(
    run: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.features.pairs, "SPILLED", 300)
    monkeypatch.setattr(train.features.pairs, "RUNS", 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert result_of(run) == whole


@pytest.mark.usefixtures("small")
def test_interrupted_twenty_times(run: Path, whole: dict[str, bytes]) -> None:
    """Each time at another chunk that is read or file that is written, half of the files written first."""
    rng, real, left = random.Random(0), HookRows.values, 0

    class Killed(BaseException):
        pass

    def step(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    def values(self: HookRows, shard: int, chunk: int) -> Any:
        step()
        return real(self, shard, chunk)

    features_of = FeaturesConfig(run=run, device="cpu")
    folder, kills = emptied(run), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HookRows, "values", values)
        before_each_file(patch, step)
        while kills < 20:
            left = rng.randint(3, 22)
            try:
                features(features_of)
            except Killed:
                kills += 1
            else:
                break
    assert kills > 8
    if not folder.exists():
        features(features_of)
    assert bytes_of(folder) == whole


@pytest.mark.usefixtures("small")
def test_what_was_counted_is_not_counted_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied(run)
    read: list[int] = []
    real = HookRows.values

    def values(self: HookRows, shard: int, chunk: int) -> Any:
        read.append(shard)
        if len(set(read)) > 7:
            raise KeyboardInterrupt
        return real(self, shard, chunk)

    monkeypatch.setattr(HookRows, "values", values)
    with pytest.raises(KeyboardInterrupt):
        features(FeaturesConfig(run=run, device="cpu"))
    monkeypatch.setattr(HookRows, "values", real)
    again: list[int] = []

    def noted(self: Tally, shard: int, *rest: Any) -> None:
        again.append(shard)
        take(self, shard, *rest)

    monkeypatch.setattr(Tally, "take", noted)
    features(FeaturesConfig(run=run, device="cpu"))
    assert set(again) == set(range(-(-TOKENS // 512))) - set(range(7))


take = Tally.take


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_write_the_same_bytes(
    processes: int, run: Path, whole: dict[str, bytes], sagsae: Sagsae
) -> None:
    done = sagsae("features", run, "--overwrite", "--processes", processes, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    (folder,) = (run / "features").iterdir()
    assert bytes_of(folder) == whole


LOOP = """
import sys
import train.features.run as run
from pathlib import Path
from shared.schemas.features import FeaturesConfig
run.SAVE_SECONDS = run.SAVE_SHARE = 0.0
run.features(FeaturesConfig(run=Path(sys.argv[1]), device="cpu"))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_twenty_times(run: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder, rng, kills = emptied(run), random.Random(0), 0
    work = folder.with_name(f"{folder.name}.work")
    while kills < 20 and not folder.exists():
        process = subprocess.Popen([sys.executable, "-c", LOOP, str(run)], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (work / ".lock").exists():
            time.sleep(0.01)
        began = (work / "rank-00000.tally").stat().st_mtime_ns if (work / "rank-00000.tally").exists() else 0
        while process.poll() is None and not changed(work / "rank-00000.tally", began):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 5
    if not folder.exists():
        features(FeaturesConfig(run=run, device="cpu"))
    assert bytes_of(folder) == whole


def changed(path: Path, before: int) -> bool:
    return path.exists() and path.stat().st_mtime_ns != before


def test_a_signal_saves_what_was_counted(run: Path, whole: dict[str, bytes]) -> None:
    folder = emptied(run)

    @contextmanager
    def stop_requests() -> Iterator[Callable[[], bool]]:
        yield lambda: True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.features.run, "stop_requests", stop_requests)
        with pytest.raises(Interrupted, match="run the same command again"):
            features(FeaturesConfig(run=run, device="cpu"))
    (saved,) = (run / "features").glob("*.work/*.tally")
    assert done_in(read_arrays(saved)) == [0]
    features(FeaturesConfig(run=run, device="cpu"))
    assert bytes_of(folder) == whole


def test_the_drawn_firings_are_uniform(tmp_path: Path) -> None:
    """Acceptance: over 1,000 poles, χ² of the places of the drawn firings against all firings, at 1e-3."""
    store = make_store(tmp_path / "s", 20_000)
    done = features(FeaturesConfig(run=make_run(tmp_path / "run", store, [make_sae("sa-gsae", 512)]), device="cpu"))
    latents = pq.read_table(done.folder / "latents.parquet", columns=["firings"])["firings"].to_numpy()
    assert (latents > 300).sum() > 800
    table = pq.read_table(done.folder / "examples.parquet", columns=["group", "context", "position", "latent", "sign"])
    columns = {name: table[name].to_numpy() for name in table.column_names}
    drawn = columns["group"] > 0
    place = columns["context"][drawn].astype(np.int64) * 24 + columns["position"][drawn]
    counts = np.bincount(place * 20 // 20_000, minlength=20)
    truth = all_latents(store, make_sae("sa-gsae", 512))
    poles = np.stack([truth.f > 0, truth.f < 0], 2).reshape(len(truth.f), -1)
    weight = np.minimum(12, poles.sum(0)) / np.maximum(1, poles.sum(0))
    expected = np.array([(part * weight).sum() for part in np.array_split(poles, 20)])
    assert counts.sum() == pytest.approx(expected.sum())
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < 43.8, "the 99.9 % quantile of χ² with 19 degrees of freedom"
