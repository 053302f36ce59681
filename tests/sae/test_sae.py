"""The mathematics of every architecture: gradients against autograd in float64, equivalences, degenerate input."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.variants import (
    BATCH,
    D_IN,
    D_SAE,
    FOLDING,
    GATED,
    VARIANTS,
    batch,
    by_autograd,
    gated_family,
    silences,
    update,
    variant,
    weights,
)

from train.fit.optim import Optimizer, learning_rate, usual_warmup
from train.sae.activation import bi_jump_relu
from train.sae.base import StepInputs, decode
from train.sae.families import family
from train.sae.gated import join, split


def now_of(d_sae: int = D_SAE, sparsity: float = 0.3) -> StepInputs:
    return StepInputs(sparsity, torch.float32, silences(d_sae))


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=12, deadline=None, derandomize=True)  # a value that lands on a threshold would go either way
@given(
    seed=st.integers(0, 999), sparsity=st.floats(0.0, 2), d_in=st.integers(1, 40), d_sae=st.integers(5, 90),
    n=st.integers(1, 70),
)  # fmt: skip
def test_gradients_equal_autograd(name: str, seed: int, sparsity: float, d_in: int, d_sae: int, n: int) -> None:
    """For every variant, at any shape, batch and λ."""
    config = variant(name, d_sae)
    w, x, now = weights(config, seed, d_in), batch(seed, n, d_in), now_of(d_sae, sparsity)
    found, step = family(config).gradients(w, x, now)
    expected, loss = by_autograd(config, w, x, now)
    size = torch.cat([grad.flatten() for grad in expected.values()]).norm()
    for key in w.trained():
        error = (getattr(found, key) - expected[key]).norm() / (expected[key].norm() + 1e-3 * size + 1e-9)
        assert error < 1e-5, (key, error)
    total = step.reconstruction + sparsity * step.sparsity + step.auxiliary
    torch.testing.assert_close(total.double(), loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_measures_what_the_code_is(name: str) -> None:
    config = variant(name)
    w, x = weights(config), batch()
    _, step = family(config).gradients(w, x, now_of())
    if config.arch in ("batch-topk", "abs-topk"):  # a step has its own threshold; afterwards it is the running mean
        assert step.threshold is not None
        w = replace(w, threshold=step.threshold * (1 - 1e-6))
    f = family(config).encode(w, x)
    assert step.l0 == pytest.approx((f != 0).sum().item() / BATCH)
    assert torch.equal(step.fired, (f != 0).any(0))
    error = (x - decode(w, f)).square().sum(1).mean()
    torch.testing.assert_close(step.reconstruction, error, rtol=1e-5, atol=1e-6)
    assert (f < 0).any() == family(config).signed


@pytest.mark.parametrize("name", [name for name in GATED if "free" not in name])
def test_gradients_equal_finite_differences(name: str) -> None:
    """Independent of autograd: the loss itself, moved a little along each parameter's gradient. Not W_dec and b_dec,
    whose gradient leaves the auxiliary term out, and not θ, at which the loss jumps."""
    config = variant(name)
    w, x, mathematics = weights(config), batch(), family(config)
    found, _ = mathematics.gradients(w, x, now_of())
    wide = type(w)(**{key: tensor.double() for key, tensor in w.named().items()})
    for key in ("r", "b", "W_enc"):
        direction = getattr(found, key).double()
        step = 1e-7 / direction.norm()
        ends = (
            mathematics.loss(replace(wide, **{key: getattr(wide, key) + sign * step * direction}), x.double(), now_of())
            for sign in (1, -1)
        )
        ahead, behind = (float(end) for end in ends)
        assert (ahead - behind) / (2 * step) == pytest.approx(float(direction.norm() ** 2), rel=1e-3), key


def test_jumprelu_thresholds_follow_the_smoothed_step() -> None:
    """θ's gradient is the published estimator, written out entry by entry in float64."""
    config = variant("jumprelu")
    w, x = weights(config), batch()
    found, _ = family(config).gradients(w, x, now_of())
    wide, data = {key: tensor.double() for key, tensor in w.named().items()}, x.double()
    u = (data - wide["b_dec"]) @ wide["W_enc"].T + wide["b_enc"]
    f = u * (u > wide["theta"])
    to_f = 2 * (f @ wide["W_dec"] + wide["b_dec"] - data) @ wide["W_dec"].T
    width = 0.5 / D_IN**0.5
    kernel = ((u - wide["theta"]).abs() < width / 2) / width
    assert kernel.any()
    expected = -(kernel * (wide["theta"] * to_f + 0.3)).mean(0)
    torch.testing.assert_close(found.theta.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sa-gsae", "untied", "gated"])
def test_the_auxiliary_term_trains_no_decoder(name: str) -> None:
    """With the code closed by b, only the auxiliary and L1 terms are left: W_dec gets nothing from them."""
    config = variant(name)
    w, x = weights(config), batch()
    found, step = family(config).gradients(replace(w, b=torch.full_like(w.b, -1e6)), x, now_of())
    assert step.auxiliary > 0
    assert step.l0 == 0
    assert found.W_dec.abs().max() == 0
    assert found.r.abs().max() == found.b.abs().max() == 0
    assert found.theta.abs().max() > 0
    assert found.W_enc.abs().max() > 0


@pytest.mark.parametrize("name", ["sa-gsae", "r tied", "untied"])
def test_a_latent_never_changes_its_sign(name: str) -> None:
    config = variant(name)
    w, x = weights(config), batch()
    f = family(config).encode(replace(w, b=torch.full_like(w.b, -0.3)), x)
    u = (x - w.b_dec) @ w.W_enc.T
    assert ((f == 0) | (f.sign() == u.sign())).all()
    assert (f < 0).any()
    assert (f > 0).any()


@pytest.mark.parametrize("name", ["sa-gsae", "abs-topk"])
def test_odd_symmetry(name: str) -> None:
    """What is mirrored at b_dec has the mirrored code; a latent turned round (w, d) -> (-w, -d) changes nothing."""
    config = variant(name)
    w, x, encode = weights(config), batch(), family(config).encode
    torch.testing.assert_close(encode(w, 2 * w.b_dec - x), -encode(w, x), rtol=1e-4, atol=1e-5)
    turned = replace(w, W_enc=-w.W_enc, W_dec=-w.W_dec)
    torch.testing.assert_close(decode(turned, encode(turned, x)), decode(w, encode(w, x)))


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(sorted(FOLDING)), seed=st.integers(0, 999))
def test_the_folded_form_is_the_same_function(name: str, seed: int) -> None:
    """To 1e-5, but for entries that lie on a threshold within rounding."""
    config = variant(name)
    w, x = weights(config, seed), batch(seed, 500)
    folded, code = family(config).fold(w), family(config).encode(w, x)
    found = folded.encode(x)
    z = x @ folded.W_enc.T + folded.b_enc
    near = ((z - folded.threshold[0]).abs() < 1e-5 * (1 + folded.threshold[0].abs())) | (
        (z * folded.slope + folded.threshold[1]).abs() < 1e-5 * (1 + folded.threshold[1].abs())
    )
    torch.testing.assert_close(torch.where(near, 0.0, found), torch.where(near, 0.0, code), rtol=1e-5, atol=1e-5)
    assert near.float().mean() < 1e-3
    torch.testing.assert_close(folded.decode(code), decode(w, code))


