"""A store is right at every moment: whoever is killed, whoever writes beside, when the disk is full or read-only, and
wherever the store is moved. With real processes, real signals and a real full disk."""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from support.command import ROOT, Sagsae
from support.crash_writer import Size, begin, files_of, harvest_again, job, read_lines, result, unfinish, wrong_rows
from support.folders import contents

from shared.files.local import LocalFiles
from shared.files.locks import folder_lock
from shared.store.manifest import Commit, append_commit
from shared.store.opened import Store, is_store
from shared.store.reader import open_reader, read_shard
from shared.store.verify import verify

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = Size(tokens=90_000, chunk_rows=256, shard_rows=1024, widths=(192, 128))
SMALL = Size(tokens=150, chunk_rows=32, shard_rows=96, widths=(8,))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A store that one writer wrote in one go, and how many seconds that took."""
    root = tmp_path_factory.mktemp("undisturbed") / "s"
    return root, result(job("write", root, SIZE))


def following(root: Path) -> subprocess.Popen[str]:
    """A process that reads along, and has begun to."""
    follower = job("follow", root, SIZE)
    assert follower.stdout
    assert follower.stdout.readline() == "begun\n"
    return follower


def check_followed(followed: dict[str, Any]) -> None:
    assert followed["errors"] == []
    assert (followed["bad"], followed["rows"]) == (0, SIZE.tokens)
    assert followed["growing"] > 2, "it looked while the store grew"


def check_final(root: Path, whole: Path) -> None:
    store = Store.open(root)
    assert store.state == "final"
    assert store.n_rows == SIZE.tokens
    assert sum(wrong_rows(store, shard) for shard in store.commits) == 0
    assert verify(store, full=True).lines == []
    assert {**contents(root), "record.json": (root / "record.json").read_bytes()} == {
        **contents(whole), "record.json": (whole / "record.json").read_bytes()
    }  # fmt: skip


def test_writers_killed_at_random(undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    """Every writer is killed after at most a 25th of what the whole store takes, until 50 were."""
    whole, seconds = undisturbed
    root = tmp_path / "s"
    root.mkdir()
    begin(LocalFiles(root), SIZE)
    follower = following(root)
    killed, followed = result(job("kill", root, SIZE, 50, seconds / 25)), result(follower)
    assert killed["kills"] >= 40
    assert killed["half_files"] > 0, "some were killed in the middle of a file"
    check_followed(followed)
    check_final(root, whole)


def test_writers_killed_at_every_step(tmp_path: Path) -> None:
    """From the empty folder to the final store: in front of every file that is opened, renamed or deleted."""
    done = result(job("steps", tmp_path, SMALL))
    assert done["wrong"] == []
    assert done["kills"] > 80
    assert done["stores"] > 30


@pytest.mark.parametrize("kills", [0, 8])
def test_two_writers_and_a_follower(undisturbed: tuple[Path, float], tmp_path: Path, kills: int) -> None:
    whole, seconds = undisturbed
    root = tmp_path / "s"
    root.mkdir()
    begin(LocalFiles(root), SIZE)
    follower = following(root)
    wrote, followed = result(job("pair", root, SIZE, kills, seconds / 12)), result(follower)
    assert wrote["logs"] == 2
    assert kills // 2 <= wrote["kills"] <= kills  # a busy machine may finish before the last of them
    check_followed(followed)
    check_final(root, whole)


def test_a_shard_that_two_logs_name(tmp_path: Path) -> None:
    """Nothing of ours commits a shard twice, but a store where it happened opens."""
    begin(LocalFiles(tmp_path), SMALL)
    rows, arrays = Store.open(tmp_path).spec.rows_of_shards(), Store.open(tmp_path).spec.arrays()
    files = {array: (rows[array][0] * rows[array][1].itemsize + 4 if array in rows else 1, 0) for array in arrays}
    for writer in (0, 1):
        append_commit(LocalFiles(tmp_path), writer, Commit(0, 96, 0, 96, 93 + writer, files))
    assert Store.open(tmp_path).commits[0].kept == 94


ROOMY = """
import shutil, sys
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40)
sys.path.insert(0, sys.argv.pop(1))
import cli
cli.main()
"""


class Disk:
    """A small file system in memory, in a mount namespace of its own that ends with the process that holds it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        script = f"mount -t tmpfs -o size={PAGE},huge=never tests '{folder}' && echo mounted && exec cat"
        for flags in ("-m", "-Urm"):  # as root, or with a user namespace
            with suppress(FileNotFoundError):
                self.holder = subprocess.Popen(
                    ["unshare", flags, "sh", "-c", script],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                )  # fmt: skip
                assert self.holder.stdout
                if self.holder.stdout.readline() == "mounted\n":
                    break
                self.close()
        else:
            pytest.skip("needs to be allowed to mount a file system")
        user = ["-U", "--preserve-credentials"] if "U" in flags else []
        self.enter = ["nsenter", "-t", str(self.holder.pid), "-m", *user]
        self.view = Path(f"/proc/{self.holder.pid}/root", *folder.parts[1:])
        """The same folder, for those outside."""

    def close(self) -> None:
        self.holder.communicate()

    def remount(self, options: str) -> None:
        subprocess.run([*self.enter, "mount", "-o", f"remount,{options}", "tests", str(self.folder)], check=True)

    def hold(self, pages: int) -> None:
        """Makes it so large, in pages."""
        self.remount(f"size={pages * PAGE}")

    def sagsae(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Its estimate finds room enough, as where another program fills the disk meanwhile."""
        command = [*self.enter, sys.executable, "-c", ROOMY, str(ROOT), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Of the commands' matrix products: several get in one another's way where the processor has other work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, sagsae: Sagsae) -> tuple[list[str], Path]:
    """A harvest command that lacks --out, and the store that it makes undisturbed: 55 shards."""
    folder = tmp_path_factory.mktemp("tiny")
    with (ROOT / "shared" / "tiny" / "corpus.jsonl").open() as corpus:
        (folder / "corpus.jsonl").write_text("".join(corpus.readline() for _ in range(12)))
    command = ["harvest", "--model", "tiny", "--corpus", str(folder / "corpus.jsonl"), "--hook", "mlp_out", "--hook",
               "attn_out", "--set", "shard_rows=128", "--set", "chunk_rows=128", "--out"]  # fmt: skip
    done = sagsae(*command, folder)
    assert done.returncode == 0, done.stderr
    return command, folder / "tiny"


@pytest.mark.slow
def test_a_full_disk(tiny: tuple[list[str], Path], disk: Disk) -> None:
    """It is full three times: in the token ids, in a shard's file, and in the middle of a manifest line. Every time the
    same command says so, and goes on when there is room."""
    command, whole = tiny
    root, needed, lines = disk.view / "tiny", pages_without_line(whole), read_lines(whole)
    disk.hold(2)
    check_full(disk.sagsae(*command, disk.folder), root, None)
    in_file = len(lines) * 7 // 8
    disk.hold(needed[in_file] - 2)
    check_full(disk.sagsae(*command, disk.folder), root, in_file)
    ends = [pages(end) for end in accumulate(map(len, lines))]
    in_line = next(shard for shard in range(in_file + 1, len(lines)) if ends[shard] > ends[shard - 1])
    disk.hold(needed[in_line])
    check_full(disk.sagsae(*command, disk.folder), root, in_line)
    assert (root / "manifest" / "rank-00000.jsonl").read_bytes() == b"".join(lines[:in_line])
    assert all((root / path).exists() for path in files_of(Store.open(whole), in_line)), "all but its line was written"
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (disk.view / "ballast").write_bytes(bytes(100 * PAGE))
    with folder_lock(root):
        pass  # to take the lock needs no room
    disk.hold(2 * needed[-1])
    (disk.view / "ballast").unlink()
    done = disk.sagsae(*command, disk.folder)
    assert done.returncode == 0, done.stderr
    assert contents(root) == contents(whole)


def pages(size: int) -> int:
    return -(-size // PAGE)


def pages_without_line(whole: Path) -> list[int]:
    """For each shard, how many pages a store takes at the moment when all but the shard's manifest line is written."""
    store = Store.open(whole)
    of_shards = [files_of(store, shard) for shard in store.commits]
    once = set(contents(whole)) - {path for files in of_shards for path in files} - {"manifest/index.jsonl"}
    used = 1 + sum(pages((whole / path).stat().st_size) for path in [*once, "record.json"])  # 1: the lock
    grown = accumulate(sum(pages((whole / path).stat().st_size) for path in files) for files in of_shards)
    logs = accumulate(map(len, read_lines(whole)), initial=0)
    return [used + files + pages(log) for files, log in zip(grown, logs, strict=False)]


def check_full(done: subprocess.CompletedProcess[str], root: Path, commits: int | None) -> None:
    """The message; and so many commits and nothing half, or no store at all."""
    assert done.returncode == 75, done.stderr
    assert re.search(r"^error: .*: the disk is full\. Free space, then run the same command again", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    assert [path for path in root.rglob("*") if path.name == "tokens.building" or path.suffix == ".tmp"] == []
    assert is_store(LocalFiles(root)) == (commits is not None)
    if commits is not None:
        assert list(Store.open(root).commits) == list(range(commits))
        assert verify(Store.open(root), full=True).lines == []


def test_a_read_only_disk(store: Store, model_folder: Path, disk: Disk, tmp_path: Path) -> None:
    disk.hold(1 << 13)
    for name in ("whole", "half", "damaged"):
        shutil.copytree(store.root, disk.view / name)
    unfinish(disk.view / "half", 4)
    os.truncate(disk.view / "damaged" / files_of(store, 2)[0], 5)
    disk.remount("ro")
    whole = disk.folder / "whole"
    train = ["train", "--store", whole, "--hook", "mlp_out", "--arch", "gated", "--d-sae", "48", "--sparsity", "0.2",
             "--tokens", "1280", "--batch", "64", "--set", "heldout_tokens=320", "--device", "cpu"]  # fmt: skip
    reading = (["store", "info", whole], ["store", "ls", disk.folder], ["store", "verify", "--full", whole],
               ["store", "verify", disk.folder / "half"], [*train, "--out", tmp_path / "run"])  # fmt: skip
    for command in reading:
        done = disk.sagsae(*command)
        assert done.returncode == 0, done.stderr
    before = contents(disk.view)
    writing = (["store", "verify", "--repair", disk.folder / "damaged"], ["store", "rm", "--yes", whole],
               ["store", "recode", "--codec", "int8", whole, disk.folder / "int8"],
               [*harvest_again(model_folder), "--out", disk.folder, "--name", "half"])  # fmt: skip
    for command in writing:
        done = disk.sagsae(*command)
        assert done.returncode == 2, done.stderr
        assert re.search(r"^error: .*read-only", done.stderr, re.M | re.I), done.stderr
        assert "Traceback" not in done.stderr
    assert contents(disk.view) == before


def test_a_second_harvest_and_a_killed_one(tiny: tuple[list[str], Path], sagsae: Sagsae, tmp_path: Path) -> None:
    """The second is refused while the first lives, even if it stands still; then it takes over from the killed one."""
    command, whole = tiny
    root = tmp_path / "tiny"
    log = root / "manifest" / "rank-00000.jsonl"
    words = [sys.executable, str(ROOT / "cli.py"), *command, str(tmp_path)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as first:
        try:
            while not log.exists() or log.read_bytes().count(b"\n") < 3:
                assert first.poll() is None
                time.sleep(0.002)
            first.send_signal(signal.SIGSTOP)
            os.waitpid(first.pid, os.WUNTRACED)
            before = contents(root)
            second = sagsae(*command, tmp_path)
            assert second.returncode == 75
            assert f"process {first.pid} on {socket.gethostname()} is writing here" in second.stderr
            assert contents(root) == before
        finally:
            first.kill()
    assert first.returncode == -signal.SIGKILL
    assert f"process {first.pid} on" in (root / ".lock").read_text(), "it left its lock file"
    assert 3 <= len(Store.open(root).commits) < len(read_lines(whole))
    done = sagsae(*command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(root) == contents(whole)


def test_a_store_that_was_moved(store: Store, model_folder: Path, sagsae: Sagsae, tmp_path: Path) -> None:
    """Renamed while it was unfinished, then when it was final."""
    unfinish(Path(shutil.copytree(store.root, tmp_path / "here" / "s")), 4)
    (tmp_path / "there").mkdir()
    half = (tmp_path / "here" / "s").rename(tmp_path / "there" / "renamed")
    assert verify(Store.open(half), full=True).lines == []
    done = sagsae(*harvest_again(model_folder), "--out", tmp_path / "there", "--name", "renamed")
    assert done.returncode == 0, done.stderr
    final = (tmp_path / "there").rename(tmp_path / "elsewhere") / "renamed"
    assert contents(final) == contents(store.root)
    assert sagsae("store", "verify", "--full", final).returncode == 0
    for array in store.spec.layouts():
        for shard in store.commits:
            found, expected = (read_shard(open_reader(s, array), shard) for s in (Store.open(final), store))
            assert found.tobytes() == expected.tobytes()


def test_an_altered_last_line_is_written_anew(tmp_path: Path) -> None:
    """It is not cut off like a torn one: it ends in a newline."""
    for name in ("whole", "s"):
        result(job("write", tmp_path / name, SMALL))
    log = unfinish(tmp_path / "s", 1)
    log.write_bytes(log.read_bytes().replace(b'"rows":96', b'"rows":95'))
    assert Store.open(tmp_path / "s").commits == {}
    result(job("write", tmp_path / "s", SMALL))
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")
