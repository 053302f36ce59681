"""The sparse step against autograd in float64 and against the dense step, at every density."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.variants import GATED, batch, by_autograd, gated_family, variant, weights

from shared.config import TrainConfig
from shared.saes import sae_config
from train.run import train as run_train
from train.sae.base import StepInputs
from train.sae.families import family
from train.sae.sparse.cpu import open_entries
from train.sae.sparse.step import sparse_gradients

CASES = [name for name in GATED if "free" not in name]


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999), sparsity=st.floats(0.0, 2), d_in=st.integers(1, 40), d_sae=st.integers(1, 90),
    n=st.integers(1, 70), height=st.sampled_from([0.0, 0.3, 1.0, 2.0, 1e3]),
)  # fmt: skip
def test_gradients_equal_autograd(
    name: str, seed: int, sparsity: float, d_in: int, d_sae: int, n: int, height: float
) -> None:
    """From every gate open to none, for any shape."""
    config = variant(name, d_sae)
    w, x, now = weights(config, seed, d_in), batch(seed, n, d_in), StepInputs(sparsity)
    w.theta.mul_(height)
    found, step = sparse_gradients(gated_family(config), w, x, now)
    expected, loss = by_autograd(config, w, x, now)
    size = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    for key, grad in found.named().items():
        error = (grad - expected[key]).norm() / (expected[key].norm() + 1e-2 * size + 1e-9)  # float32 of `size`
        assert error < 1e-5, (key, error)
    torch.testing.assert_close(
        (step.reconstruction + sparsity * step.sparsity + step.auxiliary).double(), loss, rtol=1e-5, atol=1e-6
    )
    _, dense = family(config).gradients(w, x, now)
    assert torch.equal(step.fired, dense.fired)
    assert step.l0 == pytest.approx(dense.l0.item())


@pytest.mark.parametrize("name", CASES)
def test_one_open_entry(name: str) -> None:
    config = variant(name)
    w, x = weights(config), batch()
    u = (x - w.b_dec) @ w.W_enc.T
    size = u.abs() if family(config).signed else u
    second, largest = size.flatten().topk(2).values.flip(0)
    w.theta.fill_(float(second + largest) / 2)
    assert len(open_entries(gated_family(config), w, x - w.b_dec).u) == 1
    found, _ = sparse_gradients(gated_family(config), w, x, StepInputs(0.3))
    expected, _ = by_autograd(config, w, x, StepInputs(0.3))
    for key, grad in found.named().items():
        torch.testing.assert_close(grad.double(), expected[key], rtol=1e-4, atol=1e-6)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = variant("untied")
    w, x = weights(config), batch()
    whole = open_entries(gated_family(config), w, x - w.b_dec)
    monkeypatch.setattr("train.sae.sparse.cpu.BLOCK", 7 * len(x))
    parts = open_entries(gated_family(config), w, x - w.b_dec)
    for key in ("latent", "token", "by_token", "token_bounds", "latent_bounds"):
        assert torch.equal(getattr(whole, key), getattr(parts, key)), key
    torch.testing.assert_close(parts.u, whole.u)


@pytest.mark.parametrize("name", ["sa-gsae", "gated"])
def test_bfloat16_products(name: str) -> None:
    """Only u is rounded: nearer to the exact gradient than the dense form."""
    config = variant(name)
    w, x = weights(config), batch()
    exact, _ = family(config).gradients(w, x, StepInputs(0.3))
    rounded, _ = sparse_gradients(gated_family(config), w, x, StepInputs(0.3, torch.bfloat16))
    for key, grad in exact.named().items():
        assert (getattr(rounded, key) - grad).norm() <= 0.08 * grad.norm(), key


def test_a_run_switches_to_the_sparse_step(train_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """When few latents are active, and says so; it then ends where the dense step does, up to rounding."""
    sae = sae_config(arch="sa-gsae", d_sae=384, sparsity=0.6)
    entries = {}
    for step in ("auto", "dense", "sparse"):
        out = tmp_path / step
        config = train_config(saes=[sae], step=step, precision="float32", tokens=64 * 300, out=out)
        entries[step] = run_train(config).saes[0]
        lines = (out / "metrics.jsonl").read_text().splitlines()
        used = [json.loads(line)["saes"][sae.name]["sparse"] for line in lines]
        assert used == sorted(used), "once"
        assert (used[0], used[-1]) == {"auto": (False, True), "dense": (False, False), "sparse": (True, True)}[step]
    for step in ("auto", "sparse"):
        assert entries[step]["r2"] == pytest.approx(entries["dense"]["r2"], abs=0.01)
        assert entries[step]["l0"] == pytest.approx(entries["dense"]["l0"], rel=0.05)
