"""`sagsae import`: each tool's autoencoders compute here what the tool's formulas say, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import foreign
from support.foreign import HOOK, MODEL, ForeignSAE

import train
from shared.exchange import ImportConfig
from train.autoencoder import Autoencoder
from train.exchange.bring import Imported, bring


def imported(found: ForeignSAE, out: Path, **asked: Any) -> tuple[Imported, Autoencoder]:
    done = bring(ImportConfig(source=found.place, out=out, **asked))
    return done, train.load(out)


def check_equal(found: ForeignSAE, sae: Autoencoder) -> None:
    """Codes and reconstructions to float32's precision, the same support. `train.load` read what was written."""
    x = found.x.float()
    code = sae.encode(x).double()
    wanted = found.code * found.norms
    scale = float(x.abs().max())
    assert torch.equal(code != 0, wanted != 0)
    assert 0 < int((wanted != 0).sum()) < wanted.numel()
    assert float((code - wanted).abs().max()) <= 2e-6 * max(scale, float(wanted.abs().max()))
    assert float((sae(x).double() - found.x_hat).abs().max()) <= 2e-6 * max(scale, float(found.x_hat.abs().max()))


@pytest.mark.parametrize("unit", [False, True], ids=["any norm", "norm one"])
@pytest.mark.parametrize("factor", [None, 0.37])
@pytest.mark.parametrize("centred", [True, False], ids=["b_dec on input", "not"])
@pytest.mark.parametrize("kind", foreign.TENSORS)
def test_saelens(tmp_path: Path, kind: str, centred: bool, factor: float | None, unit: bool) -> None:
    found = foreign.saelens(tmp_path / "theirs", kind, centred, factor, unit)
    done, sae = imported(found, tmp_path / "ours", norm_factor=factor)
    check_equal(found, sae)
    assert (done.tool, done.format, done.model, done.hook_name) == ("SAELens", kind, MODEL, HOOK)
    if "topk" not in kind:
        assert (sae.weights.W_dec.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["topk", "abstopk"])
def test_saelens_topk_by_the_norm_of_the_decoder(tmp_path: Path, kind: str) -> None:
    found = foreign.saelens(tmp_path / "theirs", kind, rescale=True)
    _, sae = imported(found, tmp_path / "ours")
    check_equal(found, sae)
    assert (sae.weights.W_dec.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", foreign.FORMULAS)
@pytest.mark.parametrize("unit", [False, True])
def test_dictionary_learning(tmp_path: Path, kind: str, unit: bool) -> None:
    found = foreign.dictionary_learning(tmp_path / "theirs", kind, unit=unit)
    done, sae = imported(found, tmp_path / "ours")
    check_equal(found, sae)
    assert (done.tool, done.format, done.model, done.hook_name) == ("dictionary_learning", kind, MODEL, HOOK)


def test_a_common_threshold_stays_one_where_rows_have_norm_one(tmp_path: Path) -> None:
    for unit, arch in ((True, "batch-topk"), (False, "jumprelu")):
        found = foreign.dictionary_learning(tmp_path / f"{unit}", "BatchTopKSAE", unit=unit)
        _, sae = imported(found, tmp_path / f"{unit}-ours")
        assert sae.config.arch == arch


@pytest.mark.parametrize(("k", "signed", "arch"), [(5, False, "topk"), (40, False, "relu"), (5, True, "signed-topk")])
def test_sparsify(tmp_path: Path, k: int, signed: bool, arch: str) -> None:
    found = foreign.sparsify(tmp_path / "layers.3", k, signed=signed)
    done, sae = imported(found, tmp_path / "ours")
    check_equal(found, sae)
    assert (sae.config.arch, done.hook_name) == (arch, HOOK)


@pytest.mark.parametrize(
    ("name", "lower", "hook"),
    [
        ("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_71/params.npz", False, HOOK),
        ("resid_post/layer_3_width_16k_l0_medium/params.safetensors", True, HOOK),
        ("embedding/width_4k/average_l0_6/params.npz", False, None),
        ("somewhere/params.npz", True, None),
    ],
)
def test_gemma_scope(tmp_path: Path, name: str, lower: bool, hook: str | None) -> None:
    found = foreign.gemma_scope(tmp_path / name, lower)
    done, sae = imported(found, tmp_path / "ours")
    check_equal(found, sae)
    assert (sae.config.arch, done.hook_name) == ("jumprelu", hook)


def test_openai(tmp_path: Path) -> None:
    found = foreign.openai(tmp_path / "3.pt")
    _, sae = imported(found, tmp_path / "ours")
    check_equal(found, sae)


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_llamascopium(tmp_path: Path, kind: str, by_norm: bool) -> None:
    found = foreign.llamascopium(tmp_path / "theirs", kind, by_norm)
    done, sae = imported(found, tmp_path / "ours")
    check_equal(found, sae)
    assert done.hook_name == HOOK
