"""Other tools' training steps in `bench train`: which are found, what they are asked to do, what happens when they
fail. Stand-ins for the tools lie in a folder on PYTHONPATH; the real ones are used where SAGSAE_PEER_PYTHON names an
interpreter that has them."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.command import Sagsae
from torch.utils.flop_counter import FlopCounterMode

from shared.errors import UserError
from shared.saes import sae_config
from shared.store.opened import Store
from train.bench.peers import find_peers, running
from train.bench.steps import StepBenchPlan, alternate, products, rows, step_seconds
from train.bench.train import against
from train.sae.base import StepInputs
from train.sae.families import family

TOOLS = {"sae-lens": "9.8", "dictionary-learning": "7.6"}
SAE_LENS = {
    "__init__.py": """
        import torch

        class GatedTrainingSAEConfig:
            def __init__(self, **given): self.__dict__.update(given)

        class GatedTrainingSAE:
            def __init__(self, cfg):
                print("chatter on stdout, at length")
                assert cfg.d_sae != 13, "thirteen is out of the question"
                self.cfg, self.W_enc = cfg, torch.randn(cfg.d_in, cfg.d_sae)
                self.b_gate = torch.nn.Parameter(torch.zeros(cfg.d_sae))
        """,
    "config.py": """
        from importlib.util import find_spec

        class LoggingConfig:
            def __init__(self, log_to_wandb):
                assert not log_to_wandb
                assert find_spec("bench_peers") is None, "modules of sagsae are in the way"

        class SAETrainerConfig:
            def __init__(self, **given): self.__dict__.update(given)
        """,
    "training/__init__.py": "",
    "training/sae_trainer.py": """
        import json, os, time, torch

        class SAETrainer:
            def __init__(self, cfg, sae, data_provider): self.cfg, self.sae = cfg, sae

            def step(self, x):
                print("more chatter")
                if self.n_training_steps == 99:
                    os._exit(3)
                time.sleep(0.05)
                open_gates = (x @ self.sae.W_enc + self.sae.b_gate > 0).sum().item()
                seen = {"sum": x.sum().item(), "rows": len(x), "step": self.n_training_steps, "open": open_gates,
                        "threads": torch.get_num_threads(), "d_sae": self.sae.cfg.d_sae, **vars(self.cfg)}
                seen.pop("logger")
                with open(os.environ["SEEN"], "a") as file:
                    file.write(json.dumps(seen) + chr(10))
        """,
}
DICTIONARY_LEARNING = {
    "__init__.py": "",
    "trainers/__init__.py": "",
    "trainers/gdm.py": """
        import torch
        from types import SimpleNamespace

        class GatedSAETrainer:
            def __init__(self, steps, activation_dim, dict_size, **given):
                self.ae = SimpleNamespace(encoder=torch.nn.Linear(activation_dim, dict_size, bias=False),
                                          decoder_bias=torch.zeros(activation_dim),
                                          gate_bias=torch.nn.Parameter(torch.zeros(dict_size)))

            def update(self, step, x):
                assert x.dtype == torch.float32
        """,
}


def save_tool(folder: Path, package: str) -> None:
    files = SAE_LENS if package == "sae-lens" else DICTIONARY_LEARNING
    name = package.replace("-", "_")
    for path, text in files.items():
        (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / path).write_text(dedent(text))
    about = folder / f"{name}-{TOOLS[package]}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {TOOLS[package]}\n")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stand-ins for both tools, where this interpreter finds them."""
    folder = tmp_path / "tools"
    for package in TOOLS:
        save_tool(folder, package)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    save_file({"x": torch.randn(100, 8, generator=torch.Generator().manual_seed(0))}, tmp_path / "rows.safetensors")
    return {
        "rows": str(tmp_path / "rows.safetensors"), "l0": 3, "precision": "float32", "device": "cpu", "threads": 2,
    }  # fmt: skip


