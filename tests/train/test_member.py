"""Autoencoders in training: each on its own, λ under control, resets, and what can never learn."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command import Sagsae
from support.runs import lines_of, unfinished_run, weights_of
from support.variants import VARIANTS, variant

from shared.config import EvalConfig, TrainConfig
from shared.errors import UserError
from shared.gate import BadData
from shared.saes import sae_config
from shared.store.opened import Statistics, Store, find_hookpoint
from train.autoencoder import Autoencoder
from train.evaluate import evaluate
from train.fit.control import EVERY, SPAN, SparsityController
from train.fit.member import Member
from train.fit.step_kind import StepKind, allowed_kinds, sparse_kind
from train.plan.sweep import shared_out
from train.ranks import Ranks
from train.run import train as run_train
from train.sae.families import family

Config = Callable[..., TrainConfig]
CPU = torch.device("cpu")


def control(steps: int = 1000, **changes: Any) -> SparsityController:
    return SparsityController(sae_config(arch="sa-gsae", d_sae=512, **changes), steps, CPU)


def test_every_architecture_trains_alone_as_in_company(train_config: Config, tmp_path: Path) -> None:
    """Bit for bit: a run's other members change nothing."""
    saes = [variant(name, 48) for name in VARIANTS]
    together = run_train(train_config(saes=saes, tokens=64 * 40, out=tmp_path / "all")).run
    for index in (0, 6, 10, 13, 14):
        alone = run_train(train_config(saes=[saes[index]], tokens=64 * 40, out=tmp_path / str(index))).run
        for key, data in weights_of(alone).items():
            assert (together / key).read_bytes() == data, key
    entries = {entry["name"]: entry for entry in json.loads((together / "evaluation.json").read_text())["saes"]}
    assert set(entries) == {sae.name for sae in saes}
    for sae in saes:
        if getattr(sae, "aux", True):
            assert entries[sae.name]["r2"] > 0.2, sae.name


