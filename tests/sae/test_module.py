"""A loaded autoencoder is a torch module like any other; one whose λ is not known can be used, but not trained."""

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.variants import D_IN, D_SAE, VARIANTS, batch, variant, weights
from torch import nn

from shared.config import TrainConfig
from shared.errors import UserError
from shared.saes import ARCHITECTURES, sae_config
from train import load
from train.autoencoder import SETTINGS, WEIGHTS, Autoencoder
from train.fit.control import SparsityController

SCALE = 7.5


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    name = getattr(request, "param", "untied")
    Autoencoder.of(variant(name), weights(variant(name)), SCALE).save(tmp_path, {})
    return tmp_path


@pytest.mark.parametrize("saved", VARIANTS, indirect=True)
def test_a_module_with_the_names_of_the_file(saved: Path) -> None:
    sae, tensors = load(saved), load_file(saved / WEIGHTS)
    assert isinstance(sae, Autoencoder)
    assert isinstance(sae, nn.Module)
    assert sae.state_dict().keys() == tensors.keys()
    assert all(torch.equal(sae.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert set(tensors) - set(dict(sae.named_parameters())) == set(dict(sae.named_buffers()))
    assert [name for name, _ in sae.named_buffers()] == (["threshold"] if "threshold" in tensors else [])
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    x = SCALE * batch()
    assert torch.equal(sae(x), sae.decode(sae.encode(x)))
    assert str(D_SAE) in repr(sae)


@pytest.mark.parametrize("saved", VARIANTS, indirect=True)
def test_copies_are_equal_and_apart(saved: Path) -> None:
    sae, x = load(saved), SCALE * batch()
    expected, file = sae(x), io.BytesIO()
    torch.save(sae, file)
    file.seek(0)
    copies = [copy.deepcopy(sae), torch.load(file, weights_only=False)]
    for each in copies:
        assert (each.config, each.scale, each.signed, each.d_in) == (sae.config, sae.scale, sae.signed, D_IN)
        assert torch.equal(each(x), expected)
        each.b_dec += 1
        assert not torch.equal(each(x), expected)
    assert torch.equal(sae(x), expected), "a copy has memory of its own"


def test_other_weights_are_taken_and_wrong_ones_refused(saved: Path) -> None:
    sae, other = load(saved), Autoencoder.of(variant("untied"), weights(variant("untied"), seed=3), SCALE)
    sae.load_state_dict(other.state_dict())
    x = SCALE * batch()
    assert torch.equal(sae(x), other(x))
    with pytest.raises(RuntimeError, match="size mismatch for theta"):
        sae.load_state_dict(Autoencoder.of(variant("sa-gsae"), weights(variant("sa-gsae")), SCALE).state_dict())


def test_inside_a_larger_module(saved: Path) -> None:
    class Spliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.sae = nn.Linear(D_IN, D_IN), load(saved)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.sae(self.before(x))
            return found

    whole = Spliced()
    assert {f"sae.{name}" for name in load_file(saved / WEIGHTS)} < whole.state_dict().keys()
    torch.autograd.backward(whole(batch()).square().sum())
    assert whole.before.weight.grad is not None
    assert whole.before.weight.grad.any(), "gradients reach what is before it"
    assert all(parameter.grad is None for parameter in whole.sae.parameters())
    with torch.no_grad():
        assert not whole(batch()).requires_grad
    with torch.inference_mode():
        whole(batch())


def test_it_can_be_made_trainable(saved: Path) -> None:
    sae = load(saved).requires_grad_()
    torch.autograd.backward(sae(SCALE * batch()).square().sum())
    for name in ("W_enc", "W_dec", "b_dec", "r", "b"):
        assert getattr(sae, name).grad.any(), name


def test_it_moves_in_place_and_changes_type(saved: Path) -> None:
    sae, x = load(saved), SCALE * batch()
    expected = sae(x)
    assert sae.to(torch.float64) is sae
    assert sae.encode(x).dtype == torch.float64
    torch.testing.assert_close(sae(x), expected.double(), rtol=1e-5, atol=1e-4)
    assert sae.to("meta").W_enc.is_meta


# --------------------------------------------------------------------------------------------- λ that is not known


PENALISED = [name for name, architecture in ARCHITECTURES.items() if architecture.has("sparsity")]


@pytest.mark.parametrize("arch", PENALISED)
def test_an_unknown_sparsity_is_null_in_the_folder(arch: str, tmp_path: Path) -> None:
    config = sae_config(arch=arch, d_sae=D_SAE, sparsity=None)
    assert config.name == f"{arch}-{D_SAE}-imported-seed0"
    Autoencoder(config, weights(config), 1.0).save(tmp_path, {})
    assert json.loads((tmp_path / SETTINGS).read_text())["sparsity"] is None
    sae = load(tmp_path)
    assert sae.config == config
    assert sae.encode(batch()).any()


@pytest.mark.parametrize("arch", PENALISED)
def test_it_cannot_be_trained(arch: str) -> None:
    config = sae_config(arch=arch, d_sae=D_SAE, sparsity=None)
    with pytest.raises(ValueError, match=r"its λ is not known\. Training needs a number"):
        TrainConfig(store="s", saes=(config,))
    with pytest.raises(ValueError, match=r"its λ is not known\. Training needs a number"):
        SparsityController(config, 10, torch.device("cpu"))
    with pytest.raises(UserError, match="must be above 0 for an l0_target"):
        sae_config(arch=arch, d_sae=D_SAE, sparsity=None, l0_target=4)
