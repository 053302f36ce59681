"""Processes of a command that are killed: all are started again, or one comes back into the running team."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.command import ROOT, Sagsae
from support.crash_writer import unfinish
from support.folders import contents
from support.processes import children, kill, rank_of
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import shared.command.start
from harvest.capture import Capture
from harvest.run import harvest
from harvest.team import Team
from shared.command.main import fail
from shared.command.start import MAX_RESTARTS, launch, reason
from shared.config import HarvestConfig
from shared.errors import BusyError
from shared.launch import RESTARTED, begun_by_this_command
from shared.store.opened import Store

Config = Callable[..., HarvestConfig]
Start = Callable[[int], subprocess.Popen[str]]
COMMAND = [
    "harvest", "--model", "tiny", "--device", "cpu", "--tokens", "40000", "--hook", "mlp_out", "--context", "64",
    "--set", "shard_rows=1024", "--set", "chunk_rows=256", "--set", "batch_tokens=512", "--json", "--out",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(sagsae: Sagsae, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of one process that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    assert sagsae(*COMMAND, out).returncode == 0
    return contents(out / "tiny")


def lines(root: Path, rank: int) -> list[int]:
    """Numbers of the shards that a rank has committed, in order."""
    log = root / "manifest" / f"rank-{rank:05}.jsonl"
    return [json.loads(line)["k"] for line in log.read_bytes().splitlines()] if log.exists() else []


def written(root: Path, shard: int) -> int:
    """When the file of a shard was written."""
    return (root / "layer_02" / "mlp_out" / "c" / str(shard) / "0").stat().st_mtime_ns


def wait_for(true: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    while not true():
        assert process.poll() is None
        time.sleep(0.002)


@pytest.mark.parametrize(("rank", "overwrite"), [(1, False), pytest.param(0, True, marks=pytest.mark.slow)])
def test_a_killed_process_is_started_again(
    sagsae: Sagsae, whole: dict[str, bytes], tmp_path: Path, rank: int, overwrite: bool
) -> None:
    """--overwrite is done once: what was committed before the kill stays."""
    root = tmp_path / "tiny"
    command = [sys.executable, str(ROOT / "cli.py"), *COMMAND, str(tmp_path), "--processes", "2"]
    if overwrite:
        assert sagsae(*COMMAND, tmp_path, "--set", "seed=1").returncode == 0
        command.append("--overwrite")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: bool(lines(root, 0)) and bool(lines(root, 1)), process)
            before = {shard: written(root, shard) for shard in lines(root, 1)}
            for pid in children(process.pid):
                if rank_of(pid) == rank:
                    kill(pid)
            output, errors = process.communicate(timeout=120)
        finally:
            process.terminate()
    assert process.returncode == 0, errors
    assert json.loads(output)["tokens"] == 40_000
    assert "was killed (SIGKILL): all are started again and continue (1 of at most 3 times)" in errors
    assert contents(root) == whole
    assert {shard: written(root, shard) for shard in before} == before, "not captured again"


def test_a_rank_that_comes_back_leaves_out_what_is_committed(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(harvest(harvest_config(tmp_path)).store)
    every = list(Store.open(root).commits)
    unfinish(root, 4)
    captured: list[int] = []
    run = Capture.shard

    def shard(self: Capture, number: int, *rest: Any) -> Any:
        captured.append(number)
        return run(self, number, *rest)

    told: list[str] = []
    work = json.dumps([str(root), every]).encode()
    keys = SimpleNamespace(set=lambda key, _: told.append(key), check=lambda keys: keys == ["work"], get=lambda _: work)
    monkeypatch.setattr(Team, "join", lambda: Team(1, 2, 1, 2, keys))
    monkeypatch.setattr(Capture, "shard", shard)
    assert len([shard for shard in every[1::2] if shard < 4]) == 2
    harvest(harvest_config(tmp_path))
    assert captured == [shard for shard in every[1::2] if shard >= 4]
    assert told == ["done 1"]
    harvest(harvest_config(tmp_path))
    assert captured == [shard for shard in every[1::2] if shard >= 4], "nothing is left to do"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts one of two processes of a harvest. What they meet at is no process of theirs, so it outlives them."""
    keys = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(keys.port), "LOCAL_WORLD_SIZE": "2"}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen[str]] = []

    def start(rank: int) -> subprocess.Popen[str]:
        said = (tmp_path / f"said-{len(started)}").open("w+")
        env = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(ROOT / "cli.py"), *COMMAND, str(tmp_path)]
        process = subprocess.Popen(command, env=env, stdout=said, stderr=said, text=True)
        said.close()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_one_process_comes_back_while_the_others_go_on(whole: dict[str, bytes], tmp_path: Path, start: Start) -> None:
    """As under Ray, which starts a lost task again alone. The first process stands still meanwhile, so that the log of
    the other can be read to its end: each of its shards is in it once."""
    root = tmp_path / "tiny"
    first, second = start(0), start(1)
    wait_for(lambda: len(lines(root, 1)) >= 3, second)
    first.send_signal(signal.SIGSTOP)
    second.kill()
    second.wait()
    committed = lines(root, 1)
    assert start(1).wait(100) == 0
    shards = lines(root, 1)
    assert shards[: len(committed)] == committed
    assert len(shards) == len(set(shards)) == 20, "none is captured again"
    first.send_signal(signal.SIGCONT)
    assert first.wait(100) == 0
    assert contents(root) == whole


