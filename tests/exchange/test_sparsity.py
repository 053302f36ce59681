"""How often each latent fires: what an evaluation counts, and sparsity.safetensors of an export for SAELens."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from support.command import ROOT
from support.exact.frequencies import ARCHS, counted_run, heldout_rows
from support.exchange import read, saelens_says
from support.folders import before_each_file, contents

from shared.config import EvalConfig
from shared.errors import DamagedError, UserError
from shared.schemas.exchange import ExportConfig
from train.autoencoder import Autoencoder
from train.evaluate import evaluate
from train.exchange.export import Exported, export
from train.exchange.saved import find_saes
from train.runs.folder import RunFolder, read_sealed, write_sealed

SPARSITY = "sparsity.safetensors"


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return counted_run(tmp_path_factory.mktemp("counted"))


@pytest.fixture
def run(counted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(counted, tmp_path / "run"))


def exported(source: Path, out: Path, **more: Any) -> list[Exported]:
    return export(ExportConfig.model_validate({"source": source, "to": "saelens", "out": out, **more}))


def frequencies(folder: Path) -> NDArray[np.float32]:
    found = load_file(folder / SPARSITY)
    assert list(found) == ["sparsity"]
    assert found["sparsity"].dtype == torch.float32
    array: NDArray[np.float32] = found["sparsity"].numpy()
    return array


def one(run: Path, arch: str) -> Path:
    (saved,) = (each for each in find_saes(run) if each.name.startswith(f"{arch}-"))
    return saved.folder


def test_frequencies_are_those_that_saelens_loads_and_computes(counted: Path, tmp_path: Path) -> None:
    """golden/sparsity.py asked SAELens."""
    golden = read(ROOT / "tests/golden/sparsity.json")
    assert golden["rows"] == len(heldout_rows(counted))
    done = exported(counted, tmp_path)
    assert {each.name for each in done} == golden["saes"].keys()
    for each in done:
        found, said = frequencies(each.folder), golden["saes"][each.name]
        assert found.shape == (each.width,)
        np.testing.assert_allclose(found, said["loaded"], atol=2e-6)
        np.testing.assert_allclose(found, said["own"], atol=2e-6)
        assert not any("sparsity" in note for note in each.notes)


@pytest.mark.parametrize(
    ("arch", "form"), [*((arch, "auto") for arch in ARCHS), ("sa-gsae", "jumprelu"), ("sa-gsae", "bijumprelu")]
)
def test_every_form_counts_the_latents_that_it_has(counted: Path, tmp_path: Path, arch: str, form: str) -> None:
    """Two poles of a doubled form fire apart, and a latent with a sign fires with either."""
    (done,) = exported(one(counted, arch), tmp_path, form=form)
    f, _ = saelens_says(done.folder, heldout_rows(counted).astype(np.float64))
    share = (f != 0).mean(axis=0)
    assert done.width == {"gated": 24, "signed-topk": 24}.get(arch, 24 if form == "bijumprelu" else 48)
    np.testing.assert_allclose(frequencies(done.folder), np.log10(share + 1e-10), atol=2e-6)
    assert 0 < share.min() < share.max() < 1


def test_a_latent_that_never_fires(run: Path, tmp_path: Path) -> None:
    """It has -10, and cfg.json counts it as dead: the negative pole of one latent, both of another."""
    folder = one(run, "sa-gsae")
    sae = Autoencoder.load(folder)
    theta = sae.weights.named()["theta"]
    theta[1, 3] = theta[0, 5] = theta[1, 5] = 1e6
    sae.save(folder, {})
    evaluate(EvalConfig(run=run, device="cpu", ce=False))
    (done,) = exported(folder, tmp_path / "out")
    dead = np.flatnonzero(frequencies(done.folder) == -10)
    assert set(dead) >= {3 + 24, 5, 5 + 24}
    assert read(done.folder / "cfg.json")["metadata"]["num_dead_features"] == len(dead)


def test_an_evaluation_counts_the_same_again(run: Path) -> None:
    before = contents(run)
    evaluate(EvalConfig(run=run, device="cpu", ce=False))
    assert contents(run) == before
    assert "firings.safetensors" in before
    assert RunFolder(run).foreign_names() == []


@pytest.mark.parametrize("gone", ["evaluation.json", "firings.safetensors"])
def test_without_counts_there_is_no_file_and_a_line_says_so(run: Path, tmp_path: Path, gone: str) -> None:
    """An export deletes the file of an earlier export, which belongs to other weights."""
    exported(one(run, "sa-gsae"), tmp_path / "out", form="bijumprelu")
    (run / gone).unlink()
    with pytest.raises(UserError, match="--overwrite"):
        exported(one(run, "gated"), tmp_path / "out")
    (done,) = exported(one(run, "gated"), tmp_path / "out", overwrite=True)
    assert [note for note in done.notes if "sparsity" in note] == [
        "no sparsity.safetensors: firings of single latents were not counted. sagsae eval RUN counts them"
    ]
    assert contents(tmp_path / "out").keys() == {"cfg.json", "sae_weights.safetensors"}


def test_an_evaluation_of_an_earlier_version_has_no_counts(run: Path, tmp_path: Path) -> None:
    found = read_sealed(run / "evaluation.json")
    del found["firings"]
    write_sealed(run / "evaluation.json", found)
    (done,) = exported(one(run, "gated"), tmp_path / "out")
    assert not (done.folder / SPARSITY).exists()


def test_a_file_of_somebody_elses_is_in_the_way(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SPARSITY).write_text("mine")
    (run / "firings.safetensors").unlink()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="did not write it"):
            exported(one(run, "gated"), tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path / "out") == {SPARSITY: b"mine"}


NAME = "gated-24-lambda0.2-seed0"
COUNTS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "missing": ({}, f"does not count {NAME}"),
    "other width": ({"positive": torch.zeros(5, dtype=torch.int64)}, "has no 24 whole numbers"),
    "fractions": ({"negative": torch.zeros(24)}, "has no 24 whole numbers"),
    "below zero": ({"negative": torch.full((24,), -1)}, "counts fewer than 0"),
    "too many": ({"positive": torch.full((24,), 368)}, "more than all 367 held-out tokens"),
    "overflow": ({"positive": torch.full((24,), (1 << 63) - 1), "negative": torch.full((24,), 5)}, "more than all"),
}


@pytest.mark.parametrize("case", COUNTS)
def test_counts_that_cannot_be(run: Path, tmp_path: Path, case: str) -> None:
    """A run may come from anybody, with an evaluation.json that vouches for its file."""
    changes, message = COUNTS[case]
    zeros = torch.zeros(24, dtype=torch.int64)
    tensors = {f"{NAME}/{sign}": changes.get(sign, zeros).clone() for sign in ("positive", "negative")}
    vouched(run, tensors if changes else {"other/positive": zeros})
    with pytest.raises(DamagedError, match=message) as error:
        exported(run / NAME, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"Write it again: sagsae eval {run}")
    assert not (tmp_path / "out").exists()


def vouched(run: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, run / "firings.safetensors")
    digest = hashlib.sha256((run / "firings.safetensors").read_bytes()).hexdigest()
    write_sealed(run / "evaluation.json", {**read_sealed(run / "evaluation.json"), "firings": digest})


@pytest.mark.parametrize("change", ["a byte", "cut", "huge", "folder", "text"])
def test_counts_of_another_evaluation_are_refused(run: Path, tmp_path: Path, change: str) -> None:
    file = run / "firings.safetensors"
    data = file.read_bytes()
    if change == "folder":
        file.unlink()
        file.mkdir()
    elif change == "text":
        write_sealed(run / "evaluation.json", {**read_sealed(run / "evaluation.json"), "firings": [1]})
    else:
        end = {"a byte": data[:-1] + b"\1", "cut": data[:-8], "huge": (1 << 62).to_bytes(8, "little") + data[8:]}
        file.write_bytes(end[change])
    with pytest.raises((DamagedError, UserError), match=str(file)) as error:
        exported(run / NAME, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_leaves_the_evaluation_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(run)

    def check(path: Path) -> None:
        if "evaluation.json" in path.name:
            raise OSError(28, "No space left on device")

    before_each_file(monkeypatch, check)
    with pytest.raises(UserError, match="disk is full"):
        evaluate(EvalConfig(run=run, device="cpu", ce=False))
    assert contents(run) == before
    assert read_sealed(run / "evaluation.json")["firings"]
