"""The dial test finds planted directions, and lets random ones pass no more often than it says."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.exact.linear import LinearModel, exact_sae, orthonormal
from torch import Tensor

from shared.errors import Interrupted
from shared.schemas.steer import FEWEST_CONTROLS, DialConfig, DialLatent
from train.autoencoder import Autoencoder
from train.data.row_mask import RowMask
from train.steer.contrast import NextTokens, TokenSets, shuffled_sets, token_sets
from train.steer.controls import draw_controls
from train.steer.dial import able_latents
from train.steer.follow import next_tokens
from train.steer.probe import SteeredContexts
from train.steer.subject import make_subject
from train.steer.trial import DialSubject, DialTest
from train.steer.verdict import verdict

PLANTED, TESTED = 40, 30


def without_verdict(found: Sequence[DialLatent]) -> bool:
    return all(latent.passes is None for latent in found)


@pytest.fixture(scope="module")
def model() -> LinearModel:
    return LinearModel(orthonormal(PLANTED))


@pytest.fixture(scope="module")
def contexts(model: LinearModel) -> SteeredContexts:
    tokens = model.text(8, seed=1)
    return SteeredContexts.of(tokens, np.ones(tokens.shape, bool), ())


@pytest.fixture(scope="module")
def after(model: LinearModel) -> NextTokens:
    """Next-token counts of every planted direction, on text that is not steered."""
    tokens, sae = model.text(600, seed=2), exact_sae(model.directions, model.directions)
    f = sae.encode(model.embedding[torch.from_numpy(tokens[:, :-1].reshape(-1))]).numpy()
    return NextTokens.counted(f, tokens[:, 1:].reshape(-1), model.vocab_size)


def subjects(after: NextTokens, shuffled: int = 0) -> list[DialSubject]:
    rng, found = np.random.default_rng(0), []
    for latent in range(TESTED):
        above, below = after.after(latent, False), after.after(latent, True)
        sets = token_sets(above, below, after.base, (), (True, True))
        drawn = tuple(shuffled_sets(above, below, after.base, (), rng) for _ in range(shuffled))
        counts = int(below.sum()), int(above.sum())
        found.append(DialSubject(latent, counts, 0.5, 1.0, sets, tuple(each for each in drawn if each.usable)))
    return found


def controls_of(sae: Autoencoder, many: int = FEWEST_CONTROLS, seed: int = 0) -> Tensor:
    others = np.arange(TESTED, sae.config.d_sae)
    return draw_controls(sae.weights.W_dec, others, many, np.random.default_rng(seed))[1]


def test_planted_directions_pass_with_both_signs_right(
    model: LinearModel, contexts: SteeredContexts, after: NextTokens
) -> None:
    """Acceptance: at least 95 % of planted directions pass, and no sign is wrong."""
    sae = exact_sae(model.directions, model.directions)
    chosen = subjects(after, shuffled=8)
    raised = (model.unembedding @ model.directions.T).numpy()
    for each in chosen:
        assert (raised[list(each.sets.plus), each.latent] > 1).sum() >= 2, "counts find the 3 tokens of the direction"
        assert (raised[list(each.sets.minus), each.latent] < -1).sum() >= 2
    found, sizes = DialTest(model, "x", sae, contexts, chosen, controls_of(sae)).run(0)
    assert sizes == pytest.approx([1.0]), "all latents have one dial unit, so one size is enough"
    assert np.mean([latent.passes for latent in found]) >= 0.95
    for latent in found:
        assert (np.diff(latent.y) > 0).all(), "raised by every step of the dial"
        assert latent.kl[2] < min(latent.kl[1], latent.kl[3]) < max(latent.kl[0], latent.kl[4])
        assert latent.interval[0] <= latent.slope <= latent.interval[1]
    shuffled = [slope for latent in found for slope in latent.shuffled]
    assert len(shuffled) > 100
    slope = float(np.mean([latent.slope for latent in found]))
    assert abs(np.mean(shuffled)) < 0.05 * slope, "tokens from shuffled signs do not know which end is which"
    words = verdict(found, FEWEST_CONTROLS)
    assert f"of {TESTED} latents are a dial" in words
    assert "No verdict" not in words


def test_the_slope_is_the_known_one(model: LinearModel, contexts: SteeredContexts, after: NextTokens) -> None:
    """Without the softmax, which moves both sets alike, y is linear in v with a slope that W_U gives."""
    sae = exact_sae(model.directions, model.directions)
    chosen = subjects(after)
    found, _ = DialTest(model, "x", sae, contexts, chosen, controls_of(sae)).run(0)
    raised = (model.unembedding @ model.directions.T).numpy()
    for each, latent in zip(chosen, found, strict=True):
        plus, minus = (raised[list(part), each.latent].mean() for part in (each.sets.plus, each.sets.minus))
        assert latent.slope == pytest.approx(plus - minus, abs=1e-4)
        assert np.diff(latent.y) == pytest.approx([plus - minus] * 4, abs=1e-4)
        rows = controls_of(sae).numpy() @ model.unembedding.numpy().T
        known = rows[:, list(each.sets.plus)].mean(1) - rows[:, list(each.sets.minus)].mean(1)
        assert latent.controls == pytest.approx(known.tolist(), abs=1e-4)


def pass_rate(
    test: DialTest, chosen: Sequence[DialSubject], draws: int, sets: Callable[[Tensor, DialSubject], TokenSets]
) -> float:
    """The share of random directions, in the places of the latents, whose p is 0.05 or less."""
    width = test.sae.d_in
    generator = torch.Generator().manual_seed(3)
    slots = [chosen[number % len(chosen)] for number in range(draws)]
    random = torch.randn(draws, width, generator=generator)
    random /= random.norm(dim=1, keepdim=True)
    placed = [
        replace(each, latent=number, sets=sets(random[number], each), shuffled=()) for number, each in enumerate(slots)
    ]
    found, _ = replace(test, sae=with_rows(test.sae, [each.latent for each in slots], random), subjects=placed).run(0)
    assert len(found) == draws
    return float(np.mean([latent.p is not None and latent.p <= 0.05 for latent in found]))


def with_rows(sae: Autoencoder, latents: list[int], decoder: Tensor) -> Autoencoder:
    """An autoencoder that reads the latents named, as often as they are named, and writes other directions."""
    weights = {}
    for name, tensor in sae.weights.named().items():
        axis = next((axis for axis, size in enumerate(tensor.shape) if size == sae.config.d_sae), None)
        weights[name] = tensor if axis is None else tensor.index_select(axis, torch.tensor(latents))
    weights["W_dec"] = decoder
    config = sae.config.model_copy(update={"d_sae": len(latents)})
    return Autoencoder(config, type(sae.weights)(**weights), sae.scale)


@pytest.mark.slow
def test_random_directions_pass_as_often_as_they_may(
    model: LinearModel, contexts: SteeredContexts, after: NextTokens
) -> None:
    """Acceptance: at most 8 % at the 5 % level. By its own lens tokens every direction passes: that proves nothing."""
    sae = exact_sae(model.directions, model.directions)
    chosen = subjects(after)
    test = DialTest(model, "x", sae, contexts, chosen, controls_of(sae))
    rate = pass_rate(test, chosen, 240, lambda _, subject: subject.sets)
    assert 0.005 < rate <= 0.08

    def own_lens(direction: Tensor, _: DialSubject) -> TokenSets:
        logits = model.unembedding @ direction
        return TokenSets(tuple(logits.topk(8).indices.tolist()), tuple((-logits).topk(8).indices.tolist()))

    assert pass_rate(test, chosen, 60, own_lens) > 0.95


@pytest.mark.slow
def test_random_directions_in_a_language_model(finished: Path) -> None:
    """The same in a transformer, with an autoencoder that was trained on it."""
    config = DialConfig(run=finished, device="cpu", least=10, latents=20)
    subject = make_subject(config)
    parts = subject.split()
    _, contexts = subject.contexts(RowMask.of(parts.heldout), 16, 0)
    latents = np.flatnonzero(subject.counts.two_sided & (subject.counts.firings.min(1) >= 10))[:20].tolist()
    after = next_tokens(subject, RowMask.of(parts.train), latents, None, lambda: False)
    chosen, _ = able_latents(latents, after, subject, config)
    assert len(chosen) >= 10
    rows = draw_controls(subject.sae.weights.W_dec, np.empty(0, np.int64), FEWEST_CONTROLS, np.random.default_rng(1))[1]
    test = DialTest(subject.language_model(), subject.hook_name, subject.sae, contexts, chosen, rows)
    assert pass_rate(test, chosen, 200, lambda _, each: each.sets) <= 0.08


@pytest.mark.parametrize("many", [0, 1, 39])
def test_there_is_no_verdict_with_fewer_than_40_control_directions(
    many: int, model: LinearModel, contexts: SteeredContexts, after: NextTokens
) -> None:
    sae = exact_sae(model.directions, model.directions)
    found, _ = DialTest(model, "x", sae, contexts, subjects(after)[:3], controls_of(sae, many)).run(0)
    assert without_verdict(found)
    assert [len(latent.controls) for latent in found] == [many] * 3
    assert all((latent.p is None) == (many == 0) for latent in found)
    assert verdict(found, many).startswith("No verdict: a verdict needs at least 40 control directions")
    enough, _ = DialTest(model, "x", sae, contexts, subjects(after)[:3], controls_of(sae, 40)).run(0)
    assert not without_verdict(enough)


def test_latents_of_different_units_share_the_control_directions(
    model: LinearModel, contexts: SteeredContexts, after: NextTokens
) -> None:
    """The slope of a control direction is interpolated between three sizes; the model is linear, so it is exact."""
    sae = exact_sae(model.directions, model.directions)
    chosen = [replace(each, unit=0.2 + 0.1 * number) for number, each in enumerate(subjects(after)[:9])]
    found, sizes = DialTest(model, "x", sae, contexts, chosen, controls_of(sae)).run(0)
    assert sizes == pytest.approx([0.2, 0.6, 1.0])
    alone, _ = DialTest(model, "x", sae, contexts, chosen[3:4], controls_of(sae)).run(0)
    assert found[3].controls == pytest.approx(alone[0].controls, abs=1e-5)
    assert found[3].slope == pytest.approx(alone[0].slope, abs=1e-6)


def test_it_can_be_stopped(model: LinearModel, contexts: SteeredContexts, after: NextTokens) -> None:
    sae = exact_sae(model.directions, model.directions)
    asked = iter([False] * 5 + [True])
    with pytest.raises(Interrupted, match="nothing was written"):
        DialTest(model, "x", sae, contexts, subjects(after), controls_of(sae)).run(0, lambda: next(asked))