@pytest.mark.slow
def test_the_first_process_comes_back_while_another_goes_on(
    whole: dict[str, bytes], tmp_path: Path, start: Start
) -> None:
    """It cannot write beside what is left of its old team; once that has ended, it writes the rest."""
    root = tmp_path / "tiny"
    first, second = start(0), start(1)
    wait_for(lambda: bool(lines(root, 0)) and bool(lines(root, 1)), second)
    first.kill()
    first.wait()
    second.send_signal(signal.SIGSTOP)
    assert start(0).wait(100) == 75
    assert "is writing here; wait for it" in (tmp_path / "said-2").read_text()
    second.send_signal(signal.SIGCONT)
    assert second.wait(100) == 0
    codes = [start(0).wait(100)]
    while codes[-1] == 75:
        codes.append(start(0).wait(100))
    assert codes[-1] == 0
    assert contents(root) == whole


# --- the launcher


@pytest.mark.parametrize("code", [1, 2, 3, 75, 130, -signal.SIGTERM, 0])
def test_what_ends_by_itself_is_not_started_again(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    runs: list[int] = []

    def run(*_: Any) -> int:
        runs.append(code)
        return code

    monkeypatch.setattr(shared.command.start, "run_processes", run)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(SystemExit) as ended:
        launch(2, "script")
    assert ended.value.code == (code if code >= 0 else 143)
    assert runs == [code]


@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT])
def test_what_is_killed_again_and_again_is_given_up(
    monkeypatch: pytest.MonkeyPatch, killed: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    restarted: list[str] = []
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != RESTARTED})

    def run(*_: Any) -> int:
        restarted.append(os.environ.get(RESTARTED, ""))
        return -killed

    monkeypatch.setattr(shared.command.start, "run_processes", run)
    with pytest.raises(BusyError, match=rf"killed \({killed.name}\), 4 times in all\. .*run the same command again"):
        launch(2, "script")
    assert len(restarted) == MAX_RESTARTS + 1
    assert not restarted[0]
    assert len(set(restarted[1:])) == 1
    assert capsys.readouterr().err.count("all are started again") == MAX_RESTARTS
    assert not begun_by_this_command({"started": "2000-01-01T00:00:00+00:00"})
    assert begun_by_this_command({"started": restarted[1]})
    assert not begun_by_this_command({})


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([(75, 4), (2, 5)], 2),
        ([(130, 4), (3, 4)], 3),
        ([(-9, 4), (130, 5)], -9),
        ([(75, 5), (130, 6)], 75),
        ([(2, 5), (-9, 9)], 2),
        ([(-15, 4), (1, 5)], 1),
    ],
)
def test_whose_exit_code_counts(ends: list[tuple[int, int]], code: int) -> None:
    failures = {rank: SimpleNamespace(exitcode=end, timestamp=at) for rank, (end, at) in enumerate(ends)}
    assert reason(failures) == code


def test_torchrun_gets_the_message_for_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last words were how to enable tracebacks."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(SystemExit) as ended:
        fail("--layer 77: the model has 4 layers, 0 to 3", 2)
    assert ended.value.code == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert str(ChildFailedError("cli.py", {0: failure})).splitlines()[-2] == (
        "  traceback : --layer 77: the model has 4 layers, 0 to 3"
    )
