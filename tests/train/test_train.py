"""Training learns, resumes to the bit, says what is wrong, and gives the same result on one process and on two."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from support.command import ROOT, Sagsae
from support.folders import contents, rewrite
from support.runs import lines_of, unfinished_run, weights_of
from support.stores import unfinished

import train.resume
import train.run
from harvest.run import harvest as run_harvest
from shared.config import EvalConfig, HarvestConfig, TrainConfig
from shared.errors import DamagedError, Interrupted, UserError
from shared.files.locks import folder_lock
from shared.model.source import ModelSource
from shared.saes import ARCHITECTURES, Architecture, Gated, Penalised, sae_config
from shared.store.opened import Store
from shared.store.spec import shard_file
from train import load
from train.autoencoder import Autoencoder, matmul_dtype
from train.data.snapshot import content_of
from train.evaluate import evaluate
from train.measure.heldout import find_model
from train.plan.job import make_job
from train.report import write_report
from train.run import train as run_train
from train.runs.checkpoint import end_checkpoint
from train.runs.folder import CLEARING, RunFolder, read_sealed

Config = Callable[..., TrainConfig]


def test_a_run_and_its_folder(train_config: Config, store: Store) -> None:
    summary = run_train(train_config(tokens=64 * 300))
    assert summary.steps == 300
    assert summary.epochs > 3, "more tokens than the store holds are several epochs"
    run = summary.run
    lines = lines_of(run)
    assert [line["step"] for line in lines] == list(range(5, 301, 5))
    for name in ("sa-gsae-48-lambda0.2-seed0", "gated-48-lambda0.2-seed0"):
        first, last = lines[0]["saes"][name], lines[-1]["saes"][name]
        assert last["loss"] < first["loss"]
        assert last["fvu"] < 0.7
        sae = Autoencoder.load(run / "saes" / name)
        assert (sae.weights.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
        assert sae.scale == store.statistics("layer_01/mlp_out").scale
    record = json.loads((run / "record.json").read_text())
    assert {"command", "versions", "started", "finished", "seconds", "store", "precision"} <= set(record)
    for entry in summary.saes:
        assert entry["r2"] > 0.3
        assert entry["ce_recovered"] is None, "not measured yet"
        assert entry["tokens"] == record["store"]["heldout_tokens"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000296", "step-00000300"]


class Plain(Penalised):
    """An architecture of this test."""

    arch: Literal["plain"]


def test_an_entry_is_all_that_the_program_asks_of_an_architecture(
    train_config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With an entry alone, and no measured memory, an architecture trains, is loaded and stands in a report."""
    entry = Architecture(Plain, "train.sae.relu:ReluFamily", "Quite plain", ("#123456", "#fedcba"))
    monkeypatch.setitem(ARCHITECTURES, "plain", entry)
    run = run_train(train_config(saes=(sae_config(arch="plain", d_sae=48),))).run
    assert load(run / "saes" / "plain-48-lambda0.2-seed0").config == Plain(arch="plain", d_sae=48)
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "Quite plain" in page
    assert re.search(r":root \{[^}]*--plain: #123456;", page)
    assert re.search(r":root:not\(\[data-paper\]\) \{[^}]*--plain: #fedcba;", page)


