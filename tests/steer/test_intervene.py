"""Interventions change what they say and nothing else; spliced losses equal those of `sagsae eval`."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exact.runs import make_sae
from torch import Tensor

from shared.model.language_model import LanguageModel
from shared.saes import ARCHITECTURES
from shared.schemas.steer import SteerConfig
from train.data.row_mask import RowMask
from train.measure.metrics import reconstructed, replaced_at
from train.steer.intervene import Intervention, LatentReader
from train.steer.probe import Probe, SteeredContexts, TokenContrasts
from train.steer.subject import SteeringSubject, make_subject

Splice = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def subject(finished: Path) -> SteeringSubject:
    return make_subject(SteerConfig(run=finished, latent=0, prompt="a", device="cpu"))


@pytest.fixture(scope="module")
def model(subject: SteeringSubject) -> LanguageModel:
    """In float32, so that equal means equal; the store's own type is bfloat16."""
    return LanguageModel(subject.source, "cpu", "float32")


@pytest.fixture(scope="module")
def contexts(subject: SteeringSubject) -> SteeredContexts:
    _, found = subject.contexts(RowMask.of(subject.split().heldout), 12, 0)
    return found


def busiest(subject: SteeringSubject) -> int:
    """A latent that uses both poles."""
    able = np.where(subject.counts.two_sided, subject.counts.firings.min(1), 0)
    assert able.max() > 20
    return int(able.argmax())


def logits(
    subject: SteeringSubject, model: LanguageModel, contexts: SteeredContexts, splice: Splice | None
) -> tuple[Tensor, Tensor]:
    """The logits, and the activations behind the splice."""
    kept: list[Tensor] = []
    here = torch.from_numpy(contexts.counted)

    def keep(x: Tensor) -> Tensor:
        found = x if splice is None else replaced_at(here, splice)(x)
        kept.append(found.clone())
        return found

    return model.logits(torch.from_numpy(contexts.tokens.astype("int64")), (subject.hook_name, keep)), kept[0]


def latent_of(subject: SteeringSubject, x: Tensor, latent: int) -> Tensor:
    return subject.sae.encode(x.float().flatten(0, 1))[:, latent].view(x.shape[:2])


def test_clamping_a_latent_to_its_own_value_changes_no_logit(
    subject: SteeringSubject, model: LanguageModel, contexts: SteeredContexts
) -> None:
    clean, x = logits(subject, model, contexts, None)
    latent = busiest(subject)
    own, direction = latent_of(subject, x, latent), subject.sae.weights.W_dec[latent]

    def to_itself(x: Tensor) -> Tensor:
        f = LatentReader(subject.sae, [latent])(x.flatten(0, 1)).view(x.shape[:2])
        return x + (own - f)[..., None] * direction

    same, _ = logits(subject, model, contexts, to_itself)
    assert own.count_nonzero() > 10
    assert (same - clean).abs().max() <= 1e-5
    moved, _ = logits(subject, model, contexts, lambda x: x + 0.1 * direction)
    assert (moved - clean).abs().max() > 1e-3, "the comparison can fail"


def test_clamping_to_zero_takes_the_latents_part_away(
    subject: SteeringSubject, model: LanguageModel, contexts: SteeredContexts
) -> None:
    _, x = logits(subject, model, contexts, None)
    latent = busiest(subject)
    part = latent_of(subject, x, latent)[..., None] * subject.sae.weights.W_dec[latent]
    expected, _ = logits(subject, model, contexts, lambda x: x - part)
    ablation = Intervention.on_latent(subject.sae, latent, torch.zeros(1), added=False)
    found, behind = logits(subject, model, contexts, ablation)
    assert (found - expected).abs().max() <= 1e-5
    here = torch.from_numpy(contexts.counted)
    rest = subject.sae.decode(subject.sae.encode(x.flatten(0, 1))).view_as(x) - x
    assert torch.allclose((behind - x)[here], -part[here], atol=1e-6)
    assert rest.abs().max() > 0.1, "the error is large, and kept"


def test_a_clamped_latent_has_the_value_that_was_asked_for(
    subject: SteeringSubject, model: LanguageModel, contexts: SteeredContexts
) -> None:
    """The decoder row moves the activation by (v - f) d; along d the activation is then f d + the rest, with v for
    f."""
    latent = busiest(subject)
    values = torch.linspace(-1, 1, len(contexts.tokens)) * float(subject.counts.units[latent])
    clamp = Intervention.on_latent(subject.sae, latent, values, added=False)
    _, x = logits(subject, model, contexts, None)
    _, behind = logits(subject, model, contexts, clamp)
    here, d = torch.from_numpy(contexts.counted), subject.sae.weights.W_dec[latent]
    moved = ((behind - x) @ d)[here]
    assert torch.allclose(moved, (values[:, None] - latent_of(subject, x, latent))[here], atol=1e-5)


