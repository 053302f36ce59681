"""Autoencoders that the tools themselves saved (tests/golden/released.py) compute here what the tools computed."""

import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command import ROOT

import train
from shared.schemas.exchange import ImportConfig
from train.exchange.bring import bring

ARCHIVE = ROOT / "tests/golden/released.tar.xz"
FACTOR = 0.37
SAID = "said.safetensors"
FAMILIES = {
    "standard": "relu", "gated": "gated", "jumprelu": "jumprelu", "topk": "topk", "abstopk": "signed-topk",
    "batchtopk": "jumprelu", "AutoEncoder": "relu", "AutoEncoderNew": "relu", "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu", "BatchTopKSAE": "jumprelu", "MatryoshkaBatchTopKSAE": "jumprelu",
    "AutoEncoderTopK": "topk", "4": "topk", "24": "relu", "layer": "jumprelu", "embedding": "jumprelu",
}  # fmt: skip
"""By the word behind the tool's name. With decoder rows of any norm, BatchTopK has a threshold of each latent."""


def folders() -> list[str]:
    with tarfile.open(ARCHIVE) as archive:
        return [str(Path(name).parent) for name in archive.getnames() if name.endswith(SAID)]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("released")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(place, filter="data")
    return place


@pytest.mark.parametrize("name", folders())
def test_a_released_autoencoder(tmp_path: Path, released: Path, name: str) -> None:
    """At most one of its codes may be active in one of both alone: thresholds are compared in float32."""
    said = load_file(released / name / SAID)
    factor = FACTOR if "scaled" in name.split("-") else None
    done = bring(ImportConfig(source=released / name, out=tmp_path / "ours", norm_factor=factor))
    sae = train.load(tmp_path / "ours")
    assert sae.config.arch == FAMILIES[name.partition("/")[0].split("-")[1]]
    f, x = sae.encode(said["x"]), said["x"]
    flips = (f != 0) != (said["f"] != 0)
    assert int(flips.sum()) <= 1
    assert 0.02 < (f != 0).float().mean() < 0.98
    bound = 1e-6 * max(float(each.abs().max()) for each in said.values())
    assert (f - said["f"])[~flips].abs().max() <= 2 * bound
    assert (sae(x) - said["x_hat"])[~flips.any(1)].abs().max() <= 2 * bound
    assert done.d_in == x.shape[1]
    if sae.config.arch not in ("topk", "signed-topk"):
        assert torch.allclose(sae.weights.W_dec.norm(dim=1), torch.ones(done.d_sae), atol=1e-6)
