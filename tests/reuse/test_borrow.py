"""A harvest takes over the shards that stores beside it hold. It ends with the bytes of one that takes over nothing."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command import ROOT
from support.reuse import SHARD, comparable, counted_shards, no_model, own_bytes, tiny

from harvest import capture
from harvest.reuse import borrow
from harvest.run import harvest
from shared.errors import UserError
from shared.files.local import LocalFiles
from shared.store.create import remove_store
from shared.store.opened import Store
from shared.store.tokens import TokenRows
from shared.store.verify import repair, verify


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of 20 shards. Nothing in that store is changed."""
    root = tmp_path_factory.mktemp("pool")
    harvest(tiny(root, "n20", 20))
    return root


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What a harvest of so many shards writes where there is no other store."""
    known: dict[str, dict[str, Any]] = {}

    def made(shards: float, **changes: Any) -> dict[str, Any]:
        key = repr((shards, changes))
        if key not in known:
            root = tmp_path_factory.mktemp("fresh")
            harvest(tiny(root, "s", shards, **changes))
            known[key] = comparable(root / "s")
        return known[key]

    return made


def linked(pool: Path, root: Path) -> Path:
    """A folder whose store `n20` shares its shards with the one of `pool`."""
    shutil.copytree(pool / "n20", root / "n20", copy_function=os.link)
    for name in ("zarr.json", "record.json", ".lock", "manifest/index.jsonl", "manifest/metadata.json"):
        shutil.copyfile(root / "n20" / name, root / "copy")
        os.replace(root / "copy", root / "n20" / name)
    return root


def test_a_prefix_takes_neither_the_model_nor_space(pool: Path, tmp_path: Path, fresh: Callable[..., Any]) -> None:
    root = linked(pool, tmp_path)
    with no_model():
        started = time.process_time()
        summary = harvest(tiny(root, "n7", 7))
        seconds = time.process_time() - started
    assert (summary.tokens, summary.reused) == (7 * SHARD, 7 * SHARD)
    assert seconds <= 2
    assert own_bytes(root / "n7") <= 1_000_000
    assert not verify(Store.open(root / "n7"), full=True).lines
    assert comparable(root / "n7") == fresh(7)


def test_the_last_shard_is_made_from_a_larger_one(pool: Path, tmp_path: Path, fresh: Callable[..., Any]) -> None:
    root = linked(pool, tmp_path)
    with no_model():
        harvest(tiny(root, "n7", 7.5))
    shards = [path for path in (root / "n7" / "layer_01" / "mlp_out" / "c").rglob("0") if path.is_file()]
    assert sorted(int(path.parent.name) for path in shards if path.stat().st_nlink == 1) == [7]
    assert not verify(Store.open(root / "n7"), full=True).lines
    assert comparable(root / "n7") == fresh(7.5)


@pytest.mark.parametrize(("codec", "captured"), [("lz4", []), ("none", []), ("int8", [3])])
def test_other_codecs(tmp_path: Path, fresh: Callable[..., Any], codec: str, captured: list[int]) -> None:
    """Rows of int8 cannot be cut out of a larger shard, whose scales are others."""
    harvest(tiny(tmp_path, "n5", 5, codec=codec))
    with counted_shards() as found:
        harvest(tiny(tmp_path, "n3", 3.25, codec=codec))
    assert found == captured
    assert comparable(tmp_path / "n3") == fresh(3.25, codec=codec)


OTHER: dict[str, dict[str, Any]] = {
    "smaller shards": {"chunk_rows": 256, "shard_rows": 1024},
    "larger shards": {"chunk_rows": 1024, "shard_rows": 3 * SHARD},
    "codec": {"codec": "lz4"},
    "lossy": {"codec": "int8"},
    "both": {"codec": "none", "chunk_rows": 512, "shard_rows": 1536},
}


@pytest.mark.parametrize("what", OTHER)
def test_other_shapes_and_codecs_are_made_from_the_rows(
    pool: Path, tmp_path: Path, fresh: Callable[..., Any], what: str
) -> None:
    root = linked(pool, tmp_path)
    with no_model():
        summary = harvest(tiny(root, "other", 6.5, **OTHER[what]))
    assert summary.reused == int(6.5 * SHARD)
    assert not verify(Store.open(root / "other"), full=True).lines
    assert comparable(root / "other") == fresh(6.5, **OTHER[what])


def test_rows_come_from_several_shards_and_the_rest_from_the_model(pool: Path, tmp_path: Path) -> None:
    """A store of an older shape lends its rows, too."""
    harvest(tiny(tmp_path, "old", 2.5, chunk_rows=128, shard_rows=640))
    with counted_shards() as captured:
        harvest(tiny(tmp_path, "n20", 20))
    assert captured == list(range(2, 20))
    assert comparable(tmp_path / "n20") == comparable(pool / "n20")


def test_a_longer_store_captures_only_what_is_new(pool: Path, tmp_path: Path, fresh: Callable[..., Any]) -> None:
    harvest(tiny(tmp_path, "n7", 7))
    with counted_shards() as captured:
        harvest(tiny(tmp_path, "n20", 20))
    assert captured == list(range(7, 20))
    assert comparable(tmp_path / "n20") == comparable(pool / "n20")
    assert comparable(tmp_path / "n7") == fresh(7)


def test_a_half_filled_last_shard_is_captured_again(pool: Path, tmp_path: Path) -> None:
    harvest(tiny(tmp_path, "n2", 2.5))
    with counted_shards() as captured:
        harvest(tiny(tmp_path, "n20", 20))
    assert captured == list(range(2, 20))
    assert comparable(tmp_path / "n20") == comparable(pool / "n20")


def test_another_hookpoint_takes_the_tokens_and_the_order(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = linked(pool, tmp_path)
    harvest(tiny(root, "attn", 5, hooks=("attn_out",)))
    said = capsys.readouterr().err
    assert "copied the tokens of" in said
    assert "tokenising" not in said
    for shard in range(5):
        for name in ("context", "position"):
            ours, theirs = (root / store / "index" / name / "c" / str(shard) for store in ("attn", "n20"))
            assert ours.read_bytes() == theirs.read_bytes()
    with counted_shards() as captured:
        harvest(tiny(root, "both", 4, hooks=("attn_out", "mlp_out")))
    assert captured == [], "each hookpoint comes from another store"
    assert not verify(Store.open(root / "both"), full=True).lines


def test_a_whole_corpus(tmp_path: Path) -> None:
    lines = (ROOT / "shared" / "tiny" / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    corpus = tmp_path / "some.jsonl"
    corpus.write_text("".join(lines[:150]), encoding="utf-8")
    some = {"corpus": str(corpus), "shard_rows": 1024}
    harvest(tiny(tmp_path / "s", "part", 1, **some))
    with counted_shards() as captured:
        summary = harvest(tiny(tmp_path / "s", "all", 1, **{**some, "tokens": None}))
    whole = Store.open(tmp_path / "s" / "all").spec
    assert captured == list(range(4, whole.n_shards))
    assert summary.reused == 4 * 1024
    with no_model():
        assert harvest(tiny(tmp_path / "s", "again", 1, **{**some, "tokens": None})).reused == whole.n_tokens
    assert comparable(tmp_path / "s" / "again") == comparable(tmp_path / "s" / "all")


# damage and interruption


def test_damage_is_not_taken_over(pool: Path, tmp_path: Path, fresh: Callable[..., Any]) -> None:
    root = linked(pool, tmp_path)
    place = root / "n20" / "layer_01" / "mlp_out" / "c" / "3" / "0"
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.unlink()  # the pool's own file stays as it is
    place.write_bytes(data)
    with counted_shards() as captured:
        harvest(tiny(root, "n7", 7))
    assert captured == [3]
    assert comparable(root / "n7") == fresh(7)


def test_a_donor_that_disappears(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: Callable[..., Any]
) -> None:
    """It is deleted after it was found: nothing is lost, the model makes the shards."""
    root, real = linked(pool, tmp_path), borrow.find_donors

    def then_delete(*arguments: Any) -> Any:
        found = real(*arguments)
        if (root / "n7" / "zarr.json").exists() and (root / "n20").exists():
            shutil.rmtree(root / "n20")
        return found

    monkeypatch.setattr("harvest.run.find_donors", then_delete)
    with counted_shards() as captured:
        harvest(tiny(root, "n7", 7))
    assert captured == list(range(7))
    assert comparable(root / "n7") == fresh(7)


def test_other_tokens_are_not_taken_over(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A donor with the same key has other tokens from some row on: only shards before that row are linked."""
    root = linked(pool, tmp_path)
    real = borrow.common_rows
    monkeypatch.setattr(borrow, "common_rows", lambda *stores: min(real(*stores), 2 * SHARD + 128))
    with counted_shards() as captured:
        harvest(tiny(root, "n5", 5))
    assert captured == [2, 3, 4]