def test_adding_and_taking_away_returns(
    subject: SteeringSubject, model: LanguageModel, contexts: SteeredContexts
) -> None:
    latent, amount = busiest(subject), torch.tensor([0.7])
    there = Intervention.on_latent(subject.sae, latent, amount, added=True)
    back = Intervention.on_latent(subject.sae, latent, -amount, added=True)
    clean, x = logits(subject, model, contexts, None)
    found, behind = logits(subject, model, contexts, lambda x: back(there(x)))
    assert (behind - x).abs().max() <= 1e-6
    assert (found - clean).abs().max() <= 1e-5


def test_other_positions_keep_their_bits(
    subject: SteeringSubject, model: LanguageModel, contexts: SteeredContexts
) -> None:
    _, x = logits(subject, model, contexts, None)
    here = torch.zeros(x.shape[:2], dtype=torch.bool)
    here[:, 5] = True
    clamp = Intervention.on_latent(subject.sae, busiest(subject), torch.tensor([2.0]), added=False)
    found = replaced_at(here, clamp)(x)
    assert torch.equal(found[~here], x[~here])
    assert not torch.equal(found[here], x[here])
    half = x.to(torch.bfloat16)
    assert torch.equal(replaced_at(here, clamp)(half)[~here], half[~here])
    assert clamp(half).dtype == torch.bfloat16


def test_a_row_with_heads_is_changed_as_one(subject: SteeringSubject) -> None:
    latent = busiest(subject)
    x = torch.randn(2, 3, 2, subject.sae.d_in // 2)
    clamp = Intervention.on_latent(subject.sae, latent, torch.tensor([1.0]), added=False)
    assert torch.equal(clamp(x), clamp(x.flatten(2)).view_as(x))


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_some_latents_alone_are_those_of_the_whole_code(arch: str) -> None:
    sae = make_sae(arch)
    x = torch.randint(-12, 13, (500, sae.d_in), generator=torch.Generator().manual_seed(1)) / 8
    some = [3, 17, 5, 63]
    assert torch.equal(LatentReader(sae, some)(x), sae.encode(x)[:, some])


def test_spliced_losses_equal_those_of_eval(subject: SteeringSubject, finished: Path) -> None:
    measured: dict[str, Any] = json.loads((finished / "evaluation.json").read_text())
    heldout = RowMask.of(subject.split().heldout)
    every = heldout.contexts()
    tokens = subject.store.token_rows(check=False).take(every)
    contexts = SteeredContexts.of(tokens, heldout.of_contexts(every), subject.store.spec.special_ids)
    assert contexts.predictions.sum() == measured["ce_tokens"]
    probe = Probe(subject.language_model(), subject.hook_name, contexts, TokenContrasts.of([]))
    clean, spliced, zero = probe.measure([partial(reconstructed, subject.sae), torch.zeros_like])
    assert contexts.mean(clean.ce) == pytest.approx(measured["ce_clean"], abs=1e-6)
    assert contexts.mean(spliced.ce) == pytest.approx(measured["saes"][0]["ce_spliced"], abs=1e-6)
    assert contexts.mean(zero.ce) == pytest.approx(measured["ce_zero"], abs=1e-6)
    losses = [measured["ce_clean"], measured["ce_zero"], measured["saes"][0]["ce_spliced"]]
    assert np.abs(np.subtract.outer(losses, losses))[np.triu_indices(3, 1)].min() > 1e-3, "they differ"


def test_kl_contrast_and_means_are_those_of_the_logits(
    subject: SteeringSubject, model: LanguageModel, contexts: SteeredContexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = Intervention.on_latent(subject.sae, busiest(subject), torch.tensor([3.0]), added=False)
    sets = [((5, 9, 12), (7, 44)), ((1, 2), (290, 3))]
    before, _ = logits(subject, model, contexts, None)
    behind, _ = logits(subject, model, contexts, change)
    p, q = (found[:, :-1].double().log_softmax(-1) for found in (before, behind))
    marks = torch.from_numpy(contexts.predicted)
    expected = [(q[..., list(a)].mean(-1) - q[..., list(b)].mean(-1))[marks].mean().item() for a, b in sets]
    kl = (p.exp() * (p - q)).sum(-1)[marks].mean().item()
    for at_once in (1 << 24, 1):  # one batch, then one context at a time
        monkeypatch.setattr("train.steer.probe.LOGITS_AT_ONCE", at_once)
        probe = Probe(model, subject.hook_name, contexts, TokenContrasts.of(sets), with_means=True)
        clean, found = probe.measure([change])
        assert contexts.mean(found.contrast).tolist() == pytest.approx(expected, abs=1e-5)
        assert contexts.mean(found.kl) == pytest.approx(kl, rel=1e-4)
        assert contexts.mean(clean.kl) == pytest.approx(0, abs=1e-9)
        assert found.mean is not None
        assert np.allclose(found.mean, q.exp()[marks].mean(0).numpy(), atol=1e-6)
        assert (len(found.kl), probe.batch_count) == (len(contexts.tokens), 1 if at_once > 1 else len(contexts.tokens))
