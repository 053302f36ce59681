"""Whole stores in an object store: harvested there, followed, recoded there, trained from there, broken on the way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import servers
from support.command import Sagsae
from support.folders import contents
from support.servers import Server

from harvest.recode import recode
from harvest.run import harvest as run_harvest
from harvest.synth import synth
from shared.config import EvalConfig, HarvestConfig, SynthConfig, TrainConfig
from shared.errors import DamagedError, UserError
from shared.files.open import open_files
from shared.files.remote import RemoteFiles
from shared.store.listing import list_stores
from shared.store.opened import Store
from shared.store.reader import open_reader, read_shard
from shared.store.spec import shard_file
from shared.store.verify import repair, verify
from train.evaluate import evaluate
from train.run import train as run_train

moto, front, s3, server, alone = (getattr(servers, n) for n in ("moto", "front", "s3", "server", "alone"))
HOOK = "layer_01/mlp_out"
SMALL = {"tokens": 2000, "hooks": ("mlp_out",)}
Harvest = Callable[..., HarvestConfig]
Train = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, harvest_config: Harvest) -> Store:
    """A smaller one than the session's: every file is a slow request to the test's S3 server."""
    return Store.open(run_harvest(harvest_config(tmp_path_factory.mktemp("stores"), **SMALL)).store)


@pytest.fixture
def small(store: Store, train_config: Train) -> Train:
    """Training on it."""
    return lambda **changes: train_config(**{"store": str(store.root), "heldout_tokens": 160, **changes})


@pytest.fixture
def uploaded(s3: RemoteFiles, store: Store) -> RemoteFiles:
    """The store, copied into a bucket."""
    files = s3.at("stores").at("s")
    for path, data in contents(store.root).items():
        files.write(path, [data])
    files.write("record.json", [(store.root / "record.json").read_bytes()])
    assert isinstance(files, RemoteFiles)
    return files


def objects(files: RemoteFiles, like: dict[str, bytes]) -> dict[str, bytes]:
    """What `contents` gives of a folder."""
    return {path: files.read(path) for path in like}


def test_a_synthetic_store_is_written_to_a_bucket(s3: RemoteFiles, tmp_path: Path) -> None:
    asked = {"d_in": 8, "features": 6, "l0": 1.0, "tokens": 600, "context": 16, "chunk_rows": 64, "shard_rows": 256}
    here = Store.open(synth(SynthConfig(**asked, out=str(tmp_path))).store)
    far = Store.open(synth(SynthConfig(**asked, out=s3.at("made").name)).store)
    assert (far.state, far.commits) == ("final", here.commits)
    same = contents(here.root)
    assert objects(far.files, same) == same  # type: ignore[arg-type]


def test_a_store_is_read_from_a_bucket_as_from_a_disk(uploaded: RemoteFiles, store: Store) -> None:
    far = Store.open(uploaded.name)
    assert far.commits == store.commits
    assert np.array_equal(far.tokens(), store.tokens())
    assert np.array_equal(far.statistics(HOOK).mean, store.statistics(HOOK).mean)
    for array in store.spec.layouts():
        for shard in store.commits:
            here, there = (read_shard(open_reader(s, array), shard) for s in (store, far))
            assert here.tobytes() == there.tobytes()
    assert verify(far, full=True).lines == []
    parent = uploaded.name.rpartition("/")[0]
    assert [row["store"] for row in list_stores(parent)] == ["s"]


def test_training_from_a_bucket_gives_what_a_disk_gives(uploaded: RemoteFiles, small: Train, tmp_path: Path) -> None:
    """The same order of runs given, the same weights; and the second run is served from the cache."""
    near = run_train(small(run_chunks=2, out=tmp_path / "near")).run
    far = run_train(small(store=f"{uploaded.name}/{HOOK}", hook=None, out=tmp_path / "far"))
    assert json.loads((far.run / "config.json").read_text())["run_chunks"] == 1, "a window this small allows no more"
    again = run_train(small(store=uploaded.name, run_chunks=2, out=tmp_path / "again"))
    assert contents(near / "saes") == contents(again.run / "saes")
    assert evaluate(EvalConfig(run=again.run, ce=False)).results["saes"][0]["r2"] == again.saes[0]["r2"]


@pytest.mark.parametrize("fault", ["kill", "500", "cut"])
def test_training_gets_over_a_server_in_trouble(
    uploaded: RemoteFiles, front: Server, small: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    near = run_train(small(out=tmp_path / "near")).run
    config = small(store=uploaded.name, out=tmp_path / "far")

    def first_time(_: str, line: str) -> str:
        return fault if "bytes=" in line and front.requests.count(line) == 1 else ""

    monkeypatch.setattr(front, "next_fault", first_time)
    assert contents(run_train(config).run / "saes") == contents(near / "saes")


def test_a_harvest_into_a_bucket_is_the_store_on_a_disk(
    s3: RemoteFiles, harvest_config: Harvest, tmp_path: Path
) -> None:
    """Stopped on the way, gone on, and ended with the same bytes as a folder."""
    near = contents(Path(run_harvest(harvest_config(tmp_path, **SMALL)).store))
    out = f"{s3.name}/out"
    far = open_files(f"{out}/s")
    assert isinstance(far, RemoteFiles)
    commits, append = 0, RemoteFiles.append

    def two(files: RemoteFiles, path: str, line: bytes, number: int) -> None:
        nonlocal commits
        commits += 1
        if commits == 3:
            raise UserError("pulled the plug")
        append(files, path, line, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteFiles, "append", two)
        with pytest.raises(UserError, match="pulled the plug"):
            run_harvest(harvest_config(out, **SMALL))
    half = Store.open(far)
    assert (half.state, len(half.commits)) == ("writing", 2)
    assert verify(half, full=True).lines == []
    assert run_harvest(harvest_config(out, **SMALL)).tokens == 2000
    assert objects(far, near) == near
    assert far.logs("manifest", "rank-") == []
    with pytest.raises(UserError, match="seed: the store has 0, this asks for 1"):
        run_harvest(harvest_config(out, **SMALL, seed=1))


def test_a_store_is_recoded_into_a_bucket(s3: RemoteFiles, store: Store, tmp_path: Path) -> None:
    recode(str(store.root), str(tmp_path / "lz4"), "lz4")
    recode(str(store.root), f"{s3.name}/lz4", "lz4")
    near = contents(tmp_path / "lz4")
    far = open_files(f"{s3.name}/lz4")
    assert isinstance(far, RemoteFiles)
    assert objects(far, near) == near


def test_damage_in_a_bucket_is_found_and_repaired(uploaded: RemoteFiles) -> None:
    path = shard_file(HOOK, 2, True)
    data = bytearray(uploaded.read(path))
    data[100] ^= 1
    uploaded.write(path, [bytes(data)])
    far = Store.open(uploaded)
    with pytest.raises(DamagedError, match=r"mlp_out/c/2/0: chunk 0: the checksum"):
        read_shard(open_reader(far, HOOK), 2)
    damage = verify(far, full=True)
    assert damage.shards == [2]
    assert repair(uploaded, damage.shards) == [2]
    assert verify(Store.open(uploaded), full=True).lines == []


def test_commands_take_urls(uploaded: RemoteFiles, sagsae: Sagsae, tmp_path: Path) -> None:
    listed = sagsae("store", "ls", uploaded.name.rpartition("/")[0], "--json")
    assert [row["state"] for row in json.loads(listed.stdout)] == ["final"]
    assert sagsae("store", "verify", uploaded.name).returncode == 0
    assert json.loads(sagsae("store", "info", uploaded.name, "--json").stdout)["tokens"] == 2000
    done = sagsae("train", "--store", uploaded.name, "--hook", "mlp_out", "--arch", "gated:16", "--sparsity", "0.2",
                  "--batch", "64", "--device", "cpu", "--out", tmp_path / "run", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sagsae("store", "rm", uploaded.name, "--yes").returncode == 0
    missing = sagsae("store", "info", uploaded.name)
    assert (missing.returncode, "holds no store" in missing.stderr) == (2, True)


def test_an_unfinished_store_over_http_is_refused(server: Server, store: Store, tmp_path: Path) -> None:
    from support.stores import unfinished

    copy = Path(shutil.copytree(store.root, tmp_path / "copy"))
    server.objects = {f"/s/{path}": data for path, data in contents(copy).items()}
    assert Store.open(f"{server.url}/s").n_rows == 2000
    unfinished(copy)
    server.objects = {f"/s/{path}": data for path, data in contents(copy).items()}
    with pytest.raises(UserError, match="an unfinished store cannot be read over http"):
        Store.open(f"{server.url}/s")
