"""What `steer` and `dial` say of a wrong run, latent, model or text, and what they write."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.command import Sagsae
from support.folders import before_each_file
from support.models import save_model

from shared.errors import BusyError, DamagedError, UserError
from shared.schemas.features import FeaturesConfig
from shared.schemas.steer import DialConfig, DialFile, SteerConfig
from train.features.run import features
from train.runs.folder import RunFolder, read_sealed, write_sealed
from train.steer.dial import DialSummary, dial, read_dial
from train.steer.steer import steer
from train.steer.subject import LatentCounts, make_subject
from train.steer.wording import SteerResult


def turn(run: Path, **changes: Any) -> SteerResult:
    values: dict[str, Any] = {"latent": 1, "prompt": "the cat sat on", "new_tokens": 3, "device": "cpu", **changes}
    return steer(SteerConfig(run=run, **values))


def dialled(run: Path, **changes: Any) -> DialSummary:
    small = {"latents": 3, "least": 10, "contexts": 4, "controls": 40, "shuffled": 2, "device": "cpu"}
    return dial(DialConfig(run=run, **{**small, **changes}))


def folder_of(run: Path) -> Path:
    (found,) = (run / "features").iterdir()
    return found


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check has to come before the language model is loaded."""

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the language model was loaded")

    monkeypatch.setattr("train.steer.subject.LanguageModel", loaded)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a latent that is not there": ({"latent": 48}, r"--latent 48: .* has 48 latents, 0 to 47"),
    "a model that is not there": ({"model": "/no/such/model"}, r"--model /no/such/model: there is no such folder"),
    "an empty prompt": ({"prompt": ""}, r"--prompt: has no token. Give some text"),
    "too long a prompt": (
        {"prompt": "the cat " * 40},
        r"--prompt: .* and 3 new ones are too many for .* for 64",
    ),
    "too many new tokens": ({"new_tokens": 64}, r"64 new ones are too many"),
    "a position behind the prompt": ({"at": "99"}, r"--at 99: the prompt has \d+ tokens, 0 to"),
    "an autoencoder that is not there": ({"sae": "nothing"}, r"--sae nothing: .* has no such autoencoder"),
    "too many contexts": ({"prompt": None, "contexts": 999}, r"--contexts 999: the run held out 30 contexts"),
    "a position behind the contexts": ({"prompt": None, "contexts": 2, "at": "16"}, r"--at 16: .* have 16 tokens"),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_question_is_refused_before_the_model_is_loaded(case: str, finished: Path) -> None:
    changes, message = WRONG[case]
    with pytest.raises(UserError, match=message) as error:
        turn(finished, **changes)
    assert "\n  " in str(error.value) or "\n" not in str(error.value), "one sentence; or a list of autoencoders"


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "neither text": ({"prompt": None}, "give a text with --prompt, or a number of held-out contexts"),
    "both texts": ({"contexts": 3}, "give a text with --prompt, or a number of held-out contexts"),
    "no numbers": ({"dial": "1,x"}, "must be at most 64 numbers with commas"),
    "infinite": ({"dial": "inf"}, "must be at most 64 numbers with commas"),
    "an ablation to a value": ({"mode": "ablate", "dial": "1"}, "not used by --mode ablate"),
    "the last of contexts": ({"prompt": None, "contexts": 2, "at": "last"}, "last is the last token of a prompt"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_do_not_go_together(case: str, tmp_path: Path) -> None:
    changes, message = SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        turn(tmp_path, **changes)


def latents_file(run: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = folder_of(run) / "latents.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def with_column(name: str, values: Callable[[np.ndarray], np.ndarray]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.column_names.index(name)
        return table.set_column(at, name, pa.array(values(table.column(name).to_numpy().copy())))

    return change


ALTERED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no features": (lambda run: shutil.rmtree(run / "features"), UserError, r"is not there.* Run: sagsae features"),
    "an altered about.json": (
        lambda run: (folder_of(run) / "about.json").write_text('{"identity": 3}'), DamagedError, "about.json: does not"
    ),
    "no table": (lambda run: (folder_of(run) / "latents.parquet").unlink(), DamagedError, r"latents.parquet: .*No"),
    "no Parquet": (lambda run: (folder_of(run) / "latents.parquet").write_bytes(b"x" * 99), DamagedError, "Parquet"),
    "fewer poles": (lambda run: latents_file(run, lambda table: table.slice(2)), DamagedError, "has 94 poles"),
    "poles in disorder": (
        lambda run: latents_file(run, lambda table: table.take(list(reversed(range(96))))), DamagedError, "not sorted"
    ),
    "NaN": (
        lambda run: latents_file(run, with_column("q95", lambda q: q * np.nan)), DamagedError, "not finite"
    ),
    "no column": (lambda run: latents_file(run, lambda table: table.drop(["energy"])), DamagedError, "energy"),
    "a latent that never fires": (
        lambda run: latents_file(run, with_column("q95", lambda q: q * 0)), UserError, "--latent 1: never fires"
    ),
    "no evaluation": (lambda run: (run / "evaluation.json").unlink(), UserError, "run `sagsae eval"),
}  # fmt: skip


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", ALTERED)
def test_a_run_that_cannot_be_used(case: str, run: Path) -> None:
    change, kind, message = ALTERED[case]
    change(run)
    with pytest.raises(kind, match=message) as error:
        turn(run)
    assert "\n" not in str(error.value)


def test_another_model_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not the model that .* Give that model with --model$"):
        turn(finished, model=str(save_model(tmp_path / "other", hidden_size=16)))


def test_features_of_another_autoencoder_are_refused(run: Path) -> None:
    about = read_sealed(folder_of(run) / "about.json")
    write_sealed(folder_of(run) / "about.json", {**about, "identity": {**about["identity"], "sha256": "0" * 64}})
    with pytest.raises(UserError, match=r"was made from another autoencoder .* --overwrite"):
        turn(run)


def test_the_unit_is_the_quantile_of_the_weaker_pole(finished: Path) -> None:
    subject = make_subject(SteerConfig(run=finished, latent=0, prompt="a", device="cpu"))
    table = pq.read_table(folder_of(finished) / "latents.parquet")
    q95, firings = (table.column(name).to_numpy().reshape(-1, 2).copy() for name in ("q95", "firings"))
    both = firings.min(1) > 0.1 * firings.sum(1)
    assert both.all(), "a model with random weights knows no signs"
    assert subject.counts.units.tolist() == pytest.approx(q95.min(1).tolist())
    firings[:9, 1], firings[9:12, 0], firings[12] = firings[:9, 0] // 20, 0, 0
    counts = LatentCounts(firings, np.ones((48, 2)), np.where(firings > 0, q95, 0).astype("f8"))
    assert counts.units.tolist() == pytest.approx([*q95[:9, 0], *q95[9:12, 1], 0, *q95[13:].min(1)])
    assert [counts.poles(latent) for latent in (0, 9, 20)] == [(True, False), (False, True), (True, True)]


def test_a_prompt_is_continued_beside_the_unsteered_text(finished: Path) -> None:
    found = turn(finished, dial="-40,0,40", new_tokens=6)
    assert [row.dial for row in found.rows] == [None, -40, 0, 40]
    assert found.rows[0].kl == pytest.approx(0, abs=1e-9)
    assert found.rows[1].kl > 0.01 < found.rows[3].kl
    assert all(row.text is not None and len(row.tokens) <= 6 for row in found.rows)
    assert found.rows[1].tokens != found.rows[0].tokens
    for shares in found.next_tokens.values():
        assert len(shares) == 4
        assert all(0 <= share <= 1 for share in shares)
    again = turn(finished, dial="-40,0,40", new_tokens=6)
    assert [row.tokens for row in again.rows] == [row.tokens for row in found.rows]


def test_drawn_tokens_follow_the_seed(finished: Path) -> None:
    texts = [turn(finished, temperature=1.0, seed=seed, new_tokens=8, dial="0").rows[0].tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy, cold = (turn(finished, temperature=t, new_tokens=8, dial="0").rows[0].tokens for t in (0.0, 0.01))
    assert greedy == cold


def test_the_last_token_alone(finished: Path) -> None:
    """One position changes less than all do; an ablation equals a clamp to zero."""
    every, last = (turn(finished, at=at, dial="40", mode="add").rows[1].kl for at in ("all", "last"))
    assert 0 < last != every
    ablated, zero = turn(finished, mode="ablate"), turn(finished, dial="0")
    assert ablated.rows[1].kl == pytest.approx(zero.rows[1].kl, abs=1e-9)


def test_held_out_contexts_are_measured(finished: Path) -> None:
    found = turn(finished, prompt=None, contexts=8, dial="-30,0,30", mode="add")
    assert [row.dial for row in found.rows] == [-30, 0, 30]
    assert found.rows[1].kl == pytest.approx(0, abs=1e-6)
    assert found.rows[1].ce == pytest.approx(0, abs=1e-6)
    assert min(found.rows[0].kl, found.rows[2].kl) > 1e-3
    assert all(each.change > 0 for each in found.rows[0].rise)
    assert all(each.change < 0 for each in found.rows[0].fall)
    one = turn(finished, prompt=None, contexts=8, dial="30", mode="add", at="7")
    assert 0 < one.rows[0].kl < found.rows[2].kl


def test_a_dial_test_writes_what_it_found(run: Path) -> None:
    done = dialled(run)
    assert done.file == folder_of(run) / "dial.json"
    document = read_sealed(done.file)
    assert DialFile.model_validate(document) == done.found == read_dial(done.file)
    assert document["versions"]["numpy"]
    assert [len(latent.controls) for latent in done.found.latents] == [40] * len(done.found.latents)
    assert all(latent.passes is not None for latent in done.found.latents)
    assert done.found.verdict
    assert len(done.found.contexts) == 4
    folder = RunFolder(run)
    assert folder.foreign_paths() == []
    before = done.file.read_bytes()
    again = dialled(run)
    assert again.complete
    assert again.found == done.found
    assert done.file.read_bytes() == before
    same = dialled(run, overwrite=True).found
    assert same.model_copy(update={"seconds": 0}) == done.found.model_copy(update={"seconds": 0}), "seeded throughout"
    assert features(FeaturesConfig(run=run, device="cpu")).complete, "dial.json does not disturb features"


def test_a_dial_test_of_other_settings_or_rows_is_kept(run: Path) -> None:
    done = dialled(run)
    before, found = done.file.read_bytes(), read_sealed(done.file)
    with pytest.raises(UserError, match="was made with contexts = 4, and this asks for 5"):
        dialled(run, contexts=5)
    with pytest.raises(UserError, match="was made with latents = 3, and this asks for None"):
        dialled(run, latent=(1,))
    write_sealed(done.file, {**found, "snapshot": "0"})
    with pytest.raises(UserError, match="was made from another autoencoder or other rows"):
        dialled(run)
    done.file.write_bytes(before.replace(b'"slope": ', b'"slope": 1', 1).replace(b'"slope":', b'"slope":1', 1))
    with pytest.raises(DamagedError, match=r"dial.json: .*Test again with --overwrite"):
        dialled(run)
    write_sealed(done.file, {**found, "latents": [{"latent": "x"}]})
    with pytest.raises(DamagedError, match=r"dial.json: latents.0.* is not what a dial test writes"):
        dialled(run)
    assert not dialled(run, overwrite=True).complete


def test_named_latents_are_tested_whatever_their_poles(run: Path) -> None:
    """Latent 3 is made one that uses its pole below zero: T- is enriched after it fired, T+ depleted."""

    def one_pole(firings: np.ndarray) -> np.ndarray:
        firings[6] = 0
        return firings

    both = dialled(run, latent=(3,), controls=3).found.latents[0]
    latents_file(run, with_column("firings", one_pole))
    found = dialled(run, latent=(3,), controls=3, overwrite=True).found
    assert [latent.latent for latent in found.latents] == [3]
    assert set(found.latents[0].minus) & set(both.minus)
    assert found.latents[0].plus != both.plus
    assert found.latents[0].passes is None
    assert found.verdict.startswith("No verdict")
    assert found.share is None


WRONG_DIALS: dict[str, tuple[dict[str, Any], str]] = {
    "no latent fires so often": ({"least": 10**9}, r"--least 1000000000: no latent of .* Lower it"),
    "a latent that is not there": ({"latent": (1, 99)}, r"--latent 99: .* has 48 latents"),
    "too many contexts": ({"contexts": 31}, r"--contexts 31: the run held out 30 contexts"),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("case", WRONG_DIALS)
def test_a_wrong_dial_test_is_refused_and_writes_nothing(case: str, run: Path) -> None:
    changes, message = WRONG_DIALS[case]
    with pytest.raises(UserError, match=message):
        dialled(run, **changes)
    assert not list(folder_of(run).glob("dial*"))


def test_a_full_disk_leaves_no_half_result(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        if path.name == "dial.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        before_each_file(patch, full)
        with pytest.raises(BusyError, match="the disk is full"):
            dialled(run, controls=2)
    assert not (folder_of(run) / "dial.json").exists()
    assert RunFolder(run).foreign_paths() == []


def test_the_command_line(run: Path, sagsae: Sagsae) -> None:
    done = sagsae("steer", run, "--latent", 1, "--dial", "-2,2", "--prompt", "the cat", "--new-tokens", 2)
    assert done.returncode == 0, done.stderr
    assert "unsteered" in done.stdout
    assert "KL, nats" in done.stdout
    small = ("--latents", 2, "--least", 10, "--contexts", 3, "--controls", 2, "--shuffled", 0, "--device", "cpu")
    found = sagsae("dial", run, *small, "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["verdict"].startswith("No verdict")
    again = sagsae("dial", run, *small)
    assert "No verdict" in again.stdout
    assert "Nothing to do" in again.stderr
    wrong = sagsae("steer", run, "--latent", 1)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--prompt" in wrong.stderr
    assert "Traceback" not in wrong.stderr
