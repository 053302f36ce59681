"""The mathematics of both architectures, against autograd in float64, against properties, against known features."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.optim import Optimizer, learning_rate
from train.sae.gated import Weights, constrain_, decode, encode, gradients, initial_weights, loss, project_gradient_

D_IN, D_SAE, BATCH = 16, 48, 64


def weights(seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE) -> Weights:
    """Everything away from its initial value, so that no term of a gradient vanishes by accident."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    w = initial_weights(d_in, d_sae, 0.5, noise(d_in), generator)
    return replace(w, W_enc=1.3 * w.W_enc + 0.05 * noise(d_sae, d_in), r=0.3 * noise(d_sae), b=0.1 * noise(d_sae))


def batch(seed: int = 0, n: int = BATCH, d_in: int = D_IN) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(100 + seed))


def by_autograd(w: Weights, x: Tensor, sparsity: float, signed: bool) -> dict[str, Tensor]:
    parameters = {name: tensor.double().requires_grad_() for name, tensor in w.named().items()}
    loss(Weights(**parameters), x.double(), sparsity, signed).backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in parameters.items()}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), signed=st.booleans(), sparsity=st.floats(0.01, 2))
def test_gradients_equal_autograd(seed: int, signed: bool, sparsity: float) -> None:
    w, x = weights(seed), batch(seed)
    found, step = gradients(w, x, sparsity, signed, torch.float32)
    for name, expected in by_autograd(w, x, sparsity, signed).items():
        error = (getattr(found, name) - expected).norm() / expected.norm().clamp_min(1e-9)
        assert error < 1e-5, (name, error)
    total = step.reconstruction + sparsity * step.sparsity + step.auxiliary
    torch.testing.assert_close(total, loss(w, x, sparsity, signed), rtol=1e-5, atol=1e-6)
    f = encode(w, x, signed)
    assert step.l0 == pytest.approx((f != 0).sum().item() / BATCH)
    assert torch.equal(step.fired, (f != 0).any(0))


@pytest.mark.parametrize("signed", [True, False])
def test_gradients_equal_finite_differences(signed: bool) -> None:
    """Independent of autograd: the loss itself, moved a little along each parameter's gradient. Not W_dec and b_dec,
    whose gradient leaves the auxiliary term out, and not θ, at which the loss jumps."""
    w, x = weights(), batch()
    found, _ = gradients(w, x, 0.3, signed, torch.float32)
    wide = Weights(**{name: tensor.double() for name, tensor in w.named().items()})
    for name in ("r", "b", "W_enc"):
        direction = getattr(found, name).double()
        step = 1e-7 / direction.norm()
        ends = (
            loss(replace(wide, **{name: getattr(wide, name) + sign * step * direction}), x.double(), 0.3, signed)
            for sign in (1, -1)
        )
        ahead, behind = (float(end) for end in ends)
        assert (ahead - behind) / (2 * step) == pytest.approx(float(direction.norm() ** 2), rel=1e-3), name


@pytest.mark.parametrize("signed", [True, False])
def test_the_auxiliary_term_trains_no_decoder(signed: bool) -> None:
    """With the code closed by b, only the auxiliary and L1 terms are left: W_dec gets nothing from them."""
    w, x = replace(weights(), b=torch.full((D_SAE,), -1e6)), batch()
    found, step = gradients(w, x, 0.3, signed, torch.float32)
    assert step.auxiliary > 0
    assert step.l0 == 0
    assert found.W_dec.abs().max() == 0
    assert found.r.abs().max() == found.b.abs().max() == 0
    assert found.theta.abs().max() > 0
    assert found.W_enc.abs().max() > 0


def test_a_latent_never_changes_its_sign() -> None:
    w, x = replace(weights(), b=torch.full((D_SAE,), -0.3)), batch()
    f = encode(w, x, signed=True)
    u = (x - w.b_dec) @ w.W_enc.T
    assert ((f == 0) | (f.sign() == u.sign())).all()
    assert (f < 0).any()
    assert (f > 0).any()
    assert (encode(w, x, signed=False) >= 0).all()


