"""Faults of training runs that were found from outside, by kind: each test failed before it was mended."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.folders import contents, rewrite, without
from support.runs import begun, unfinished_run
from support.stores import unfinished
from support.variants import FOLDING, VARIANTS, batch, variant, weights

import train.autoencoder
import train.plan.job
import train.run
from harvest.recode import recode
from harvest.run import harvest as run_harvest
from shared.command.grid import multiples_of_d_in
from shared.config import EvalConfig, HarvestConfig, SynthConfig, TrainConfig
from shared.errors import DamagedError, UserError
from shared.saes import ARCHITECTURES, sae_config, sae_grid
from shared.schema import Frozen, build
from shared.store.opened import Statistics, Store
from shared.store.spec import seal
from train.autoencoder import Autoencoder
from train.data.follow import segments_of
from train.data.norm_filter import statistics
from train.data.snapshot import as_ranges, from_ranges
from train.evaluate import evaluate, last_logged_inactive
from train.fit.member import Member
from train.plan.job import make_job
from train.report.data import read_run
from train.run import train as run_train
from train.runs.checkpoint import end_checkpoint, read_state
from train.runs.folder import CLEARING, RunFolder, read_sealed
from train.sae.activation import Folded

Config = Callable[..., TrainConfig]
CPU = torch.device("cpu")
NAME = "sa-gsae-48-lambda0.2-seed0"


def weights_of(run: Path) -> dict[str, bytes]:
    return {key: data for key, data in contents(run).items() if key.startswith("saes/")}


def resealed(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """As one who knows the format would alter a file."""
    rewrite(path, change)
    path.write_text(json.dumps(seal(json.loads(path.read_text()))))


# Identity by content


@pytest.fixture
def growing(store: Store, tmp_path: Path) -> tuple[Path, Callable[[int], None]]:
    """A copy of the store, and what makes it one that has so many shards."""
    copy = Path(shutil.copytree(store.root, tmp_path / "copy"))
    log, lines = unfinished(copy)

    def has(shards: int) -> None:
        log.write_text("".join(lines[:shards]))

    has(6)
    return copy, has


def test_identity_a_run_goes_on_after_its_store_grew(
    train_config: Config, growing: tuple[Path, Callable[[int], None]], tmp_path: Path
) -> None:
    """Field report: a run on an unfinished store could never be evaluated or continued once the harvest went on."""
    place, has = growing
    whole = run_train(train_config(store=place, tokens=None, out=tmp_path / "whole")).run
    before = evaluate(EvalConfig(run=whole, ce=False, device="cpu")).results
    part = begun(train_config(store=place, tokens=None, out=tmp_path / "part"), 9)
    has(10)
    assert evaluate(EvalConfig(run=whole, ce=False, device="cpu")).results == before
    assert run_train(train_config(store=place, tokens=None, out=tmp_path / "part")).saes == before["saes"]
    assert weights_of(part) == weights_of(whole)
    has(4)
    with pytest.raises(UserError, match=r"was trained on shards 0-5 .* does not have 2 of them, such as shard 4"):
        evaluate(EvalConfig(run=whole, ce=False, device="cpu"))


def test_identity_the_same_command_is_the_same_run_whatever_the_store_has(
    train_config: Config, growing: tuple[Path, Callable[[int], None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field report: the same command word for word began a second run in another folder without a word."""
    place, has = growing
    monkeypatch.chdir(tmp_path)
    config = train_config(store=place, out=None)
    first = run_train(config).run
    has(10)
    assert run_train(config).run == first
    assert len(list(Path("runs").iterdir())) == 1


def test_identity_a_lossless_recode_keeps_runs(train_config: Config, store: Store, tmp_path: Path) -> None:
    """Field report: recoding to save disk and removing the original orphaned every run."""
    place = Path(shutil.copytree(store.root, tmp_path / "s"))
    whole = run_train(train_config(store=place, out=tmp_path / "whole")).run
    before = evaluate(EvalConfig(run=whole, ce=False, device="cpu")).results
    part = begun(train_config(store=place, out=tmp_path / "part"), 9)
    for codec in ("lz4", "none", "int8"):
        recode(str(place), str(tmp_path / codec), codec)
    shutil.rmtree(place)
    for codec in ("lz4", "none"):
        again = evaluate(EvalConfig(run=whole, ce=False, device="cpu", store=str(tmp_path / codec))).results
        assert again == before, codec
    run_train(train_config(store=tmp_path / "lz4", out=tmp_path / "part"))
    assert weights_of(part) == weights_of(whole)
    with pytest.raises(UserError, match="quantised to int8, which changes rows; lossless codecs keep them"):
        evaluate(EvalConfig(run=whole, ce=False, device="cpu", store=str(tmp_path / "int8")))


