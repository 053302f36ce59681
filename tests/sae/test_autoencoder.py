"""A saved autoencoder: the same in a fresh process, on raw activations, in other forms, and never another's weights."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import ROOT
from support.folders import without
from support.variants import D_IN, D_SAE, FOLDING, VARIANTS, batch, variant, weights

from shared.errors import DamagedError, UserError
from train.autoencoder import SETTINGS, WEIGHTS, Autoencoder
from train.sae.base import decode
from train.sae.families import family

SCALE = 7.5
READER = """
import hashlib, sys
from pathlib import Path
import torch
from train.autoencoder import Autoencoder
x = torch.randn(64, 16, generator=torch.Generator().manual_seed(100))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    sae = Autoencoder.load(folder)
    f = sae.encode(7.5 * x)
    print(folder.name, hashlib.sha256(f.numpy().tobytes() + sae.decode(f).numpy().tobytes()).hexdigest(), sep=":")
"""


def autoencoder(name: str) -> Autoencoder:
    return Autoencoder.of(variant(name), weights(variant(name)), SCALE)


def test_every_variant_is_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    expected, x = {}, SCALE * batch()
    for name in VARIANTS:
        sae = autoencoder(name)
        f = sae.encode(x)
        expected[name] = hashlib.sha256(f.numpy().tobytes() + sae.decode(f).numpy().tobytes()).hexdigest()
        sae.save(tmp_path / name, {"hook_name": "blocks.0.hook_mlp_out"})
        assert Autoencoder.load(tmp_path / name).config == variant(name)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert dict(line.split(":") for line in done.stdout.splitlines()) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_raw_activations_in_raw_activations_out(name: str) -> None:
    """The same as scaling by hand; decoder rows keep norm one, latents are in the units of the activations."""
    config, x = variant(name), batch()
    w, sae = weights(config), autoencoder(name)
    f = family(config).encode(w, x)
    torch.testing.assert_close(sae.encode(SCALE * x), SCALE * f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.decode(SCALE * f), SCALE * decode(w, f), rtol=1e-4, atol=1e-4)
    assert torch.equal(sae.weights.W_dec, w.W_dec)
    if name not in FOLDING:
        with pytest.raises(UserError, match=rf"{config.name}: does not fold"):
            sae.fold()
        return
    folded = sae.fold()
    torch.testing.assert_close(folded.decode(folded.encode(SCALE * x)), sae.decode(sae.encode(SCALE * x)))


@pytest.mark.parametrize("name", ["sa-gsae", "r tied", "untied"])
def test_split_and_join_lose_nothing(name: str) -> None:
    sae, x = autoencoder(name), SCALE * batch()
    halves = sae.split()
    assert (halves.config.arch, halves.config.d_sae) == ("gated", 2 * D_SAE)
    torch.testing.assert_close(halves.decode(halves.encode(x)), sae.decode(sae.encode(x)))
    back = halves.join()
    assert back.config == sae.config
    for key, tensor in back.weights.named().items():
        assert torch.equal(tensor, getattr(sae.weights, key)), key


def test_what_cannot_be_split_or_joined() -> None:
    for name in ("gated", "one-sided", "relu"):
        with pytest.raises(UserError, match="cannot be split; only a two-sided sa-gsae"):
            autoencoder(name).split()
    with pytest.raises(UserError, match="does not mirror the first"):
        autoencoder("gated").join()
    with pytest.raises(UserError, match="is not a gated autoencoder"):
        autoencoder("sa-gsae").join()


def test_a_folder_that_is_not_what_was_saved(tmp_path: Path) -> None:
    sae = autoencoder("untied")
    sae.save(tmp_path, {})
    settings = without("crc32c")(json.loads((tmp_path / SETTINGS).read_text()))
    tensors = load_file(tmp_path / WEIGHTS)

    save_file({**tensors, "theta": tensors["theta"] + 1}, tmp_path / WEIGHTS)
    with pytest.raises(DamagedError, match=r"SHA-256 differs"):
        Autoencoder.load(tmp_path)
    sae.save(tmp_path, {})
    for changes, message in {
        ("tie", "symmetric"): r"holds \{.*'theta': \(2, 48\).*has \{.*'theta': \(1, 48\)",
        ("d_in", D_IN + 1): "of d_in 17 has",
        ("d_sae", D_SAE + 1): "48",
        ("arch", "relu"): "has",
        ("arch", "transcoder"): "does not hold a trained autoencoder",
        ("sparsity", -1): "sparsity",
    }.items():
        (tmp_path / SETTINGS).write_text(json.dumps({**settings, changes[0]: changes[1]}))
        with pytest.raises(UserError, match=message):
            Autoencoder.load(tmp_path)
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(UserError, match="does not hold a trained autoencoder"):
        Autoencoder.load(tmp_path)
