"""Where it runs: few open files, no flock, links, special files, errors of disks, half an environment, quotas, servers
that lie or dawdle. One small test a fault; where a public report is named, that is where it was first seen."""

import errno
import fcntl
import gc
import json
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.command import ROOT

import cli
import shared.files.client
import shared.files.connect
import shared.files.handles
import shared.files.local
from harvest.recode import recode
from harvest.synth import synth
from harvest.team import Team
from shared.command.start import on_this_machine
from shared.config import EvalConfig, SynthConfig, TrainConfig
from shared.device import local_cores, share_cores, usable_cores
from shared.errors import DamagedError, UserError
from shared.files.handles import HANDLES, HandlePool, LocalFile
from shared.files.local import TEMPORARY, LocalFiles, remove_temporaries, write_file
from shared.files.locks import folder_lock
from shared.files.open import open_files
from shared.launch import ProcessPlace, is_helper, meeting, read
from shared.progress import say
from shared.saes import sae_config
from shared.store.create import clean_up, remove_store
from shared.store.listing import describe_store, list_stores
from shared.store.opened import Store, write_state
from shared.store.reader import ArrayReader, IndexCache, open_reader, read_shard
from shared.store.tail import watch_store
from shared.store.verify import repair, verify
from train.evaluate import evaluate
from train.run import train
from train.runs.folder import RunFolder

HOOK = "layer_00/synthetic"
LEFT = "then run the same command again: it deletes what is left"
FEW = 128
SHARDS = 80


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8, 80 shards of 9 files: few, but more than may be open. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)  # thousands of tiny files, for nobody to keep
        return Path(synth(small(tmp_path_factory.mktemp("many"), tokens=SHARDS * 32, codec="int8")).store)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards. Read only."""
    return Path(synth(small(tmp_path_factory.mktemp("few"), tokens=128)).store)


@pytest.fixture
def copy(few: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(few, tmp_path / "store"))


def small(out: Path, **changes: Any) -> SynthConfig:
    values: dict[str, Any] = {
        "d_in": 8, "features": 12, "context": 16, "chunk_rows": 32, "shard_rows": 32, "out": str(out), "name": "s",
        **changes,
    }  # fmt: skip
    return SynthConfig(**values)


def training(store: Path, run: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "store": str(store), "saes": (sae_config(arch="gated", d_sae=8, sparsity=0.1),), "batch": 32, "streams": 2,
        "heldout_tokens": 32, "device": "cpu", "out": run, **changes,
    }  # fmt: skip
    return TrainConfig(**values)


@pytest.fixture
def few_files() -> Iterator[int]:
    """`ulimit -n 128`."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, before[1]))
    yield FEW
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- open files


def test_info_of_many_shards_opens_few_files(many: Path, few_files: int) -> None:
    """`store info` of 170 shards and three hookpoints ended in a traceback, Too many open files, at 1,024."""
    assert describe_store(many)["shards"] == f"{SHARDS} of {SHARDS}"
    assert len(os.listdir("/proc/self/fd")) < few_files


def test_training_on_many_quantised_shards_opens_few_files(many: Path, tmp_path: Path, few_files: int) -> None:
    """A training on an int8 store of 256 shards ended in mid-run: four arrays, 256 files kept open of each."""
    assert train(training(many, tmp_path / "run", tokens=2_000, heldout_tokens=320)).steps > 60
    assert evaluate(EvalConfig(run=tmp_path / "run", ce=False, device="cpu")).results["tokens"] > 0
    assert len(HANDLES.open) <= few_files // 2


def test_following_many_segments_opens_few_files(many: Path, tmp_path: Path, few_files: int) -> None:
    """`train --follow` kept the files of every earlier segment open."""
    config = training(many, tmp_path / "run", follow=True, window_rows=64, tokens=2_000, heldout_tokens=320)
    assert train(config).steps > 60
    assert len(os.listdir("/proc/self/fd")) < few_files


@pytest.mark.usefixtures("few_files")
def test_verify_recode_and_ls_of_many_shards_open_few_files(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _handle: None)
    assert verify(Store.open(many), full=True).lines == []
    plain = Path(synth(small(tmp_path, tokens=SHARDS * 32)).store)
    assert recode(str(plain), str(tmp_path / "lz4"), "lz4").tokens == SHARDS * 32
    assert len(list_stores(tmp_path)) == 2


