"""Every metric against its definition, written out in numpy float64; language-model losses against identities."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from harvest.run import harvest as run_harvest
from shared.config import HarvestConfig
from shared.model import LanguageModel
from shared.models import resolve_model
from shared.saes import sae_config
from shared.store import Store
from train.autoencoder import Autoencoder
from train.metrics import language_losses, measure, read_heldout, recovered
from train.rows import Rows
from train.sae import family

D_IN, D_SAE = 32, 40


def autoencoder(arch: str = "sa-gsae", scale: float = 3.0, theta0: float = 2.0) -> Autoencoder:
    mean = torch.linspace(-1, 1, D_IN)
    config = sae_config(arch=arch, d_sae=D_SAE, sparsity=0.2, theta0=theta0)
    return Autoencoder.of(config, family(config).initial(D_IN, mean, torch.Generator().manual_seed(0)), scale)


def activations(n: int = 9000) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(n, D_IN, generator=generator) + 5 * torch.linspace(-1, 1, D_IN)) * 2


@pytest.mark.parametrize("arch", ["sa-gsae", "gated"])
def test_fit_equals_its_definition(arch: str) -> None:
    sae, x = autoencoder(arch), activations()
    w = {name: tensor.double().numpy() for name, tensor in sae.weights.named().items()}
    data = x.double().numpy()
    u = (data - w["b_dec"]) @ w["W_enc"].T
    a, s = (np.abs(u), np.sign(u)) if arch == "sa-gsae" else (u, np.ones_like(u))
    f = s * np.where(a > w["theta"], np.maximum(np.exp(w["r"]) * a + w["b"], 0), 0)
    recon = f @ w["W_dec"] + w["b_dec"]
    r2 = 1 - np.square(data - recon).sum() / np.square(data - data.mean(0)).sum()
    positive, negative = (f > 0).sum(0), (f < 0).sum(0)
    live = positive + negative > 0
    minority = np.minimum(positive, negative)[live] / (positive + negative)[live]

    fit = measure(sae, x, "cpu")
    assert fit.tokens == 9000
    assert fit.r2 == pytest.approx(r2, abs=1e-5)
    assert fit.l0 == pytest.approx((f != 0).sum(1).mean(), rel=1e-3)
    assert fit.l0_pos == pytest.approx((f > 0).sum(1).mean(), rel=1e-3)
    assert fit.l0_neg == pytest.approx((f < 0).sum(1).mean(), rel=1e-3)
    assert fit.l0 == pytest.approx(fit.l0_pos + fit.l0_neg)
    assert fit.dead_fraction == pytest.approx(1 - live.mean())
    if arch == "gated":
        assert fit.bipolar_fraction is None
    else:
        assert fit.bipolar_fraction == pytest.approx((minority > 0.1).mean(), abs=0.03)


def test_r2_sees_a_constant_bias_and_ignores_the_mean_of_the_data() -> None:
    """Definitions that other tools got wrong: a biased reconstruction is worse, a shifted data set is not better."""
    sae, x = autoencoder(), activations()
    exact = measure(sae, x, "cpu").r2
    shifted = replace(sae, weights=replace(sae.weights, b_dec=sae.weights.b_dec + 100))
    assert measure(shifted, x + 100, "cpu").r2 == pytest.approx(exact, abs=1e-3)
    closed = replace(sae, weights=replace(sae.weights, theta=torch.full((1, D_SAE), 1e6), b_dec=x.mean(0)))
    nothing = measure(closed, x, "cpu")
    assert nothing.r2 == pytest.approx(0, abs=1e-5), "predicting the mean explains nothing"
    assert (nothing.l0, nothing.dead_fraction, nothing.bipolar_fraction) == (0, 1, None)
    biased = replace(closed, weights=replace(closed.weights, b_dec=closed.weights.b_dec + 1))
    assert measure(biased, x, "cpu").r2 < -0.5


def test_held_out_contexts_over_many_shards_are_read_whole(
    harvest_config: Callable[..., HarvestConfig], tmp_path: Path
) -> None:
    """A context longer than a shard: its middle shards hold its rows too."""
    config = harvest_config(tmp_path, context=48, tokens=960, shard_rows=16, chunk_rows=16, hooks=("mlp_out",))
    store = Store.open(run_harvest(config).store)
    keep = np.zeros((20, 48), dtype=bool)
    keep[[3, 11]] = True
    assert len(read_heldout(Rows.of(store, "layer_01/mlp_out"), keep)) == 2 * 48


def test_the_share_recovered() -> None:
    assert recovered(4.0, 2.0, 2.0) == 1
    assert recovered(4.0, 4.0, 2.0) == 0
    assert recovered(4.0, 5.0, 2.0) == -0.5
    assert recovered(2.0, 2.1, 2.0) is None, "an ablation that does nothing leaves nothing to recover"


class Exact(Autoencoder):
    """Reconstructs whatever it is given."""

    def encode(self, x: Tensor) -> Tensor:
        return x.float()

    def decode(self, f: Tensor) -> Tensor:
        return f


def test_language_losses(model_folder: Path) -> None:
    model = LanguageModel(resolve_model(str(model_folder)), "cpu", "float32")
    tokens = np.random.default_rng(0).integers(1, 300, (5, 16), dtype=np.uint16)
    tokens[2, 7] = 0
    counted = np.ones(tokens.shape, dtype=bool)
    counted[:, 0] = False
    counted &= tokens != 0
    exact = Exact(autoencoder().config, autoencoder().weights, 1.0)
    mean = np.linspace(-1, 1, 32)
    hook = "blocks.1.hook_mlp_out"
    found = language_losses(model, hook, tokens, counted, [0], mean, [exact, autoencoder()])

    ids = torch.from_numpy(tokens.astype("int64"))
    predicted = torch.from_numpy(counted[:, :-1] & (tokens[:, 1:] != 0))
    assert found.tokens == predicted.sum() == 5 * 14 - 2
    clean = model.losses(ids)
    assert found.clean == pytest.approx(clean[predicted].double().mean().item())
    assert found.spliced[0] == found.clean, "a perfect reconstruction costs nothing"
    assert found.spliced[1] != found.clean

    here = torch.from_numpy(counted)[..., None]
    zero = model.losses(ids, (hook, lambda x: torch.where(here, torch.zeros_like(x), x)))
    average = torch.from_numpy(mean).float()
    middle = model.losses(ids, (hook, lambda x: torch.where(here, average.expand_as(x), x)))
    assert found.zero == pytest.approx(zero[predicted].double().mean().item())
    assert found.mean == pytest.approx(middle[predicted].double().mean().item())
    everywhere = model.losses(ids, (hook, torch.zeros_like))
    assert not torch.equal(everywhere, zero), "excluded positions stay clean"
