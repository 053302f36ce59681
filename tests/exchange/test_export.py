"""Exported autoencoders against what the tools compute from their files, and against what the files have to hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.exchange import ABOUT, SAYS, check_equal, read, rows, save
from support.variants import D_IN, D_SAE, VARIANTS

from shared.errors import UserError
from shared.schemas.exchange import ExportConfig
from train.autoencoder import Autoencoder
from train.exchange.export import Exported, export

GATED = "sa-gsae|r tied|untied|one-sided|gated|gated, free decoder".split("|")
SIGNED_GATED = ["sa-gsae", "r tied", "untied"]
THRESHOLDS = [*GATED, "relu", "jumprelu", "batch-topk", "abs-topk"]
CASES = [
    *(("saelens", name, "auto") for name in VARIANTS),
    *(("saelens", name, "gated") for name in GATED),
    *(("saelens", name, "jumprelu") for name in THRESHOLDS),
    *(("saelens", name, "bijumprelu") for name in [*SIGNED_GATED, "abs-topk"]),
    ("saelens", "relu", "standard"),
    ("saelens", "topk", "topk"),
    *(("dictionary-learning", name, "auto") for name in VARIANTS),
    *(("dictionary-learning", name, "jumprelu") for name in THRESHOLDS),
    ("dictionary-learning", "batch-topk", "batch-topk"),
    ("sparsify", "relu", "auto"),
    ("sparsify", "topk", "auto"),
    *(("gemma-scope", name, "auto") for name in THRESHOLDS),
]
SAELENS = {
    "relu": "standard", "jumprelu": "jumprelu", "batch-topk": "jumprelu", "abs-topk": "jumprelu", "topk": "topk",
    "signed-topk": "abstopk",
}  # fmt: skip
AUTO = {
    "saelens": dict.fromkeys(VARIANTS, "gated") | SAELENS,
    "dictionary-learning": dict.fromkeys(VARIANTS, "gated")
    | SAELENS
    | {"batch-topk": "batch-topk", "abs-topk": "batch-topk", "signed-topk": "topk"},
    "sparsify": dict.fromkeys(VARIANTS, "topk"),
    "gemma-scope": dict.fromkeys(VARIANTS, "jumprelu"),
}


def one(folder: Path, tool: str, **more: Any) -> Exported:
    (done,) = export(ExportConfig.model_validate({"source": folder, "to": tool, "out": folder.parent / "out", **more}))
    return done


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("tool", "name", "form"), CASES)
def test_a_tool_computes_the_same_function(tmp_path: Path, tool: str, name: str, form: str) -> None:
    sae, x = save(tmp_path / "sae", name), rows()
    done = one(tmp_path / "sae", tool, form=form)
    assert done.form == (AUTO[tool][name] if form == "auto" else form)
    doubles = sae.signed and done.form not in ("bijumprelu", "abstopk")
    assert done.width == D_SAE * (2 if doubles else 1)
    scaled = tool == "dictionary-learning" and name.startswith(("gated, free", "free"))
    norms = sae.weights.W_dec.double().norm(dim=1).numpy() if scaled else 1.0
    folder = done.folder / "layers.2" if tool == "sparsify" else done.folder
    check_equal(sae, x, SAYS[tool](folder, x.double().numpy()), norms)


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, "auto") for name in VARIANTS]
    + [(name, "jumprelu") for name in GATED]
    + [(name, "bijumprelu") for name in SIGNED_GATED],
)
def test_saelens_without_b_dec_on_its_input(tmp_path: Path, name: str, form: str) -> None:
    sae, x = save(tmp_path / "sae", name), rows()
    done = one(tmp_path / "sae", "saelens", form=form, fold_b_dec=True)
    assert read(done.folder / "cfg.json")["apply_b_dec_to_input"] is False
    check_equal(sae, x, SAYS["saelens"](done.folder, x.double().numpy()))


@pytest.mark.parametrize("name", ["sa-gsae", "untied", "gated"])
def test_the_gated_form_changes_no_number_but_signs(tmp_path: Path, name: str) -> None:
    sae = save(tmp_path / "sae", name)
    w, found = sae.weights.named(), load_file(one(tmp_path / "sae", "saelens").folder / "sae_weights.safetensors")
    poles = 2 if sae.signed else 1
    for pole, sign in enumerate((1, -1)[:poles]):
        mine = slice(pole * D_SAE, (pole + 1) * D_SAE)
        assert np.array_equal(found["W_enc"][:, mine], sign * w["W_enc"].T.numpy())
        assert np.array_equal(found["W_dec"][mine], sign * w["W_dec"].numpy())
        for theirs, ours, turned in (("b_gate", "theta", -1), ("r_mag", "r", 1), ("b_mag", "b", 1)):
            assert np.array_equal(found[theirs][mine], turned * w[ours][min(pole, len(w[ours]) - 1)].numpy())
    assert np.array_equal(found["b_dec"], w["b_dec"].numpy())


def test_decoder_rows_are_unit_where_the_format_wants_them(tmp_path: Path) -> None:
    sae = save(tmp_path / "sae", "gated, free decoder")
    dead = sae.weights.named()
    dead["W_dec"][3] = 0.0  # has no direction
    Autoencoder(sae.config, type(sae.weights)(**dead), sae.scale).save(tmp_path / "sae", ABOUT)
    done = one(tmp_path / "sae", "dictionary-learning")
    assert "norm one" in done.notes[0]
    tensors = torch.load(done.folder / "ae.pt", weights_only=True)
    norms = tensors["decoder.weight"].norm(dim=0)
    assert (norms - 1).abs().max() < 1e-6
    f, _ = SAYS["dictionary-learning"](done.folder, rows().double().numpy())
    assert f[:, 3].max() == 0
    assert len(set(norms.tolist())) < D_SAE
    kept = load_file(one(tmp_path / "sae", "saelens", out=tmp_path / "s").folder / "sae_weights.safetensors")
    assert np.array_equal(kept["W_dec"], dead["W_dec"].numpy())


@pytest.mark.parametrize(("name", "form"), [(name, "jumprelu") for name in GATED] + [("untied", "bijumprelu")])
def test_thresholds_where_the_offset_decides(tmp_path: Path, name: str, form: str) -> None:
    """With b far below zero a latent is active where eʳa + b is above zero, whatever θ is; with a θ below zero too."""
    sae = save(tmp_path / "sae", name)
    w = sae.weights.named()
    w["b"][:, ::2] = -2 * (w["r"].exp() * w["theta"]).amax()
    if not sae.signed:
        w["theta"][:, ::3] *= -1
    changed = Autoencoder(sae.config, type(sae.weights)(**w), sae.scale)
    changed.save(tmp_path / "sae", ABOUT)
    done, x = one(tmp_path / "sae", "saelens", form=form), rows()
    tensors = load_file(done.folder / "sae_weights.safetensors")
    if form == "jumprelu":
        assert tensors["threshold"].min() == 0
        assert tensors["threshold"].max() > 1
    check_equal(changed, x, SAYS["saelens"](done.folder, x.double().numpy()))


# what the files hold


def test_every_member_of_saelens_description(tmp_path: Path) -> None:
    save(tmp_path / "sae", "sa-gsae")
    done = one(tmp_path / "sae", "saelens")
    assert files_of(done.folder) == {"cfg.json", "sae_weights.safetensors"}
    cfg = read(done.folder / "cfg.json")
    metadata = cfg.pop("metadata")
    ours = metadata.pop("sagsae")
    assert cfg == {
        "architecture": "gated", "d_in": D_IN, "d_sae": 2 * D_SAE, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
    }  # fmt: skip
    assert metadata == {
        "sae_lens_version": "6.54.12", "sae_lens_training_version": None, "model_name": "EleutherAI/pythia-1b",
        "model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {},
        "hook_name": "blocks.2.hook_resid_post", "hf_hook_name": "gpt_neox.layers.2", "hook_head_index": None,
        "context_size": 128, "prepend_bos": True, "dataset_path": "owner/texts", "seqpos_slice": [1, None],
        "exclude_special_tokens": True, "l0": None, "r2": None, "num_dead_features": None,
    }  # fmt: skip
    assert ours["pairs"] == "i, i + d_sae/2"
    assert (ours["arch"], ours["d_sae"], ours["tie"], ours["lambda"]) == ("sa-gsae", D_SAE, "symmetric", 0.1)
    assert ours["sagsae_version"]


@pytest.mark.parametrize("name", ["gated", "topk"])
def test_there_are_no_pairs_without_signs(tmp_path: Path, name: str) -> None:
    save(tmp_path / "sae", name)
    cfg = read(one(tmp_path / "sae", "saelens").folder / "cfg.json")
    assert cfg["metadata"]["sagsae"]["pairs"] is None
    assert cfg["d_sae"] == D_SAE
    assert (cfg.get("k"), cfg.get("rescale_acts_by_decoder_norm")) == ((4, True) if name == "topk" else (None, None))


def test_heads_are_reshaped(tmp_path: Path) -> None:
    save(tmp_path / "sae", "gated", {"hook_name": "blocks.3.attn.hook_z"})
    cfg = read(one(tmp_path / "sae", "saelens").folder / "cfg.json")
    assert cfg["reshape_activations"] == "hook_z"
    assert cfg["metadata"]["hf_hook_name"] == "gpt_neox.layers.3.attention.dense.input"


def test_the_class_for_signed_latents_lies_beside_them(tmp_path: Path) -> None:
    save(tmp_path / "sae", "untied")
    done = one(tmp_path / "sae", "saelens", form="bijumprelu")
    assert files_of(done.folder) == {"cfg.json", "sae_weights.safetensors", "sagsae_bijumprelu.py"}
    compile((done.folder / "sagsae_bijumprelu.py").read_text(encoding="utf-8"), "class", "exec")
    assert read(done.folder / "cfg.json")["metadata"]["sagsae"]["pairs"] is None


def test_dictionary_learning_description(tmp_path: Path) -> None:
    save(tmp_path / "sae", "abs-topk")
    done = one(tmp_path / "sae", "dictionary-learning")
    assert files_of(done.folder) == {"config.json", "ae.pt"}
    cfg = read(done.folder / "config.json")
    assert cfg["trainer"] == {
        "dict_class": "BatchTopKSAE", "trainer_class": "BatchTopKTrainer", "activation_dim": D_IN,
        "dict_size": 2 * D_SAE, "layer": 2, "lm_name": "EleutherAI/pythia-1b",
        "submodule_name": "resid_post_layer_2", "k": 4,
    }  # fmt: skip
    assert cfg["buffer"] == {"ctx_len": 128, "d_submodule": D_IN}
    tensors = torch.load(done.folder / "ae.pt", weights_only=True)
    assert {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()} == {
        "encoder.weight": (torch.float32, (2 * D_SAE, D_IN)), "decoder.weight": (torch.float32, (D_IN, 2 * D_SAE)),
        "encoder.bias": (torch.float32, (2 * D_SAE,)), "b_dec": (torch.float32, (D_IN,)),
        "k": (torch.int32, ()), "threshold": (torch.float32, ()),
    }  # fmt: skip


def test_sparsify_description(tmp_path: Path) -> None:
    save(tmp_path / "sae", "relu", {"hook_name": "blocks.2.hook_mlp_out"})
    done = one(tmp_path / "sae", "sparsify")
    folder = "layers.2.mlp"
    inside = {f"{folder}/{name}" for name in ("cfg.json", "sae.safetensors", "sagsae.json")}
    assert files_of(done.folder) == {"config.json", *inside}
    assert read(done.folder / folder / "sagsae.json")["sagsae"]["pairs"] is None
    assert read(done.folder / folder / "cfg.json") == {
        "activation": "topk", "expansion_factor": D_SAE // D_IN, "normalize_decoder": True, "num_latents": D_SAE,
        "k": D_SAE, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN,
    }  # fmt: skip
    root = read(done.folder / "config.json")
    assert (root["model"], root["dataset"], root["ctx_len"]) == ("EleutherAI/pythia-1b", "owner/texts", 128)


def test_what_is_not_known_is_null_and_said(tmp_path: Path) -> None:
    save(tmp_path / "sae", "gated")
    rewrite = {key: value for key, value in read(tmp_path / "sae/cfg.json").items() if key not in (*ABOUT, "crc32c")}
    (tmp_path / "sae/cfg.json").write_text(json.dumps(rewrite))
    done = one(tmp_path / "sae", "saelens")
    metadata = read(done.folder / "cfg.json")["metadata"]
    names = ["model_name", "hook_name", "context_size", "prepend_bos", "dataset_path"]
    assert [metadata[name] for name in names] == [None] * 5
    assert done.notes[0].endswith(", ".join(names))


def test_no_path_of_this_machine_leaves_it(tmp_path: Path) -> None:
    save(tmp_path / "sae", "gated", {"model": {"name": "/home/me/models/small", "commit": "1", "local": True}})
    done = one(tmp_path / "sae", "saelens")
    assert "/home/me" not in (done.folder / "cfg.json").read_text()
    assert read(done.folder / "cfg.json")["metadata"]["model_name"] == "small"


# refusals


REFUSED = [
    ("sa-gsae", {"to": "saelens", "form": "standard"}, "--form standard: .* gated, jumprelu, bijumprelu"),
    ("gated", {"to": "saelens", "form": "bijumprelu"}, "can be written for saelens as gated, jumprelu$"),
    ("topk", {"to": "saelens", "form": "jumprelu"}, "as topk$"),
    ("topk", {"to": "gemma-scope"}, "gemma-scope cannot say topk"),
    ("gated", {"to": "gemma-scope", "form": "gated"}, "as jumprelu$"),
    ("sa-gsae", {"to": "sparsify"}, "has thresholds, and sparsify .* --approximate-topk K"),
    ("batch-topk", {"to": "sparsify", "approximate_topk": 49}, "--approximate-topk 49: .* has 48 latents"),
    ("relu", {"to": "sparsify", "form": "jumprelu"}, "sparsify knows topk only"),
]


@pytest.mark.parametrize(("name", "asked", "message"), REFUSED)
def test_what_a_format_cannot_say_is_refused(tmp_path: Path, name: str, asked: dict[str, Any], message: str) -> None:
    save(tmp_path / "sae", name)
    with pytest.raises(UserError, match=message):
        one(tmp_path / "sae", asked["to"], **{key: value for key, value in asked.items() if key != "to"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tool", "hook"),
    [
        ("dictionary-learning", "blocks.2.hook_mlp_out"),
        ("dictionary-learning", None),
        ("sparsify", "blocks.2.attn.hook_z"),
        ("sparsify", "blocks.2.hook_resid_mid"),
        ("sparsify", None),
    ],
)
def test_a_hookpoint_that_the_files_cannot_name(tmp_path: Path, tool: str, hook: str | None) -> None:
    save(tmp_path / "sae", "relu", {"hook_name": hook})
    with pytest.raises(UserError, match=r"Export it to saelens, or write it.* with --force"):
        one(tmp_path / "sae", tool)
    done = one(tmp_path / "sae", tool, force=True)
    assert len(done.notes) == 1
    assert files_of(done.folder)


@pytest.mark.parametrize("asked", [{"to": "sparsify", "fold_b_dec": True}, {"to": "saelens", "approximate_topk": 3}])
def test_options_of_another_tool_are_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is for --to"):
        ExportConfig.model_validate({"source": tmp_path, "out": tmp_path, **asked})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hook_name", 3), ("hook_name", "x" * 5000), ("context", "many"), ("context", 1 << 40), ("model", "tiny"),
        ("model", {"name": None}), ("model", {"name": "a", "local": "yes"}), ("corpus", ["a"]),
        ("exclude_special", "no"), ("exclude_positions", {"0": 1}),
    ],
)  # fmt: skip
def test_a_description_with_wrong_values_is_one_message(tmp_path: Path, key: str, value: Any) -> None:
    save(tmp_path / "sae", "gated", {key: value})
    with pytest.raises(UserError, match=key.split("_", maxsplit=1)[0]):
        one(tmp_path / "sae", "saelens")
    assert not (tmp_path / "out").exists()