def test_files_are_closed_with_their_reader_without_the_collector(few: Path) -> None:
    """A reader held itself through its cache, so that its files stayed open until the cyclic collector ran."""
    before = len(HANDLES.open)
    gc.disable()
    try:
        readers = [open_reader(Store.open(few), HOOK) for _ in range(3)]
        for reader in readers:
            for shard in range(4):
                read_shard(reader, shard)
        assert len(HANDLES.open) >= before + 12
        del reader
        readers.clear()
        assert len(HANDLES.open) <= before
    finally:
        gc.enable()


@pytest.fixture
def numbered(tmp_path: Path) -> list[Path]:
    """40 files of 100 numbers each, all of them different."""
    paths = [tmp_path / f"{number}" for number in range(40)]
    for number, path in enumerate(paths):
        path.write_bytes(np.full(100, number, "<u4").tobytes())
    return paths


def test_a_file_that_is_being_read_is_never_closed(numbered: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads, forty files, eight of them open: always the right bytes."""
    pool = HandlePool(lambda: 8)
    monkeypatch.setattr(shared.files.handles, "HANDLES", pool)
    files = [LocalFile(path, 400) for path in numbered]

    def look(seed: int) -> int:
        for number in np.random.default_rng(seed).integers(0, 40, 300).tolist():
            assert set(np.frombuffer(files[number].read(40, 200), "<u4").tolist()) == {number}
        return len(pool.open)

    with ThreadPoolExecutor(8) as threads:
        assert max(threads.map(look, range(8))) <= 16, "what every thread reads, besides"
    assert len(pool.open) <= 16


def test_files_of_others_make_the_pool_shrink(numbered: list[Path], few_files: int) -> None:
    files = [LocalFile(path, 400) for path in numbered]
    taken: list[int] = []
    try:
        while len(taken) <= few_files:
            try:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        for number in range(40):
            assert LocalFiles(numbered[0].parent).read(f"{number}")[:4] == np.uint32(number).tobytes()
            assert files[number].read(0, 4) == np.uint32(number).tobytes()
    finally:
        for handle in taken:
            os.close(handle)
        HANDLES.most = shared.files.handles.MAX_OPEN
    assert len(taken) < few_files


def test_a_file_that_was_replaced_meanwhile_is_noticed(numbered: list[Path]) -> None:
    """A store that was replaced under a training gave rows of another: a file that is opened again must be the same."""
    file = LocalFile(numbered[0], 400)
    HANDLES.close_idle(0)
    shutil.copy(numbered[1], f"{numbered[0]}.new")
    os.utime(f"{numbered[0]}.new", (1, 1))
    os.rename(f"{numbered[0]}.new", numbered[0])
    with pytest.raises(DamagedError, match="was replaced while it was being read"):
        file.read(0, 4)


def test_indexes_are_bounded_in_bytes_over_all_readers(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.store.reader.INDEXES", IndexCache(1200))
    readers = [open_reader(Store.open(few), HOOK) for _ in range(3)]
    for reader in readers:
        for shard in range(4):
            read_shard(reader, shard)
    assert sum(len(reader.indexes) for reader in readers if isinstance(reader, ArrayReader)) <= 4


# --- links and special files


LINKS: dict[str, Callable[[Path, Path], None]] = {
    "link": lambda path, target: path.symlink_to(target),
    "hard link": lambda path, target: os.link(target, path),
}


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("command", ["rm", "repair", "train", "synth"])
def test_a_lock_never_empties_what_it_is_a_link_to(copy: Path, tmp_path: Path, kind: str, command: str) -> None:
    """`.lock` in a downloaded store or run was opened through links and emptied."""
    mine, run = tmp_path / "thesis.tex", tmp_path / "run"
    mine.write_text("years of work")
    run.mkdir()
    for folder in (copy, run):
        (folder / ".lock").unlink(missing_ok=True)
        LINKS[kind](folder / ".lock", mine)
    acts: dict[str, Callable[[], Any]] = {
        "rm": lambda: remove_store(LocalFiles(copy)),
        "repair": lambda: repair(LocalFiles(copy), [0]),
        "train": lambda: train(training(copy, run)),
        "synth": lambda: synth(small(tmp_path, name="store", overwrite=True)),
    }
    with pytest.raises(UserError, match=r"\.lock: is a link, has a second name .*Remove it"):
        acts[command]()
    assert mine.read_text() == "years of work"
    assert (copy / "zarr.json").exists()


@pytest.mark.parametrize("kind", LINKS)
def test_logs_and_temporaries_are_never_written_through_links(tmp_path: Path, kind: str) -> None:
    mine, folder = tmp_path / "mine", tmp_path / "folder"
    mine.write_text("mine")
    folder.mkdir()
    LINKS[kind](folder / "log.jsonl", mine)
    LINKS[kind](folder / f"file.{os.getpid()}.tmp", mine)
    with pytest.raises(UserError, match=r"log\.jsonl: is a link"):
        LocalFiles(folder).append("log.jsonl", b"line\n", 0)
    write_file(folder / "file", b"data")
    assert (mine.read_text(), (folder / "file").read_bytes()) == ("mine", b"data")


@given(st.lists(st.sampled_from(["..", ".", "", "a", "b/c", "/etc", "x\0y", "/"]), max_size=5))
def test_a_path_never_leads_out_of_its_folder(parts: list[str]) -> None:
    path = "/".join(parts)
    try:
        safe = shared.files.base.safe(path)
    except DamagedError:
        return
    assert os.path.normpath(f"/top/{safe}").startswith("/top")
    assert not os.path.isabs(safe)


def test_nothing_is_written_through_a_linked_folder(copy: Path, tmp_path: Path) -> None:
    """A layer that was moved to another disk and linked back is read; what is linked is never written to."""
    shutil.move(copy / "layer_00", tmp_path / "elsewhere")
    (copy / "layer_00").symlink_to(tmp_path / "elsewhere")
    assert verify(Store.open(copy), full=True).lines == []
    with pytest.raises(UserError, match=r"layer_00/synthetic/c/0: leads out of"):
        LocalFiles(copy).write(f"{HOOK}/c/0/0", [b"data"])


def test_a_store_with_a_linked_layer_is_removed_and_the_target_stays(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`store rm` removed zarr.json, then failed at the link: what was left was no store any more."""
    shutil.move(copy / "layer_00", tmp_path / "elsewhere")
    (copy / "layer_00").symlink_to(tmp_path / "elsewhere")
    remove_store(LocalFiles(copy))
    assert not copy.exists()
    assert (tmp_path / "elsewhere/synthetic/c/0/0").exists()
    assert f"{tmp_path / 'elsewhere'} is left as it is" in capsys.readouterr().err.replace("\n", "")


def test_a_run_with_linked_folders_starts_afresh(few: Path, tmp_path: Path) -> None:
    """`train --overwrite` removed config.json, then failed at the link."""
    run = tmp_path / "run"
    train(training(few, run, keep_checkpoints=True))
    for name in ("checkpoints", "saes"):
        shutil.move(run / name, tmp_path / name)
        (run / name).symlink_to(tmp_path / name)
    before = sorted(path.name for path in (tmp_path / "saes").iterdir())
    train(training(few, run, overwrite=True, lr=2e-3))
    assert not (run / "saes").is_symlink()
    assert sorted(path.name for path in (tmp_path / "saes").iterdir()) == before


def test_what_cannot_be_deleted_is_found_before_anything_is(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _how: Path(path).name != "stats")
    with pytest.raises(UserError, match="Nothing was deleted"):
        remove_store(LocalFiles(copy))
    assert verify(Store.open(copy), full=True).lines == []


@pytest.mark.parametrize("fails", range(2, 40, 6))
def test_a_deletion_that_was_broken_off_goes_on(copy: Path, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    """What was left had no zarr.json any more, so that `store rm` would not touch it."""
    calls, real = [], os.unlink

    def unlink(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == fails:
            raise OSError(errno.EIO, "Input/output error")
        real(*args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(UserError, match=r"I/O error.*it deletes what is left"), LocalFiles(copy).explained(LEFT):
        remove_store(LocalFiles(copy))
    remove_store(LocalFiles(copy))
    assert not copy.exists()


def special(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.getcwd()
            os.chdir(path.parent)  # such names are short
            listener.bind(path.name)
            os.chdir(here)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("file", ["zarr.json", "manifest/index.jsonl", "tokens/c/0/0", f"{HOOK}/c/1/0", "record.json"])
def test_special_files_are_refused_at_once(copy: Path, kind: str, file: str) -> None:
    """A pipe was waited for, /dev/zero was read until memory was full."""
    special(copy / file, kind)
    with pytest.raises(DamagedError, match="is a device, a pipe or a socket, not a file"):
        LocalFiles(copy).read(file)
    with pytest.raises(DamagedError, match="is a device, a pipe or a socket, not a file"):
        LocalFiles(copy).open(file, 10)
    found = verify(Store.open(copy), full=False).lines if file.endswith("/0") else []
    assert all("not a file" in line for line in found)


def test_a_file_that_is_too_large_is_not_read(copy: Path) -> None:
    os.truncate(copy / "zarr.json", 1 << 40)  # a hole
    with pytest.raises(DamagedError, match=r"zarr\.json: has 1,099,511,627,776 bytes; a file of its kind"):
        Store.open(copy)


# --- what a terminal is told


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_write_is_an_escape(encoding: str) -> None:
    """Cold review: where the locale has no λ, a training that was finished ended in a traceback, as did --help."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, str(ROOT / "cli.py"), "train", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u03bb" in done.stdout or "λ".encode() in done.stdout  # click takes ASCII for a locale that is not set


def test_words_of_others_do_not_move_the_cursor(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cold review: the first line of a CSV file was repeated as it was, with what clears a terminal or writes into its
    title."""
    (tmp_path / "a.csv").write_text("a\x1b[2J\x1b]0;title\x07\u202eb,c\n1,2\n")
    asked = ["--tokens", "64", "--context", "16", "--device", "cpu", "--out", str(tmp_path)]
    command = ["sagsae", "harvest", "--model", "tiny", "--corpus", str(tmp_path / "a.csv"), *asked]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert r"there are: a\x1b[2J\x1b]0;title\x07\u202eb, c" in said
    say("\x1b[31m")
    assert r"\x1b[31m" in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-", "2>/dev/full"])
def test_streams_that_are_closed_or_full(tmp_path: Path, closed: str) -> None:
    """Cold review: a command that was started without a stderr, or with one on a full disk, ended with 1; and the next
    file that it opened would have had the number of stderr."""
    command = f"{sys.executable} {ROOT / 'cli.py'} synth --tokens 500 --d-in 8 --out {tmp_path} {closed}"
    assert subprocess.run(["bash", "-c", command], timeout=100).returncode == 0
    assert not verify(Store.open(tmp_path / "synthetic"), full=True).lines


@pytest.mark.parametrize("pipe", ["| head -c 1", "--json 2>&1 | head -n 1", "2>&1 >/dev/null | true"])
def test_pipes_that_their_readers_close(few: Path, tmp_path: Path, pipe: str) -> None:
    """Cold review: `| head -1` ended a command with 1; of `2>&1 | head -1` the first line that was said ended it before
    anything was done."""
    settings = "--batch 32 --set heldout_tokens=32 --set streams=2 --device cpu"
    arguments = f"train --store {few} --arch gated:8 --sparsity 0.1 {settings} --out {tmp_path / 'run'} {pipe}"
    command = f"{sys.executable} {ROOT / 'cli.py'} {arguments} >/dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], timeout=100, capture_output=True, text=True)
    assert done.returncode in (0, 141), done.stderr
    assert "Traceback" not in done.stderr
    assert RunFolder(tmp_path / "run").finished()


def test_a_tail_ends_when_its_reader_does(tmp_path: Path) -> None:
    """A store that is being written is followed until it is final: not for a reader that is gone."""
    synth(small(tmp_path, tokens=1024))
    write_state(LocalFiles(tmp_path / "s"), Store.open(tmp_path / "s").spec, "writing")
    command = f"{sys.executable} {ROOT / 'cli.py'} store tail {tmp_path / 's'} --every 0.1 | true"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], timeout=100, capture_output=True)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_under_the_output_is_said(few: Path) -> None:
    command = f"{sys.executable} {ROOT / 'cli.py'} store info {few} >/dev/full"
    done = subprocess.run(["bash", "-c", command], timeout=100, capture_output=True, text=True)
    assert done.returncode == 75
    assert done.stderr == "error: the disk is full. Free space\n"


@pytest.mark.parametrize("command", ["train", "harvest"])
def test_partners_that_do_not_come(few: Path, tmp_path: Path, command: str) -> None:
    """Cold review: with WORLD_SIZE=2 and no second process it waited for two days without a word, and Ctrl-C, heard by
    no library, did not end it. A port that is taken was a traceback."""
    arguments = {
        "train": f"--store {few} --arch gated:8 --out {tmp_path / 'run'} --device cpu",
        "harvest": f"--model tiny --tokens 4096 --out {tmp_path} --device cpu",
    }
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    line = [sys.executable, "-c", "import sys, shared.launch; shared.launch.LATE = 0.1; import cli; cli.main()"]
    with subprocess.Popen(
        [*line, command, *arguments[command].split()], cwd=ROOT, env={**os.environ, **told}, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        said = next(text for text in process.stderr if "waiting for" in text)
        assert said == f"waiting for the other processes of this run (2 in all) at 127.0.0.1:{port}\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (-signal.SIGINT, 130)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"cannot be reached at .* \(address already in use\)\. Start them"):  # noqa: SIM117
        with meeting(ProcessPlace(0, 2)):
            raise RuntimeError("address already in use\nand more")


def test_rm_without_a_terminal_deletes_nothing(few: Path, tmp_path: Path) -> None:
    """Cold review: without a stdin the question ended in a traceback."""
    store = shutil.copytree(few, tmp_path / "store")
    command = f"{sys.executable} {ROOT / 'cli.py'} store rm {store} 0<&-"
    done = subprocess.run(["bash", "-c", command], timeout=100, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(f"error: {store}: was not deleted. Answer y, or add --yes\n")
    assert Store.open(store).commits


# --- without flock


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(getattr(errno, request.param), "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_flock")
def test_a_file_system_without_flock_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On Lustre without `-o flock` (ENOSYS), or NFS without locks (ENOLCK), everything ended in a traceback."""
    store = Path(synth(small(tmp_path, tokens=128)).store)
    assert recode(str(store), str(tmp_path / "lz4"), "lz4").tokens == 128
    assert train(training(store, tmp_path / "run")).steps == 3
    assert [look.at_work for look in watch_store(LocalFiles(store), 0.1)] == [None]
    assert describe_store(store)["state"] == "final"
    synth(small(tmp_path, tokens=128, seed=3, overwrite=True))
    remove_store(LocalFiles(store))
    assert not store.exists()
    assert "does not show whether another process is reading it" in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.rglob(".lock.held*"))


@pytest.mark.usefixtures("no_flock")
def test_without_flock_one_writer_at_a_time(tmp_path: Path) -> None:
    busy = f"process {os.getpid()} on .* is writing here"
    with folder_lock(tmp_path), folder_lock(tmp_path, ".lock.3"):
        with pytest.raises(UserError, match=busy), folder_lock(tmp_path):
            pass
        with pytest.raises(UserError, match=busy), folder_lock(tmp_path, ".lock.3"):
            pass
    held = tmp_path / ".lock.held"
    assert not held.exists()
    with subprocess.Popen(["true"]) as gone:
        pass
    with folder_lock(tmp_path):
        text = json.loads(held.read_text())
    held.write_text(json.dumps({**text, "pid": gone.pid}))
    with pytest.raises(UserError, match=rf"was killed\. Delete {held}"), folder_lock(tmp_path):
        pass


def test_a_lock_with_flock_and_one_without_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks left")

    with folder_lock(tmp_path):
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(UserError, match="is writing here"), folder_lock(tmp_path):
            pass
    with folder_lock(tmp_path):
        monkeypatch.setattr(fcntl, "flock", real)
        with pytest.raises(UserError, match="is writing here"), folder_lock(tmp_path):
            pass


# --- a store that is read is not deleted


@pytest.mark.parametrize("command", ["rm", "overwrite", "repair"])
def test_a_store_that_is_being_read_is_not_deleted(copy: Path, tmp_path: Path, command: str) -> None:
    """`store rm` beside a training: done at once; the training ended with "committed but missing"."""
    acts: dict[str, Callable[[], Any]] = {
        "rm": lambda: remove_store(LocalFiles(copy)),
        "overwrite": lambda: synth(small(tmp_path, name="store", tokens=128, seed=9, overwrite=True)),
        "repair": lambda: repair(LocalFiles(copy), [0]),
    }
    refused = pytest.raises(UserError, match=r"reading it .*Wait for it, or stop it first")
    with LocalFiles(copy).reading(), LocalFiles(copy).reading(), refused:
        acts[command]()
    assert verify(Store.open(copy), full=True).lines == []
    acts[command]()


def test_a_training_holds_its_store(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []

    def inside(*args: Any, **kwargs: Any) -> Any:
        with pytest.raises(UserError) as caught:
            remove_store(LocalFiles(copy))
        refused.append(str(caught.value))
        return real(*args, **kwargs)

    real = sys.modules["train.run"].run_wave
    monkeypatch.setattr("train.run.run_wave", inside)
    train(training(copy, tmp_path / "run"))
    assert len(refused) == 1
    assert "reading it" in refused[0]
    remove_store(LocalFiles(copy))


# --- temporaries


def test_temporaries_are_looked_for_where_they_can_be(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a store was walked over, twice a harvest: minutes for millions of files."""
    index = copy / "manifest/index.jsonl"
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:3]))
    places = ["zarr.json.1.tmp", "manifest/index.jsonl.1.tmp", f"{HOOK}/zarr.json.1.tmp", f"{HOOK}/c/3/0.1.tmp",
              "index/context/c/3.1.tmp", "stats/layer_00/zarr.json.1.tmp", "tokens/c/0/0.1.tmp",
              f"stats/{HOOK}/sum/c/3/0.1.tmp"]  # fmt: skip
    for place in places:
        (copy / place).write_bytes(b"torn")
    looked: list[str] = []
    real = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, *rest: looked.append(str(path)) or real(path, *rest))  # type: ignore[func-returns-value]
    clean_up(LocalFiles(copy))
    assert not list(copy.rglob("*.tmp"))
    assert not [path for path in looked if path.endswith(("synthetic/c/0", "sum/c/1"))]
    remove_temporaries(copy / "nowhere", ["a"])


# --- what a disk can say


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_the_system_is_one_message(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """EMFILE, EINTR, ENOENT, ESTALE … ended in tracebacks wherever nobody had thought of them."""

    def app() -> None:
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(cli, "app", app)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert ended.value.code == (75 if number in TEMPORARY else 2)
    assert said.startswith("error: some/file: ")
    assert len(said.strip().splitlines()) == 1


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def app() -> None:
        raise OSError("no error of the system")

    monkeypatch.setattr(cli, "app", app)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(OSError, match="no error of the system"):
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_call_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) < 3:
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    write_file(tmp_path / "file", b"data")
    assert (len(calls), (tmp_path / "file").read_bytes()) == (3, b"data")


# --- one process or several

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, ProcessPlace()),
        ({"WORLD_SIZE": ""}, ProcessPlace()),
        ({"RANK": "1"}, ProcessPlace()),
        ({"RANK": "1", "WORLD_SIZE": ""}, ProcessPlace()),
        ({"RANK": "", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, ProcessPlace()),
        ({"LOCAL_RANK": "3", "MASTER_ADDR": "elsewhere"}, ProcessPlace()),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "PMI_SIZE": "1"}, ProcessPlace()),
        ({"RANK": "3", "WORLD_SIZE": "4", **MEET}, ProcessPlace(3, 4, 3, 4)),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEET},
            ProcessPlace(3, 4, 1, 2),
        ),
    ],
)
def test_what_the_environment_says_of_processes(environment: dict[str, str], place: ProcessPlace) -> None:
    """RANK=1 left over from another job: rc 0, and nothing printed. WORLD_SIZE= (empty): a traceback."""
    assert read(environment) == place


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2: expected"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9999"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MEET}, r"RANK=2: expected a whole number below WORLD_SIZE \(2\)"),
        ({"WORLD_SIZE": "2", "RANK": "-1", **MEET}, "RANK=-1"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1: expected"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "2", **MEET}, "LOCAL_RANK=2: expected"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "0", **MEET}, "LOCAL_WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE is 4: started by mpirun or srun"),
    ],
)
def test_half_an_environment_is_one_message(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(environment)


def test_alone_is_alone_for_libraries_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", ""), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert Team.join() == Team()
    assert not {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} & set(os.environ)
    assert not is_helper()
    assert "this is one process alone" in capsys.readouterr().err.replace("\n", " ")


def test_processes_of_one_machine_meet_on_loopback() -> None:
    """Where a machine's own name did not resolve, `--processes` waited for ever."""
    options = " ".join(on_this_machine())
    assert "--local-addr=127.0.0.1" in options
    assert "--rdzv-endpoint=127.0.0.1:0" in options


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs unshare and an administrator")
def test_processes_where_the_machines_name_does_not_resolve(many: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "cli.py", "train", "--store", many, "--arch", "gated:8", "--sparsity", "0.1",
               "--batch", "32", "--set", "heldout_tokens=320", "--set", "streams=2", "--tokens", "640", "--device",
               "cpu", "--parallel", "data", "--processes", "2", "--out", tmp_path / "run"]  # fmt: skip
    quoted = " ".join(map(str, command))
    done = subprocess.run(["unshare", "-u", "sh", "-c", f"hostname nowhere-to-be-found; exec {quoted}"],
                          capture_output=True, text=True, timeout=250)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/evaluation.json").exists()


# --- signals


@pytest.mark.parametrize("pause", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_a_second_ctrl_c_ends_at_once_with_130(tmp_path: Path, pause: float) -> None:
    """The interpreter's end met threads of libraries: terminate called without an active exception, SIGABRT."""
    command = [sys.executable, str(ROOT / "cli.py"), "harvest", "--model", "tiny", "--layer", "1", "--hook", "mlp_out",
               "--tokens", "200000", "--set", "shard_rows=2048", "--set", "chunk_rows=512", "--device", "cpu", "--out",
               str(tmp_path), "--name", "s"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("s/manifest/rank-*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert verify(Store.open(tmp_path / "s"), full=True).lines == []


# --- quotas


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 12),
        ("0::/job/step\n", {"job/cpu.max": "400000 100000\n", "job/step/cpu.max": "max 100000\n"}, 4),
        ("0::/job/step\n", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/box\n0::/\n",
         {"cpu,cpuacct/box/cpu.cfs_quota_us": "500000\n", "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"}, 5),
        ("4:cpu,cpuacct:/not/seen/from/here\n",
         {"cpu/cpu.cfs_quota_us": "500000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 5),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 12),
        ("0::/\n", {"cpu.max": "garbage"}, 12),
        ("0::/\n", {"cpu.max": "100000 0"}, 12),
        ("", {}, 12),
    ],
)  # fmt: skip
def test_the_cpu_quota_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], cores: int
) -> None:
    """A container with 2 of 64 cores started 64 threads: affinity says nothing of a quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    assert usable_cores(tmp_path / "proc", tmp_path / "groups") == cores


def test_processes_share_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.device.usable_cores", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (local_cores(), local_cores(4), local_cores(16)) == (8, 2, 1)
    for before, heeded, after in ((None, None, "2"), ("8", "8", "2"), ("8", None, "8"), ("3", None, "3")):
        for name, value in (("OMP_NUM_THREADS", before), ("SAGSAE_CORES", heeded)):
            monkeypatch.delenv(name, raising=False)
            if value:
                monkeypatch.setenv(name, value)
        share_cores(4)
        assert os.environ["OMP_NUM_THREADS"] == after


# --- servers


class Liar(BaseHTTPRequestHandler):
    """Answers as its server's `how` says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        how: Callable[[BaseHTTPRequestHandler], None] = self.server.how  # type: ignore[attr-defined]
        self.close_connection = True
        how(self)

    do_HEAD = do_GET

    def begin(self, length: int, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Callable[[Any], None]], str]]:
    """Starts a server that answers with what is given; its address."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_")) or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SAGSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shared.files.client, "BACKOFF_SECONDS", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Liar)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that hung up is no news
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()

    def start(how: Callable[[Any], None]) -> str:
        server.how = how  # type: ignore[attr-defined]
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("size", [1 << 62, 20 * 10**9, (64 << 20) + 1])
def test_a_length_that_a_server_says_is_a_limit_not_an_allocation(liar: Any, size: int) -> None:
    """Content-Length 2^62 aborted the process; 20 GB were taken."""
    address = liar(lambda answer: (answer.begin(size), answer.wfile.write(b"{}")))
    with pytest.raises(DamagedError, match=rf"zarr\.json: has {size:,} bytes; a file of its kind has at most"):
        Store.open(f"{address}/store")


def test_more_bytes_than_asked_for_are_not_taken(liar: Any) -> None:
    def endless(answer: Any) -> None:
        answer.send_response(206)
        for name, value in (("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT"), ("Content-Range", "bytes 0-9/100"),
                            ("Content-Length", str(1 << 40))):  # fmt: skip
            answer.send_header(name, value)
        answer.end_headers()
        while True:
            answer.wfile.write(bytes(1 << 16))

    with pytest.raises(UserError, match=r"more than 10 bytes came|broke off"):
        open_files(f"{liar(endless)}/store").open("file", 100).read(0, 10)


def test_a_server_that_dawdles_is_told_within_a_minute(liar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte every 5 s kept a command for 361 s."""
    connect = shared.files.connect
    assert connect.TOTAL_SECONDS + 2 * connect.STALL_SECONDS <= 60
    assert connect.TOTAL_SECONDS + connect.ANSWER_SECONDS <= 60
    monkeypatch.setattr(connect, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(shared.files.client, "TOTAL_SECONDS", 0.5)

    def dawdle(answer: Any) -> None:
        answer.begin(10_000)
        for _ in range(100):
            answer.wfile.write(b"x")
            answer.wfile.flush()
            time.sleep(0.1)

    started = time.monotonic()
    with pytest.raises(UserError, match=r"could not be read.*only \d+ bytes came in"):
        open_files(f"{liar(dawdle)}/store").read("zarr.json")
    assert time.monotonic() - started < 5


def test_a_slow_line_that_lives_is_waited_for(liar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.files.connect, "STALL_SECONDS", 0.3)

    def slow(answer: Any) -> None:
        answer.begin(20 * 4096)
        for _ in range(20):
            answer.wfile.write(bytes(4096))
            answer.wfile.flush()
            time.sleep(0.06)

    assert len(open_files(f"{liar(slow)}/store").read("file")) == 20 * 4096


def bucket(liar: Any, monkeypatch: pytest.MonkeyPatch, how: Callable[[Any], None]) -> Any:
    monkeypatch.setenv("AWS_ENDPOINT_URL", liar(how))
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return open_files("s3://bucket/stores")


def listing(names: list[str], more: str = "", head: str = "") -> bytes:
    found = "".join(f"<CommonPrefixes><Prefix>stores/{name}/</Prefix></CommonPrefixes>" for name in names)
    going_on = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{more}</NextContinuationToken>"
    last = going_on if more else "<IsTruncated>false</IsTruncated>"
    return f'<?xml version="1.0"?>{head}<ListBucketResult><Name>bucket</Name>{last}{found}</ListBucketResult>'.encode()


def test_names_that_a_server_lists_are_names(liar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Any) -> None:
        body = listing(["good", "..", "a&#27;[31mb", "x" * 300, "."])
        request.begin(len(body))
        request.wfile.write(body)

    try:
        assert bucket(liar, monkeypatch, answer).folders() == ["good"]
    except UserError as error:  # obstore refuses some of them itself
        assert "could not be listed" in str(error)  # noqa: PT017


def test_a_listing_that_never_ends_is_told(liar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.files.client, "LISTING_SECONDS", 0.5)
    pages = []

    def answer(request: Any) -> None:
        pages.append(0)
        body = listing([f"store-{len(pages)}"], more=f"t{len(pages)}")
        request.begin(len(body))
        request.wfile.write(body)

    started = time.monotonic()
    with pytest.raises(UserError, match=r"could not be listed: the server did not finish"):
        bucket(liar, monkeypatch, answer).folders()
    assert time.monotonic() - started < 5
    seen = len(pages)
    time.sleep(0.3)
    assert len(pages) <= seen + 2, "and it is not asked any more"


def test_entities_of_xml_are_not_unfolded(liar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The billion laughs: an entity of ten, of ten, of ten …"""
    entities = "".join(
        f'<!ENTITY a{n} "{f"&a{n - 1};" * 10 if n else "laugh"}">' for n in range(10)
    )  # fmt: skip
    head = f"<!DOCTYPE x [{entities}]>"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def answer(request: Any) -> None:
        body = listing(["&a9;"], head=head)
        request.begin(len(body))
        request.wfile.write(body)

    files = bucket(liar, monkeypatch, answer)
    try:
        assert all(len(name) < 300 for name in files.folders())
    except UserError as error:
        assert "could not be listed" in str(error)  # noqa: PT017
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_modes_of_new_files_are_the_users(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.slow
@pytest.mark.skipif(not (sys.platform == "linux" and shutil.which("gcc")), reason="needs Linux and gcc")
@pytest.mark.parametrize("command", ["synth", "recode", "rm", "train", "harvest"])
def test_whatever_a_disk_says_whenever_nothing_is_lost(tmp_path: Path, command: str) -> None:
    """A fourth of the errors of a disk were tracebacks; a full disk, too, at every moment."""
    here, library = Path(__file__).parent, tmp_path / "disk_errors.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, here / "disk_errors.c", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    many = 5 if command == "harvest" else 17  # a harvest takes seconds
    done = subprocess.run([sys.executable, here / "disk_errors.py", tmp_path, command, str(many)], env=environment,
                          capture_output=True, text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(points) == many
    for point in points:
        killed = point["error"] == "kill"
        assert point["first"] in ((-signal.SIGKILL,) if killed else (0, 2, 3, 75)), point
        assert "Traceback" not in point["said"] + point["said_again"], point
        if (command, point["error"]) != ("rm", "ENOENT"):  # what is said to be gone is not deleted
            assert (point["again"], point["same"]) == (0, True), point
