"""A latent's examples: the strongest tokens of each pole, from every row that counts, whatever the order of reading."""

import numpy as np
import pytest
import torch
from support.stores import in_token_order

from shared.errors import UserError
from shared.saes import sae_config
from shared.store.opened import Store
from train.autoencoder import Autoencoder
from train.measure.examples import LatentExample, Strongest, latent_examples, strongest
from train.sae.families import family


def sae_for(store: Store, hook: str, arch: str) -> Autoencoder:
    """An autoencoder with random weights and low thresholds, so that latents of both signs are active."""
    torch.manual_seed(5)
    d_in = store.spec.hookpoints[hook].d_in
    config = sae_config(arch=arch, d_sae=24, theta0=0.01)
    return Autoencoder.of(
        config, family(config).initial(d_in, torch.zeros(d_in), torch.Generator().manual_seed(5)), 1.0
    )


@pytest.mark.parametrize("arch", ["sa-gsae", "gated"])
def test_examples_are_those_of_all_rows_at_once(store: Store, arch: str) -> None:
    hook = next(iter(store.spec.hookpoints))
    sae, tokens = sae_for(store, hook, arch), store.tokens()
    rows = torch.from_numpy(in_token_order(store, hook)).view(torch.bfloat16).float()
    latents = sae.encode(rows)[:, 3].double().numpy()[: store.n_rows]
    counts = ~np.isin(tokens, store.spec.special_ids)
    counts[:, : store.spec.skip_positions] = False
    latents[~counts.reshape(-1)[: store.n_rows]] = 0
    found = latent_examples(sae, store, hook, 3, count=5)
    assert [example.value for example in found.positive] == pytest.approx(
        sorted(latents[latents > 0])[::-1][:5], rel=1e-4
    )
    assert [example.value for example in found.negative] == pytest.approx(sorted(latents[latents < 0])[:5], rel=1e-4)
    assert bool(found.negative) == sae.signed
    for example in (*found.positive, *found.negative):
        assert latents[example.context * store.spec.context + example.position] == pytest.approx(
            example.value, rel=1e-4
        )
        assert example.ids == tuple(tokens[example.context])


def test_of_equal_values_the_first_place_wins_in_any_order_of_reading() -> None:
    values, places = np.array([1.0, 2.0, 2.0, 0.0, -3.0, 2.0]), np.array([9, 8, 4, 1, 0, 6])
    whole = strongest(Strongest.none(), values, places, 3)
    assert (whole.values.tolist(), whole.places.tolist()) == ([2, 2, 2], [4, 6, 8])
    best = Strongest.none()
    for at in (3, 5, 0, 4, 2, 1):
        best = strongest(best, values[at : at + 1], places[at : at + 1], 3)
    assert best.places.tolist() == whole.places.tolist()


def test_text_marks_the_token() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(chr(one) for one in ids)

    ids = tuple(map(ord, "one two\nthree"))
    assert LatentExample(1.0, 0, 4, ids).text(Letters(), around=3) == "ne [[t]]wo"
    assert LatentExample(1.0, 0, 0, ids).text(Letters(), around=2) == "[[o]]ne"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hook": "layer_09/nothing"}, "is no hookpoint of"),
        ({"latent": 24}, "latents 0 to 23"),
        ({"latent": -1}, "latents 0 to 23"),
        ({"count": 0}, "ask for 1 example or more"),
    ],
)
def test_what_does_not_fit_is_refused(store: Store, changed: dict[str, object], message: str) -> None:
    hook = next(iter(store.spec.hookpoints))
    asked: dict[str, object] = {"hook": hook, "latent": 0, "count": 1, **changed}
    with pytest.raises(UserError, match=message):
        latent_examples(sae_for(store, hook, "gated"), store, **asked)  # type: ignore[arg-type]