def script(path: Path, line: str) -> str:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_the_tools_of_an_interpreter_are_found(tools: Path) -> None:  # noqa: ARG001
    peers = find_peers([sys.executable], "float32", "cpu")
    assert [(peer.name, peer.version, peer.python) for peer in peers.found] == [
        ("saelens", "9.8", sys.executable), ("dictionary_learning", "7.6", sys.executable),
    ]  # fmt: skip
    assert peers.left_out == {}
    low = find_peers([sys.executable], "bfloat16", "cpu")
    assert [peer.name for peer in low.found] == ["saelens"]
    assert "on a CPU it always computes in float32" in low.left_out["dictionary_learning"]
    with pytest.raises(UserError, match=r"sae-lens is in .* already"):
        find_peers([sys.executable, sys.executable], "float32", "cpu")


def test_a_tool_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = find_peers([], "float32", "cpu").left_out
    assert set(left_out) == {"saelens", "dictionary_learning"}
    assert all("no --peer-python" in why for why in left_out.values())

    save_tool(tmp_path / "one", "sae-lens")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "one"))
    one = find_peers([sys.executable], "float32", "cpu")
    assert [peer.name for peer in one.found] == ["saelens"]
    assert one.left_out["dictionary_learning"].endswith(f"{sys.executable} -m pip install dictionary-learning")

    bare = script(tmp_path / "python", f'exec {sys.executable} -S "$@"')
    with pytest.raises(UserError, match=f"{bare}: has no torch.* {bare} -m pip install torch"):
        find_peers([bare], "float32", "cpu")
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(UserError, match=f"{bare}: has neither.* {bare} -m pip install sae-lens dictionary-learning"):
        find_peers([bare], "float32", "cpu")


def test_what_is_no_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/nowhere/python: cannot be started: No such file"):
        find_peers(["/nowhere/python"], "float32", "cpu")
    broken = script(tmp_path / "broken", "echo one >&2; echo the last word >&2; exit 5")
    with pytest.raises(UserError, match="is not a Python that can be used: the last word"):
        find_peers([broken], "float32", "cpu")


def test_a_step_is_done_as_asked(tools: Path, settings: dict[str, Any], tmp_path: Path) -> None:  # noqa: ARG001
    """On the rows in the file, with the gates set to the L0; what the tool prints is no answer."""
    saelens, other = find_peers([sys.executable], "float32", "cpu").found
    with running(saelens, settings) as ask:
        assert ask(d_sae=16) == {"l0": pytest.approx(3)}
        assert 0.05 <= ask(step=0)["seconds"] < 5
        assert ask(d_sae=24) == {"l0": pytest.approx(3)}
        assert 0.05 <= ask(step=7)["seconds"] < 5
    first, second = map(json.loads, (tmp_path / "seen").read_text().splitlines())
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    assert first["sum"] == pytest.approx(x.sum().item(), rel=1e-6)
    expected = {"rows": 100, "step": 0, "d_sae": 16, "threads": 2, "train_batch_size_samples": 100, "autocast": False,
                "device": "cpu", "lr": 1e-12}  # fmt: skip
    assert expected.items() <= first.items()
    assert (second["step"], second["d_sae"]) == (7, 24)
    assert 200 < first["open"] < 400, "gates are set on 64 of the 100 rows"
    with running(other, settings) as ask:
        assert ask(d_sae=16) == {"l0": pytest.approx(3)}
        assert ask(step=0)["seconds"] >= 0


def test_a_tool_that_fails_is_quoted(tools: Path, settings: dict[str, Any]) -> None:  # noqa: ARG001
    saelens, _ = find_peers([sys.executable], "float32", "cpu").found
    with (
        pytest.raises(UserError, match=r"sae-lens 9\.8 failed: AssertionError: thirteen is out of the question"),
        running(saelens, settings) as ask,
    ):
        ask(d_sae=13)
    with running(saelens, settings) as ask:
        ask(d_sae=12)
        for _ in ("it dies", "it is dead"):
            with pytest.raises(UserError, match=r"sae-lens 9\.8 failed: more chatter"):
                ask(step=99)


def test_no_process_is_left(tools: Path, settings: dict[str, Any]) -> None:  # noqa: ARG001
    started: list[subprocess.Popen[bytes]] = []

    def fail() -> None:
        with running(find_peers([sys.executable], "float32", "cpu").found[0], settings) as ask:
            started.append(ask.args[1])  # type: ignore[attr-defined]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert started[0].poll() is not None


