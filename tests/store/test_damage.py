"""No altered byte goes unnoticed, wherever it is; and what can be mended is mended by the harvest itself."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.command import Sagsae
from support.crash_writer import Size, alter, files_of, harvest_again, job, read_lines, result, unfinish
from support.folders import contents

from shared.store.manifest import INDEX
from shared.store.opened import Store
from shared.store.recount import sums_of_levels
from shared.store.verify import verify


@pytest.mark.parametrize(("hits", "more"), [(2, 40), pytest.param(10, 400, marks=pytest.mark.slow)])
def test_one_altered_byte_anywhere(tmp_path: Path, hits: int, more: int) -> None:
    """Verify must see it, and who reads without verifying meets an error or nothing wrong. Three shards, the last one
    short; the unfinished store has two."""
    jobs = {}
    for codec, shards in (("zstd", 3), ("int8", 3), ("zstd", 2)):
        root, size = tmp_path / f"{codec}-{shards}", Size(150, 16, 64, (8, 5), codec)
        jobs[codec, shards] = job("damage", root, size, shards, hits, more)
    for (codec, shards), process in jobs.items():
        done = result(process)
        assert done["silent"] == [], (codec, shards)
        assert done["wrong"] == 0
        assert done["error"] + done["right"] == hits * len(done["paths"]) + more, "every file was hit"
        assert done["error"] > done["right"] / 2
        manifest = "manifest/index.jsonl" if shards == 3 else "manifest/rank-00000.jsonl"
        scales = {"scale/layer_00/mlp_out/row/c/0", "scale/layer_01/mlp_out/dim/c/0/0"} if codec == "int8" else set()
        expected = {"record.json", "zarr.json", "tokens/zarr.json", "tokens/c/0/0", "manifest/metadata.json", manifest,
                    "index/position/c/1", "layer_00/mlp_out/c/0/0", "stats/layer_01/mlp_out/sum/c/1/0"}  # fmt: skip
        assert expected | scales <= set(done["paths"])


@pytest.mark.parametrize(("rows", "d_in", "at_once"), [(1000, 1, 256), (700, 3, 256), (37, 768, 16), (5, 2048, 1)])
def test_sums_of_int8_rows_are_those_of_their_numbers(rows: int, d_in: int, at_once: int) -> None:
    """With rows that were lost (scale NaN), rows that do not count, and -128, which the writer never makes."""
    draw = np.random.default_rng(rows)
    q = draw.integers(-127, 128, (rows, d_in)).astype(np.int8)
    q[1], q[2, 0], q[3] = 0, -128, 1
    scales, dim = draw.uniform(0.01, 3, rows).astype("f4"), draw.uniform(1e-3, 1e3, d_in).astype("f4")
    counted = draw.random(rows) < 0.9
    scales[1], counted[1] = np.nan, False
    found, levels = sums_of_levels((q[at : at + at_once] for at in range(0, rows, at_once)), scales, dim, counted)
    whole = q.astype("f8") * scales[:, None].astype("f8") * dim
    assert (levels == np.abs(q.astype(int)).max(axis=1)).all()
    np.testing.assert_allclose(found.norms, np.linalg.norm(whole, axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.squares, np.square(whole[counted]).sum(0), rtol=3e-6)
    np.testing.assert_allclose(found.total, whole[counted].sum(0), atol=1e-6 * np.abs(whole[counted]).sum(0).max())


def test_repair_and_the_same_harvest_again(store: Store, model_folder: Path, sagsae: Sagsae, tmp_path: Path) -> None:
    """Two damaged shards and a damaged manifest line, mended from the command line."""
    root = Path(shutil.copytree(store.root, tmp_path / "s"))
    os.truncate(root / "layer_01" / "mlp_out" / "c" / "2" / "0", 1000)
    alter(root / "stats" / "layer_01" / "attn_out" / "sum" / "c" / "7" / "0")
    alter(root / INDEX, at=sum(map(len, read_lines(root)[:4])) + 100)
    found = sagsae("store", "verify", "--full", root)
    assert found.returncode == 3
    assert found.stdout.count(str(root)) == 5, "two files, the line, the shard that it committed, and the last line"
    mended = sagsae("store", "verify", "--full", "--repair", root)
    assert mended.returncode == 0, mended.stderr
    assert "shards [2, 4, 7] are to be written again: run the same sagsae harvest command once more" in mended.stdout
    done = sagsae(*harvest_again(model_folder), "--out", tmp_path, "--name", "s")
    assert done.returncode == 0, done.stderr
    assert contents(root) == contents(store.root)
    assert verify(Store.open(root), full=True).lines == []


def test_repair_of_an_unfinished_store(sagsae: Sagsae, tmp_path: Path) -> None:
    for name in ("whole", "s"):
        result(job("write", tmp_path / name, Size(600, 32, 96, (8,))))
    root = tmp_path / "s"
    log = unfinish(root, 5)
    alter(log)
    alter(root / files_of(Store.open(tmp_path / "whole"), 3)[0])
    refused = sagsae("store", "info", root)
    assert (refused.returncode, "rank-00000.jsonl: line 1 of the manifest" in refused.stderr) == (3, True)
    mended = sagsae("store", "verify", "--repair", root)
    assert mended.returncode == 0, mended.stderr
    assert "shards [0, 3, 5, 6] are to be written again" in mended.stdout
    result(job("write", root, Size(600, 32, 96, (8,))))
    assert contents(root) == contents(tmp_path / "whole")


@pytest.mark.parametrize("path", ["tokens/c/0/0", "index/zarr.json", "manifest/metadata.json", "record.json"])
def test_what_no_harvest_mends(store: Store, sagsae: Sagsae, tmp_path: Path, path: str) -> None:
    """It is said, and nothing is touched."""
    root = Path(shutil.copytree(store.root, tmp_path / "s"))
    alter(root / path)
    record, before = (root / "record.json").read_bytes(), contents(root)
    done = sagsae("store", "verify", "--full", "--repair", root)
    assert done.returncode == 3, done.stderr
    assert f"{root}/{path}" in done.stdout
    assert "are to be written again" not in done.stdout
    assert (contents(root), (root / "record.json").read_bytes()) == (before, record)


def test_recode_and_commits_that_were_lost(sagsae: Sagsae, tmp_path: Path) -> None:
    """A source that lost some is refused; a target that lost some gets them again."""
    root, target = tmp_path / "s", tmp_path / "int8"
    result(job("write", root, Size(600, 32, 96, (8,))))
    recode = ("store", "recode", "--codec", "int8", root, target)
    assert sagsae(*recode).returncode == 0
    whole, lines = contents(target), read_lines(target)
    (target / INDEX).write_bytes(b"".join(lines[:4]))
    again = sagsae(*recode)
    assert again.returncode == 0, again.stderr
    assert contents(target) == whole
    (root / INDEX).write_bytes(b"".join(read_lines(root)[:4]))
    refused = sagsae(*recode)
    assert (refused.returncode, "is unfinished" in refused.stderr) == (2, True)