def test_bi_jump_relu() -> None:
    z = torch.tensor([[-3.0], [-1.0], [0.0], [1.0], [3.0]])
    two = bi_jump_relu(z, torch.tensor([[0.5], [2.0]]), torch.tensor([[0.25], [0.5]]), torch.tensor([2.0]))
    assert two.flatten().tolist() == [-6.5, 0, 0, 1.25, 3.25], "ρ|z| is 6, and 2 where that is not above"
    one = bi_jump_relu(z, torch.tensor([[1.0]]))
    assert one.flatten().tolist() == [-3, 0, 0, 0, 3]
    closed = bi_jump_relu(z, torch.tensor([[0.0], [torch.inf]]))
    assert torch.equal(closed, torch.relu(z))


@pytest.mark.parametrize("name", ["sa-gsae", "r tied", "untied"])
def test_sa_gsae_is_a_gated_sae_of_twice_the_width(name: str) -> None:
    """Every SA-GSAE(H) is a Gated(2H) with the same loss (docs/explanation/method.md):
    a win at half width is not a matter of capacity."""
    config, twice = variant(name), variant("gated", 2 * D_SAE)
    w, x = weights(config), batch()
    halves = split(w)
    torch.testing.assert_close(family(twice).loss(halves, x, now_of()), family(config).loss(w, x, now_of()))
    code, signed = family(twice).encode(halves, x), family(config).encode(w, x)
    torch.testing.assert_close(code[:, :D_SAE] - code[:, D_SAE:], signed)
    assert (code != 0).sum() == (signed != 0).sum()
    for key, tensor in join(halves).named().items():
        assert torch.equal(tensor.expand_as(getattr(w, key)), getattr(w, key)), key
    with pytest.raises(ValueError, match="does not mirror"):
        join(weights(twice))