def test_every_architecture_resumes_to_the_bit(train_config: Config, tmp_path: Path) -> None:
    """Controllers, resets and running thresholds are part of a checkpoint."""
    saes = [variant(name, 48) for name in ("untied", "gated", "jumprelu", "abs-topk", "batch-topk", "topk")]
    saes += [sae_config(arch="sa-gsae", d_sae=48, l0_target=9.0, reset_every=4)]
    whole = run_train(train_config(saes=saes, tokens=64 * 40, out=tmp_path / "whole")).run
    again = run_train(train_config(saes=saes, tokens=64 * 40, out=tmp_path / "again")).run
    unfinished_run(again)
    checkpoints = sorted((again / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-00000032", "step-00000040"]
    shutil.rmtree(checkpoints[1])
    run_train(train_config(saes=saes, tokens=64 * 40, out=tmp_path / "again"))
    assert weights_of(again) == weights_of(whole)
    assert (again / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()


def test_which_steps_a_setting_allows() -> None:
    """The sparse step is for unit decoder rows; what is chosen as training goes needs kernels on CUDA."""
    gated, free = (family(variant(name)) for name in ("gated", "gated, free decoder"))
    assert sparse_kind(gated, "cpu", 16) is StepKind.SPARSE
    assert sparse_kind(free, "cpu", 16) is None
    assert sparse_kind(family(variant("topk")), "cpu", 16) is None
    for device, sparse, auto in (
        ("cpu", StepKind.SPARSE, (StepKind.DENSE, StepKind.SPARSE)),
        ("cuda", StepKind.SPARSE, (StepKind.DENSE,)),
        ("cuda", StepKind.KERNELS, (StepKind.DENSE, StepKind.KERNELS)),
    ):
        assert allowed_kinds("auto", sparse, device) == auto
        assert allowed_kinds("sparse", sparse, device) == (sparse,)
        assert allowed_kinds("dense", sparse, device) == (StepKind.DENSE,)
    assert allowed_kinds("sparse", None, "cpu") == (StepKind.DENSE,)


def test_a_checkpoint_of_a_sparse_step_is_refused_where_there_is_none() -> None:
    run = TrainConfig(store="s", saes=(variant("relu"),))
    member = Member(run.saes[0], run, 10, torch.float32, Statistics(2, np.zeros(16), np.full(16, 1 / 16)), Ranks(CPU))
    state = {**member.state(), f"{member.config.name}/sparse": torch.tensor(True)}
    with pytest.raises(BadData, match="a sparse step, which this architecture does not have"):
        member.load_(state)


def test_a_learning_rate_of_its_own(train_config: Config, tmp_path: Path) -> None:
    own = sae_config(arch="gated", d_sae=48, lr=2e-3)
    first = run_train(train_config(saes=[own], lr=5e-3, out=tmp_path / "own")).run
    second = run_train(train_config(saes=[own.model_copy(update={"lr": None})], lr=2e-3, out=tmp_path / "run")).run
    one, other = (Autoencoder.load(next((run / "saes").iterdir())).weights.named() for run in (first, second))
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def test_one_that_diverges_touches_no_other(
    train_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = sae_config(arch="gated", d_sae=48), sae_config(arch="gated", d_sae=48, lr=1e30)
    done = run_train(train_config(saes=[bad, good], out=tmp_path / "both"))
    assert [entry["name"] for entry in done.saes] == [good.name]
    assert "or use float32. It is trained no further" in capsys.readouterr().err
    assert json.loads((done.run / "record.json").read_text())["diverged"] == {bad.name: 5}
    logged = (done.run / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in logged]
    assert None in [line["saes"][bad.name]["loss"] for line in lines if bad.name in line["saes"]], "JSON has no NaN"
    alone = run_train(train_config(saes=[good], out=tmp_path / "alone")).run
    for key, data in weights_of(alone).items():
        assert (done.run / key).read_bytes() == data, key
    again = evaluate(EvalConfig(run=done.run, ce=False, device="cpu")).results
    assert [entry["name"] for entry in again["saes"]] == [good.name]


def test_the_sparsity_warms_up() -> None:
    ramp = control(sparsity=0.5, sparsity_warmup=0.1)
    assert [ramp.now(step) for step in (0, 49, 99, 100, 999)] == pytest.approx([0.005, 0.25, 0.5, 0.5, 0.5])
    assert control(sparsity=0.5).now(0) == 0.5
    assert SparsityController(variant("abs-topk"), 1000, CPU).now(3) == 0


@settings(max_examples=20, deadline=None)
@given(
    target=st.floats(2, 200), start=st.floats(0.02, 2), power=st.floats(0.7, 3.0), lag=st.integers(1, 30),
)  # fmt: skip
def test_the_controller_finds_its_target(target: float, start: float, power: float, lag: int) -> None:
    """On a plant like training: L0 falls as a power of λ and follows it slowly."""
    steered = control(2000, sparsity=start, l0_target=target)
    l0 = 256.0
    for step in range(2000):
        settled = min(512.0, 30 * (float(steered.now(step)) / 0.2) ** -power)
        l0 += (settled - l0) / lag
        steered.observe_(step, torch.tensor(l0))
    assert l0 == pytest.approx(target, rel=0.2)
    assert steered.missed() is None


def test_a_target_out_of_reach_is_said_and_bounded() -> None:
    steered = control(sparsity=0.2, l0_target=100.0)
    for step in range(1000):
        steered.observe_(step, torch.tensor(3.0))
    assert float(steered.now(999)) == pytest.approx(0.2 / SPAN)
    assert str(steered.missed()).startswith("l0_target 100 was missed: L0 ended at 3 with λ at")
    steered = control(sparsity=0.2, l0_target=100.0)
    for step in range(1000):
        before = float(steered.now(step))
        steered.observe_(step, torch.tensor(0.0))
        assert step % EVERY == EVERY - 1 or float(steered.now(step)) == before
    assert float(steered.now(999)) > 0, "no L0 at all is no NaN"


def test_runs_with_a_target(train_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def one(target: float, steps: int = 700) -> dict[str, Any]:
        sae = sae_config(arch="sa-gsae", d_sae=48, l0_target=target)
        done = run_train(train_config(saes=[sae], tokens=64 * steps, out=tmp_path / f"{target}-{steps}"))
        return {**done.saes[0], "lambda": json.loads((done.run / "saes" / sae.name / "cfg.json").read_text())["lambda"]}

    few, many = one(5.0), one(15.0)
    assert few["l0"] == pytest.approx(5, rel=0.3)
    assert many["l0"] == pytest.approx(15, rel=0.3)
    assert few["lambda"] > many["lambda"]
    assert (few["sparsity"], few["l0_target"], few["k"]) == (None, 5.0, None), "λ was not chosen"
    one(47.5, 30)
    assert "l0_target 47.5 was missed: L0 ended at" in capsys.readouterr().err


def test_resets_bring_latents_back(train_config: Config, tmp_path: Path) -> None:
    """A θ0 at which most of the dictionary never opens: with resets more of it is alive at the end."""
    common = {"arch": "sa-gsae", "d_sae": 96, "theta0": 3.0, "sparsity": 0.05}
    runs = {}
    for every in (0, 25):
        sae = sae_config(**common, reset_every=every)
        runs[every] = run_train(train_config(saes=[sae], tokens=64 * 400, out=tmp_path / str(every))).saes[0]
    assert runs[0]["dead_fraction"] > runs[25]["dead_fraction"] + 0.1
    assert runs[25]["r2"] == pytest.approx(runs[0]["r2"], abs=0.01), "which is why a dead fraction alone says little"


@pytest.mark.parametrize("arch", ["sa-gsae", "gated", "jumprelu"])
def test_a_threshold_above_everything_is_refused_with_the_number(train_config: Config, arch: str) -> None:
    config = train_config(saes=[sae_config(arch=arch, d_sae=48, theta0=90.0)])
    with pytest.raises(UserError, match=r"theta0 = 90 closes every latent on the first batch.* there is [\d.]+ in the"):
        run_train(config)
    assert config.out is not None
    assert not (config.out / "config.json").exists(), "the same --out takes the corrected command"


def test_the_first_look_takes_a_few_rows_at_a_time(
    train_config: Config, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole batch would take more memory than a step of it in parts, which is all that was planned for."""
    statistics = store.statistics(find_hookpoint(str(store.root), "mlp_out")[1])
    member = Member(
        sae_config(arch="sa-gsae", d_sae=48, theta0=90.0), train_config(), 100, torch.float32, statistics, Ranks(CPU)
    )
    x = torch.randn(64, len(statistics.mean), generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    encode = member.family.encode

    def counted(w: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return encode(w, x)

    monkeypatch.setattr("train.fit.member.BLOCK", 48 * 10)
    monkeypatch.setattr(member.family, "encode", counted)
    with pytest.raises(UserError, match="theta0 = 90 closes every latent") as raised:
        member.begin(x)
    assert seen == 2 * [10, 10, 10, 10, 10, 10, 4]
    largest = ((x - member.weights.b_dec) @ member.weights.W_enc.T).abs().max().item() * x.shape[1] ** 0.5
    assert f"pre-activation there is {largest:.3g}" in str(raised.value)
    seen.clear()
    member.weights.theta[:, 7] = 0.0  # type: ignore[attr-defined]
    member.begin(x)
    assert seen == [10], "no further than to the first open latent"


@pytest.mark.parametrize("parts", [2, 3, 4, 6, 7, 8])
def test_gradients_that_are_alive_with_parts(
    train_config: Config, store: Store, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """As many as the plan of a run's memory counts (train/plan/memory.py)."""
    statistics = store.statistics(find_hookpoint(str(store.root), "mlp_out")[1])
    config = train_config(batch=2 * 3 * 4 * 7, parts=parts)
    member = Member(sae_config(arch="relu", d_sae=48), config, 100, torch.float32, statistics, Ranks(CPU))
    x = torch.randn(config.batch, len(statistics.mean), generator=torch.Generator().manual_seed(0))
    made: list[weakref.ref[torch.Tensor]] = []
    most, dense = 0, member.dense

    def watched(*arguments: Any) -> Any:
        nonlocal most
        grads, measured = dense(*arguments)
        made.append(weakref.ref(grads.W_enc))
        most = max(most, sum(tensor() is not None for tensor in made))
        return grads, measured

    monkeypatch.setattr(member, "dense", watched)
    member.gradients(x, 10)
    assert most == parts.bit_length()


@pytest.mark.parametrize(("counts", "steps"), [((1, 2), 80), pytest.param((1, 2, 4), 200, marks=pytest.mark.slow)])
def test_any_number_of_processes_trains_the_same_bits(
    sagsae: Sagsae, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...], steps: int
) -> None:
    """Gradients, thresholds, TopK's sizes, controllers and resets of the whole batch, whoever computes which part."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["train", "--store", store.root, "--hook", "mlp_out", "--arch", "sa-gsae:48", "--arch", "gated:48",
               "--arch", "relu:48", "--arch", "jumprelu:48", "--arch", "batch-topk:48", "--arch", "abs-topk:40",
               "--tie", "none", "--l0-target", "8", "--k", "6", "--reset-every", "60", "--batch", "64",
               "--tokens", 64 * steps, "--device", "cpu", "--set", "precision=float32", "--set", "parts=4",
               "--set", "log_every=10", "--parallel", "data", "--json", "--out"]  # fmt: skip
    for processes in counts:
        done = sagsae(*command, tmp_path / str(processes), "--processes", processes)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / str(processes) / "record.json").read_text())["processes"] == processes
    one = weights_of(tmp_path / "1")
    assert len(one) == 12, "weights and settings of six"
    for processes in counts[1:]:
        assert weights_of(tmp_path / str(processes)) == one
        assert lines_of(tmp_path / str(processes)) == lines_of(tmp_path / "1")


def test_a_run_before_on_another_device_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate keeps the first device that a process asks it for; a notebook may train on two."""
    Ranks(CPU)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    monkeypatch.setitem(AcceleratorState._shared_state, "device", torch.device("meta"))
    assert Ranks(CPU).device == CPU


def test_devices_that_training_is_not_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--device mps: training runs on cpu and cuda devices. Use --device cpu"):
        Ranks(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("train.ranks.local_processes", lambda: 3)
    with pytest.raises(UserError, match=r"--processes: 3 on this machine, which has 2 GPUs"):
        Ranks(torch.device("cuda"))


def test_parts_of_a_batch_give_its_gradients(train_config: Config, store: Store) -> None:
    """Three parts, which no rounding helps: the means over them are those over the batch."""
    saes = [sae_config(arch=arch, d_sae=48) for arch in ("sa-gsae", "relu", "jumprelu", "batch-topk", "abs-topk")]
    statistics = store.statistics(find_hookpoint(str(store.root), "mlp_out")[1])
    x = torch.randn(60, len(statistics.mean), generator=torch.Generator().manual_seed(0))
    for sae in saes:
        found = []
        for parts in (None, 3):
            member = Member(sae, train_config(batch=60, parts=parts), 100, torch.float32, statistics, Ranks(CPU))
            found.append(member.gradients(x, 10))
        (whole, measured), (cut, also) = found
        for name, tensor in whole.items():
            assert isinstance(tensor, torch.Tensor)
            torch.testing.assert_close(cut[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()) + 1e-9)
        assert torch.equal(measured.fired, also.fired)
        for name in ("reconstruction", "sparsity", "auxiliary", "l0"):
            torch.testing.assert_close(getattr(also, name), getattr(measured, name))
        if measured.threshold is not None:
            torch.testing.assert_close(also.threshold, measured.threshold)


def test_parts_that_cannot_be(train_config: Config) -> None:
    with pytest.raises(UserError, match=r"parts = 7: a --batch of 64 does not divide into 7 equal micro-batches"):
        run_train(train_config(batch=64, parts=7))
    with pytest.raises(UserError, match=r"parts = 2: 4 processes cannot share 2 micro-batches"):
        shared_out(train_config(batch=64, parts=2, parallel="data"), 4)