def test_odd_symmetry() -> None:
    """What is mirrored at b_dec has the mirrored code; a latent turned round (w, d) -> (-w, -d) changes nothing."""
    w, x = weights(), batch()
    torch.testing.assert_close(encode(w, 2 * w.b_dec - x, True), -encode(w, x, True), rtol=1e-4, atol=1e-5)
    turned = replace(w, W_enc=-w.W_enc, W_dec=-w.W_dec)
    torch.testing.assert_close(decode(turned, encode(turned, x, True)), decode(w, encode(w, x, True)))


def test_sa_gsae_is_a_gated_sae_of_twice_the_width() -> None:
    """Every SA-GSAE(H) is a Gated(2H) with the same loss (docs/method.md): no win at half width is capacity."""
    w, x = weights(), batch()
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in w.named().items() if name != "b_dec"}
    for name in ("W_enc", "W_dec"):
        twice[name][D_SAE:] *= -1
    split = Weights(**twice, b_dec=w.b_dec)
    torch.testing.assert_close(loss(split, x, 0.3, False), loss(w, x, 0.3, True))
    code, signed = encode(split, x, False), encode(w, x, True)
    torch.testing.assert_close(code[:, :D_SAE] - code[:, D_SAE:], signed)
    assert (code != 0).sum() == (signed != 0).sum()


@pytest.mark.parametrize("signed", [True, False])
def test_latents_that_never_open_get_no_gradient(signed: bool) -> None:
    w, x = replace(weights(), theta=torch.full((D_SAE,), 1e3)), batch()
    found, step = gradients(w, x, 0.3, signed, torch.float32)
    assert step.l0 == 0
    for name, grad in found.named().items():
        assert (grad.abs().max() > 0) == (name == "b_dec"), name


def test_degenerate_inputs_give_no_nan() -> None:
    for signed in (True, False):
        for x in (torch.zeros(4, D_IN), torch.ones(1, D_IN), weights().b_dec.repeat(5, 1)):
            found, step = gradients(weights(), x, 0.3, signed, torch.float32)
            assert all(grad.isfinite().all() for grad in found.named().values())
            assert step.reconstruction.isfinite()


