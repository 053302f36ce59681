"""Poles that begin with different thresholds, and which of them is the first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.variants import batch, gated_family, known_features, quality, trained, variant, weights

from harvest.synth import synth
from shared.config import SynthConfig, TrainConfig
from shared.errors import UserError
from shared.saes import sae_config
from train.autoencoder import Autoencoder
from train.run import train
from train.sae.base import decode
from train.sae.families import family
from train.sae.gated import CLOSED, pre_activations, smallest_of_largest

UNTIED = {"arch": "sa-gsae", "tie": "none", "d_sae": 48}


def test_the_ratio_is_the_first_threshold() -> None:
    config = sae_config(**UNTIED, theta0=0.8, theta0_negative=3.0)
    w = family(config).initial(16, torch.zeros(16), torch.Generator().manual_seed(0))
    assert w.theta[0].unique().tolist() == pytest.approx([0.2])
    assert w.theta[1].unique().tolist() == pytest.approx([0.6])


@pytest.mark.parametrize(("target", "rate"), [(6.0, 0.05), (None, 0.1)])
def test_the_rate_is_that_of_the_negative_poles_on_these_rows(target: float | None, rate: float) -> None:
    config = sae_config(**UNTIED, theta0=1.0, negative_rate=rate, l0_target=target)
    w = weights(config)
    batches = [batch(0), batch(1), batch(2)[:7]]
    u = torch.cat([pre_activations(w, x) for x in batches])
    wanted = rate * (target * len(u) if target else int((u > w.theta[0]).sum()))
    threshold = gated_family(config).first_negative(w, batches, rate)
    assert int((u < -threshold).sum()) == round(wanted)
    assert gated_family(config).first_negative(w, batches, 0.0) == CLOSED


def test_the_largest_of_many_parts() -> None:
    values = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()
    for wanted in (1, 7, 999):
        assert smallest_of_largest(torch.split(values, 64), wanted) == 999 - wanted
    assert smallest_of_largest(torch.split(values, 64), 5000) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"theta0_negative": 3.0}, "tie = symmetric"),
        ({"negative_rate": 0.02}, "tie = symmetric"),
        ({"negative_rate": 0.02, "tie": "none", "one_sided": True}, "no effect with one_sided"),
        ({"negative_rate": 0.02, "tie": "none", "theta0_negative": 3.0}, "Give one of the two"),
        ({"theta0_negative": 0.0, "tie": "none"}, "theta0_negative"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sae_config(arch="sa-gsae", d_sae=8, **settings)


@pytest.mark.parametrize("name", ["sa-gsae", "r tied", "untied", "untied, no aux"])
def test_a_flip_changes_no_reconstruction(name: str) -> None:
    """To the bit: a sign is exact, and so is an exchange of scalars."""
    config, x = variant(name), batch()
    w = weights(config)
    mathematics, which = gated_family(config), torch.arange(48) % 3 == 0
    f, x_hat = mathematics.encode(w, x), decode(w, mathematics.encode(w, x))
    energy = mathematics.energy(w, x)
    mathematics.flip_(w, which)
    assert torch.equal(mathematics.encode(w, x), torch.where(which, -f, f))
    assert torch.equal(decode(w, mathematics.encode(w, x)), x_hat)
    assert torch.equal(mathematics.energy(w, x), torch.where(which, energy.flip(0), energy))


def test_a_reset_keeps_the_poles_apart() -> None:
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    every = torch.ones(48, dtype=torch.bool)
    for settings, expected in (({"negative_rate": 0.25}, 0.0125), ({"theta0_negative": 1e6}, 0.0)):
        config = sae_config(**UNTIED, reset_share=0.05, **settings)
        w = weights(config)
        gated_family(config).reset_(w, x + w.b_dec, every)
        u = pre_activations(w, x + w.b_dec)
        assert ((u > w.theta[0]).float().mean(0) - 0.05).abs().max() < 1e-6
        assert ((u < -w.theta[1]).float().mean(0) - expected).abs().max() < 1e-6


def runs(folder: Path, **changes: Any) -> dict[str, Autoencoder]:
    """The trained autoencoders of a synthetic store, by architecture and rate."""
    store = folder / "store"
    if not store.exists():
        synth(SynthConfig(out=folder, name="store", d_in=32, features=48, tokens=40_000, p_bipolar=0.5))
    saes: list[dict[str, Any]] = [
        {"arch": "gated", "d_sae": 48},
        *({**UNTIED, "negative_rate": rate} for rate in (0.0, 0.05)),
    ]
    shared: dict[str, Any] = {"theta0": 1.0, "l0_target": 3.0, **changes}
    config = TrainConfig(
        store=str(store), out=folder / "run", batch=256, lr=5e-3, device="cpu",
        saes=tuple(sae_config(**sae, **shared) for sae in saes),
    )  # fmt: skip
    train(config)
    names = {sae.name: f"{sae.arch} {getattr(sae, 'negative_rate', '')}".strip() for sae in config.saes}
    return {names[name]: Autoencoder.load(folder / "run" / "saes" / name) for name in names}


def test_closed_negative_poles_are_a_gated_autoencoder(tmp_path: Path) -> None:
    """Bit for bit, through the whole of training; and a pole that opens is another autoencoder."""
    found = runs(tmp_path)
    gated, closed, opened = found["gated"], found["sa-gsae 0.0"], found["sa-gsae 0.05"]
    for name in ("W_enc", "W_dec", "b_dec"):
        assert torch.equal(gated.state_dict()[name], closed.state_dict()[name])
        assert not torch.equal(gated.state_dict()[name], opened.state_dict()[name])
    for name in ("theta", "r", "b"):
        assert torch.equal(gated.state_dict()[name][0], closed.state_dict()[name][0])
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(3)) * gated.scale
    assert torch.equal(gated.encode(x), closed.encode(x))
    f = opened.encode(x)
    assert (f < 0).any()


def test_the_first_pole_carries_more_energy(tmp_path: Path) -> None:
    """On other rows than those that decided it, nearly always."""
    sae = runs(tmp_path)["sa-gsae 0.05"]
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(3)) * sae.scale
    f = sae.encode(x).double()
    positive, negative = f.relu().square().sum(0), (-f).relu().square().sum(0)
    assert positive.sum() > negative.sum()


def test_an_uneven_start_beats_both_where_features_are_of_both_kinds() -> None:
    """The finding that it is there for, with wide bounds: half of the features go both ways."""
    x, features = known_features(0.5, 0)

    def r2(**settings: Any) -> float:
        config = sae_config(d_sae=96, sparsity=0.4, **settings)
        return quality(config, trained(x, config, 600), x, features)[0]

    uneven = r2(arch="sa-gsae", tie="none", theta0=1.6 / 10, theta0_negative=3.0)
    assert uneven >= r2(arch="gated", theta0=1.6 / 10) + 0.03
