"""`sagsae import`: each tool's autoencoders compute here what the tool's formulas say, in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.foreign import saes as foreign
from support.foreign.saes import HOOK, MODEL, ForeignSAE

import train
from shared.errors import UserError
from shared.schemas.exchange import ImportConfig
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_data_types(tmp_path: Path, dtype: torch.dtype) -> None:
    found = foreign.saelens(tmp_path / "theirs", "jumprelu", dtype=dtype)
    done, sae = imported(found, tmp_path / "ours")
    check_equal(found, sae)
    assert done.notes[0] == f"its weights were {str(dtype).removeprefix('torch.')}, and are float32 here"


def test_thresholds_below_zero_are_zero(tmp_path: Path) -> None:
    threshold = torch.linspace(-1, 1, foreign.D_SAE)
    found = foreign.saelens(tmp_path / "theirs", "jumprelu", changes={"threshold": threshold})
    done, sae = imported(found, tmp_path / "ours")
    check_equal(found, sae)
    assert float(sae.state_dict()["theta"].min()) == 0
    assert "20 thresholds below 0 are 0 here" in done.notes[-1]


@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu"])
def test_a_decoder_row_of_zeros_never_fires(tmp_path: Path, kind: str) -> None:
    """The norm of its row is 0, and so is the tool's latent times that norm; x̂ does not change."""
    W_dec = foreign.draws(0)["W_dec"]
    W_dec[[3, 7]] = 0
    found = foreign.saelens(tmp_path / "theirs", kind, changes={"W_dec": W_dec})
    done, sae = imported(found, tmp_path / "ours")
    assert bool((found.code[:, 3] > 0).any() | (found.code[:, 7] > 0).any())
    check_equal(found, sae)
    assert not bool(sae.encode(found.x.float())[:, [3, 7]].any())
    assert "2 latents have a decoder row of zeros, and never fire here" in done.notes


def test_a_folder_of_before_saelens_6(tmp_path: Path) -> None:
    """Metadata beside the settings, other names, no architecture, and a tensor of ones."""
    for kind, more in (("standard", {}), ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}})):
        found = foreign.saelens(tmp_path / kind, kind)
        cfg: dict[str, Any] = {"d_in": foreign.D_IN, "d_sae": foreign.D_SAE, "hook_point": HOOK, "model_name": MODEL}
        cfg |= {"normalize_activations": False, "finetuning_scaling_factor": False, "hook_point_layer": 3, **more}
        (tmp_path / kind / "cfg.json").write_text(json.dumps(cfg))
        weights = load_file(tmp_path / kind / "sae_weights.safetensors")
        save_file({**weights, "scaling_factor": torch.ones(foreign.D_SAE)}, tmp_path / kind / "sae_weights.safetensors")
        done, sae = imported(found, tmp_path / f"{kind}-ours")
        check_equal(found, sae)
        assert (done.format, done.model, done.hook_name) == (kind, MODEL, HOOK)


@pytest.mark.parametrize("kind", foreign.FORMULAS)
@pytest.mark.parametrize("unit", [False, True])
def test_dictionary_learning(tmp_path: Path, kind: str, unit: bool) -> None:
    found = foreign.dictionary_learning(tmp_path / "theirs", kind, unit=unit)
    done, sae = imported(found, tmp_path / "ours")
    check_equal(found, sae)
    assert (done.tool, done.format, done.model, done.hook_name) == ("dictionary_learning", kind, MODEL, HOOK)


def test_dictionary_learning_of_before_k_was_a_tensor(tmp_path: Path) -> None:
    found = foreign.dictionary_learning(tmp_path / "theirs", "AutoEncoderTopK")
    stored = torch.load(tmp_path / "theirs/ae.pt", weights_only=True)
    del stored["k"], stored["threshold"]
    torch.save(stored, tmp_path / "theirs/ae.pt")
    with pytest.raises(UserError, match="lacks k; AutoEncoderTopK"):
        imported(found, tmp_path / "ours")
    cfg = json.loads((tmp_path / "theirs/config.json").read_text())
    cfg["trainer"]["k"] = 5
    (tmp_path / "theirs/config.json").write_text(json.dumps(cfg))
    check_equal(found, imported(found, tmp_path / "ours")[1])


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
        ("gemma-scope-9b-it-att/layer_3/width_16k/average_l0_71/params.npz", False, "blocks.3.attn.hook_z"),
        ("attn_out/layer_3_width_16k_l0_medium/params.safetensors", True, "blocks.3.attn.hook_z"),
        ("embedding/width_4k/average_l0_6/params.npz", False, "hook_embed"),
        ("somewhere/params.npz", True, None),
    ],
)
def test_gemma_scope(tmp_path: Path, name: str, lower: bool, hook: str | None) -> None:
    found = foreign.gemma_scope(tmp_path / name, lower)
    done, sae = imported(found, tmp_path / "ours")
    check_equal(found, sae)
    assert (sae.config.arch, done.hook_name) == ("jumprelu", hook)
    models = {"gemma-scope-2b-pt-res": "google/gemma-2-2b", "gemma-scope-9b-it-att": "google/gemma-2-9b-it"}
    assert done.model == models.get(name.partition("/")[0])


def test_the_second_gemma_scope_says_its_model(tmp_path: Path) -> None:
    place = tmp_path / "resid_post_all" / "layer_3_width_16k_l0_small" / "params.safetensors"
    foreign.gemma_scope(place, lower=True)
    said = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.3.output",
    }
    (place.parent / "config.json").write_text(json.dumps(said))
    done = bring(ImportConfig(source=place.parent, out=tmp_path / "ours"))
    assert (done.model, done.hook_name) == ("google/gemma-3-1b-pt", HOOK)
    for wrong, message in (
        ({"hf_hook_point_out": "model.layers.3.mlp.output"}, "is a transcoder"),
        ({"architecture": "topk"}, "has the architecture 'topk' in its config.json"),
        ({"model_name": 5}, "model_name is 5 instead of a text"),
    ):
        (place.parent / "config.json").write_text(json.dumps({**said, **wrong}))
        with pytest.raises(UserError, match=message):
            bring(ImportConfig(source=place.parent, out=tmp_path / "more"))


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