def test_projection_and_constraints() -> None:
    w, x = weights(), batch()
    found, _ = gradients(w, x, 0.3, True, torch.float32)
    project_gradient_(w, found)
    assert (found.W_dec * w.W_dec).sum(1).abs().max() < 1e-5
    optimizer = Optimizer(w, signed=True)
    for seed in range(50):
        optimizer.step_(gradients(w, batch(seed), 0.3, True, torch.float32)[0], 0.05)
    assert (w.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    assert w.theta.min() >= 0
    open_both = replace(weights(), theta=torch.full((D_SAE,), -1.0), r=torch.full((D_SAE,), 9.0))
    constrain_(open_both, signed=False)
    assert open_both.theta.max() == -1, "a Gated threshold is free in sign"
    assert open_both.r.max() == 5
    constrain_(open_both, signed=True)
    assert open_both.theta.min() == 0


def test_lost_decoder_rows_are_drawn_anew() -> None:
    w = weights()
    optimizer = Optimizer(w, signed=True)
    optimizer.step_(gradients(w, batch(), 0.3, True, torch.float32)[0], 1e-3)
    w.W_dec[3] = 0
    w.W_dec[5] = float("nan")
    assert optimizer.revive_(torch.Generator().manual_seed(0)) == 2
    assert (w.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    assert torch.equal(w.W_enc[3], w.W_dec[3])
    assert optimizer.adam.state[w.W_dec]["exp_avg"][5].abs().max() == 0
    assert optimizer.revive_(torch.Generator().manual_seed(0)) == 0


def test_bfloat16_products_stay_close() -> None:
    for signed in (True, False):
        exact, _ = gradients(weights(), batch(), 0.3, signed, torch.float32)
        rounded, _ = gradients(weights(), batch(), 0.3, signed, torch.bfloat16)
        for name, grad in exact.named().items():
            assert (getattr(rounded, name) - grad).norm() / grad.norm() < 0.05, name


def test_schedule() -> None:
    rates = [learning_rate(step, 1000, 2.0, 100, 0.3) for step in range(1000)]
    assert rates[0] == pytest.approx(2 / 51), "the warm-up is at most 5 % of the run"
    assert rates[50] == rates[700] == 2
    assert rates[850] == pytest.approx(1)
    assert 0 < rates[-1] < 0.01
    assert rates[:51] == sorted(rates[:51])
    assert rates[700:] == sorted(rates[700:], reverse=True)
    assert learning_rate(0, 1, 1.0, 100, 0.0) == 1


def known_features(p_bipolar: float, seed: int) -> tuple[Tensor, Tensor]:
    """(activations [50000, 64] of unit variance, directed features): 96 random directions, 3 active a token with
    Zipf(0.5) frequencies, coefficients U(0.5, 1.5), of either sign for a share `p_bipolar` of them."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(96, 64, generator=generator), dim=1)
    frequency = torch.arange(1, 97).float() ** -0.5
    active = torch.rand(50_000, 96, generator=generator) < 3 * frequency / frequency.sum()
    size = 0.5 + torch.rand(50_000, 96, generator=generator)
    bipolar = torch.arange(96) < round(96 * p_bipolar)
    bipolar = bipolar[torch.randperm(96, generator=generator)]
    negative = bipolar & (torch.rand(50_000, 96, generator=generator) < 0.5)
    x = (active * size * torch.where(negative, -1.0, 1.0)) @ directions
    x += 0.01 * torch.randn(50_000, 64, generator=generator)
    x -= x.mean(0)
    return x / x.square().sum(1).mean().sqrt(), torch.cat([directions, -directions[bipolar]])


def trained(x: Tensor, d_sae: int, signed: bool, steps: int = 1000) -> Weights:
    generator = torch.Generator().manual_seed(1)
    w = initial_weights(64, d_sae, 0.02 * 8 if signed else 0.0, x.mean(0), generator)
    optimizer = Optimizer(w, signed)
    for step in range(steps):
        rows = torch.randint(len(x), (512,), generator=generator)
        grads, _ = gradients(w, x[rows], 0.4, signed, torch.float32)
        optimizer.step_(grads, learning_rate(step, steps, 1e-2, 100, 0.3))
    return w


def quality(w: Weights, x: Tensor, features: Tensor, signed: bool) -> tuple[float, float, float]:
    """(R², L0, share of the directed features that a firing pole points along with cosine > 0.9)."""
    f = encode(w, x[:10_000], signed)
    r2 = 1 - ((x[:10_000] - decode(w, f)).square().sum() / x[:10_000].square().sum()).item()
    poles = [w.W_dec[((f > 0).float().mean(0) > 1e-4)], -w.W_dec[((f < 0).float().mean(0) > 1e-4)]]
    recovered = ((torch.cat(poles) @ features.T).max(0).values > 0.9).float().mean().item()
    return r2, (f != 0).float().sum(1).mean().item(), recovered


def test_known_features_are_recovered() -> None:
    """The claim the architecture stands on, with the bounds of docs/method.md for 1,000 steps: of features that go both
    ways, SA-GSAE finds both at the width at which a Gated SAE can only find half; of one-way features both find all."""
    x, features = known_features(1.0, seed=0)
    r2, l0, recovered = quality(trained(x, 96, True), x, features, True)
    assert r2 >= 0.92
    assert 2.5 <= l0 <= 4.5
    assert recovered >= 0.8
    r2, _, recovered = quality(trained(x, 96, False), x, features, False)
    assert r2 <= 0.85
    assert recovered <= 0.5
    x, features = known_features(0.0, seed=0)
    assert quality(trained(x, 96, False), x, features, False)[2] >= 0.88


def test_training_is_deterministic() -> None:
    x, _ = known_features(1.0, seed=0)
    first, second = (trained(x, 32, True, steps=30) for _ in range(2))
    for name, tensor in first.named().items():
        assert torch.equal(tensor, getattr(second, name)), name
    assert not math.isnan(float(first.b_dec.sum()))