def test_identity_precision_auto_is_what_the_run_began_with(
    train_config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Field report: on another kind of CPU the same command was another run, or was refused."""
    monkeypatch.chdir(tmp_path)
    native = "float32"
    monkeypatch.setattr(train.autoencoder, "native_dtype", lambda _: native)
    whole = run_train(train_config(out=tmp_path / "whole")).run
    config = train_config(out=None)
    begun(config.model_copy(update={"out": (first := make_job(config, CPU).folder.path)}), 9)
    native = "bfloat16"
    assert run_train(config).run == first
    assert weights_of(first) == weights_of(whole)
    assert "resumes with float32 products, as it began; precision = auto would be bfloat16" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"precision: the run has float32, this asks for bfloat16.*ask for its settings"
    ):
        run_train(train_config(out=first, precision="bfloat16"))
    capsys.readouterr()
    with pytest.raises(UserError, match="lr: the run has"):
        run_train(train_config(out=first, lr=0.5))
    assert "resumes" not in capsys.readouterr().err, "it says so only when it does"
    assert store.spec.n_tokens


def test_identity_the_order_of_autoencoders_does_not_count(train_config: Config, tmp_path: Path) -> None:
    """Field report: the same --arch list in another order was refused with a wall of differences."""
    config = train_config()
    whole = run_train(config).run
    turned = config.model_copy(update={"saes": config.saes[::-1]})
    assert [sae["name"] for sae in run_train(turned).saes] == [sae.name for sae in config.saes]
    part = begun(train_config(out=tmp_path / "part"), 9)
    run_train(turned.model_copy(update={"out": part}))
    assert contents(part)["evaluation.json"] == contents(whole)["evaluation.json"]
    names = {make_job(each.model_copy(update={"out": None}), CPU).folder.path for each in (config, turned)}
    assert len(names) == 1


def test_identity_a_run_of_an_earlier_version_goes_on(train_config: Config, store: Store, tmp_path: Path) -> None:
    """It named its snapshot by all bytes of the manifest, cut its warm-up, and had no checksums."""
    whole = run_train(train_config(out=tmp_path / "whole")).run
    part = begun(train_config(out=tmp_path / "part"), 9)
    earlier = {"snapshot": store.snapshot_id, "warmup_steps": 100}
    for run in (whole, part):
        rewrite(run / "config.json", lambda config: {**without("shards", "keep_checkpoints")(config), **earlier})
        for path in (run / "record.json", *run.glob("*/*/cfg.json"), *run.glob("*/*/state.json")):
            rewrite(path, without("blake2b"))
    before = read_sealed(whole / "evaluation.json")
    assert evaluate(EvalConfig(run=whole, ce=False, device="cpu")).results == before
    assert run_train(train_config(out=part)).saes == before["saes"]
    assert {key: data for key, data in weights_of(part).items() if key.endswith("safetensors")} == {
        key: data for key, data in weights_of(whole).items() if key.endswith("safetensors")
    }


@given(st.sets(st.integers(0, 99), min_size=1))
def test_identity_numbers_of_shards_as_a_text(numbers: set[int]) -> None:
    assert from_ranges(as_ranges(numbers), 100) == sorted(numbers)


def test_identity_text_that_names_no_shards() -> None:
    assert as_ranges(range(150_000)) == "0-149999"
    for text in ("", "1-0", "0,0", "3-9,4", "0-999999999999", "-1", "a", "0-", None, 7, "0," * 9):
        with pytest.raises(ValueError, match="shards is"):
            from_ranges(text, 10)


# Nothing is lost


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "another bracket": lambda data: b"[" + data[1:],
    "the last byte": lambda data: data.rstrip()[:-1],
    "not UTF-8": lambda data: data[:200] + b"\xff" + data[201:],
    "empty": lambda _: b"",
    "a list": lambda _: b"[]",
    "another number": lambda data: data.replace(b'"batch": 64', b'"batch": 65').replace(b'"steps": 20', b'"steps": 21'),
    "nested": lambda _: b'{"a":' * 100_000,
    "no run": lambda _: b"{}",
}


@pytest.mark.parametrize("name", ["config.json", "record.json"])
def test_lost_a_damaged_file_of_a_finished_run(train_config: Config, name: str) -> None:
    """Field report: one damaged byte in config.json, and the same command deleted the finished run."""
    run = run_train(train_config()).run
    sound = (run / name).read_bytes()
    for what, damage in DAMAGES.items():
        if (what, name) == ("no run", "record.json"):
            continue
        (run / name).write_bytes(damage(sound))
        before = contents(run)
        with pytest.raises(DamagedError, match=rf"{name}: .*--overwrite"):
            run_train(train_config())
        assert contents(run) == before, what
    assert run_train(train_config(overwrite=True)).steps == 20, "when it is asked for"


def test_lost_a_config_that_is_gone(train_config: Config) -> None:
    """Kind of: a finished run is deleted. Without its config.json it is still one."""
    run = run_train(train_config()).run
    (run / "config.json").unlink()
    before = contents(run)
    with pytest.raises(DamagedError, match=r"holds results of a run, but no config\.json"):
        run_train(train_config())
    assert contents(run) == before


def test_lost_a_config_that_is_somebody_elses(train_config: Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for text in ("{}", '{"model_type": "gpt2"}', "no json"):
        (tmp_path / "run" / "config.json").write_text(text)
        for overwrite in (False, True):
            with pytest.raises(UserError, match="is not a training run"):
                run_train(train_config(overwrite=overwrite))
        assert (tmp_path / "run" / "config.json").read_text() == text


def test_lost_through_links(train_config: Config, tmp_path: Path) -> None:
    """Field report: with `saes` moved to another disk, --overwrite failed after config.json was gone."""
    run = run_train(train_config()).run
    for name in ("saes", "checkpoints"):
        (run / name).rename(tmp_path / name)
        (run / name).symlink_to(tmp_path / name)
    kept = contents(tmp_path / "saes")
    run_train(train_config(overwrite=True, lr=1e-3))
    assert contents(tmp_path / "saes") == kept, "what a link names is not deleted"
    assert contents(run / "saes") != kept


def test_lost_what_somebody_put_among_a_runs_files(train_config: Config) -> None:
    run = run_train(train_config()).run
    (run / "saes" / NAME / "notes.txt").write_text("mine")
    before = contents(run)
    with pytest.raises(UserError, match=r"notes\.txt was not put there by a run.*Move it away"):
        run_train(train_config(overwrite=True))
    assert contents(run) == before


def test_lost_clearing_that_is_killed_goes_on(train_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_train(train_config()).run
    whole = weights_of(run)
    with monkeypatch.context() as patch:
        patch.setattr("train.runs.folder.remove_tree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_train(train_config(overwrite=True))
    assert (run / CLEARING).exists()
    assert weights_of(run_train(train_config()).run) == whole
    assert not (run / CLEARING).exists()


def test_lost_an_evaluation_is_not_a_training(train_config: Config) -> None:
    """A finished run whose evaluation.json is gone or damaged is measured again, never trained again."""
    run = run_train(train_config()).run
    before = read_sealed(run / "evaluation.json")
    for damage in (b'{"saes": null}', b"{", None):
        (run / "evaluation.json").unlink() if damage is None else (run / "evaluation.json").write_bytes(damage)
        with pytest.raises(DamagedError, match=r"evaluation\.json.*sagsae eval"):
            run_train(train_config())
        assert evaluate(EvalConfig(run=run, ce=False, device="cpu")).results == before


# Checkpoints


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_checkpoint_damaged_goes_on_from_the_one_before(train_config: Config, tmp_path: Path, capsys: Any) -> None:
    """Field report: a bit flipped in a checkpoint's tensors was taken without a word, and gave other weights."""
    whole = run_train(train_config(out=tmp_path / "whole")).run
    for number, what in enumerate(("tensors-0000.safetensors", "state.json")):
        run = begun(train_config(out=tmp_path / f"{number}"), 13)
        newest = run / "checkpoints" / "step-00000013"
        flip(newest / what, (newest / what).stat().st_size // 2)
        run_train(train_config(out=run))
        assert "resuming from step-00000008, the one before" in capsys.readouterr().err
        assert weights_of(run) == weights_of(whole)
        unfinished_run(run)
        for folder in (run / "checkpoints").glob("step-*"):
            flip(folder / what, (folder / what).stat().st_size // 2)
        before = contents(run)
        with pytest.raises(DamagedError, match="There is no undamaged checkpoint before it"):
            run_train(train_config(out=run))
        assert contents(run) == before


@pytest.mark.parametrize(
    "change",
    [
        {"step": 10**9}, {"step": -1}, {"step": True}, {"wave": 2}, {"wave": 0}, {"seconds": -1}, {"seconds": "1"},
        {"positions": [[0, 0, 0]]}, {"positions": [[0, 0, 10**9]] * 4}, {"positions": [[10**9, 0, 0]] * 4},
        {"positions": [[0, 10**9, 0]] * 4}, {"positions": [[0, 0]] * 4}, {"positions": None}, {"parts": 2},
        {"parts": 10**12}, {"diverged": {"nobody": 3}}, {"diverged": []}, {"blake2b": ["0" * 32]},
    ],
)  # fmt: skip
def test_checkpoint_that_says_what_cannot_be(train_config: Config, change: dict[str, Any]) -> None:
    """Field report: a state.json with step 10^9 made a run "finished" with the weights of step 40."""
    run = begun(train_config(checkpoint_every=100), 5)
    resealed(run / "checkpoints" / "step-00000005" / "state.json", lambda state: {**state, **change})
    with pytest.raises(DamagedError, match=r"step-00000005.*cannot be read"):
        run_train(train_config(checkpoint_every=100))


def test_checkpoint_of_other_tensors(train_config: Config) -> None:
    """Shapes and types are compared: a tensor that would have been stretched or rounded is refused."""
    run = begun(train_config(checkpoint_every=100), 5)
    folder = run / "checkpoints" / "step-00000005"
    path = folder / "tensors-0000.safetensors"
    sound = train.runs.checkpoint.load_tensors(folder, 1)
    rewrite(folder / "state.json", lambda state: {key: item for key, item in state.items() if key != "blake2b"})
    key = f"{NAME}/W_enc"
    for spoilt in (
        {**sound, key: sound[key][:1].clone()}, {**sound, key: sound[key].to(torch.int64)},
        {name: tensor for name, tensor in sound.items() if name != key}, {**sound, f"{NAME}/more": sound[key].clone()},
        {**sound, f"{NAME}/W_enc.step": torch.tensor(1e9)}, {**sound, f"{NAME}/lambda": torch.tensor(np.nan)},
        {**sound, f"{NAME}/generator": torch.zeros(3, dtype=torch.uint8)},
    ):  # fmt: skip
        save_file({name: tensor.contiguous().clone() for name, tensor in spoilt.items()}, path)
        with pytest.raises(DamagedError, match=r"step-00000005"):
            run_train(train_config(checkpoint_every=100))


def test_checkpoint_replaced_by_one_of_the_same_step_is_never_absent(
    train_config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed between the two renames, the only checkpoint would be gone."""
    whole = run_train(train_config(checkpoint_every=100, out=tmp_path / "whole")).run
    run = begun(train_config(checkpoint_every=100), 5)
    end, (newest,) = end_checkpoint, (run / "checkpoints").iterdir()
    with monkeypatch.context() as patch:
        rename = Path.rename

        def killed(self: Path, target: Path) -> Path:
            if self.name == "building":
                raise KeyboardInterrupt
            return rename(self, target)

        patch.setattr(Path, "rename", killed)
        shutil.copytree(newest, newest.with_name("building"))
        with pytest.raises(KeyboardInterrupt):
            end(newest.parent, 5, {"version": 4})
    assert not newest.exists()
    run_train(train_config(checkpoint_every=100))
    assert weights_of(run) == weights_of(whole)


def test_checkpoints_go_when_the_run_is_finished(train_config: Config, tmp_path: Path) -> None:
    """Field report: a finished run kept checkpoints of eight times its autoencoders."""
    run = run_train(train_config(keep_checkpoints=False)).run
    assert not (run / "checkpoints").exists()
    kept = run_train(train_config(out=tmp_path / "kept")).run
    assert len(list((kept / "checkpoints").iterdir())) == 2


# A store that is replaced


@pytest.mark.parametrize("when", ["before a checkpoint", "before the end"])
def test_store_replaced_under_a_training_is_noticed(
    train_config: Config, harvest_config: Callable[..., HarvestConfig], tmp_path: Path, when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Field report: a store of equal shapes moved to its place gave a mixture of both, and no word."""
    for name, seed in (("s", 0), ("other", 1)):
        run_harvest(harvest_config(tmp_path, hooks=("mlp_out",), codec="none", name=name, seed=seed))
    config = train_config(store=tmp_path / "s", checkpoint_every=8 if when == "before a checkpoint" else 100)
    log = RunFolder.log

    def swap_at(self: RunFolder, line: dict[str, Any]) -> None:
        log(self, line)
        if line["step"] == (10 if when == "before a checkpoint" else 20):
            (tmp_path / "s").rename(tmp_path / "old")
            (tmp_path / "other").rename(tmp_path / "s")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", swap_at)
        with pytest.raises(DamagedError, match=r"was replaced, or lost shards, while it was read"):
            run_train(config)
    run = tmp_path / "run"
    assert not RunFolder(run).finished()
    (tmp_path / "s").rename(tmp_path / "other")
    (tmp_path / "old").rename(tmp_path / "s")
    run_train(config)
    whole = run_train(config.model_copy(update={"out": tmp_path / "whole"})).run
    assert weights_of(run) == weights_of(whole), "no checkpoint holds what was read of the other"


# Settings that were given


def test_setting_a_warm_up_is_kept_or_refused(train_config: Config, tmp_path: Path) -> None:
    """Field report: warmup_steps = 1000 was cut to 5 % of the run, and the record said 1000."""
    run = run_train(train_config(warmup_steps=9)).run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["lr"] == pytest.approx(0.005 * 5 / 10)
    assert read_sealed(run / "config.json")["warmup_steps"] == 9
    usual = run_train(train_config(out=tmp_path / "usual")).run
    assert read_sealed(usual / "config.json")["warmup_steps"] == 1, "what was used"
    with pytest.raises(UserError, match=r"warmup_steps = 1,000: the run has 20 steps"):
        run_train(train_config(warmup_steps=1000, out=tmp_path / "long"))


def test_setting_a_recorded_warm_up_written_as_a_fraction_is_read_as_an_integer(
    train_config: Config, tmp_path: Path
) -> None:
    """Random damage found it: 1.0 in config.json reached the training as a float."""
    part = begun(train_config(out=tmp_path / "part"), 9)
    rewrite(part / "config.json", lambda config: {**config, "warmup_steps": 1.0})
    found = make_job(train_config(out=part), CPU).config.warmup_steps
    assert (found, type(found)) == (1, int)


def test_setting_that_cannot_be_reached_is_said_or_refused(train_config: Config, capsys: Any) -> None:
    config = train_config(heldout_tokens=100_000, streams=8, window_rows=1, run_chunks=1, batch=64)
    make_job(config, CPU)
    said = capsys.readouterr().err
    assert "heldout_tokens = 100,000: at most a tenth of the store is held out, here 496" in said
    assert "window_rows = 1: a window of a stream has at least one run, here 64 rows" in said
    for settings, message in (
        ({"exclude_positions": (99,)}, "a context of 16 has no position 99"),
        ({"exclude_positions": (-1,)}, "has no position -1"),
        ({"step": "sparse", "saes": (sae_config(arch="relu", d_sae=8),)}, "none is asked for"),
        ({"step": "sparse", "saes": (sae_config(arch="gated", d_sae=8, decoder="free"),)}, "none is asked for"),
        ({"batch": 1 << 30, "tokens": 1 << 40}, "batch: 1,073,741,824 at once"),
        ({"batch": 1 << 20, "streams": 1 << 20}, "streams: 1,048,576 at once"),
        ({"lr": 1e39}, r"lr: 1e\+39 is too large for float32"),
        ({"clip_norm": 1e300}, r"clip_norm: 1e\+300 is too large for float32"),
        ({"max_norm": 1e300}, r"max_norm: 1e\+300 times the median norm is beyond float32"),
    ):
        with pytest.raises(UserError, match=message):
            make_job(train_config(**settings), CPU)


def test_setting_that_has_no_effect_is_said(train_config: Config, capsys: Any) -> None:
    """Cold review: reset_every, log_every and checkpoint_every beyond the run's steps were taken without a word."""
    saes = (
        sae_config(arch="sa-gsae", d_sae=48, reset_every=21, sparsity_warmup=0.01),
        sae_config(arch="gated", d_sae=48, reset_share=0.5),
        sae_config(arch="batch-topk", d_sae=48, k=4, aux_after=1281),
        sae_config(arch="abs-topk", d_sae=48, k=4, aux_after=7, aux_k=0),
    )
    beyond = {"log_every": 21, "checkpoint_every": 21, "dead_after_tokens": 1281, "decay_fraction": 0.01}
    make_job(train_config(saes=saes, **beyond), CPU)
    said = " ".join(capsys.readouterr().err.split())
    for sentence in (
        "log_every = 21: the run has 20 steps", "checkpoint_every = 21: the run has 20 steps",
        "dead_after_tokens = 1,281: the run has 1,280 tokens", "decay_fraction = 0.01: is less than one of 20 steps",
        "reset_every = 21: the run has 20 steps; no latent is reset", "reset_share = 0.5: has no effect without",
        "sparsity_warmup = 0.01: is less than one of 20 steps", "aux_after = 1,281: the run has 1,280 tokens",
        "aux_after = 7: has no effect with aux_k = 0",
    ):  # fmt: skip
        assert said.count(sentence) == 1, sentence
    own = tuple(sae.model_copy(update={"lr": 1e-3}) for sae in saes[:1])
    make_job(train_config(saes=own), CPU)
    assert "lr = 0.005: is not used" in capsys.readouterr().err
    within = {"log_every": 20, "checkpoint_every": 20, "dead_after_tokens": 1280, "decay_fraction": 0.0}
    make_job(train_config(saes=(sae_config(arch="gated", d_sae=48, reset_every=20),), **within), CPU)
    assert "run has" not in capsys.readouterr().err


SCHEMAS = (HarvestConfig, SynthConfig, TrainConfig, EvalConfig, *(each.config for each in ARCHITECTURES.values()))


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_setting_of_any_size_is_bounded(schema: type[Frozen]) -> None:
    """Cold review: --tokens 99999999999999999999 began a training without a word."""
    needed = {"model": "m", "store": "s", "run": "r", "saes": [{"arch": "gated", "d_sae": 64}], "d_sae": 64}
    usual = {key: value for key, value in needed.items() if key in schema.model_fields}
    arch = next((arch for arch, found in ARCHITECTURES.items() if found.config is schema), None)
    usual |= {"arch": arch} if arch else {}
    build(schema, usual)
    tried = 0
    for name, field in schema.model_fields.items():
        for value in (10**20, [10**20]):
            if "int" in str(field.annotation) and name != "saes":
                tried += 1
                with pytest.raises(UserError, match=rf"^(unknown setting .)?{name}\b"):
                    build(schema, {**usual, name: value})
    assert tried


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ({"arch": "batch-topk", "k": 4, "aux_k": 49}, "aux_k: 49 of 48 latents cannot be active"),
        ({"arch": "abs-topk", "k": 4, "aux_k": 10**9}, "aux_k: 1,000,000,000 of 48 latents"),
        ({"arch": "gated", "theta0": 1e300}, r"theta0: 1e\+300 is too large for float32"),
        ({"arch": "jumprelu", "bandwidth": 1e39}, r"bandwidth: 1e\+39 is too large"),
        ({"arch": "relu", "sparsity": 1e300}, r"sparsity: 1e\+300 is too large"),
    ],
)
def test_setting_of_an_autoencoder_that_cannot_be_kept(
    train_config: Config, monkeypatch: pytest.MonkeyPatch, sae: dict[str, Any], message: str
) -> None:
    """Cold review: aux_k above d_sae was cut without a word, theta0 of 1e300 ended in a traceback. A run of an earlier
    version, which cut it, still goes on."""
    config = train_config(saes=(sae_config(d_sae=48, **sae),))
    with pytest.raises(UserError, match=message):
        make_job(config, CPU)
    if "aux_k" in sae:
        with monkeypatch.context() as patch:
            patch.setattr(train.plan.job, "check_saes", lambda _: None)
            run_train(config)
        run_train(config)


def test_setting_a_width_that_no_architecture_takes() -> None:
    """Cold review: --arch gated:32 --d-sae 64 trained 32 latents without a word."""
    with pytest.raises(UserError, match=r"--d-sae: every --arch has a width of its own \(gated:32\)"):
        sae_grid(["gated:32"], {"d_sae": [64]}, {})
    widths = [sae["d_sae"] for sae in sae_grid(["gated:32", "relu"], {"d_sae": [64], "sparsity": [0.1]}, {})]
    assert widths == [32, 64]


def test_setting_of_activations_that_bfloat16_makes_equal(
    train_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field report: means of 1,000 beside a spread of 0.25 were refused without the cause and the cure."""

    def rounded(*about: Any) -> Statistics:
        found = statistics(*about)
        rows = (1000 + 0.25 * torch.randn(50, len(found.mean))).bfloat16().double().numpy()
        return Statistics(len(rows), rows.mean(axis=0), rows.var(axis=0))

    monkeypatch.setattr(train.plan.job, "statistics", rounded)
    with pytest.raises(UserError, match=r"equal in bfloat16, .*a large mean, harvest with --set store_dtype=float32"):
        make_job(train_config(), torch.device("cpu"))


@pytest.mark.parametrize("times", [float("nan"), float("inf"), 0.0, -8.0])
def test_setting_expansion_is_a_number(store: Store, times: float) -> None:
    """Field report: --expansion nan ended in a traceback."""
    with pytest.raises(UserError, match=r"--expansion: must be a number above 0"):
        multiples_of_d_in(str(store.root), "mlp_out", [times])


# A saved autoencoder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    sae = Autoencoder.of(variant("sa-gsae"), weights(variant("sa-gsae")), 7.5)
    sae.save(tmp_path / "sae", {})
    return tmp_path / "sae"


def replaced(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other weights, with the checksums of what they are."""
    path = folder / "sae_weights.safetensors"
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    resealed(folder / "cfg.json", lambda about: {**about, "sha256": digest})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.int8])
def test_autoencoder_of_another_type(saved: Path, dtype: torch.dtype) -> None:
    """Field report: weights of any data type were taken."""
    tensors = Autoencoder.load(saved).state_dict()
    replaced(saved, {**tensors, "W_enc": tensors["W_enc"].to(dtype)})
    with pytest.raises(DamagedError, match=r"sae_weights\.safetensors"):
        Autoencoder.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_autoencoder_of_weights_that_are_no_numbers(saved: Path, value: float) -> None:
    """Field report: NaN weights gave an evaluation of null, and the same train command ended in a TypeError."""
    tensors = Autoencoder.load(saved).state_dict()
    tensors["b_dec"][3] = value
    replaced(saved, tensors)
    with pytest.raises(DamagedError, match="b_dec has NaN or infinities"):
        Autoencoder.load(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [("d_in", "1e309"), ("d_in", "-1"), ("d_in", "1" * 5000), ("d_in", "16.0"), ("d_in", "true"), ("d_in", "1000000"),
     ("scale", "0"), ("scale", "-1"), ("scale", "1e999"), ("scale", "null"), ("arch", "[]"), ("sha256", "7"),
     ("d_sae", "16777216"), ("tie", '"none"'), ("seed", "[" * 100_000)],
)  # fmt: skip
def test_autoencoder_of_settings_that_cannot_be(saved: Path, key: str, value: str) -> None:
    """Field report: d_in = 1e309 in cfg.json, or JSON that is nested deep, ended in a traceback."""
    about = json.loads((saved / "cfg.json").read_text())
    del about["crc32c"]
    text = json.dumps({**about, key: "HERE"}).replace('"HERE"', value)
    (saved / "cfg.json").write_text(text)
    with pytest.raises((UserError, DamagedError)):
        Autoencoder.load(saved)


@pytest.mark.parametrize("length", [0, 7, 8, 2**63, 10**9])
def test_autoencoder_with_a_header_that_lies(saved: Path, length: int) -> None:
    path = saved / "sae_weights.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    resealed(saved / "cfg.json", lambda about: {**about, "sha256": digest})
    with pytest.raises(DamagedError, match=r"sae_weights\.safetensors"):
        Autoencoder.load(saved)


def test_autoencoder_settings_that_were_altered(saved: Path) -> None:
    """One letter of cfg.json makes another function of the same weights."""
    path = saved / "cfg.json"
    path.write_text(path.read_text().replace('"scale": 7.5', '"scale": 7.6'))
    with pytest.raises(UserError, match="was altered"):
        Autoencoder.load(saved)


@pytest.mark.parametrize("name", VARIANTS)
def test_nan_stays_nan(name: str) -> None:
    """A row with a NaN gives a row of NaN, in the code and in the reconstruction; other rows are as they were."""
    sae, x = Autoencoder.of(variant(name), weights(variant(name)), 7.5), 7.5 * batch()
    spoilt = x.clone()
    spoilt[1, 3] = float("nan")
    functions: list[Autoencoder | Folded] = [sae, *([sae.fold()] if name in FOLDING else [])]
    for function in functions:
        f = function.encode(spoilt)
        assert f[1].isnan().all()
        assert function.decode(f)[1].isnan().all()
        keep = torch.arange(len(x)) != 1
        torch.testing.assert_close(f[keep], function.encode(x)[keep])


def test_autoencoder_as_others_use_it(saved: Path) -> None:
    """Field report: a saved autoencoder had no `.to`, could not be called, and gave no `state_dict`."""
    sae, x = Autoencoder.load(saved), 7.5 * batch()
    assert torch.equal(sae(x), sae.decode(sae.encode(x)))
    assert torch.equal(sae.to("cpu")(x), sae(x))
    assert sae.state_dict().keys() == {"W_enc", "W_dec", "b_dec", "theta", "r", "b"}


def test_weights_that_are_no_numbers_after_the_last_step(
    train_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The last loss is a number, the last update is not: the autoencoder has diverged, and the others are saved."""
    step = Member.step_

    def spoil(self: Any, x: Any, number: int) -> Any:
        found = step(self, x, number)
        if number == 19 and self.config.arch == "gated":
            self.weights.W_enc[0, 0] = float("nan")
        return found

    monkeypatch.setattr(Member, "step_", spoil)
    summary = run_train(train_config())
    assert [sae["arch"] for sae in summary.saes] == ["sa-gsae"]
    assert "its weights are NaN or infinite after step 20" in capsys.readouterr().err
    assert os.listdir(summary.run / "saes") == [NAME]


# A run that was downloaded is hostile, too


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises TimeoutError where it takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def put_there(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 42)  # a hole


@pytest.mark.parametrize("kind", ["pipe", "device", "hole"])
@pytest.mark.parametrize("name", ["config.json", "record.json", "evaluation.json", "metrics.jsonl", "segments.jsonl"])
def test_hostile_files_of_a_run_are_ordinary_and_bounded(train_config: Config, name: str, kind: str) -> None:
    """Cold review: a pipe in a run was waited for, /dev/zero was read until memory was full, a hole of 8 GB whole."""
    run = run_train(train_config()).run
    (run / name).touch()
    put_there(run / name, kind)
    with within(60):
        with pytest.raises((UserError, DamagedError)):
            read_run(run) if name != "segments.jsonl" else segments_of(run)
        if name in ("config.json", "record.json"):
            with pytest.raises(DamagedError, match=rf"{name}: is no ordinary file of at most 16 MiB"):
                run_train(train_config())
        elif name == "metrics.jsonl":
            assert last_logged_inactive(RunFolder(run), 1) == {}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["state.json", "tensors-0000.safetensors"])
def test_hostile_files_of_a_checkpoint_are_ordinary(train_config: Config, name: str, kind: str) -> None:
    """Kind of: a pipe in a run was waited for."""
    run = begun(train_config(checkpoint_every=4), 9)
    newest = max((run / "checkpoints").glob("step-*"))
    put_there(newest / name, kind)
    with within(60), pytest.raises(DamagedError):
        read_state(newest)