def test_the_model_of_an_evaluation_is_the_one_that_was_harvested(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub model is asked for at the commit that was harvested, wherever its main branch is now."""
    asked = []

    def resolve(name: str, revision: str | None = None) -> ModelSource:
        asked.append((name, revision))
        return ModelSource(name, name, False, "c0ffee")

    monkeypatch.setattr("train.measure.heldout.resolve_model", resolve)
    model = {**store.spec.model, "name": "owner/model", "commit": "c0ffee", "local": False}
    find_model(replace(store, spec=store.spec.model_copy(update={"model": model})), None)
    assert asked == [("owner/model", "c0ffee")]


def test_evaluation_of_a_run(train_config: Config, model_folder: Path, tmp_path: Path) -> None:
    run = run_train(train_config()).run
    results = evaluate(EvalConfig(run=run, device="cpu")).results
    assert results["ce_tokens"] > 0
    assert results["saes"][0]["ce_spliced"] is not None
    assert read_sealed(run / "evaluation.json") == results
    without = evaluate(EvalConfig(run=run, ce=False)).results
    assert without["ce_clean"] == results["ce_clean"], "what was measured before is kept"
    assert without["saes"][0]["r2"] == results["saes"][0]["r2"]
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rotary_pct": 0.5}))
    with pytest.raises(UserError, match=r"is not the model that .* was harvested from"):
        evaluate(EvalConfig(run=run, model=str(other)))
    with pytest.raises(UserError, match="is not a training run"):
        evaluate(EvalConfig(run=tmp_path))
    unfinished_run(run)
    with pytest.raises(UserError, match="not finished"):
        evaluate(EvalConfig(run=run))


def test_stopped_anywhere_it_ends_with_the_same_bits(
    train_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_train(train_config(out=tmp_path / "whole")).run
    for stop_after in (1, 7, 8, 13, 19):
        asked = iter(range(1, 100))

        @contextmanager
        def stop_requests(asked: Iterator[int] = asked, at: int = stop_after) -> Iterator[Callable[[], bool]]:
            yield lambda: next(asked) == at

        config = train_config(out=tmp_path / f"stopped-{stop_after}")
        with monkeypatch.context() as patch:
            patch.setattr(train.run, "stop_requests", stop_requests)
            with pytest.raises(
                Interrupted, match=f"stopped after step {stop_after}. To continue, run the same command"
            ):
                run_train(config)
        run = run_train(config).run
        assert weights_of(run) == weights_of(whole), stop_after
        assert lines_of(run) == lines_of(whole), stop_after


def test_every_autoencoder_trains_as_if_alone(train_config: Config, tmp_path: Path) -> None:
    """One pass trains many: no other member, seed or sparsity changes what one learns."""
    saes = tuple(sae_config(arch="sa-gsae", d_sae=48, sparsity=s, seed=i) for i, s in enumerate((0.2, 0.4, 0.2)))
    together = run_train(train_config(saes=saes, out=tmp_path / "many")).run
    for sae in saes:
        alone = run_train(train_config(saes=(sae,), out=tmp_path / sae.name)).run
        assert weights_of(alone).items() <= weights_of(together).items()
    first, third = (load_file(together / "saes" / saes[i].name / "sae_weights.safetensors")["W_enc"] for i in (0, 2))
    assert not torch.equal(first, third), "seeds differ"


def test_the_same_call_again_is_complete(train_config: Config, capsys: Any) -> None:
    first = run_train(train_config())
    before = contents(first.run)
    assert run_train(train_config(log_every=7)).saes == first.saes
    assert "complete" in capsys.readouterr().err
    assert contents(first.run) == before
    with pytest.raises(UserError, match=r"lr: the run has 0\.005, this asks for 0\.001.*--overwrite"):
        run_train(train_config(lr=1e-3))
    with pytest.raises(UserError, match=r"hook: the run has layer_01/mlp_out, this asks for layer_01/attn_out"):
        run_train(train_config(hook="attn_out"))
    saes = train_config().saes
    other = (*saes[:-1], saes[-1].model_copy(update={"sparsity": 0.7, "seed": 9}))
    place, was = f"saes[{len(saes) - 1}]", saes[-1]
    assert isinstance(was, Gated)
    differ = f"{place}.seed: the run has {was.seed}, this asks for 9; {place}.sparsity: the run has {was.sparsity}"
    with pytest.raises(UserError, match=re.escape(differ)):
        run_train(train_config(saes=other))
    with pytest.raises(UserError, match=f"the run has {len(saes)} autoencoders, this asks for {len(saes) + 1}"):
        run_train(train_config(saes=(*saes, other[-1])))
    run_train(train_config(lr=1e-3, overwrite=True))
    assert weights_of(first.run).items() != {k: v for k, v in before.items() if k.startswith("saes/")}.items()


@pytest.mark.parametrize(("every", "written"), [("auto", [2, 22, 42, 50]), (15, [15, 30, 45, 50])])
def test_checkpoints_are_written_when_due(
    train_config: Config, monkeypatch: pytest.MonkeyPatch, every: int | str, written: list[int]
) -> None:
    """A step takes a second here, a checkpoint two: of themselves they come after twenty more."""
    now, steps = [0.0], list[int]()

    class Timed(train.resume.Checkpoints):
        def __init__(self, *of: Any) -> None:
            job, members, stream, ranks, sweep = of
            super().__init__(job, members, stream, ranks, sweep, lambda: now[0])

        def due(self, done: int) -> bool:
            now[0] += 1
            return super().due(done)

        def save(self, at: train.resume.ResumePoint) -> None:
            steps.append(at.step)
            super().save(at)

    def slowly(*of: Any) -> None:
        now[0] += 2
        end(*of)

    end = end_checkpoint
    monkeypatch.setattr(train.resume, "end_checkpoint", slowly)
    monkeypatch.setattr(train.resume, "AUTO_EVERY", 2)
    monkeypatch.setattr(train.run, "Checkpoints", Timed)
    run_train(train_config(checkpoint_every=every, tokens=50 * 64))
    assert steps == written


def test_a_run_has_a_name_of_its_own(train_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {run_train(train_config(out=None, seed=seed)).run for seed in (0, 0, 1)}
    assert len(names) == 2
    assert all(name.parent == Path("runs") and name.name.startswith("s-layer_01-mlp_out-") for name in names)


def test_a_run_killed_while_it_began_begins_again(train_config: Config) -> None:
    run = run_train(train_config()).run
    whole = weights_of(run)
    (run / "config.json").unlink()
    for name in ("checkpoints", "saes"):
        shutil.rmtree(run / name)
    for name in ("evaluation.json", "firings.safetensors", "metrics.jsonl"):
        (run / name).unlink()
    (run / "config.json.123.tmp").write_text("half")
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.json.123.tmp", "record.json", "run.toml"]
    assert weights_of(run_train(train_config()).run) == whole


def test_overwriting_that_was_killed_half_way(train_config: Config) -> None:
    run = run_train(train_config()).run
    whole = weights_of(run)
    (run / "config.json").unlink()
    (run / "evaluation.json").unlink()
    before = contents(run)
    with pytest.raises(DamagedError, match=r"holds results of a run, but no config.json.*--overwrite"):
        run_train(train_config())
    assert contents(run) == before, "nothing is cleared that nobody asked to have cleared"
    (run / CLEARING).touch()
    assert weights_of(run_train(train_config()).run) == whole


def test_two_trainings_of_one_run(train_config: Config) -> None:
    run = run_train(train_config()).run
    with folder_lock(run), pytest.raises(UserError, match=r"process \d+ on .* is writing here"):
        run_train(train_config(overwrite=True))
    assert RunFolder(run).finished()


def test_a_store_that_moved(train_config: Config, store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.root, tmp_path / "copy"))
    run = run_train(train_config(store=copy)).run
    copy.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"its store .*copy does not exist. Name its new place with --store"):
        evaluate(EvalConfig(run=run, ce=False))
    assert evaluate(EvalConfig(run=run, ce=False, store=tmp_path / "moved")).results["tokens"] > 0


def test_unusable_input(train_config: Config, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    (tmp_path / "thesis" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    refused: dict[str, dict[str, Any]] = {
        r"5 training tokens are less than one batch of 64": {"tokens": 5},
        r"several hookpoints": {"hook": None},
        r"does not exist. Make a store with: sagsae harvest": {"store": tmp_path / "none"},
        r"exists and is not a training run": {"out": tmp_path / "thesis", "overwrite": True},
        r"--out .*: cannot be written to": {"out": tmp_path / "file" / "run"},
        r"--out .*file: is a file": {"out": tmp_path / "file"},
        r"--device cuda:7": {"device": "cuda:7"},
    }
    for message, changes in refused.items():
        with pytest.raises(UserError, match=message):
            run_train(train_config(**changes))
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "thesis" / "thesis.tex").exists(), "--overwrite clears runs, nothing else"
    with pytest.raises(UserError, match="the loss is"):
        run_train(train_config(lr=1e30))


def test_a_damaged_shard_stops_training_with_its_name(train_config: Config, store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.root, tmp_path / "copy"))
    path = copy / shard_file("layer_01/mlp_out", 3, True)
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"mlp_out/c/3/0: chunk \d+: the checksum"):
        run_train(train_config(store=copy, tokens=64 * 100))
    os.truncate(path, 10)
    with pytest.raises(DamagedError, match=r"has 10 bytes, \d+ were committed"):
        run_train(train_config(store=copy, tokens=64 * 100, out=tmp_path / "again"))


def test_training_on_an_unfinished_store(train_config: Config, store: Store, tmp_path: Path, capsys: Any) -> None:
    copy = Path(shutil.copytree(store.root, tmp_path / "copy"))
    manifest, lines = unfinished(copy)
    manifest.write_text("".join(lines[:6]))
    config = train_config(store=copy)
    run_train(config)
    assert "is unfinished: training on the 3,072 tokens committed so far" in capsys.readouterr().err
    manifest.write_text("".join(lines[:7]))
    run_train(config)
    assert "reads the 6 shards that" in capsys.readouterr().err, "it is the same run"
    manifest.write_text("")
    with pytest.raises(UserError, match="no shard is committed yet"):
        run_train(train_config(store=copy, out=tmp_path / "none"))


def test_ranks_that_open_a_growing_store_at_different_moments(train_config: Config, store: Store) -> None:
    """All train on what the last of them to look could not miss: on one snapshot."""
    alone = make_job(train_config(), torch.device("cpu"))
    job = make_job(train_config(), torch.device("cpu"), gather=lambda mine: [mine, mine[:4], mine[:6]])
    assert list(job.store.commits) == list(store.commits)[:4]
    assert job.identity["shards"] == "0-3"
    assert job.identity["snapshot"] == content_of(store.only([0, 1, 2, 3]), job.hook) != alone.identity["snapshot"]
    assert job.epoch_rows < alone.epoch_rows


def test_a_checkpoint_of_another_version_is_refused(train_config: Config) -> None:
    run = run_train(train_config()).run
    unfinished_run(run)
    for path in run.glob("checkpoints/*/state.json"):
        rewrite(path, lambda state: {**state, "version": 3})
    before = contents(run)
    with pytest.raises(UserError, match=r"its checkpoint is of version 3; this sagsae reads 4\..*--overwrite"):
        run_train(train_config())
    assert contents(run) == before


def test_a_broken_checkpoint_is_named(train_config: Config, capsys: Any) -> None:
    run = run_train(train_config()).run
    whole = weights_of(run)
    unfinished_run(run)
    os.truncate(run / "checkpoints" / "step-00000020" / "tensors-0000.safetensors", 100)
    assert run_train(train_config()).steps == 20
    said = capsys.readouterr().err
    assert re.search(r"step-00000020: cannot be read .*resuming from step-00000016, the one before", said)
    assert weights_of(run) == whole
    unfinished_run(run)
    for path in run.glob("checkpoints/step-*/tensors-0000.safetensors"):
        os.truncate(path, 100)
    with pytest.raises(DamagedError, match=r"cannot be read .* no undamaged checkpoint before it.*--overwrite"):
        run_train(train_config())


def test_an_autoencoder_is_used_on_raw_activations(train_config: Config, store: Store) -> None:
    run = run_train(train_config(tokens=64 * 200)).run
    sae = Autoencoder.load(run / "saes" / "sa-gsae-48-lambda0.2-seed0")
    mean = torch.from_numpy(store.statistics("layer_01/mlp_out").mean).float()
    x = mean + 0.01 * torch.randn(4, 32)
    f = sae.encode(x)
    assert f.shape == (4, 48)
    assert (sae.decode(f) - x).norm() < mean.norm()
    with pytest.raises(UserError, match="does not hold a trained autoencoder"):
        Autoencoder.load(run)


def test_its_settings_are_a_file_that_repeats_it(train_config: Config, sagsae: Sagsae, tmp_path: Path) -> None:
    run = run_train(train_config(parts=2)).run
    done = sagsae("train", "--config", run / "run.toml", "--out", tmp_path / "again", "--json")
    assert done.returncode == 0, done.stderr
    again = read_sealed(tmp_path / "again" / "config.json")
    assert again == {**read_sealed(run / "config.json"), "out": str(tmp_path / "again")}
    assert weights_of(tmp_path / "again") == weights_of(run)


def test_a_checkpoint_holds_autoencoders_as_they_were(train_config: Config) -> None:
    """Each takes raw activations: the one of the last step is the run's, up to the signs that are chosen after it."""
    saes = [sae_config(arch="sa-gsae", d_sae=48, majority_sign=ordered) for ordered in (False, True)]
    run = run_train(train_config(saes=(*saes, sae_config(arch="gated", d_sae=48)))).run
    for folder in sorted((run / "saes").iterdir()):
        early, late = (run / "checkpoints" / f"step-{step:08d}" / "saes" / folder.name for step in (16, 20))
        as_trained = folder.name != saes[1].name
        for name in ("cfg.json", "sae_weights.safetensors"):
            assert ((late / name).read_bytes() == (folder / name).read_bytes()) == as_trained
        x = 30 * torch.randn(8, load(folder).d_in)
        assert torch.equal(load(late)(x), load(folder)(x))
        assert torch.equal(load(late).encode(x), load(folder).encode(x)) == as_trained
        assert torch.equal(load(late).encode(x).abs(), load(folder).encode(x).abs())
        assert not torch.equal(load(early).encode(x), load(folder).encode(x))


def test_what_was_saved_measures_the_same_in_another_process(train_config: Config, sagsae: Sagsae) -> None:
    """To the last digit, from cfg.json and the weights; nothing is taken from the evaluation that was there."""
    saes = [
        sae_config(arch=arch, d_sae=48) for arch in ("sa-gsae", "gated", "relu", "jumprelu", "batch-topk", "abs-topk")
    ]
    run = run_train(train_config(saes=saes, precision="float32")).run
    recorded = json.loads((run / "evaluation.json").read_text())["saes"]
    spoilt = [
        {**entry, **{key: -1.0 for key, value in entry.items() if isinstance(value, float)}} for entry in recorded
    ]
    assert spoilt != recorded
    (run / "evaluation.json").write_text(json.dumps({"saes": spoilt}))
    done = sagsae("eval", run, "--no-ce", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["saes"] == recorded


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert matmul_dtype("float32", cpu) == torch.float32
    assert matmul_dtype("tf32", torch.device("cuda")) == torch.float32
    with pytest.raises(UserError, match=r"tf32: works on CUDA devices only, and this is cpu"):
        matmul_dtype("tf32", cpu)
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, question, lambda supported=supported: supported, raising=False)
        assert matmul_dtype("auto", cpu) == expected


@pytest.mark.slow
@pytest.mark.deep
def test_compiled_steps_are_the_same_steps(sagsae: Sagsae, store: Store, tmp_path: Path) -> None:
    command = ["train", "--store", store.root, "--hook", "mlp_out", "--arch", "sa-gsae:48", "--arch", "jumprelu:48",
               "--sparsity", "0.2", "--batch", "64", "--tokens", 64 * 10, "--device", "cpu", "--set", "step=dense",
               "--set", "precision=float32", "--json", "--out"]  # fmt: skip
    for name, value in (("eager", "false"), ("compiled", "true")):
        done = sagsae(*command, tmp_path / name, "--set", f"compile={value}")
        assert done.returncode == 0, done.stderr
    eager, compiled = (weights_of(tmp_path / name) for name in ("eager", "compiled"))
    assert eager != compiled, "rounded in another order"
    for key in (key for key in eager if key.endswith(".safetensors")):
        for name, tensor in load_bytes(eager[key]).items():
            torch.testing.assert_close(load_bytes(compiled[key])[name], tensor, rtol=1e-3, atol=1e-4)


COMPILED = """
import sys
from functools import partial
import torch, torch._dynamo.utils as dynamo
torch.compile = partial(torch.compile, backend="eager")  # traced like any other, and run at once
from shared.config import TrainConfig
from shared.saes import sae_config
from train.run import train
saes = [sae_config(arch="sa-gsae", d_sae=40 + i, sparsity=0.2, sparsity_warmup=0.9) for i in range(10)]
saes.append(sae_config(arch="batch-topk", d_sae=48, k=6))
train(TrainConfig(store=sys.argv[1], out=sys.argv[2], hook="mlp_out", saes=tuple(saes), batch=64, tokens=64 * 12,
                  device="cpu", precision="float32", step="dense", compile=True, parts=2))
print(dynamo.counters["stats"]["unique_graphs"], sum(dynamo.counters["graph_break"].values()))
"""


def test_every_autoencoder_is_compiled_once(store: Store, tmp_path: Path) -> None:
    """torch gives up on a function after eight programs: of ten autoencoders, and of twelve steps with λ of their own.
    TopK in parts has another threshold in every step, and is not compiled."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, store.root, tmp_path / "run"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["10", "0"]
    assert "recompile" not in done.stderr


def test_a_missing_compiler_is_said(train_config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"compile = true: there is no C\+\+ compiler here"):
        run_train(train_config(compile=True))
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_kill_9_and_again(sagsae: Sagsae, harvest_config: Callable[..., HarvestConfig], tmp_path: Path) -> None:
    """Killed between checkpoints, then finished: the same weights, bit for bit, and no line of metrics twice."""
    store = run_harvest(harvest_config(tmp_path, hooks=("mlp_out",))).store
    command = ["train", "--store", store, "--arch", "sa-gsae:64", "--arch", "gated:128", "--sparsity", "0.2",
               "--batch", "64", "--tokens", 64 * 1600, "--device", "cpu", "--set", "checkpoint_every=100",
               "--set", "log_every=10", "--json", "--out"]  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"

    def checkpoints() -> int:
        return int(max((p.name for p in killed.glob("checkpoints/step-*")), default="step-0").removeprefix("step-"))

    done = sagsae(*command, killed, stop=(signal.SIGKILL, lambda: checkpoints() >= 300))
    assert done.returncode == -signal.SIGKILL
    assert not RunFolder(killed).finished()
    asked = sagsae(*command, killed, stop=(signal.SIGTERM, lambda: checkpoints() >= 800))
    assert asked.returncode == 130
    assert "To continue, run the same command again" in asked.stderr
    for out in (killed, whole):
        done = sagsae(*command, out)
        assert done.returncode == 0, done.stderr
    assert weights_of(killed) == weights_of(whole)
    assert lines_of(killed) == lines_of(whole)
    assert len(lines_of(killed)) == 160


@pytest.mark.slow
def test_two_processes_train_what_one_does(sagsae: Sagsae, store: Store, tmp_path: Path) -> None:
    """Real processes, real collectives: the same global batches, so the same weights up to the order of sums."""
    command = ["train", "--store", store.root, "--hook", "mlp_out", "--arch", "sa-gsae:48", "--arch", "gated:48",
               "--sparsity", "0.2", "--batch", "64", "--tokens", 64 * 40, "--device", "cpu",
               "--set", "precision=float32", "--json", "--out"]  # fmt: skip
    for processes in (1, 2):
        done = sagsae(*command, tmp_path / str(processes), "--processes", processes)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["saes"]) == 2
    assert json.loads((tmp_path / "2" / "record.json").read_text())["processes"] == 2
    for name in ("sa-gsae-48-lambda0.2-seed0", "gated-48-lambda0.2-seed0"):
        one, two = (load_file(tmp_path / n / "saes" / name / "sae_weights.safetensors") for n in ("1", "2"))
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-4)