def test_ids_are_compared(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harvest(tiny(tmp_path, "n2", 2))
    ours, large = Store.open(tmp_path / "n2"), Store.open(pool / "n20")
    assert borrow.common_rows(ours, large) == 2 * SHARD
    real = TokenRows.chunk

    def chunk(self: TokenRows, number: int) -> Any:
        ids = real(self, number).copy()
        ids[9, 5] += self.spec.n_tokens == 2 * SHARD
        return ids

    monkeypatch.setattr(TokenRows, "chunk", chunk)
    assert borrow.common_rows(ours, large) == 9 * 128


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_what_cannot_be_linked_is_copied(
    pool: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fresh: Callable[..., Any],
    error: int,
) -> None:
    root = linked(pool, tmp_path)
    monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(error, os.strerror(error))))
    with no_model():
        harvest(tiny(root, "n7", 7))
    assert "copied, because they cannot be linked here" in capsys.readouterr().err
    assert all(path.stat().st_nlink == 1 for path in (root / "n7").rglob("*") if path.is_file())
    assert comparable(root / "n7") == fresh(7)


class Killed(BaseException):
    """Nothing that follows is done."""


@pytest.mark.parametrize("at", [0, 3, 11, 40])
def test_it_resumes_after_any_file(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: Callable[..., Any], at: int
) -> None:
    root, real, count = linked(pool, tmp_path), borrow.link, iter(range(10**6))

    def link(*arguments: Any) -> bool:
        if next(count) >= at:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(borrow, "SHARDS_TOGETHER", 2)
    monkeypatch.setattr(borrow, "link", link)
    with pytest.raises(Killed):
        harvest(tiny(root, "n7", 7))
    monkeypatch.setattr(borrow, "link", real)
    with no_model():
        harvest(tiny(root, "n7", 7))
    assert comparable(root / "n7") == fresh(7)


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import harvest.reuse.borrow as borrow
from harvest.run import harvest
from support.reuse import tiny
from pathlib import Path
borrow.SHARDS_TOGETHER = 2
real, calls = borrow.{name}, iter(range(10**6))
def killed(*arguments):
    if next(calls) >= {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
borrow.{name} = killed
harvest(tiny(Path({out!r}), "n7", 7.5))
"""


def test_kill_9_while_shards_are_taken_over(pool: Path, tmp_path: Path, fresh: Callable[..., Any]) -> None:
    root = linked(pool, tmp_path)
    for name, count in (("link", 17), ("append_commits", 1), ("in_token_order", 0)):
        text = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), name=name, count=count, out=str(root))
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert Store.open(root / "n7").missing
    with no_model():
        harvest(tiny(root, "n7", 7.5))
    assert comparable(root / "n7") == fresh(7.5)


# stores that share bytes


def test_stores_that_share_bytes_do_not_change_each_other(
    pool: Path, tmp_path: Path, fresh: Callable[..., Any]
) -> None:
    root = linked(pool, tmp_path)
    before = comparable(root / "n20")
    harvest(tiny(root, "n7", 7))
    repair(LocalFiles(root / "n7"), [2, 5])
    harvest(tiny(root, "n7", 7, reuse="none"))
    assert (comparable(root / "n20"), comparable(root / "n7")) == (before, fresh(7))
    harvest(tiny(root, "n7", 7, seed=1, overwrite=True))
    assert comparable(root / "n20") == before
    harvest(tiny(root, "n7", 7, overwrite=True))
    assert comparable(root / "n7") == fresh(7)
    remove_store(LocalFiles(root / "n20"))
    assert comparable(root / "n7") == fresh(7)
    assert not verify(Store.open(root / "n7"), full=True).lines


def test_damage_of_shared_bytes_is_repaired_from_the_model(
    pool: Path, tmp_path: Path, fresh: Callable[..., Any]
) -> None:
    """The donor has the same damaged bytes, so they are not taken over again. It keeps them until it is repaired."""
    harvest(tiny(tmp_path, "n20", 20))
    harvest(tiny(tmp_path, "n7", 7))
    place = tmp_path / "n7" / "layer_01" / "mlp_out" / "c" / "3" / "0"
    with place.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xff\xff\xff")
    damage = verify(Store.open(tmp_path / "n7"), full=False)
    assert damage.shards == verify(Store.open(tmp_path / "n20"), full=False).shards == [3]
    repair(LocalFiles(tmp_path / "n7"), damage.shards)
    with counted_shards() as captured:
        harvest(tiny(tmp_path, "n7", 7))
    assert captured == [3]
    assert comparable(tmp_path / "n7") == fresh(7)
    assert verify(Store.open(tmp_path / "n20"), full=False).shards == [3]
    repair(LocalFiles(tmp_path / "n20"), [3])
    with no_model():
        harvest(tiny(tmp_path, "n20", 20))
    assert comparable(tmp_path / "n20") == comparable(pool / "n20")


def test_rows_with_nan_are_refused_as_a_harvest_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that allows them gives its rows only to another that does."""
    real = capture.HookSink.push

    def push(self: Any, first_row: int, activations: Any) -> None:
        activations = activations.clone()
        activations[5, 0] = np.nan
        real(self, first_row, activations)

    monkeypatch.setattr(capture.HookSink, "push", push)
    harvest(tiny(tmp_path, "n3", 3, allow_nonfinite=True))
    with pytest.raises(UserError, match="NaN or infinite activations"):
        harvest(tiny(tmp_path, "n2", 2))
    with no_model():
        harvest(tiny(tmp_path, "n1", 1, allow_nonfinite=True))
    assert Store.open(tmp_path / "n1").commits[0].nonfinite["layer_01/mlp_out"] > 0


def test_reuse_none_and_other_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harvest(tiny(tmp_path, "n3", 3))
    assert harvest(tiny(tmp_path, "none", 2, reuse="none")).reused == 0
    assert harvest(tiny(tmp_path, "same", 2, reuse="same")).reused == 2 * SHARD
    monkeypatch.setattr("harvest.begin.device_name", lambda _: "another device")
    assert harvest(tiny(tmp_path, "other", 2, reuse="same")).reused == 0
    assert harvest(tiny(tmp_path, "any", 2, reuse="any")).reused == 2 * SHARD