@pytest.mark.parametrize("name", GATED)
def test_latents_that_never_open_get_no_gradient(name: str) -> None:
    config = variant(name)
    w, x = weights(config), batch()
    found, step = family(config).gradients(replace(w, theta=torch.full_like(w.theta, 1e3)), x, now_of())
    assert step.l0 == 0
    for key, grad in found.named().items():
        assert (grad.abs().max() > 0) == (key == "b_dec"), key


@pytest.mark.parametrize("name", ["sa-gsae", "untied", "gated"])
def test_a_reset_opens_latents_on_their_share(name: str) -> None:
    """θ0 = 100 closes everything; after the reset each latent in it fires on 1 % of the batch."""
    config = variant(name, theta0=100.0)
    w, x, mathematics = weights(config), batch(n=2000), gated_family(config)
    w = replace(w, theta=torch.full_like(w.theta, 100 / D_IN**0.5))
    assert not mathematics.encode(w, x).any()
    which = torch.arange(D_SAE) % 3 > 0
    mathematics.reset_(w, x, which)
    share = (mathematics.encode(w, x) != 0).float().mean(0)
    assert share[which].min() >= 0.005
    assert share[which].max() <= 0.015
    assert share[~which].max() == 0


@pytest.mark.parametrize("name", ["sa-gsae", "untied", "gated"])
def test_a_reset_in_pieces_is_the_reset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly all latents of a wide dictionary may be silent: what it takes is bounded."""
    config, which = variant(name), torch.arange(D_SAE) % 5 > 0
    w, x, mathematics = weights(config), batch(n=200), gated_family(config)
    found = []
    for at_once in (1 << 24, 200 * 7, 1):
        monkeypatch.setattr("train.sae.gated.AT_ONCE", at_once)
        fresh = replace(w, **{key: tensor.clone() for key, tensor in w.named().items()})
        mathematics.reset_(fresh, x, which)
        found.append(fresh.named())
    for key, tensor in found[0].items():
        assert key in ("W_enc", "W_dec", "b_dec") or not torch.equal(tensor, w.named()[key])
        for other in found[1:]:
            torch.testing.assert_close(other[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_degenerate_inputs_give_no_nan(name: str) -> None:
    for d_sae in (5, D_SAE):  # narrower than d_in, too
        config = variant(name, d_sae)
        w = weights(config)
        for x in (torch.zeros(4, D_IN), torch.ones(1, D_IN), w.b_dec.repeat(5, 1)):
            found, step = family(config).gradients(w, x, now_of(d_sae))
            assert all(grad.isfinite().all() for grad in found.named().values())
            assert step.reconstruction.isfinite()


@pytest.mark.parametrize("name", VARIANTS)
def test_other_units_change_nothing_but_units(name: str) -> None:
    config = variant(name)
    w, x, mathematics = weights(config), batch(), family(config)
    raw = w.times(7.5)
    f = mathematics.encode(raw, 7.5 * x)
    torch.testing.assert_close(f, 7.5 * mathematics.encode(w, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode(raw, f), 7.5 * decode(w, f / 7.5), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw.W_dec, w.W_dec)


@pytest.mark.parametrize("name", VARIANTS)
def test_projection_and_constraints(name: str) -> None:
    config = variant(name)
    w, mathematics = weights(config), family(config)
    optimizer = Optimizer(w, mathematics.unit_decoder)
    for seed in range(50):
        update(config, w, optimizer, batch(seed), now_of(), 0.05)
    if mathematics.unit_decoder:
        assert (w.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    else:
        assert (w.W_dec.norm(dim=1) - 1).abs().max() > 0.01
    if "theta" in w.named() and (mathematics.signed or config.arch == "jumprelu"):
        assert w.theta.min() >= 0
    assert {key: tuple(tensor.shape) for key, tensor in w.named().items()} == mathematics.shapes(D_IN)


def test_only_two_poles_hold_a_threshold_above_zero() -> None:
    for name, lowest in (("gated", -1.0), ("one-sided", -1.0), ("sa-gsae", 0.0), ("untied", 0.0)):
        w = weights(variant(name))
        w = replace(w, theta=torch.full_like(w.theta, -1.0), r=torch.full_like(w.r, 9.0))
        family(variant(name)).constrain_(w)
        assert w.theta.min() == lowest
        assert w.r.max() == 5


def test_lost_decoder_rows_are_drawn_anew() -> None:
    config = variant("sa-gsae")
    w = weights(config)
    optimizer = Optimizer(w, True)
    update(config, w, optimizer, batch(), now_of(), 1e-3)
    w.W_dec[3] = 0
    w.W_dec[5] = float("nan")
    assert optimizer.revive_(torch.Generator().manual_seed(0)) == 2
    assert (w.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    assert torch.equal(w.W_enc[3], w.W_dec[3])
    assert optimizer.adam.state[w.W_dec]["exp_avg"][5].abs().max() == 0
    assert optimizer.revive_(torch.Generator().manual_seed(0)) == 0


def test_a_reset_latent_gets_the_others_second_moment() -> None:
    config = variant("untied")
    w = weights(config)
    optimizer = Optimizer(w, True)
    update(config, w, optimizer, batch(), now_of(), 1e-3)
    before = {key: value.clone() for key, value in optimizer.adam.state[w.theta].items()}
    which = torch.arange(D_SAE) < 7
    optimizer.refresh_(("theta",), which)
    after = optimizer.adam.state[w.theta]
    assert after["exp_avg"][:, :7].abs().max() == 0
    torch.testing.assert_close(after["exp_avg_sq"][:, :7], before["exp_avg_sq"][:, 7:].mean(1, True).expand(2, 7))
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[key][:, 7:], before[key][:, 7:])


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_products_stay_close(name: str) -> None:
    config = variant(name)
    w, x = weights(config), batch()
    exact, _ = family(config).gradients(w, x, now_of())
    rounded, _ = family(config).gradients(w, x, replace(now_of(), matmul=torch.bfloat16))
    for key in w.trained():
        grad = getattr(exact, key)
        loose = 0.3 if config.arch == "jumprelu" and key == "theta" else 0.08  # few entries lie under its kernel
        assert (getattr(rounded, key) - grad).norm() <= loose * grad.norm(), key


def test_schedule() -> None:
    rates = [learning_rate(step, 1000, 2.0, usual_warmup(1000), 0.3) for step in range(1000)]
    assert rates[0] == pytest.approx(2 / 51), "the usual warm-up is at most 5 % of the run"
    assert rates[50] == rates[700] == 2
    assert rates[850] == pytest.approx(1)
    assert 0 < rates[-1] < 0.01
    assert rates[:51] == sorted(rates[:51])
    assert rates[700:] == sorted(rates[700:], reverse=True)
    assert learning_rate(0, 1, 1.0, usual_warmup(1), 0.0) == 1
    assert learning_rate(49, 105, 1.0, 99, 0.0) == 0.5, "one that was asked for is kept"
