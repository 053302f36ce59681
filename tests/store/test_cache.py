"""The cache of ranges: never above its limit, least recently used first to go, whoever shares it or is killed."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import shared.files.cache
from shared.errors import UserError
from shared.files.cache import RangeCache


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".range")


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 1000)
    (tmp_path / "thesis.tex").write_bytes(bytes(500))  # somebody else's
    for n in range(10):
        cache.put((n,), bytes([n]) * 100)
        os.utime(cache.path((n,)), (n, n))
    assert used(tmp_path) == 1000
    assert cache.get((0,), 100) == bytes(100)  # used now
    cache.put((10,), bytes(100))
    left = [n for n in range(11) if cache.get((n,), 100) is not None]
    assert left == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    cache.put((11,), bytes(1001))
    assert cache.get((11,), 1001) is None
    cache.put((12,), bytes(1000))
    assert [n for n in range(13) if cache.get((n,), 1000 if n == 12 else 100) is not None] == [12]
    assert (tmp_path / "thesis.tex").stat().st_size == 500


FILL = """
import sys
from pathlib import Path
from shared.files.cache import RangeCache
cache = RangeCache(Path(sys.argv[1]), 100_000)
for n in range(300):
    key = (n * int(sys.argv[2]) % 97,)
    data = bytes([key[0]]) * (1000 + key[0])
    found = cache.get(key, len(data))
    assert found is None or found == data
    cache.put(key, data)
"""


def test_processes_share_a_folder_within_the_limit(tmp_path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", FILL, str(tmp_path), str(n)]) for n in (1, 5, 11)]
    most = 0
    while any(process.poll() is None for process in running):
        try:
            most = max(most, used(tmp_path))
        except FileNotFoundError:
            time.sleep(0.001)  # deleted in between
    assert [process.wait() for process in running] == [0, 0, 0]
    assert 80_000 < max(most, used(tmp_path)) <= 100_000
    assert len(list(tmp_path.iterdir())) > 50


def test_a_killed_process_leaves_the_limit_standing(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 1000)
    for n in range(9):
        cache.put((n,), bytes(100))
    (tmp_path / shared.files.cache.TEMPORARY).write_bytes(bytes(500))  # killed in the middle of a write
    (tmp_path / shared.files.cache.TOTAL_FILE).write_bytes(b"")  # and of counting
    cache.put((9,), bytes(200))
    assert used(tmp_path) == 1000
    assert cache.get((9,), 200) == bytes(200)
    assert cache.get((8,), 100) == bytes(100)


def test_a_full_disk_means_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RangeCache(tmp_path, 10_000)
    original = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path.name == shared.files.cache.TEMPORARY:
            with original(path, "wb") as file:
                file.write(b"half")
            path = Path("/dev/full")
        return original(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    cache.put((1,), bytes(100))
    assert cache.get((1,), 100) is None
    monkeypatch.undo()
    assert not (tmp_path / shared.files.cache.TEMPORARY).exists()
    cache.put((1,), bytes(100))
    assert cache.get((1,), 100) == bytes(100)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SAGSAE_CACHE", "SAGSAE_CACHE_GB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert vars(RangeCache.of_user()) == vars(RangeCache(tmp_path / ".cache" / "sagsae", 10**10))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SAGSAE_CACHE_GB", "0.5")
    assert vars(RangeCache.of_user()) == vars(RangeCache(tmp_path / "xdg" / "sagsae", 5 * 10**8))
    monkeypatch.setenv("SAGSAE_CACHE_GB", "0")
    nothing = RangeCache.of_user()
    nothing.put((1,), b"1")
    assert nothing.get((1,), 1) is None
    assert not (tmp_path / "xdg").exists()
    for wrong in ("ten", "-1", "nan", "inf"):
        monkeypatch.setenv("SAGSAE_CACHE_GB", wrong)
        with pytest.raises(UserError, match=f"SAGSAE_CACHE_GB={wrong}: expected a number of gigabytes"):
            RangeCache.of_user()
