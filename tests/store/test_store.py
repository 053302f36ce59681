"""The store on disk: any Zarr reader opens it, the manifest is the truth, damage is found and named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from support.stores import unfinished
from zarr.core.metadata import ArrayV3Metadata

from shared.errors import DamagedError, UserError
from shared.files.local import LocalFiles, write_file
from shared.files.locks import folder_lock
from shared.store.create import clean_up, remove_store
from shared.store.manifest import append_commit, parse_commit, read_manifest
from shared.store.opened import Store, find_hookpoint, is_store, read_state
from shared.store.reader import ArrayReader, open_reader, read_shard
from shared.store.shard import as_float32
from shared.store.spec import shard_file
from shared.store.verify import repair, verify

HOOK = "layer_01/mlp_out"


@pytest.fixture
def copy(store: Store, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.root, tmp_path / "copy"))


def read_all(store: Store, array: str) -> np.ndarray:
    reader = open_reader(store, array)
    assert isinstance(reader, ArrayReader)
    return np.concatenate([read_shard(reader, shard) for shard in store.commits])


def test_other_readers_see_the_same_values(store: Store) -> None:
    for array in store.spec.layouts():
        ours = read_all(store, array)
        assert len(ours) == store.spec.n_tokens == 5000
        assert np.asarray(zarr.open_array(store.root / array, mode="r")[:]).tobytes() == ours.tobytes()
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.root / array)}}
        theirs = tensorstore.open(spec, read=True, open=True).result().read().result()
        assert np.asarray(theirs).tobytes() == ours.tobytes()


def test_the_group_opens_as_zarr(store: Store) -> None:
    group = zarr.open_group(store.root, mode="r")
    about = group.attrs["sagsae"]
    assert isinstance(about, dict)
    assert about["state"] == "final"
    array = group[HOOK]
    assert isinstance(array, zarr.Array)
    assert isinstance(array.metadata, ArrayV3Metadata)
    assert array.metadata.dimension_names == ("token", "d_model")
    assert array.attrs["sagsae"] == {"logical_dtype": "bfloat16", "hook": "blocks.1.hook_mlp_out"}
    for path in store.spec.rows_of_shards():
        partial = group[path]
        assert isinstance(partial, zarr.Array)
        assert np.array_equal(np.asarray(partial[3]), store.row_of_shard(path, 3))


def test_every_row_of_the_token_stream_is_stored_once(store: Store) -> None:
    stream = read_all(store, "index/context").astype(int) * store.spec.context + read_all(store, "index/position")
    assert sorted(stream) == list(range(5000))
    assert not np.array_equal(stream, np.arange(5000)), "rows are permuted inside a shard"
    for shard, commit in store.commits.items():
        assert store.spec.shard_range(shard) == (commit.start, commit.stop)


def test_statistics_equal_a_direct_computation(store: Store) -> None:
    tokens = store.tokens()
    contexts, positions = read_all(store, "index/context"), read_all(store, "index/position")
    counted = (positions > 0) & ~np.isin(tokens[contexts, positions], store.spec.special_ids)
    x = as_float32(read_all(store, HOOK), "bfloat16").astype("<f8")
    found = store.statistics(HOOK)
    assert found.n == counted.sum() < 5000
    np.testing.assert_allclose(found.mean, x[counted].mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.variance, x[counted].var(axis=0), rtol=1e-9)
    assert found.scale == pytest.approx(np.sqrt(np.square(x[counted] - found.mean).sum(1).mean()), rel=1e-9)
    norms = read_all(store, f"stats/{HOOK}/norm")
    np.testing.assert_allclose(norms, np.linalg.norm(x, axis=1), rtol=1e-6)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit flipped": lambda path: path.write_bytes((d := path.read_bytes())[:100] + bytes([d[100] ^ 1]) + d[101:]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_by_reading_and_by_verify(copy: Path, damage: str) -> None:
    store = Store.open(copy)
    assert verify(store, full=True).lines == []
    path = copy / shard_file(HOOK, 4, True)
    DAMAGES[damage](path)
    with pytest.raises(DamagedError, match=r"mlp_out/c/4/0"):
        read_shard(open_reader(store, HOOK), 4)
    for full in (False, True):
        assert [str(path) in line for line in verify(store, full).lines] == [True]
        assert verify(store, full).shards == [4]


def test_verify_names_all_that_is_damaged(copy: Path) -> None:
    for array, shard in ((HOOK, 0), (HOOK, 7), ("index/position", 2)):
        os.truncate(copy / shard_file(array, shard, "index" not in array), 5)
    (copy / "stats" / HOOK / "sum" / "c" / "1" / "0").unlink()
    damage = verify(Store.open(copy), full=False)
    assert len(damage.lines) == 4
    assert damage.shards == [0, 1, 2, 7]
    assert damage.lasting == []


def test_damaged_partial_sums_are_not_summed(copy: Path) -> None:
    path = copy / "stats" / HOOK / "sum" / "c" / "1" / "0"
    data = bytearray(path.read_bytes())
    data[3] ^= 16
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="checksum"):
        Store.open(copy).statistics(HOOK)


def test_a_shard_counts_only_when_the_manifest_says_so(copy: Path) -> None:
    manifest, lines = unfinished(copy)
    manifest.write_text("".join(lines[:3]))
    store = Store.open(copy)
    assert sorted(store.commits) == [0, 1, 2]
    assert store.n_rows == 3 * 512


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_torn_last_line_is_no_commit_and_is_cut(copy: Path, cut: int) -> None:
    manifest, lines = unfinished(copy)
    manifest.write_text("".join(lines[:-1]) + lines[-1][:cut])
    files = LocalFiles(copy)
    leftover = copy / "layer_01" / "mlp_out" / "c" / "9" / "0.123.tmp"
    leftover.write_bytes(b"half")
    assert len(read_manifest(files, Store.open(copy).spec, final=False)) == len(lines) - 1
    clean_up(files)
    assert not leftover.exists()
    commit = parse_commit(lines[-1])
    assert commit is not None
    append_commit(files, 0, commit)
    assert manifest.read_text() == "".join(lines)


def test_an_altered_line_is_damage(copy: Path) -> None:
    manifest = copy / "manifest" / "index.jsonl"
    manifest.write_text(manifest.read_text().replace('"rows":512', '"rows":511', 1))
    with pytest.raises(DamagedError, match="line 1"):
        Store.open(copy)
    damage = verify(Store.open(copy, lenient=True), full=False)
    assert ["line 1 is torn or damaged" in line for line in damage.lines] == [False, True]
    assert repair(LocalFiles(copy), damage.shards) == [0], "the shard of the bad line is to be harvested again"
    assert verify(Store.open(copy), full=True).lines == []
    assert Store.open(copy).state == "writing"


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []


def test_files_that_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is on the disk before it has its name, every name before the block is left."""
    done: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path).as_posix()))
        sync(handle)

    def renamed(path: Path, target: Path) -> Path:
        done.append(("name", target.relative_to(tmp_path).as_posix()))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    with LocalFiles(tmp_path).together() as write:
        write("a/b/one", [b"1", memoryview(b"23")])
        write("a/two", [])
        assert done == []
        assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".tmp"}
    assert [(what, path.removesuffix(f".{os.getpid()}.tmp")) for what, path in done[:4]] == [
        ("sync", "a/b/one"), ("sync", "a/two"), ("name", "a/b/one"), ("name", "a/two"),
    ]  # fmt: skip
    assert sorted(done[4:]) == [("sync", "."), ("sync", "a"), ("sync", "a/b")]
    assert (tmp_path / "a/b/one").read_bytes() == b"123"
    with pytest.raises(ZeroDivisionError), LocalFiles(tmp_path).together() as write:
        list(map(write, ("a/three", "a/four"), ([b"3"], (bytes(1 // n) for n in (1, 0)))))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b", "two"]


def test_two_writers(tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"), folder_lock(tmp_path):
        pass
    with folder_lock(tmp_path):
        pass


def test_find_hookpoint(store: Store, tmp_path: Path) -> None:
    for path, hook in (
        (store.root, HOOK),
        (store.root, "mlp_out"),
        (store.root / HOOK, None),
        (store.root / HOOK, "mlp_out"),
    ):
        assert find_hookpoint(path, hook)[1] == HOOK
    with pytest.raises(UserError, match=r"--hook attn_out: --store .* already says layer_01/mlp_out"):
        find_hookpoint(store.root / HOOK, "attn_out")
    with pytest.raises(UserError, match=r"several hookpoints.*--hook: layer_01/resid_post, layer_01/attn_out"):
        find_hookpoint(store.root, None)
    with pytest.raises(UserError, match=r"no hookpoint 'resid_pre'.*layer_01/mlp_out"):
        find_hookpoint(store.root, "resid_pre")
    with pytest.raises(UserError, match="does not exist"):
        find_hookpoint(tmp_path / "nowhere", None)
    with pytest.raises(UserError, match="holds no store"):
        find_hookpoint(tmp_path, None)


def test_a_newer_format_is_refused(copy: Path) -> None:
    document = json.loads((copy / "zarr.json").read_text())
    document["attributes"]["sagsae"]["format_version"] = 3
    (copy / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"store format 3; this sagsae reads format 2. Install a newer"):
        read_state(LocalFiles(copy))


def test_a_final_store_that_lost_a_commit_is_damaged(copy: Path) -> None:
    manifest = copy / "manifest" / "index.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-2]))
    store = Store.open(copy)
    assert store.missing == [8, 9]
    line = f"{copy}: is final, but shards [8, 9] are not in its manifest"
    assert verify(store, full=False).lines == [line]


@pytest.mark.parametrize("damage", ["missing", "one bit flipped"])
def test_damaged_tokens_are_never_used(copy: Path, damage: str) -> None:
    DAMAGES[damage](copy / "tokens" / "c" / "0" / "0")
    with pytest.raises(DamagedError, match=r"tokens/c/0/0: "):
        Store.open(copy).tokens()
    assert ["tokens" in line for line in verify(Store.open(copy), full=False).lines] == [True, True]
    assert len(verify(Store.open(copy), full=False).lasting) == 2


def test_an_unreadable_zarr_json_is_not_an_empty_folder(copy: Path) -> None:
    (copy / "zarr.json").write_text("{")
    with pytest.raises(DamagedError, match=r"zarr\.json: cannot be read"):
        is_store(LocalFiles(copy))


def test_a_store_being_written_is_not_removed(copy: Path) -> None:
    with folder_lock(copy), pytest.raises(UserError, match="is writing here"):
        remove_store(LocalFiles(copy))
    assert verify(Store.open(copy), full=True).lines == []


def test_what_is_not_ours_is_never_removed(copy: Path) -> None:
    (copy / "thesis.tex").write_text("years of work")
    remove_store(LocalFiles(copy))
    assert [path.name for path in copy.iterdir()] == ["thesis.tex"]


def test_remove_store_removes_only_stores(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no store"):
        remove_store(LocalFiles(tmp_path))
    remove_store(LocalFiles(copy))
    assert not copy.exists()


def test_a_disk_that_cannot_read_is_told(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    reader = open_reader(Store.open(copy), HOOK)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(DamagedError, match=r"c/3/0: cannot be read \(Input/output error\). Check the disk"):
        read_shard(reader, 3)
