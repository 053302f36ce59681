"""Several processes, each with autoencoders of its own: exactly one process's weights, through any interruption."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import ROOT, Sagsae
from support.processes import children, kill, rank_of, wait_until_gone
from support.runs import lines_of, weights_of
from support.variants import batch, variant, weights

from shared.config import TrainConfig
from shared.errors import UserError
from shared.files.locks import folder_lock
from shared.saes import sae_config
from shared.store.opened import Store
from train.fit.optim import Optimizer
from train.plan.sweep import latents, shared_out
from train.runs.folder import RunFolder
from train.sae.base import StepInputs
from train.sae.families import family


def config(widths: list[int], **changes: Any) -> TrainConfig:
    saes = tuple(sae_config(arch="gated", d_sae=width, seed=seed) for seed, width in enumerate(widths))
    return TrainConfig(store="s", saes=saes, **{"batch": 64, **changes})


def test_who_trains_what() -> None:
    shares = shared_out(config([10, 20, 30, 40, 50]), 2)
    assert shares is not None
    assert [latents(share) for share in shares] == [80, 70]
    assert sorted(sae.seed for share in shares for sae in share) == list(range(5))
    assert shared_out(config([10, 100]), 2) is None, "one would wait for the other: share each batch"
    assert shared_out(config([10, 20]), 1) is None
    assert shared_out(config([10, 100], parallel="sweep"), 2) is not None
    assert shared_out(config([10, 10], parallel="data"), 2) is None
    with pytest.raises(UserError, match=r"3 processes have only 2 autoencoders to share out"):
        shared_out(config([10, 10], parallel="sweep"), 3)
    with pytest.raises(UserError, match=r"3 processes cannot share a batch of 64 evenly"):
        shared_out(config([10, 10], parallel="data"), 3)


def command(store: Store, out: Path, tokens: int, *more: str) -> list[str | Path]:
    return ["train", "--store", store.root, "--hook", "mlp_out", "--arch", "sa-gsae", "--arch", "abs-topk",
            "--d-sae", "48", "--d-sae", "40", "--sparsity", "0.2", "--k", "6", "--batch", "64", "--tokens",
            str(tokens), "--device", "cpu", "--set", "checkpoint_every=50", "--set", "log_every=10", "--json",
            "--out", out, *more]  # fmt: skip


COMMAND_THAT_LOOKS_BACK = """
import atexit, os
from pathlib import Path

def look():  # what is registered first is called last
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    Path(f"{__file__}.{os.environ['RANK']}").write_text(str(sum("gloo" in name for name in names)))

atexit.register(look)
import cli

