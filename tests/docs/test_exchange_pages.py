"""The how-to pages on other tools' autoencoders and on the hub, each command as it stands there.

Their Python needs SAELens: tests/exchange/peers/pages.py runs it.
"""

import json
from pathlib import Path

import pytest
import torch
from support.command import ROOT
from support.foreign import saes as foreign
from support.models import save_corpus, save_model, sentences
from support.pages import THREE, PageBlock, blocks_of, run_block
from support.serving.hub import Hub
from support.serving.hub import hub as hub

import train
from train.exchange.saved import SavedSAE, find_saes

PAGES = ROOT / "docs/how-to"
SA_GSAE = "sa-gsae-512-lambda0.1-seed0"


def shell_blocks(page: str) -> list[PageBlock]:
    return [block for block in blocks_of(PAGES / page) if block.language == "sh"]


def python_block(page: str) -> str:
    (block,) = (block for block in blocks_of(PAGES / page) if block.language == "python")
    return block.code


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_released_autoencoder_as_its_page_tries_it(tmp_path: Path) -> None:
    """The commands that need no download: export, import, measure, report, train further."""
    run_block(shell_blocks("evaluate-a-released-sae.md")[-1], tmp_path)
    measured = json.loads((tmp_path / "evaluations/released/measured.json").read_text(encoding="utf-8"))
    mine = json.loads((tmp_path / "runs/mine/evaluation.json").read_text(encoding="utf-8"))
    (same,) = (sae["r2"] for sae in mine["saes"] if sae["arch"] == "relu")
    assert measured["saes"][0]["r2"] == pytest.approx(same, abs=1e-6)
    assert "(released)" in (tmp_path / "report.html").read_text(encoding="utf-8")
    (further,) = (tmp_path / "runs/further/saes").iterdir()
    assert "-start-" in further.name


PREPARE = """
sagsae harvest --model gpt2 --tokens 6000 --context 16 --layer 9 --hook resid_pre
sagsae train --store stores/gpt2 --hook resid_pre --arch relu:64 --sparsity 0.1 --batch 512 --out runs/mine
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_released_autoencoder_as_its_page_measures_it(tmp_path: Path) -> None:
    """The other commands of the page, with a small model and an autoencoder of the page's width in the place of gpt2's:
    the end of layer 8 is the beginning of layer 9."""
    save_model(tmp_path / "gpt2", num_hidden_layers=10)
    save_corpus(tmp_path / "gpt2/corpus.jsonl", sentences(400))
    run_block(PageBlock("sh", PREPARE, None), tmp_path)
    drawn = torch.Generator().manual_seed(0)
    tensors = {"W_dec": torch.nn.functional.normalize(torch.randn(24576, 32, generator=drawn), dim=1)}
    tensors |= {"W_enc": tensors["W_dec"].T.contiguous(), "b_enc": torch.zeros(24576), "b_dec": torch.zeros(32)}
    place, hook = tmp_path / "downloads/blocks.8.hook_resid_post", "blocks.8.hook_resid_post"
    metadata = {"model_name": "gpt2", "hook_name": hook}
    foreign.write_saelens(place, "jumprelu", {**tensors, "threshold": torch.full((24576,), 3.0)}, metadata=metadata)
    *blocks, _ = shell_blocks("evaluate-a-released-sae.md")
    assert [block.code.split()[1] for block in blocks] == ["import", "eval", "eval", "features", "train"]
    for block in blocks:
        run_block(block, tmp_path)
    assert len(list((tmp_path / "evaluations").glob("*/measured.json"))) == 2
    assert (tmp_path / "features/gpt2-8/latents.parquet").is_file()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "(gpt2-8)" in page
    assert next((tmp_path / "runs").glob("*/saes/jumprelu-24576-*-start-*/sae_weights.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_exports_as_their_page_makes_them(tmp_path: Path) -> None:
    run_block(PageBlock("sh", THREE, None), tmp_path)
    blocks = shell_blocks("use-in-saelens.md")
    assert len(blocks) == 2
    for block in blocks:
        run_block(block, tmp_path)
    names = [saved.name for saved in find_saes(tmp_path / "runs/three")]
    for out in ("exported", "for-saebench", "npz"):
        assert sorted(path.name for path in (tmp_path / out / "blocks.2.hook_resid_post").iterdir()) == names
    assert all((tmp_path / "approximated" / name / "layers.2/sae.safetensors").is_file() for name in names)
    assert f'"exported/blocks.2.hook_resid_post/{SA_GSAE}"' in python_block("use-in-saelens.md")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_publishing_as_its_page_does_it(hub: Hub, tmp_path: Path) -> None:
    """Every command, against a stand-in for the hub."""
    hub.owners |= {"owner"}
    run_block(PageBlock("sh", THREE, None), tmp_path)
    found = foreign.saelens(tmp_path / "theirs-there", "jumprelu")
    files = {f"blocks.8.hook_resid_pre/{path.name}": path.read_bytes() for path in found.place.iterdir()}
    hub.add("somebody/their-saes", files)
    blocks = shell_blocks("publish-on-the-hub.md")
    assert [len(block.code.splitlines()) for block in blocks] == [3, 3, 4]
    for block in blocks:
        run_block(block, tmp_path)
    names = [saved.name for saved in find_saes(tmp_path / "runs/three")]
    assert hub.model("owner/my-saes").private
    assert hub.dataset("owner/my-activations").private
    assert sorted(path.name for path in (tmp_path / "saes").iterdir()) == names
    one = train.load(tmp_path / "sae").state_dict()
    trained = train.load(tmp_path / "runs/three/saes" / SA_GSAE).state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in one.items())
    assert SavedSAE(tmp_path / "theirs", None).about()["imported"]["tool"] == "SAELens"
    repo, folder = "owner/my-saes", f"blocks.2.hook_resid_post/{SA_GSAE}"
    assert f'SAE.from_pretrained("{repo}", "{folder}")' in python_block("publish-on-the-hub.md")
    assert f"{folder}/sae_weights.safetensors" in hub.model(repo).files
