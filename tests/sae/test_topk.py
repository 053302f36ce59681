"""TopK: each token's own k largest latents, the auxiliary term of arXiv 2406.04093, and the page that explains them."""

import re

import pytest
import torch
from support.command import ROOT
from support.variants import batch, by_autograd, silences, variant, weights

from shared.errors import UserError
from shared.saes import SignedTopK, TopK, sae_config
from train.sae.base import StepInputs, decode
from train.sae.families import family


def test_each_token_has_its_own_k_largest() -> None:
    """By sorting, token by token; fewer than k where fewer pre-activations are positive."""
    config = variant("topk", k=7)
    w, x = weights(config), batch()
    u = (x - w.b_dec) @ w.W_enc.T + w.b_enc
    u[0] = -u[0].abs()
    u[1] = torch.where(torch.arange(u.shape[1]) < 3, u[1].abs() + 0.1, -u[1].abs())
    w.W_enc.zero_()
    for token in range(len(x)):  # the bias is the pre-activation
        w.b_enc.copy_(u[token])
        code = family(config).encode(w, x[token : token + 1])[0]
        kept = sorted(range(len(code)), key=lambda latent: -u[token, latent].item())[:7]
        expected = {latent for latent in kept if u[token, latent] > 0}
        assert set(torch.nonzero(code).flatten().tolist()) == expected
        assert all(code[latent] == u[token, latent] for latent in expected)
        assert len(expected) == (0 if token == 0 else 3 if token == 1 else 7)


def test_signed_latents_are_the_k_largest_by_absolute_value() -> None:
    """By sorting, token by token; the code is the pre-activation itself, bias included."""
    config = variant("signed-topk", k=7)
    w, x = weights(config), batch()
    code = family(config).encode(w, x)
    u = (x - w.b_dec) @ w.W_enc.T + w.b_enc
    assert float(w.b_enc.abs().max()) > 0
    for token in range(len(x)):
        kept = sorted(range(len(u[token])), key=lambda latent: -abs(u[token, latent].item()))[:7]
        assert set(torch.nonzero(code[token]).flatten().tolist()) == set(kept)
        assert all(code[token, latent] == u[token, latent] for latent in kept)
    assert bool((code < 0).any())


def test_the_signed_auxiliary_term_is_that_of_the_paper_by_absolute_value() -> None:
    config = variant("signed-topk")
    assert isinstance(config, SignedTopK)
    w, x = weights(config), batch()
    silent = silences()
    _, loss = by_autograd(config, w, x, StepInputs(0.0, silent=silent))
    _, main = by_autograd(config, w, x, StepInputs(0.0, silent=torch.zeros_like(silent)))
    u = (x - w.b_dec) @ w.W_enc.T + w.b_enc
    rest = x - decode(w, family(config).encode(w, x))
    total = 0.0
    for token in range(len(x)):
        inactive = [latent for latent in range(len(silent)) if silent[latent] >= config.aux_after]
        chosen = sorted(inactive, key=lambda latent: -abs(u[token, latent].item()))[: config.aux_k]
        h = sum(u[token, latent] * w.W_dec[latent] for latent in chosen)
        total += (rest[token] - h).square().sum().item()
    assert (loss - main).item() == pytest.approx(total / len(x) / 32, rel=1e-5)


def test_the_auxiliary_term_is_that_of_the_paper() -> None:
    """1/32 of what is left when the inactive latents' largest have reconstructed the error, whose gradient stops."""
    config = variant("topk")
    assert isinstance(config, TopK)
    w, x = weights(config), batch()
    silent = silences()
    _, loss = by_autograd(config, w, x, StepInputs(0.0, silent=silent))
    _, main = by_autograd(config, w, x, StepInputs(0.0, silent=torch.zeros_like(silent)))
    a = torch.relu((x - w.b_dec) @ w.W_enc.T + w.b_enc)
    rest = x - decode(w, family(config).encode(w, x))
    total = 0.0
    for token in range(len(x)):
        inactive = [latent for latent in range(len(silent)) if silent[latent] >= config.aux_after]
        chosen = sorted(inactive, key=lambda latent: -a[token, latent].item())[: config.aux_k]
        h = sum(a[token, latent] * w.W_dec[latent] for latent in chosen)
        total += (rest[token] - h).square().sum().item()
    assert (loss - main).item() == pytest.approx(total / len(x) / 32, rel=1e-5)


def test_default_aux_k_is_half_of_the_width_of_the_activations() -> None:
    config = sae_config(arch="topk", d_sae=48, k=4, aux_after=100)
    assert config.aux_k is None
    w, x, now = weights(config), batch(), StepInputs(0.0, silent=silences())
    _, half = by_autograd(config, w, x, now)
    _, same = by_autograd(variant("topk", aux_k=8), w, x, now)
    _, other = by_autograd(variant("topk", aux_k=7), w, x, now)
    assert half == same != other


def test_k_above_the_number_of_latents_is_refused() -> None:
    with pytest.raises(UserError, match="k: 49 of 48 latents cannot be active"):
        sae_config(arch="topk", d_sae=48, k=49)
    assert sae_config(arch="topk", d_sae=48, k=48).name == "topk-48-k48-seed0"


def test_the_page_shows_the_code() -> None:
    """docs/how-to/add-an-architecture.md: each block of Python stands in the file that it explains,
    whatever its indentation."""
    page = (ROOT / "docs/how-to/add-an-architecture.md").read_text(encoding="utf-8")
    code = "".join((ROOT / path).read_text() for path in re.findall(r"^`([\w/]+\.py)`", page, re.MULTILINE))
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 10
    *shown, code = ["".join(text.split()) for text in (*blocks, code)]
    for block in shown:
        assert block in code, block
