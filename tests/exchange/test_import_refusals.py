"""What `sagsae import` refuses, each with one sentence and exit code 2, and that nothing is written then."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import Sagsae
from support.exchange import save
from support.foreign import saes as foreign
from support.foreign.saes import D_IN, D_SAE

import train
from shared.errors import UserError
from shared.schemas.exchange import ExportConfig, ImportConfig
from train.exchange.bring import bring
from train.exchange.export import export
from train.exchange.saved import SavedSAE


def refusal(source: Path, **asked: Any) -> str:
    """The message; it is one line, and nothing was written."""
    out = source.absolute().parent / "not-written"
    with pytest.raises(UserError) as caught:
        bring(ImportConfig.model_validate({"source": source, "out": out, **asked}))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert not out.exists()
    assert not list(source.absolute().parent.glob(".not-written*"))
    return message


def change_cfg(folder: Path, name: str = "cfg.json", **members: Any) -> Path:
    cfg = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**cfg, **members}))
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = "sae_weights") -> Path:
    path = folder / f"{name}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


# SAELens


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"architecture": "transcoder"}, "says architecture transcoder, which is not read: it predicts other"),
        ({"architecture": "jumprelu_skip_transcoder"}, "predicts other activations"),
        ({"architecture": "temporal"}, "depends on earlier tokens"),
        ({"architecture": "clt"}, "reads one layer and writes to several"),
        ({"architecture": "matching_pursuit"}, "found by iteration"),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"architecture": "new"}, "architecture is 'new' instead of standard or gated"),
        ({"architecture": 5}, "architecture is 5 instead of a text"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm', which divides each token by its own length"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale'"),
        ({"normalize_activations": "expected_average_only_in"}, "Give --norm-factor"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes' instead of true or false"),
        ({"activation_fn_str": "tanh-relu"}, "says activation_fn 'tanh-relu'"),
        ({"finetuning_scaling_factor": True}, "has finetuning_scaling_factor"),
        ({"d_sae": 41}, "says d_sae 41, and sae_weights.safetensors has 40"),
        ({"metadata": []}, "metadata is [] instead of an object"),
        ({"metadata": {"hook_head_index": 3}}, "reads head 3 alone"),
        ({"metadata": {"hook_name": "a", "hook_name_out": "b"}}, "is a transcoder"),
        ({"metadata": {"model_name": "x" * 1000}}, "model_name has 1,000 characters"),
        ({"metadata": {"context_size": -1}}, "context_size is -1 instead of an integer"),
    ],
)
def test_saelens_settings(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    foreign.saelens(tmp_path / "theirs", "standard")
    found = refusal(change_cfg(tmp_path / "theirs", **members))
    assert found.startswith(f"{tmp_path / 'theirs' / 'cfg.json'}: ")
    assert message in found


@pytest.mark.parametrize("k", [None, 0, 41, 5.0, True, "5"])
def test_saelens_k(tmp_path: Path, k: Any) -> None:
    foreign.saelens(tmp_path / "theirs", "topk")
    assert "k is" in refusal(change_cfg(tmp_path / "theirs", k=k))


def test_the_factor_is_refused_where_there_is_none(tmp_path: Path) -> None:
    foreign.saelens(tmp_path / "theirs", "standard")
    assert "Leave --norm-factor out" in refusal(tmp_path / "theirs", norm_factor=2.0)
    foreign.sparsify(tmp_path / "layers.3")
    assert "--norm-factor: is SAELens'" in refusal(tmp_path / "layers.3", norm_factor=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("b_gate"), "lacks b_gate; a SAELens autoencoder of architecture gated has W_enc, W_dec"),
        (lambda w: w.update(extra=torch.ones(2)), "has the tensor 'extra', which a SAELens autoencoder"),
        (lambda w: w.update({"\x1b[2J": torch.ones(2)}), r"has the tensor '\x1b[2J', which"),
        (lambda w: w["W_enc"].fill_(float("nan")), "has NaN or infinities in W_enc"),
        (lambda w: w["b_mag"][3:4].fill_(float("inf")), "has NaN or infinities in b_mag"),
        (lambda w: w["r_mag"].fill_(81.0), "has r_mag up to 81, whose exponential"),
        (lambda w: w.update(W_dec=w["W_dec"].double().mul(1e60)), "has NaN or infinities in W_dec"),
        (lambda w: w["W_enc"].fill_(3e38), "leaves the range of float32"),
        (lambda w: w.update(b_gate=torch.ones(3)), "has b_gate of shape [3] instead of d_sae (40)"),
        (lambda w: w.update(b_dec=torch.ones(1, D_IN)), "has b_dec of shape [1, 12] instead of d_in (12)"),
        (lambda w: w.update(W_enc=w["W_enc"].T.contiguous()), "has W_dec of shape [40, 12] instead of d_sae (12)"),
        (lambda w: w.update(scaling_factor=torch.full((D_SAE,), 2.0)), "has finetuning_scaling_factor"),
        (lambda w: w.update(W_enc=torch.ones(0, D_SAE)), "has W_enc of shape [0, 40] instead of d_in x d_sae"),
    ],
)  # fmt: skip
def test_saelens_tensors(tmp_path: Path, change: Any, message: str) -> None:
    foreign.saelens(tmp_path / "theirs", "gated")
    assert message in refusal(change_tensors(tmp_path / "theirs", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("threshold_neg"), "lacks threshold_neg; a SAELens autoencoder of architecture bijumprelu has"),
        (lambda w: w.update(r_mag=torch.ones(48)), "has the tensor 'r_mag', which a SAELens autoencoder"),
        (lambda w: w["slope_neg"].fill_(float("nan")), "has NaN or infinities in slope_neg"),
        (lambda w: w["threshold_neg"][2:3].fill_(float("inf")), "has NaN or infinities in threshold_neg"),
        (lambda w: w.update(slope_neg=torch.ones(47)), "has slope_neg of shape [47] instead of d_sae (48)"),
        (lambda w: w.update(offset_pos=torch.ones(2, 24)), "has offset_pos of shape [2, 24] instead of d_sae (48)"),
        (lambda w: w["slope_neg"][1:2].fill_(0.0), "has slope_neg from 0 to "),
        (lambda w: w["slope_neg"][1:2].fill_(-1.0), "has slope_neg from -1 to "),
        (lambda w: w["slope_neg"][1:2].fill_(1e31), "slopes from 1e-30 to 1e+30 are read"),
        (lambda w: w["slope_neg"].fill_(1e-38), "has slope_neg from 1e-38 to 1e-38"),
        (lambda w: w["offset_neg"][4:5].fill_(-1e9), "a pole would have values of the other sign"),
        (lambda w: w["b_enc"][4:5].fill_(1e9), "both poles of a latent could be active at once"),
        (lambda w: w["b_enc"][4:5].fill_(-1e9), "both poles of a latent could be active at once"),
        (lambda w: (w["threshold_pos"].fill_(-1.0), w["offset_pos"].fill_(2.0)), "both poles of a latent could be"),
        (lambda w: (w["threshold_neg"].fill_(3e38), w["slope_neg"].fill_(1e-9)), "leaves the range of float32"),
    ],
)  # fmt: skip
def test_bijumprelu_tensors(tmp_path: Path, change: Any, message: str) -> None:
    save(tmp_path / "sae", "untied")
    export(ExportConfig(source=tmp_path / "sae", to="saelens", form="bijumprelu", out=tmp_path / "theirs"))
    assert message in refusal(change_tensors(tmp_path / "theirs", change))


# the others


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"trainer": None}, "trainer is None instead of an object"),
        ({"trainer": {"dict_class": "CrossCoder"}}, "dict_class is 'CrossCoder' instead of AutoEncoder"),
        ({"trainer": {"dict_class": "GatedAutoEncoder"}}, "lacks decoder_bias"),
        ({"trainer": {"dict_class": "AutoEncoder", "dict_size": 41}}, "says dict_size 41, and ae.pt has 40"),
        ({"trainer": {"dict_class": "AutoEncoder", "lm_name": 5}}, "lm_name is 5 instead of a text"),
    ],
)
def test_dictionary_learning(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    foreign.dictionary_learning(tmp_path / "theirs", "AutoEncoder")
    found = refusal(change_cfg(tmp_path / "theirs", "config.json", **members))
    assert message in found.replace("gate_bias, mag_bias, r_mag, ", "")


def test_batch_topk_without_a_threshold(tmp_path: Path) -> None:
    foreign.dictionary_learning(tmp_path / "theirs", "BatchTopKSAE", common=torch.tensor(-1.0))
    assert "has the threshold -1: its training ended before threshold_start_step" in refusal(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"transcode": True}, "says transcode"),
        ({"skip_connection": True}, "says skip_connection"),
        ({"embed_skip": True}, "says embed_skip"),
        ({"gram_lookup": True}, "says gram_lookup"),
        ({"activation": "groupmax"}, "says activation 'groupmax'; only topk is read"),
        ({"k": 0}, "k is 0"),
        ({"d_in": 13}, "says d_in 13"),
        ({"num_latents": 41}, "says num_latents 41"),
    ],
)
def test_sparsify(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    foreign.sparsify(tmp_path / "layers.3")
    assert message in refusal(change_cfg(tmp_path / "layers.3", **members))


def test_transcoders_of_gemma_scope(tmp_path: Path) -> None:
    """The tensors are those of an autoencoder; the second version adds one, the first says it in the path alone."""
    place = tmp_path / "resid_post" / "params.safetensors"
    foreign.gemma_scope(place, lower=True)
    change_tensors(place.parent, lambda w: w.update(affine_skip_connection=torch.eye(D_IN)), "params")
    assert "is a transcoder" in refusal(place)
    foreign.gemma_scope(tmp_path / "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_5/params.npz")
    assert "is a transcoder" in refusal(tmp_path / "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_5")


def test_openai_version_5(tmp_path: Path) -> None:
    foreign.openai(tmp_path / "5.pt", activation="TopK", activation_state_dict={"k": 32, "postact_fn": "ReLU"})
    assert "has TopK (version 5), which divides each token" in refusal(tmp_path / "5.pt")
    foreign.openai(tmp_path / "i.pt", activation="Identity")
    assert "has the activation 'Identity'; ReLU is read" in refusal(tmp_path / "i.pt")
    foreign.openai(tmp_path / "o.pt", optimizer={"lr": 1})
    assert "has 'optimizer', which no autoencoder of OpenAI has" in refusal(tmp_path / "o.pt")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"norm_activation": "dataset-wise"}, "says norm_activation 'dataset-wise'; only inference is read"),
        ({"norm_activation": "token-wise"}, "'token-wise'"),
        ({"hook_point_out": "blocks.3.hook_mlp_out"}, "predicts other activations"),
        ({"sae_type": "lorsa"}, "is a 'lorsa'"),
        ({"use_glu_encoder": True}, "has use_glu_encoder"),
        ({"act_fn": "batchtopk"}, "act_fn is 'batchtopk' instead of relu or jumprelu or topk"),
        ({"use_decoder_bias": False}, "has the tensor 'b_D'"),
    ],
)
def test_llamascopium(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    foreign.llamascopium(tmp_path / "theirs", "relu")
    assert message in refusal(change_cfg(tmp_path / "theirs", "config.json", **members))


# whose it is


def test_a_folder_of_another_tool(tmp_path: Path) -> None:
    foreign.saelens(tmp_path / "theirs", "standard")
    assert refusal(tmp_path / "theirs", format="sparsify") == (
        f"--format sparsify: {tmp_path / 'theirs'} is of SAELens (cfg.json and sae_weights.safetensors), not of "
        "sparsify. Leave --format out"
    )


def test_nothing_that_is_known(tmp_path: Path) -> None:
    assert "is no folder or file here" in refusal(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refusal(empty)
    assert message.startswith(f"{empty}: holds nothing, and none of: cfg.json, sae_weights.safetensors (SAELens); ")
    for tool in ("sparsify", "dictionary_learning", "Gemma Scope", "Llamascopium", "OpenAI"):
        assert f"({tool})" in message
    foreign.saelens(tmp_path / "repository/layer_3", "standard")
    assert f"Give one of its folders, such as {tmp_path / 'repository/layer_3'}" in refusal(tmp_path / "repository")
    (tmp_path / "a.txt").write_text("text")
    assert "holds" in refusal(tmp_path / "a.txt")


def test_our_own_folder_and_llama_scope(tmp_path: Path) -> None:
    save(tmp_path / "sae", "relu")
    assert "is sagsae's own folder already" in refusal(tmp_path / "sae")
    (tmp_path / "llama/checkpoints").mkdir(parents=True)
    (tmp_path / "llama/hyperparams.json").write_text("{}")
    assert "is Llama Scope" in refusal(tmp_path / "llama")


def test_a_file_stands_for_its_folder(tmp_path: Path) -> None:
    for number, (name, source) in enumerate(
        [
            ("cfg.json", foreign.saelens(tmp_path / "a", "standard").place),
            ("sae_weights.safetensors", tmp_path / "a"),
            ("ae.pt", foreign.dictionary_learning(tmp_path / "b", "AutoEncoder").place),
        ]
    ):
        bring(ImportConfig(source=source / name, out=tmp_path / f"{number}"))
        assert train.load(tmp_path / f"{number}").config.arch == "relu"


# the folder that is written


def test_nothing_of_anybody_is_replaced(tmp_path: Path) -> None:
    foreign.saelens(tmp_path / "theirs", "standard")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    save(tmp_path / "trained", "relu")
    (tmp_path / "link").symlink_to(other)
    (tmp_path / "file").write_text("mine")
    before = (tmp_path / "trained/cfg.json").read_bytes()
    for out in (other, tmp_path / "trained", tmp_path / "link", tmp_path / "file"):
        with pytest.raises(UserError, match="Choose another --out"):
            bring(ImportConfig(source=tmp_path / "theirs", out=out, overwrite=True))
    assert (other / "notes.txt").read_text() == "mine"
    assert (tmp_path / "trained/cfg.json").read_bytes() == before


def test_an_imported_one_is_replaced_when_that_is_asked_for(tmp_path: Path) -> None:
    foreign.saelens(tmp_path / "a", "standard")
    foreign.saelens(tmp_path / "b", "gated")
    out = tmp_path / "out"
    bring(ImportConfig(source=tmp_path / "a", out=out))
    with pytest.raises(UserError, match="replace it: --overwrite"):
        bring(ImportConfig(source=tmp_path / "b", out=out))
    bring(ImportConfig(source=tmp_path / "b", out=out, overwrite=True))
    assert train.load(out).config.arch == "gated"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_a_failure_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign.saelens(tmp_path / "a", "standard")
    out = tmp_path / "out"
    bring(ImportConfig(source=tmp_path / "a", out=out))
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp") and self.is_dir():
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(UserError, match="the disk is full"):
        bring(ImportConfig(source=tmp_path / "a", out=out, overwrite=True))
    assert train.load(out).config.arch == "relu"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_what_cfg_json_says(tmp_path: Path) -> None:
    found = foreign.saelens(tmp_path / "theirs", "jumprelu", dtype=torch.bfloat16)
    done = bring(ImportConfig(source=found.place, out=tmp_path / "ours", model="gpt2", hook="blocks.1.hook_mlp_out"))
    about = SavedSAE(tmp_path / "ours", None).about()
    assert about["model"] == {"name": "gpt2"}
    assert (about["hook_name"], about["context"], about["bos_id"]) == ("blocks.1.hook_mlp_out", 128, None)
    assert about["sparsity"] is None
    block = about["imported"]
    assert (block["tool"], block["format"], block["source"]) == ("SAELens", "jumprelu", "theirs")
    assert block["prepend_bos"] is False
    assert block["norms"]["lowest"] == pytest.approx(float(found.norms.min()))
    assert block["norms"]["highest"] == pytest.approx(float(found.norms.max()))
    assert block["norms"]["made_one"] is True
    assert block["notes"] == done.notes
    assert "its weights were bfloat16" in done.notes[0]
    assert str(tmp_path) not in (tmp_path / "ours/cfg.json").read_text()


# through the command line


def test_the_command(tmp_path: Path, sagsae: Sagsae) -> None:
    foreign.saelens(tmp_path / "theirs", "gated")
    done = sagsae("import", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert "gated-40-imported-seed0 from SAELens (gated), d_in 12" in done.stdout
    assert "reads blocks.3.hook_resid_post of EleutherAI/pythia-14m" in done.stdout
    done = sagsae("import", tmp_path / "theirs", "--out", tmp_path / "more", "--json")
    assert json.loads(done.stdout)["d_sae"] == D_SAE
    change_cfg(tmp_path / "theirs", normalize_activations="layer_norm")
    done = sagsae("import", tmp_path / "theirs", "--out", tmp_path / "third")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'theirs' / 'cfg.json'}: says normalize_activations")
    assert not (tmp_path / "third").exists()
