"""Every metric against its definition, written out in numpy float64; language-model losses against identities."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harvest.run import harvest as run_harvest
from shared.config import HarvestConfig
from shared.errors import UserError
from shared.model.language_model import LanguageModel
from shared.model.source import resolve_model
from shared.saes import ARCHITECTURES, sae_config
from shared.store.opened import Store
from train.autoencoder import Autoencoder
from train.data.rows import HookRows
from train.measure.metrics import (
    ErrorSums,
    language_losses,
    measure,
    read_heldout,
    reconstructed,
    reconstructions,
    recovered,
)
from train.sae.batch_topk import BatchTopKWeights
from train.sae.families import family

D_IN, D_SAE = 32, 40


def autoencoder(arch: str = "sa-gsae", scale: float = 3.0, **settings: Any) -> Autoencoder:
    config = sae_config(arch=arch, d_sae=D_SAE, **settings)
    weights = family(config).initial(D_IN, torch.linspace(-1, 1, D_IN), torch.Generator().manual_seed(0))
    if isinstance(weights, BatchTopKWeights):
        weights = replace(weights, threshold=torch.tensor(0.5))
    return Autoencoder.of(config, weights, scale)


def activations(n: int = 9000) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(n, D_IN, generator=generator) + 5 * torch.linspace(-1, 1, D_IN)) * 2


class Fixed(Autoencoder):
    """An autoencoder whose code and reconstruction are given functions of x."""

    code: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]

    def encode(self, x: Tensor) -> Tensor:
        self.__dict__["x"] = x
        return self.code(x)

    def decode(self, f: Tensor) -> Tensor:
        assert len(f) == len(self.__dict__["x"])
        return self.back(self.__dict__["x"])


def fixed(back: Callable[[Tensor], Tensor], code: Callable[[Tensor], Tensor] | None = None) -> Fixed:
    plain = autoencoder()
    sae = Fixed(plain.config, plain.weights, plain.scale)
    sae.__dict__.update(back=back, code=code or (lambda x: torch.ones(len(x), D_SAE)))
    return sae


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fit_equals_its_definition(arch: str) -> None:
    sae, x = autoencoder(arch), activations()
    f = sae.encode(x).double().numpy()
    data, recon = x.double().numpy(), sae.decode(sae.encode(x)).double().numpy()
    mean = data.mean(0)
    sst = np.square(data - mean).sum()
    best = np.sum((data - mean) * (recon - mean)) / np.square(recon - mean).sum()
    positive, negative = (f > 0).sum(0), (f < 0).sum(0)
    live = positive + negative > 0
    minority = np.minimum(positive, negative)[live] / (positive + negative)[live]

    fit = measure(sae, x, "cpu")
    assert fit.tokens == 9000
    assert fit.r2 == pytest.approx(1 - np.square(data - recon).sum() / sst, abs=1e-6)
    assert fit.rescaling == pytest.approx(best, rel=1e-6)
    assert fit.r2_rescaled == pytest.approx(1 - np.square(data - mean - best * (recon - mean)).sum() / sst, abs=1e-6)
    assert fit.l0 == pytest.approx((f != 0).sum(1).mean(), rel=1e-6)
    assert fit.l0_pos == pytest.approx((f > 0).sum(1).mean(), rel=1e-6)
    assert fit.l0_neg == pytest.approx((f < 0).sum(1).mean(), rel=1e-6)
    assert fit.dead_fraction == pytest.approx(1 - live.mean())
    assert fit.dead["never"]["fraction"] == fit.dead_fraction
    assert fit.directions is not None
    assert fit.directions["latents"] == live.sum()
    if ARCHITECTURES[arch].signed:
        assert fit.l0_neg > 0
        assert fit.bipolar_fraction == pytest.approx((minority > 0.1).mean())
        mass = np.abs(f).sum(0)
        assert fit.bipolar_mass == pytest.approx(mass[live][minority > 0.1].sum() / mass.sum(), rel=1e-5)
        above, below = (np.square(np.maximum(sign * f, 0)).sum(0)[live] for sign in (1, -1))
        assert fit.bipolar_energy == pytest.approx((np.minimum(above, below) > 0.1 * (above + below)).mean())
    else:
        assert (fit.l0_neg, fit.bipolar_fraction, fit.bipolar_mass, fit.census) == (0, None, None, None)
        assert fit.bipolar_energy is None
    json.dumps(asdict(fit), allow_nan=False)


@pytest.mark.parametrize("sigmas", [1, 24, 100])
def test_r2_ignores_where_the_data_lie(sigmas: float) -> None:
    """Moving data and reconstruction together, by 24 spreads of the data and in every dimension, changes nothing."""
    sae, x = autoencoder(), activations()
    exact = measure(sae, x, "cpu")
    offset = sigmas * x.std(0)
    moved = Autoencoder(sae.config, replace(sae.weights, b_dec=sae.weights.b_dec + offset), sae.scale)
    found = measure(moved, x + offset, "cpu")
    assert found.r2 == pytest.approx(exact.r2, abs=2e-5)
    assert found.rescaling == pytest.approx(exact.rescaling, rel=1e-4)
    assert found.l0 == pytest.approx(exact.l0, rel=1e-3)


def test_r2_sees_a_constant_bias() -> None:
    """By closed form: a bias c on a perfect reconstruction leaves 1 - |c|²/variance, whatever the mean of the data."""
    x = activations()
    variance = x.double().var(0, correction=0).sum().item()
    assert measure(fixed(lambda x: x), x, "cpu").r2 == 1
    for bias in (0.1, 1.0, 5.0):
        biased = measure(fixed(partial(torch.add, bias)), x, "cpu")
        assert biased.r2 == pytest.approx(1 - D_IN * bias**2 / variance, abs=1e-5)
    closed = fixed(lambda x: activations().mean(0).expand(len(x), -1), lambda x: torch.zeros(len(x), D_SAE))
    nothing = measure(closed, x, "cpu")
    assert nothing.r2 == pytest.approx(0, abs=1e-5), "predicting the mean explains nothing"
    assert (nothing.l0, nothing.dead_fraction, nothing.bipolar_fraction) == (0, 1, None)
    assert (nothing.rescaling, nothing.r2_rescaled) == (None, None)
    json.dumps(asdict(nothing), allow_nan=False)


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0, 1.25, -1.0])
def test_shrinkage_of_a_scaled_reconstruction(factor: float) -> None:
    """x̂ = mean + c (x - mean): the best rescaling is 1/c and explains everything; before it R² is 1 - (1 - c)²."""
    x = activations()
    mean = x.double().mean(0)
    fit = measure(fixed(lambda x: (mean + factor * (x.double() - mean)).float()), x, "cpu")
    assert fit.rescaling == pytest.approx(1 / factor, rel=1e-5)
    assert fit.r2_rescaled == pytest.approx(1, abs=1e-6)
    assert fit.r2 == pytest.approx(1 - (1 - factor) ** 2, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), factor=st.floats(0.1, 3), noise=st.floats(0, 2))
def test_no_rescaling_is_better_than_the_one_given(seed: int, factor: float, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 8, generator=generator) + 3
    x_hat = factor * x + noise * torch.randn(200, 8, generator=generator)
    errors = ErrorSums(x.double().mean(0))
    errors.add_(x[:70], x_hat[:70])
    errors.add_(x[70:], x_hat[70:])
    best, reached = errors.rescaling, errors.r2_rescaled
    assert best is not None
    assert reached is not None
    assert reached >= errors.r2 - 1e-12
    for other in (0.9 * best, 1.1 * best):
        tried = ErrorSums(errors.mean)
        tried.add_(x, errors.mean + other * (x_hat - errors.mean))
        assert tried.r2 < reached


def test_a_wide_dictionary_is_measured_in_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = autoencoder(), activations(500)
    whole = measure(sae, x, "cpu")
    monkeypatch.setattr("train.measure.metrics.CODES_AT_A_TIME", 100 * D_SAE)
    in_parts = measure(sae, x, "cpu")
    assert in_parts.r2 == pytest.approx(whole.r2, rel=1e-9)
    assert in_parts.census is not None
    assert whole.census is not None
    assert in_parts.census["minority"] == whole.census["minority"]


def test_held_out_contexts_over_many_shards_are_read_whole(
    harvest_config: Callable[..., HarvestConfig], tmp_path: Path
) -> None:
    """A context longer than a shard: its middle shards hold its rows too."""
    config = harvest_config(tmp_path, context=48, tokens=960, shard_rows=16, chunk_rows=16, hooks=("mlp_out",))
    store = Store.open(run_harvest(config).store)
    keep = np.zeros((20, 48), dtype=bool)
    keep[[3, 11]] = True
    assert len(read_heldout(HookRows.of(store, "layer_01/mlp_out"), keep)) == 2 * 48


def test_the_share_recovered() -> None:
    assert recovered(4.0, 2.0, 2.0) == 1
    assert recovered(4.0, 4.0, 2.0) == 0
    assert recovered(4.0, 5.0, 2.0) == -0.5
    assert recovered(2.0, 2.1, 2.0) is None, "an ablation that does nothing leaves nothing to recover"


def test_language_losses(model_folder: Path) -> None:
    model = LanguageModel(resolve_model(str(model_folder)), "cpu", "float32")
    tokens = np.random.default_rng(0).integers(1, 300, (5, 16), dtype=np.uint16)
    tokens[2, 7] = 0
    counted = np.ones(tokens.shape, dtype=bool)
    counted[:, 0] = False
    counted &= tokens != 0
    exact = fixed(lambda x: x)
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


def test_losses_without_a_prediction_that_counts(model_folder: Path) -> None:
    """No number then: a loss of 0 would be a good one."""
    model = LanguageModel(resolve_model(str(model_folder)), "cpu", "float32")
    tokens, counted = np.full((2, 16), 5, dtype=np.uint16), np.ones((2, 16), dtype=bool)
    with pytest.raises(UserError, match=r"no prediction of the held-out contexts counts.*--no-ce"):
        language_losses(model, "blocks.1.hook_mlp_out", tokens, counted, [5], np.zeros(32), [])


@pytest.mark.parametrize("shape", [(3, 7, 32), (3, 7, 4, 8)], ids=["rows", "heads"])
def test_a_wide_dictionary_is_spliced_by_parts(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, sae = activations(21).view(shape), autoencoder()
    whole = reconstructed(sae, x)
    monkeypatch.setattr("train.measure.metrics.CODES_AT_A_TIME", 5 * D_SAE)
    sizes: list[int] = []
    encode = Autoencoder.encode

    def counted(self: Autoencoder, part: Any) -> Any:
        sizes.append(len(part))
        return encode(self, part)

    monkeypatch.setattr(Autoencoder, "encode", counted)
    torch.testing.assert_close(reconstructed(sae, x), whole)
    assert sizes == [5, 5, 5, 5, 1]


def test_no_part_is_a_single_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer divides by a part's variance: its R² would be lost for 8,193 rows."""
    monkeypatch.setattr("train.measure.metrics.ROWS_AT_A_TIME", 8)
    for n, parts in ((1, [1]), (8, [8]), (9, [9]), (16, [8, 8]), (17, [8, 9]), (18, [8, 8, 2])):
        x = activations(n)
        found = [part for part, _, _ in reconstructions(autoencoder(), x, "cpu")]
        assert [len(part) for part in found] == parts
        assert torch.equal(torch.cat(found), x)


def test_language_losses_where_heads_lie_side_by_side(model_folder: Path) -> None:
    """`hook_z` is [batch, context, heads, d_head], and harvested as d_in = heads · d_head."""
    model = LanguageModel(resolve_model(str(model_folder)), "cpu", "float32")
    tokens = np.random.default_rng(0).integers(1, 300, (5, 16), dtype=np.uint16)
    counted, mean = np.ones(tokens.shape, dtype=bool), np.linspace(-1, 1, 32)
    found = language_losses(model, "blocks.1.attn.hook_z", tokens, counted, [], mean, [fixed(lambda x: x)])
    assert found.spliced[0] == found.clean
    average = torch.from_numpy(mean).float()

    def mean_of_heads(x: Tensor) -> Tensor:
        return average.expand(*x.shape[:2], 32).reshape(x.shape)

    expected = model.losses(torch.from_numpy(tokens.astype("int64")), ("blocks.1.attn.hook_z", mean_of_heads))
    assert found.mean == pytest.approx(expected.double().mean().item())