cli.main()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux names a process's threads")
@pytest.mark.parametrize("parallel", ["data", pytest.param("sweep", marks=pytest.mark.slow)])
def test_processes_have_parted_when_python_ends(store: Store, tmp_path: Path, parallel: str) -> None:
    """A thread of gloo's that lets go of its last tensor while Python ends aborts the process: on a busy machine one
    exit in four did, whose run was whole."""
    (tmp_path / "rank.py").write_text(COMMAND_THAT_LOOKS_BACK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = command(store, tmp_path / "run", 64 * 10, "--parallel", parallel, "--processes", "2")
    done = subprocess.run(
        [*launcher, tmp_path / "rank.py", *words], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank.py.{rank}").read_text() for rank in "01"] == ["0", "0"]


@pytest.mark.slow
def test_two_processes_with_autoencoders_of_their_own(
    sagsae: Sagsae, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, TopK included, in a run that one began and two finish."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one, both = tmp_path / "one", tmp_path / "both"
    done = sagsae(*command(store, one, 64 * 120))
    assert done.returncode == 0, done.stderr
    stopped = sagsae(
        *command(store, both, 64 * 120),
        stop=(signal.SIGKILL, lambda: any(both.glob("checkpoints/step-00000050"))),
    )
    assert stopped.returncode == -signal.SIGKILL
    done = sagsae(*command(store, both, 64 * 120, "--processes", "2", "--parallel", "sweep"))
    assert done.returncode == 0, done.stderr
    assert weights_of(both) == weights_of(one)
    assert lines_of(both) == lines_of(one)
    assert (both / "evaluation.json").read_bytes() == (one / "evaluation.json").read_bytes()


@pytest.mark.slow
def test_a_killed_process_is_started_again(
    sagsae: Sagsae, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that was there is overwritten once: after the kill the new one continues from its checkpoint."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one, both = tmp_path / "one", tmp_path / "both"
    assert sagsae(*command(store, one, 64 * 400)).returncode == 0
    shutil.copytree(one, both)
    words = command(store, both, 64 * 400, "--processes", "2", "--parallel", "sweep", "--overwrite")
    old = RunFolder(both).read("record.json")["started"]
    assert not list(both.glob("checkpoints/step-*")), "a finished run keeps none"
    with subprocess.Popen(
        [sys.executable, ROOT / "cli.py", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            while not any(both.glob("checkpoints/step-*")):
                assert process.poll() is None
                time.sleep(0.002)
            begun = RunFolder(both).read("record.json")["started"]
            assert begun != old
            for pid in children(process.pid):
                if rank_of(pid) == 1:
                    kill(pid)
            _, said = process.communicate(timeout=100)
        finally:
            process.terminate()
    assert process.returncode == 0, said
    assert "was killed (SIGKILL): all are started again and continue" in said
    assert "Traceback" not in said
    assert RunFolder(both).read("record.json")["started"] == begun, "not begun once more"
    assert weights_of(both) == weights_of(one)
    assert lines_of(both) == lines_of(one)


def test_what_one_process_finds_wrong_ends_both_with_one_message(
    sagsae: Sagsae, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first one locks the run's folder; only one of them reads the damaged rows."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    copy = Path(shutil.copytree(store.root, tmp_path / "copy"))
    words = command(Store.open(copy), tmp_path / "run", 64 * 60, "--processes", "2", "--parallel", "data")
    (tmp_path / "run").mkdir()
    with folder_lock(tmp_path / "run"):
        done = sagsae(*words)
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("error: ") == done.stderr.count(f"process {os.getpid()} on") == 1
    assert "Traceback" not in done.stderr
    shard = copy / "layer_01" / "mlp_out" / "c" / "3" / "0"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    done = sagsae(*words)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any("checksum" in line for line in said)
    assert len(said) <= 2, "the other one, if it leads, says that it was left alone"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("parallel", ["data", pytest.param("sweep", marks=pytest.mark.deep)])
def test_killed_twenty_times(
    sagsae: Sagsae, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: str
) -> None:
    """SIGKILL to both processes and their launcher, at random; then to the end: the weights of a run left alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rng, killed, whole = random.Random(0), tmp_path / "killed", tmp_path / "whole"
    both = ("--processes", "2", "--parallel", parallel, "--set", "parts=2")
    first = sagsae(*command(store, whole, 64 * 6000, "--set", "parts=2"))
    assert first.returncode == 0, first.stderr
    again = [sys.executable, ROOT / "cli.py", *command(store, killed, 64 * 6000, *both)]
    for _ in range(20):
        process = subprocess.Popen(
            [str(part) for part in again], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        before, deadline = newest(killed), time.monotonic() + 120
        while newest(killed) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        assert process.poll() is None, "ended before it could be killed"
        for pid in (process.pid, *children(process.pid)):
            kill(pid)
        process.wait()
        wait_until_gone([str(part) for part in again])
    assert not RunFolder(killed).finished()
    done = sagsae(*command(store, killed, 64 * 6000, *both))
    assert done.returncode == 0, done.stderr
    assert weights_of(killed) == weights_of(whole)
    assert lines_of(killed) == lines_of(whole)


def newest(run: Path) -> str:
    return max((path.name for path in run.glob("checkpoints/step-*")), default="")


def test_gradients_are_clipped_to_a_length() -> None:
    config = variant("sa-gsae")
    w = weights(config)
    found, _ = family(config).gradients(w, batch(), StepInputs(0.3))
    grads = {key: tensor.clone() for key, tensor in found.named().items()}
    radial = (grads["W_dec"] * w.W_dec).sum(1, keepdim=True) * w.W_dec
    grads["W_dec"] = grads["W_dec"] - radial
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    for limit in (float(norm) / 3, float(norm) * 3):
        optimizer = Optimizer(type(w)(**{key: tensor.clone() for key, tensor in w.named().items()}), True, limit)
        optimizer.step_({key: tensor.clone() for key, tensor in found.named().items()}, 1e-3)
        for key, parameter in optimizer.weights.trained().items():
            expected = grads[key] * min(1.0, limit / float(norm))
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)
