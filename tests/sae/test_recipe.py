"""What a right implementation reaches on activations whose features are known; bounds of docs/explanation/method.md."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.variants import known_coefficients, known_features, quality, trained, variant
from torch import Tensor

from harvest.synth import synth
from shared.config import SynthConfig, TrainConfig
from shared.saes import SAEConfig, sae_config
from shared.synthetic import TrueFeatures
from train.autoencoder import Autoencoder
from train.run import train
from train.sae.families import family

data = cache(known_features)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second one, and lose much when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def result(name: str, p: float, steps: int, d_sae: int = 96, seed: int = 0) -> tuple[float, float, float]:
    """(R², L0, share recovered). Initial thresholds as in the measurements that the bounds are from: 0.02 and, for
    Gated, 0."""
    x, features = data(p, seed)
    config = variant(name, d_sae, sparsity=0.4, theta0=0.0 if name == "gated" else 0.02 * 64**0.5)
    return quality(config, trained(x, config, steps, seed + 1), x, features)


def test_known_features_are_recovered() -> None:
    """The claim the architecture stands on, with the bounds for 1,000 steps: of features that go both ways, SA-GSAE
    finds both at the width at which a Gated SAE can only find half; of one-way features both find all. Without the
    auxiliary term there is nothing."""
    r2, l0, recovered = result("sa-gsae", 1.0, 1000)
    assert r2 >= 0.92
    assert 2.5 <= l0 <= 4.5
    assert recovered >= 0.8
    gated, _, recovered = result("gated", 1.0, 1000)
    assert gated <= 0.85
    assert recovered <= 0.5
    assert r2 - gated >= 0.1
    assert result("gated", 0.0, 1000)[2] >= 0.88
    assert result("no aux", 1.0, 1000)[0] <= 0.3


@pytest.mark.parametrize("name", ["abs-topk", "jumprelu", "relu", "batch-topk", "signed-topk"])
def test_the_baselines_learn(name: str) -> None:
    x, features = data(1.0 if name in ("abs-topk", "signed-topk") else 0.0, 0)
    special = {"k": 3, "aux_after": 20_000} if "topk" in name else {"sparsity": 0.03 if name == "jumprelu" else 0.2}
    config = variant(name, 128, **special)
    r2, l0, recovered = quality(config, trained(x, config, 600), x, features)
    assert r2 >= (0.6 if name == "relu" else 0.8), "an L1 penalty shrinks what it keeps"
    assert l0 <= 12
    assert recovered >= 0.6


def test_bfloat16_trains_as_well() -> None:
    x, features = data(1.0, 0)
    config = variant("sa-gsae", 96, sparsity=0.4)
    exact, rounded = (quality(config, trained(x, config, 300, matmul=m), x, features)[0] for m in PRECISIONS)
    assert rounded == pytest.approx(exact, abs=0.005)


PRECISIONS = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", ["sa-gsae", "abs-topk"])
def test_training_is_deterministic(name: str) -> None:
    x, _ = data(1.0, 0)
    config = variant(name, 32)
    first, second = (trained(x, config, steps=50) for _ in range(2))
    for key, tensor in first.named().items():
        assert torch.equal(tensor, getattr(second, key)), key
        assert tensor.isfinite().all()


SLOW: dict[tuple[str, float, int], dict[str, tuple[float, float]]] = {
    ("sa-gsae", 1.0, 96): {"r2": (0.94, 1), "l0": (2.8, 4.0), "rec": (0.93, 1)},
    ("gated", 1.0, 96): {"r2": (0, 0.85), "rec": (0, 0.5)},
    ("gated", 1.0, 192): {"rec": (0.9, 1)},
    ("gated", 0.0, 96): {"rec": (0.9, 1)},
    ("sa-gsae", 0.0, 96): {"rec": (0.88, 1)},
    ("no aux", 1.0, 96): {"r2": (-1, 0.15), "l0": (0, 0.3)},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "p", "d_sae"), SLOW)
def test_bounds_of_2000_steps(name: str, p: float, d_sae: int) -> None:
    """The mean over three seeds. Single ones scatter: of twelve SA-GSAE runs at p = 1 the lowest recovered 0.917, the
    highest all, 0.964 on average."""
    runs = [result(name, p, 2000, d_sae, seed) for seed in (0, 1, 2)]
    found = dict(zip(("r2", "l0", "rec"), (sum(values) / 3 for values in zip(*runs, strict=True)), strict=True))
    for key, (low, high) in SLOW[(name, p, d_sae)].items():
        assert low <= found[key] <= high, (key, runs)


@pytest.mark.slow
def test_shrinkage_and_thresholds() -> None:
    """r and b undo the shrinkage that λ puts on the gate: the code follows the true coefficients with a slope near one,
    the soft gate does not. Thresholds settle near λ/2 of the encoder row's length."""
    x, _ = data(1.0, 0)
    config = variant("sa-gsae", 96, sparsity=0.4, theta0=0.16)
    w = trained(x, config, 2000)
    f, g, true = codes(config, w, x)
    assert slope(true, f) >= 0.85
    assert slope(true, g) <= 0.75
    relative = (w.theta[0] / w.W_enc.norm(dim=1)).median().item()
    assert 0.2 * 0.4 <= relative <= 0.4


def codes(config: SAEConfig, w: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(f, g, true coefficient) where a latent fires that lies along a feature."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, 64, generator=generator), dim=1)
    coefficients, _ = known_coefficients(1.0, generator)
    raw = coefficients @ directions
    coefficients = coefficients / (raw - raw.mean(0)).square().sum(1).mean().sqrt()
    cosine = w.W_dec @ directions.T
    best = cosine.abs().max(1)
    along = best.values > 0.9
    f = family(config).encode(w, x)
    soft = replace(w, r=torch.zeros_like(w.r), b=-w.theta)  # ReLU(a - θ) is the soft gate
    g = family(config).encode(soft, x)
    turned = cosine.gather(1, best.indices[:, None]).sign().flatten()
    true = coefficients[:, best.indices] * turned
    active = (f != 0) & (true != 0) & along
    return f[active], g[active], true[active]


def slope(true: Tensor, found: Tensor) -> float:
    """Of the line through the origin: found against true."""
    return ((true * found).sum() / true.square().sum()).item()


def test_scale_of_the_data_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times as long, the same dictionary to the bit: the recipe's numbers are for rows of unit variance."""
    rows = TrueFeatures.block_rows
    found = []
    for factor in (1, 8):  # exact in any type
        monkeypatch.setattr(TrueFeatures, "block_rows", lambda self, block, by=factor: by * rows(self, block))
        made = SynthConfig(d_in=48, features=24, l0=2.0, tokens=5000, context=16, shard_rows=1024, chunk_rows=64,
                           out=str(tmp_path), name=str(factor))  # fmt: skip
        sae = sae_config(arch="sa-gsae", d_sae=48, sparsity=0.2)
        config = TrainConfig(
            store=synth(made).store, hook="synthetic", saes=(sae,), batch=64, tokens=64 * 60, streams=1,
            heldout_tokens=512, precision="float32", device="cpu", out=tmp_path / f"run{factor}",
        )  # fmt: skip
        run = train(config)
        found.append((run.saes[0], Autoencoder.load(run.run / "saes" / sae.name)))
    (one, small), (other, large) = found
    assert torch.equal(small.weights.W_dec, large.weights.W_dec)
    assert (one["r2"], one["l0"]) == (other["r2"], other["l0"])
    assert one["r2"] > 0.1
    x = torch.randn(5, 48)
    assert torch.equal(8 * small.encode(x), large.encode(8 * x))
