"""Jobs on a real Slurm: slurmctld and two slurmd on this machine."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
from support.boxes.slurm import SlurmCluster, slurm
from support.command import ROOT, Sagsae
from support.folders import contents
from support.processes import wait_for

from harvest.serve.slurm.commands import SlurmJob, cancel, check_slurm, environment, list_jobs, submit
from harvest.serve.slurm.nodes import on_all_nodes
from harvest.serve.slurm.workers import kept_token, url_for_nodes
from shared.config import ServeConfig
from shared.errors import BusyError, UserError
from shared.schema import build
from shared.store.opened import Store

__all__ = ["slurm"]
HARVEST = [
    "harvest", "--model", "tiny", "--device", "cpu", "--tokens", "40000", "--hook", "mlp_out", "--context", "64",
    "--set", "shard_rows=1024", "--set", "chunk_rows=256", "--set", "batch_tokens=512", "--name", "s",
]  # fmt: skip


WORKER = """
import signal, subprocess, sys
child = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
print('code', child.wait())
"""
"""Stands for `sagsae work`: starts its command, passes SIGTERM on, and says how it ended."""


@pytest.fixture(scope="module")
def whole(sagsae: Sagsae, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store of one process that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    done = sagsae(*HARVEST, "--out", out)
    assert done.returncode == 0, done.stderr
    return contents(out / "s")


@pytest.fixture
def here(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, for this process's own calls of Slurm's commands."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return slurm


def state_of(job: int) -> str:
    """What Slurm says; empty when it does not know the job."""
    return next((each.state for each in list_jobs() if each.id == job), "")


def is_live(job: int) -> bool:
    return any(each.live for each in list_jobs() if each.id == job)


def commits(root: Path) -> int:
    return len(Store.open(root).commits) if (root / "zarr.json").exists() else 0


def test_words_arrive_unchanged(here: SlurmCluster, tmp_path: Path) -> None:
    assert here.daemons
    folder = tmp_path / "100% of a b"
    folder.mkdir()
    words = ["a b", "$(touch x)", "; touch y", "'", '"', "`id`", "\\", "", "--partition=none", "é"]
    job = submit([sys.executable, "-c", "import json,sys; print(json.dumps(sys.argv[1:]))", *words], "sagsae-1",
                 folder / "%j.log", folder)  # fmt: skip
    wait_for(lambda: state_of(job) == "COMPLETED", 30, lambda: state_of(job))
    assert json.loads((folder / "%j.log").read_text()) == words
    assert sorted(path.name for path in folder.iterdir()) == ["%j.log"]


def test_a_job_is_given_no_token(here: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGSAE_TOKEN", "a-secret")
    monkeypatch.setenv("SAGSAE_TOKEN_FILE", "/some/file")
    job = submit(["env"], "sagsae-1", tmp_path / "log", tmp_path)
    wait_for(lambda: state_of(job) == "COMPLETED", 30)
    text = (tmp_path / "log").read_text()
    assert "SAGSAE_TOKEN_FILE=/some/file" in text
    assert "a-secret" not in text
    kept = [path for path in here.folder.rglob("*") if path.is_file() and b"a-secret" in path.read_bytes()]
    assert kept == []


def test_what_a_job_inherits() -> None:
    whole = {"SLURM_CONF": "c", "SLURM_JOB_ID": "1", "SBATCH_ACCOUNT": "lab", "PATH": "p", "SAGSAE_TOKEN": "t"}
    assert environment(whole) == {"SLURM_CONF": "c", "SBATCH_ACCOUNT": "lab", "PATH": "p"}


def test_options_reach_slurm(here: SlurmCluster, tmp_path: Path) -> None:
    job = submit(["sleep", "100"], "sagsae-7", tmp_path / "log", tmp_path, ["--partition=main", "--comment=x y"])
    try:
        shown = here.run("scontrol", "show", "job", str(job))
        for expected in ("JobName=sagsae-7", "Comment=x y", "Requeue=1", "Partition=main", f"WorkDir={tmp_path}"):
            assert expected in shown
        wait_for(lambda: state_of(job) == "RUNNING", 30)
    finally:
        cancel([job])
    wait_for(lambda: state_of(job) == "CANCELLED", 30)
    assert "CANCELLED" in (tmp_path / "log").read_text(), "the last words of the job are in its log"
    assert not is_live(job)
    cancel([job])


@pytest.mark.parametrize("option", ["output=x", "--output=x", "wra=id", "array=1-9", "e=x"])
def test_an_option_that_the_service_sets_is_refused(here: SlurmCluster, option: str) -> None:
    assert here.daemons
    with pytest.raises(UserError, match=r"--slurm .*sets this option of sbatch itself"):
        check_slurm([option])


@pytest.mark.parametrize("option", ["-p main", "partition main", "--", "--Partition=x", "", "a=\n", "=x"])
def test_what_is_no_option_is_refused(option: str) -> None:
    with pytest.raises(UserError, match=r"slurm_options"):
        build(ServeConfig, {"slurm_options": [option]})


def test_good_options_pass(here: SlurmCluster) -> None:
    assert here.daemons
    options = ["partition=gpu", "--account=lab", "gres=gpu:8", "time=08:00:00", "nodes=2", "exclusive"]
    check_slurm(build(ServeConfig, {"slurm_options": options}).slurm_options)


def test_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"--launch slurm: sbatch is not on the PATH"):
        check_slurm([])


def test_nodes_must_reach_the_server() -> None:
    with pytest.raises(UserError, match=r"do not reach 127\.0\.0\.1.*--host 0\.0\.0\.0"):
        url_for_nodes(ServeConfig(launch="slurm"), 1)
    assert url_for_nodes(ServeConfig(host="10.0.0.1"), 8) == "http://10.0.0.1:8"
    assert url_for_nodes(ServeConfig(host="::2"), 8) == "http://[::2]:8"
    assert url_for_nodes(ServeConfig(host="0.0.0.0"), 8) == f"http://{socket.gethostname()}:8"
    assert url_for_nodes(ServeConfig(url="https://cache.lab.example"), 8) == "https://cache.lab.example"


def test_the_token_of_slurms_workers_stays(tmp_path: Path) -> None:
    token = kept_token(tmp_path)
    path = tmp_path / ".jobs/slurm.token"
    assert path.stat().st_mode & 0o077 == 0
    path.chmod(0o644)
    assert kept_token(tmp_path) == token == path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    path.write_text("")
    assert len(kept_token(tmp_path)) > 30


def test_what_slurm_refuses(here: SlurmCluster, tmp_path: Path) -> None:
    assert here.daemons
    with pytest.raises(UserError, match=r"sbatch: .*invalid partition") as caught:
        submit(["true"], "sagsae-1", tmp_path / "log", tmp_path, ["--partition=none"])
    assert not isinstance(caught.value, BusyError)


def test_no_controller(here: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", here.conf.read_text())
    (tmp_path / "slurm.conf").write_text(text + "\nMessageTimeout=2\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setattr("harvest.serve.slurm.commands.PATIENCE", 3.0)
    with pytest.raises(BusyError, match=r"sbatch.*controller"):
        submit(["true"], "sagsae-1", tmp_path / "log", tmp_path)
    with pytest.raises(BusyError, match=r"squeue.*controller"):
        list_jobs()


def test_a_job_in_words() -> None:
    assert str(SlurmJob(7, "PENDING", "Resources")) == "Slurm job 7: pending (Resources)"
    assert str(SlurmJob(7, "NODE_FAIL", "None")) == "Slurm job 7: node fail"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_harvest_whose_node_fails_ends_on_the_other(
    here: SlurmCluster, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Slurm itself starts the same command again, and the harvest resumes."""
    command = [sys.executable, str(ROOT / "cli.py"), *HARVEST, "--out", str(tmp_path)]
    job = submit(command, "sagsae-1", tmp_path / "log", tmp_path)
    wait_for(lambda: commits(tmp_path / "s") >= 3, 300, (tmp_path / "log").read_text)
    node = here.job_node(job)
    here.node_fails(node)
    before = commits(tmp_path / "s")
    try:
        wait_for(lambda: state_of(job) == "COMPLETED", 500, lambda: (state_of(job), (tmp_path / "log").read_text()))
    finally:
        here.start_node(node)
        here.wait("idle")
    assert 3 <= before < 40
    assert contents(tmp_path / "s") == whole


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_as_the_page_says(here: SlurmCluster, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The script of docs/how-to/slurm.md, with this harvest in place of its own and one CPU process a node."""
    page = (ROOT / "docs/how-to/slurm.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n#SBATCH .*?)^```$", page, re.MULTILINE | re.DOTALL)
    script = re.sub(r"cli\.py harvest .*", " ".join([str(ROOT / "cli.py"), *HARVEST, "--out", str(tmp_path)]), script)
    for old, new in (
        ("#SBATCH --gpus-per-node 8\n", ""),
        ("--nproc-per-node 8", "--nproc-per-node 1"),
        ('"$SLURM_JOB_NODELIST"', "localhost"),  # both nodes are this machine
        ("srun torchrun", f"srun {sys.executable} -m torch.distributed.run"),
    ):
        assert old in script
        script = script.replace(old, new)
    path = tmp_path / "script.sh"
    path.write_text(script)
    job = int(here.run("sbatch", "--parsable", f"--output={tmp_path}/log", str(path)))
    wait_for(lambda: not is_live(job), 500, lambda: (tmp_path / "log").read_text())
    assert state_of(job) == "COMPLETED", (tmp_path / "log").read_text()
    assert contents(tmp_path / "s") == whole


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_of_two_nodes_is_stopped_and_resumes(
    here: SlurmCluster, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGTERM reaches every process, which commits its shard; then the same command ends the harvest."""
    command = [*on_all_nodes(1), *HARVEST, "--out", str(tmp_path)]
    codes = [sys.executable, "-c", WORKER]
    log = tmp_path / "log"
    first = submit([*codes, *command], "sagsae-1", log, tmp_path, ["nodes=2"])
    wait_for(lambda: commits(tmp_path / "s") >= 2, 300, log.read_text)
    here.run("scancel", "--batch", "--signal=TERM", str(first))
    wait_for(lambda: not is_live(first), 300, log.read_text)
    assert 2 <= commits(tmp_path / "s") < 40
    again = submit([*codes, *command], "sagsae-1", log, tmp_path, ["nodes=2"])
    wait_for(lambda: not is_live(again), 500, log.read_text)
    assert contents(tmp_path / "s") == whole, log.read_text()
    assert re.findall(r"^code (\d+)$", log.read_text(), re.MULTILINE) == ["130", "0"]
