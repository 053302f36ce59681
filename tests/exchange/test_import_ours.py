"""An autoencoder of this project that was exported comes back as what it was, from each tool's format."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exchange import ABOUT, check_equal, rows, saelens_says, save
from support.variants import D_SAE, VARIANTS

import train
from shared.saes import ARCHITECTURES
from shared.schemas.exchange import ExportConfig, ImportConfig
from train.autoencoder import Autoencoder
from train.exchange.bring import bring
from train.exchange.export import export
from train.exchange.readers.ours import as_gate
from train.exchange.saved import SavedSAE
from train.sae.relu import ReluWeights

TIED = ["sa-gsae", "r tied", "no aux"]
THRESHOLDS = [name for name in VARIANTS if "topk" not in VARIANTS[name]["arch"] or "batch" in name or "abs" in name]


def there_and_back(folder: Path, tool: str, **asked: Any) -> tuple[Autoencoder, dict[str, Any]]:
    """What the export of folder/sae is when it is imported again, and its cfg.json."""
    (done,) = export(
        ExportConfig.model_validate({"source": folder / "sae", "to": tool, "out": folder / "out", **asked})
    )
    place = done.folder / "layers.2" if tool == "sparsify" else done.folder
    bring(ImportConfig(source=place, out=folder / "back"))
    return train.load(folder / "back"), SavedSAE(folder / "back", None).about()


def check_bits(sae: Autoencoder, back: Autoencoder) -> None:
    assert back.config == sae.config
    assert back.scale == sae.scale
    found = back.weights.named()
    assert all(torch.equal(found[name], tensor) for name, tensor in sae.weights.named().items())


def check_function(sae: Autoencoder, back: Autoencoder, norms: torch.Tensor | float = 1.0) -> None:
    """The same code, in the same signed latents; `norms`: of decoder rows that have norm one now."""
    x = rows()
    f, g = sae.encode(x) * norms, back.encode(x)
    same = (f != 0) == (g != 0)
    assert int((~same).sum()) <= 1
    assert (f - g)[same].abs().max() <= 2e-6 * max(float(x.abs().max()), float(f.abs().max()))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tool", ["saelens", "dictionary-learning"])
def test_it_comes_back_bit_for_bit(tmp_path: Path, tool: str, name: str) -> None:
    sae = save(tmp_path / "sae", name)
    back, about = there_and_back(tmp_path, tool)
    if tool == "dictionary-learning" and "free" in name:  # its export brings decoder rows to norm one
        check_function(sae, back, sae.weights.W_dec.norm(dim=1))
    elif tool == "dictionary-learning" and name == "jumprelu":  # and folds b_dec here
        assert back.config == sae.config
        check_function(sae, back)
    else:
        check_bits(sae, back)
    assert about["model"]["name"] == "EleutherAI/pythia-1b"
    assert (about["hook_name"], about["context"], about["bos_id"]) == ("blocks.2.hook_resid_post", 128, 0)
    assert about["lambda"] == 0.1
    assert about["imported"]["notes"] == []


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_sparsify_too(tmp_path: Path, name: str) -> None:
    sae = save(tmp_path / "sae", name)
    check_bits(sae, there_and_back(tmp_path, "sparsify")[0])


@pytest.mark.parametrize("name", TIED)
def test_poles_are_joined_from_the_jumprelu_form(tmp_path: Path, name: str) -> None:
    sae = save(tmp_path / "sae", name)
    back, _ = there_and_back(tmp_path, "saelens", form="jumprelu")
    assert (back.config.arch, back.config.d_sae) == ("sa-gsae", D_SAE)
    check_function(sae, back)


@pytest.mark.parametrize("form", ["gated", "jumprelu"])
def test_poles_are_joined_without_b_dec_on_the_input(tmp_path: Path, form: str) -> None:
    sae = save(tmp_path / "sae", "sa-gsae")
    back, _ = there_and_back(tmp_path, "saelens", form=form, fold_b_dec=True)
    assert (back.config.arch, back.config.d_sae) == ("sa-gsae", D_SAE)
    check_function(sae, back)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_gemma_scope(tmp_path: Path, name: str) -> None:
    """A bias that folding b_dec changed in its last bit is still one: AbsTopK then stays one-sided."""
    sae = save(tmp_path / "sae", name)
    back, about = there_and_back(tmp_path, "gemma-scope")
    if back.config.d_sae == sae.config.d_sae:
        check_function(sae, back, sae.weights.W_dec.norm(dim=1))
    else:
        assert (back.config.arch, back.config.d_sae) == ("jumprelu", 2 * D_SAE)
        assert name in ("abs-topk", "untied", "untied, no aux")
        assert "exported by sagsae" in about["imported"]["notes"][-1]
    assert (back(rows()) - sae(rows())).abs().max() < 1e-4


# --form bijumprelu


def check_same_gates(sae: Autoencoder, back: Autoencoder) -> None:
    """The same settings, signs and thresholds of both poles; e^r of the positive pole is in W_enc now."""
    assert (back.config, back.scale, back.signed) == (sae.config, sae.scale, True)
    ours, theirs = sae.fold(), back.fold()
    for name in ("W_dec", "b_dec", "offset"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("W_enc", "threshold", "slope"):
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=3e-7, atol=0)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", [*TIED, "untied", "untied, no aux"])
def test_bijumprelu_comes_back_with_both_thresholds_and_signs(tmp_path: Path, name: str, folded: bool) -> None:
    sae = save(tmp_path / "sae", name)
    back, about = there_and_back(tmp_path, "saelens", form="bijumprelu", fold_b_dec=folded)
    check_same_gates(sae, back)
    check_function(sae, back)
    assert (sae.encode(rows()) < 0).any()
    assert (about["imported"]["format"], about["imported"]["notes"]) == ("bijumprelu", [])


@pytest.mark.parametrize("name", ["r tied", "abs-topk"])
def test_bijumprelu_without_a_rescaling_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    sae = save(tmp_path / "sae", name)
    if name == "r tied":
        w = sae.weights.named()
        w["r"].zero_()
        w["theta"].copy_(torch.maximum(w["theta"], -w["b"]))  # the file has the larger one alone
        sae.save(tmp_path / "sae", ABOUT)
    check_bits(sae, there_and_back(tmp_path, "saelens", form="bijumprelu")[0])


@pytest.mark.parametrize("name", [*TIED, "untied", "abs-topk"])
def test_bijumprelu_of_an_imported_one_is_the_same_file(tmp_path: Path, name: str) -> None:
    save(tmp_path / "sae", name)
    there_and_back(tmp_path, "saelens", form="bijumprelu")
    (again,) = export(ExportConfig(source=tmp_path / "back", to="saelens", form="bijumprelu", out=tmp_path / "again"))
    before, after = (load_file(folder / "sae_weights.safetensors") for folder in (tmp_path / "out", again.folder))
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=2e-7 if name == "untied" else 0, atol=0)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_bijumprelu_of_anybody(tmp_path: Path, unit: bool, centred: bool) -> None:
    """Without our description, with b_enc and with decoder rows of other norms: the function is that of the file."""
    save(tmp_path / "sae", "untied")
    (done,) = export(ExportConfig(source=tmp_path / "sae", to="saelens", form="bijumprelu", out=tmp_path / "out"))
    cfg = json.loads((done.folder / "cfg.json").read_text())
    del cfg["metadata"]["sagsae"]
    cfg["apply_b_dec_to_input"] = centred
    (done.folder / "cfg.json").write_text(json.dumps(cfg))
    tensors = load_file(done.folder / "sae_weights.safetensors")
    tensors["b_enc"] = torch.linspace(-0.02, 0.02, D_SAE)
    if not centred:
        tensors["b_enc"] -= tensors["b_dec"] @ tensors["W_enc"]
    tensors["threshold_pos"] += 0.05
    tensors["threshold_neg"] += 0.05
    norms = torch.linspace(0.5, 2, D_SAE) if not unit else torch.ones(D_SAE)
    tensors["W_dec"] *= norms[:, None]
    save_file(tensors, done.folder / "sae_weights.safetensors")
    found = bring(ImportConfig(source=done.folder, out=tmp_path / "back"))
    back = train.load(tmp_path / "back")
    assert (found.format, back.config.arch, back.config.d_sae) == ("bijumprelu", "sa-gsae", D_SAE)
    f, x_hat = saelens_says(done.folder, rows().double().numpy())
    check_equal(back, rows(), (f * norms.double().numpy(), x_hat))


def test_the_code_beside_it_is_not_run(tmp_path: Path) -> None:
    save(tmp_path / "sae", "sa-gsae")
    (done,) = export(ExportConfig(source=tmp_path / "sae", to="saelens", form="bijumprelu", out=tmp_path / "out"))
    (done.folder / "sagsae_bijumprelu.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    bring(ImportConfig(source=done.folder, out=tmp_path / "back"))
    (done.folder / "sagsae_bijumprelu.py").unlink()
    bring(ImportConfig(source=done.folder, out=tmp_path / "more"))
    assert not (tmp_path / "ran").exists()


def test_what_no_longer_mirrors_stays_one_sided(tmp_path: Path) -> None:
    """Somebody changed one pole of a latent: nothing is joined, and a note says so."""
    save(tmp_path / "sae", "sa-gsae")
    (done,) = export(ExportConfig(source=tmp_path / "sae", to="saelens", out=tmp_path / "out"))
    tensors = load_file(done.folder / "sae_weights.safetensors")
    tensors["W_enc"][0, 0] += 1.0
    save_file(tensors, done.folder / "sae_weights.safetensors")
    found = bring(ImportConfig(source=done.folder, out=tmp_path / "back"))
    assert train.load(tmp_path / "back").config.arch == "gated"
    assert found.d_sae == 2 * D_SAE
    assert found.notes == [
        "it was exported by sagsae, and is gated here: the second half of its latents does not mirror the first"
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"arch": "other"}, {"arch": 5}, {"arch": "sa-gsae", "d_sae": 10**9}, {"scale": "big"}, {"tie": [[]]},
        {"model": {"name": "\x1b[2J"}}, {"hook_name": {}}, {"d_sae": 24},
    ],
)  # fmt: skip
def test_a_wrong_description_changes_nothing_but_a_note(tmp_path: Path, change: dict[str, Any]) -> None:
    sae = save(tmp_path / "sae", "sa-gsae")
    (done,) = export(ExportConfig(source=tmp_path / "sae", to="saelens", out=tmp_path / "out"))
    cfg = json.loads((done.folder / "cfg.json").read_text())
    cfg["metadata"]["sagsae"] |= change
    (done.folder / "cfg.json").write_text(json.dumps(cfg))
    found = bring(ImportConfig(source=done.folder, out=tmp_path / "back"))
    back = train.load(tmp_path / "back")
    assert len(found.notes) == 1
    assert back.config.arch == "gated"
    assert (back(rows()) - sae(rows())).abs().max() < 1e-4


def test_topk_has_no_gates() -> None:
    """Its tensors are those of ReLU, and its latents have no thresholds of their own."""
    w = ReluWeights(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2))
    assert not as_gate(w, "relu").theta.any()
    with pytest.raises(ValueError, match="no thresholds"):
        as_gate(w, "topk")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "auto") for name in ("sa-gsae", "gated", "relu", "jumprelu", "abs-topk", "topk", "signed-topk")),
        *((name, "bijumprelu") for name in ("sa-gsae", "untied", "abs-topk")),
    ],
)
def test_no_description_changes_the_function(tmp_path: Path, name: str, form: str, arch: str) -> None:
    """Only the tensors are believed: with any other settings than it had, the folder computes the same."""
    sae, x = save(tmp_path / "sae", name), rows()
    (done,) = export(
        ExportConfig.model_validate(
            {"source": tmp_path / "sae", "to": "saelens", "form": form, "out": tmp_path / "out"}
        )
    )
    cfg = json.loads((done.folder / "cfg.json").read_text())
    d_sae = cfg["d_sae"]
    cases: list[tuple[int, dict[str, Any]]] = [(d_sae, {}), (d_sae // 2, {})]
    cases += [(d_sae, {"k": 7}), (d_sae, {"one_sided": True}), (d_sae, {"tie": "magnitude"}), (d_sae, {"tie": "none"})]
    for number, (width, more) in enumerate(cases):
        block: dict[str, Any] = {"arch": arch, "d_sae": width, "scale": 1.0, "k": cfg.get("k", 5), **more}
        cfg["metadata"]["sagsae"] = block
        (done.folder / "cfg.json").write_text(json.dumps(cfg))
        bring(ImportConfig(source=done.folder, out=tmp_path / f"{number}"))
        assert (train.load(tmp_path / f"{number}")(x) - sae(x)).abs().max() < 1e-4, block