@pytest.mark.slow
def test_steps_take_turns(tools: Path, store: Store, tmp_path: Path) -> None:  # noqa: ARG001
    peers = find_peers([sys.executable], "float32", "cpu")
    plan = StepBenchPlan([16, 24], 64, 3, "float32", 2, 8, 1, "cpu", peers, compiled=False, run_rounds=2)
    notes: list[str] = []
    found = step_seconds(store, "layer_01/mlp_out", tmp_path / "new", plan, lambda _, note: notes.append(note))
    kinds = ["sparse", "dense", "autograd", "products", "saelens", "dictionary_learning"]
    assert list(found) == [16, 24]
    assert all(list(figures) == kinds for figures in found.values())
    assert all(len(seconds) == 2 and min(seconds) > 0 for figures in found.values() for seconds in figures.values())
    in_one = [f"{kind}, d_sae 16" for kind in kinds]
    assert notes[:18] == [*in_one[::-1], *in_one, *in_one[::-1]]
    assert plan.runs == len(notes) + 2 * 2
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert [(one["d_sae"], one["step"]) for one in seen] == [(16, 0), (16, 1), (16, 2), (24, 0), (24, 1), (24, 2)]
    x = rows(store, "layer_01/mlp_out", 64) / store.statistics("layer_01/mlp_out").scale
    assert all(one["sum"] == pytest.approx(x.sum().item(), rel=1e-4) for one in seen)


def test_a_ratio_is_of_the_same_round() -> None:
    found = alternate({"a": lambda number: 2.0 * number, "b": lambda number: 1.0 * number}, 8, 3, lambda *_: None)
    assert found == {"a": [2.0, 4.0, 6.0], "b": [1.0, 2.0, 3.0]}
    assert against(found, "a", "b") == 2.0
    assert against(found, "saelens", "b") is None


def test_the_products_are_those_of_the_dense_step() -> None:
    config = sae_config(arch="sa-gsae", d_sae=40, sparsity=0.1)
    x = torch.randn(16, 12)
    weights = family(config).initial(12, torch.zeros(12), torch.Generator())
    now = StepInputs(0.1, torch.float32, torch.zeros(40, dtype=torch.int64))
    counts = []
    for work in (products(x, 40, torch.float32), lambda: family(config).gradients(weights, x, now)):
        with FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_flop_counts()["Global"])
    alone, whole = (sum(count.values()) for count in counts)
    assert alone == 7 * 2 * 16 * 12 * 40
    assert whole == alone + 2 * 12 * 40, "the step has one product with a vector besides, for b_dec"


def test_a_tool_that_fails_ends_the_command(tools: Path, store: Store, sagsae: Sagsae) -> None:  # noqa: ARG001
    asked = ["bench", "train", "--store", store.root, "--batch", "64", "--width", "13", "--device", "cpu", "--json"]
    done = sagsae(*asked, "--peer-python", sys.executable)
    assert (done.returncode, done.stdout) == (2, "")
    assert "failed: AssertionError: thirteen is out of the question" in done.stderr.splitlines()[-1]
    gone = sagsae(*asked, "--peer-python", "/nowhere/python")
    assert gone.returncode == 2
    assert gone.stderr.count("\n") == 1


@pytest.mark.skipif("SAGSAE_PEER_PYTHON" not in os.environ, reason="SAGSAE_PEER_PYTHON names no interpreter")
def test_the_real_tools(settings: dict[str, Any]) -> None:
    """Their steps run, and are set to the L0 that was asked for."""
    peers = find_peers(os.environ["SAGSAE_PEER_PYTHON"].split(os.pathsep), "float32", "cpu")
    assert peers.left_out == {}
    for peer in peers.found:
        for precision in ("float32", "bfloat16"):
            with running(peer, {**settings, "precision": precision}) as ask:
                assert ask(d_sae=64) == {"l0": pytest.approx(3)}
                assert all(ask(step=number)["seconds"] > 0 for number in range(2))
