"""Lexical rules, co-firing, neighbouring directions and the logit lens equal their definitions."""

import itertools
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support.exact.runs import all_latents, make_run, make_sae, make_store
from transformers import AutoModelForCausalLM

from harvest.run import harvest
from shared.config import HarvestConfig, TrainConfig
from shared.errors import UserError
from shared.saes import sae_config
from shared.schemas.features import FeaturesConfig
from shared.store.opened import Store
from train.autoencoder import Autoencoder
from train.features.cofire import AT_A_TIME, affordable, cofiring
from train.features.encode import BlockEncoder
from train.features.lens import NoLens, find_unembedding
from train.features.pairs import PairRun
from train.features.rules import lexical_rules
from train.features.run import features
from train.features.slots import lottery
from train.run import train
from train.sae.families import family


def f1(chosen: tuple[int, ...], counts: np.ndarray, read: np.ndarray, firings: int) -> float:
    return float(2 * counts[list(chosen)].sum() / (firings + read[list(chosen)].sum()))


@pytest.mark.parametrize("seed", range(6))
def test_a_rule_has_the_largest_f1_of_all_sets_of_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    read = rng.integers(20, 400, 12)
    counts = (read * rng.random((5, 12)) ** 3).astype(np.int64)
    counts[4] = 2  # too few firings on each token
    pole, token = np.nonzero(counts)
    keys = np.repeat((pole + 3) << 32 | token, counts[pole, token])
    run = PairRun.of(keys)
    firings = counts.sum(1)
    rules = lexical_rules(run, 3, firings, read)
    sets = [each for n in range(1, 9) for each in itertools.combinations(range(12), n)]
    for number in range(4):
        allowed = [each for each in sets if (counts[number][list(each)] >= 3).all()]
        best = max(f1(each, counts[number], read, firings[number]) for each in allowed)
        mine = tuple(rules.token[rules.pole == number + 3].tolist())
        assert rules.f1[number] == pytest.approx(best)
        assert f1(mine, counts[number], read, firings[number]) == pytest.approx(best)
    assert rules.f1[4] == 0
    assert not (rules.pole == 7).any()


@pytest.mark.parametrize("at_a_time", [1, 500, AT_A_TIME])
@pytest.mark.parametrize("dense", [0, 100])
@pytest.mark.parametrize("sides", [1, 2])
def test_what_fires_together(sides: int, dense: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by counters, and by sorting."""
    monkeypatch.setattr("train.features.cofire.AT_A_TIME", at_a_time)
    monkeypatch.setattr("train.features.cofire.DENSE", dense)
    rng = np.random.default_rng(0)
    on = rng.random((400, 30)) < 0.15 * rng.random(30)
    on[:, 20] = on[:, 3] | (rng.random(400) < 0.02)
    if sides == 2:
        on[:, 1::2] &= ~on[:, ::2]
    order = np.random.default_rng(1).permutation(on.sum())
    place, pole = np.nonzero(on)[0][order] * 3, np.nonzero(on)[1][order]
    found = cofiring(place, pole, sides, 31, len(on))
    assert np.array_equal(found.pole, np.sort(found.pole))
    for one in range(30):
        both = (on[:, [one]] & on).sum(0)
        union = (on[:, [one]] | on).sum(0)
        others = [o for o in range(30) if o // sides != one // sides and both[o] >= 3]
        wanted = sorted(others, key=lambda o: (-np.float32(both[o] / union[o]), o))[:8]
        mine = found.pole == one
        assert found.other[mine].tolist() == wanted
        assert found.jaccard[mine] == pytest.approx([both[o] / union[o] for o in wanted])
        expected = [on[:, one].sum() * on[:, o].sum() / len(on) for o in wanted]
        assert found.lift[mine] == pytest.approx([both[o] / e for o, e in zip(wanted, expected, strict=True)])


@pytest.mark.parametrize("largest", [3, 2**31])
def test_runs_of_pairs_are_added_up(largest: int) -> None:
    """Counts and keys that fit into one word together, and that do not."""
    rng = np.random.default_rng(0)
    runs, sums = [], Counter[int]()
    for _ in range(5):
        keys = np.unique(rng.integers(0, 60, 40)) << 32 | 5
        counts = rng.integers(1, largest // 8 + 2, len(keys)).astype(np.uint32)
        sums.update(dict(zip(keys.tolist(), counts.tolist(), strict=True)))
        runs.append(PairRun(keys, counts))
    found = PairRun.merged(runs)
    assert dict(zip(found.keys.tolist(), found.counts.tolist(), strict=True)) == dict(sums)
    assert found.keys.tolist() == sorted(sums)


@pytest.mark.parametrize("arch", ["gated", "sa-gsae"])
@pytest.mark.parametrize("tie", ["none", "symmetric"])
def test_a_block_is_what_the_autoencoder_encodes(arch: str, tie: str) -> None:
    """On weights of no grid, a threshold below zero among them, the code is that of the whole autoencoder."""
    more = {"tie": tie} if arch == "sa-gsae" else {}
    config = sae_config(arch=arch, d_sae=700, **more)
    generator = torch.Generator().manual_seed(3)
    weights = family(config).initial(16, torch.zeros(16), generator)
    for name, tensor in weights.named().items():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 3)
        if name == "theta" and arch == "sa-gsae":
            tensor.abs_()
            tensor[0, 9] = -0.1
    sae, x = Autoencoder(config, weights, 1.0), torch.randn(900, 16, generator=generator)
    encoder, whole = BlockEncoder(sae), sae.encode(x).numpy()
    found = np.zeros_like(whole)
    for first in encoder.firsts:
        block = encoder.block(first, x)
        assert np.all(np.diff(block.latent.astype(np.int64) * 900 + block.row) > 0)
        found[block.row, first + block.latent.astype(np.int64)] = block.value
    assert len(encoder.firsts) > 1
    assert np.allclose(found, whole, rtol=1e-5, atol=1e-6)
    assert 0.05 < (whole != 0).mean() < 0.95


def test_a_few_full_tokens_do_not_make_cofiring_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit, only a random part of the tokens is counted, whatever the order of the firings."""
    rng = np.random.default_rng(0)
    on = rng.random((300, 40)) < 0.2
    place, pole = np.nonzero(on)
    whole = cofiring(place, pole, 1, 40, 600)
    monkeypatch.setattr("train.features.cofire.MOST_PAIRS", int((on.sum(1) ** 2).sum() // 2))
    kept, share = affordable(place)
    assert 0.4 < share < 0.6
    assert (on.sum(1)[np.unique(place[kept])] ** 2).sum() <= (on.sum(1) ** 2).sum() / 2
    order = rng.permutation(len(place))
    part, again = cofiring(place, pole, 1, 40, 600), cofiring(place[order], pole[order], 1, 40, 600)
    assert np.array_equal(part.jaccard, again.jaccard)
    monkeypatch.undo()
    expected = cofiring(place[kept], pole[kept], 1, 40, round(600 * share))
    assert np.array_equal(part.other, expected.other)
    assert np.array_equal(part.lift, expected.lift)
    assert not np.array_equal(part.jaccard, whole.jaccard)


def test_the_files_hold_cofiring_on_sampled_tokens_and_directions_by_pole(tmp_path: Path) -> None:
    store, sae = make_store(tmp_path / "s", 5000), make_sae("sa-gsae", 40)
    run = make_run(tmp_path / "run", store, [sae])
    done = features(FeaturesConfig(run=run, device="cpu", cofire_every=3))
    rows = pq.read_table(done.folder / "latents.parquet").to_pylist()
    truth = all_latents(store, sae)
    sampled = np.arange(5000) % 3 == 0
    unit = sae.weights.W_dec.numpy() / sae.weights.W_dec.norm(dim=1, keepdim=True).numpy()
    cosines = unit @ unit.T
    listed = 0
    for row in rows:
        i, sign = row["latent"], row["sign"]
        mine = (sign * truth.f[sampled, i]) > 0
        for each in row["cofire"]:
            theirs = (each["sign"] * truth.f[sampled, each["latent"]]) > 0
            assert each["jaccard"] == pytest.approx((mine & theirs).sum() / (mine | theirs).sum(), rel=2.0**-13)
            listed += 1
        others = np.delete(np.arange(40), i)
        by_cosine = others[np.argsort(-sign * cosines[i, others], kind="stable")]
        assert [each["latent"] for each in row["near"]] == by_cosine[:8].tolist()
        assert [each["latent"] for each in row["far"]] == by_cosine[::-1][:8].tolist()
        near = [sign * cosines[i, each["latent"]] for each in row["near"]]
        assert [each["cosine"] for each in row["near"]] == pytest.approx(near, rel=2.0**-13, abs=1e-6)
    assert listed > 400
    assert rows[0]["lens"] is None


def test_the_lottery_is_uniform_and_differs_between_poles() -> None:
    places = np.arange(40_000)
    nothing = np.zeros(len(places), np.float32)
    ranks = np.stack([lottery(np.full(len(places), pole), nothing, places) for pole in range(25)])
    assert ranks.max() < 2**32
    counts = np.histogram(ranks / 2.0**32, 100, (0, 1))[0]
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 148.2, "the 99.9 % quantile of χ² with 99 degrees of freedom"
    assert ranks.size - len(np.unique(ranks)) < 200, "10^6 of 2^32: 116 are expected to be equal to another"
    between = np.corrcoef((ranks / 2.0**32)[:, :5000])
    assert np.abs(between - np.eye(25)).max() < 0.07


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, harvest_config: Any) -> Path:
    folder = tmp_path_factory.mktemp("lens")
    model = shutil.copytree(model_folder, folder / "model")
    config: Callable[..., HarvestConfig] = harvest_config
    asked = config(folder, model=str(model), tokens=1000, corpus=str(model_folder / "corpus.jsonl"))
    saes = tuple(sae_config(arch=arch, d_sae=20) for arch in ("sa-gsae", "relu"))
    return train(
        TrainConfig(
            store=str(harvest(asked).store), hook="mlp_out", saes=saes, tokens=640, batch=64, device="cpu",
            out=folder / "run", heldout_tokens=64,
        )
    ).run  # fmt: skip


@pytest.mark.parametrize("arch", ["sa-gsae", "relu"])
def test_the_lens_is_what_a_direction_raises_at_the_output(arch: str, trained: Path) -> None:
    (name,) = [path.name for path in (trained / "saes").iterdir() if path.name.startswith(arch)]
    done = features(FeaturesConfig(run=trained, sae=name, device="cpu"))
    assert done.lens
    model = AutoModelForCausalLM.from_pretrained(trained.parent / "model").double()
    d = Autoencoder.load(trained / "saes" / name).weights.W_dec.double()
    gamma = model.gpt_neox.final_layer_norm.weight
    with torch.no_grad():
        logits = ((d - d.mean(1, keepdim=True)) * gamma) @ model.get_output_embeddings().weight.T
        logits -= logits.mean(1, keepdim=True)
    rows = pq.read_table(done.folder / "latents.parquet", columns=["latent", "sign", "lens"]).to_pylist()
    assert len(rows) == (40 if arch == "sa-gsae" else 20)
    for row in rows:
        best = (row["sign"] * logits[row["latent"]]).topk(16)
        assert [each["token"] for each in row["lens"]] == best.indices.tolist()
        assert [each["logit"] for each in row["lens"]] == pytest.approx(best.values.tolist(), rel=1.5e-4)


def test_without_the_model_the_rest_is_there(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained.parent / "model"
    (name,) = [path.name for path in (trained / "saes").iterdir() if "sa-gsae" in path.name]
    asked = FeaturesConfig(run=trained, sae=name, device="cpu", overwrite=True)
    moved = model.rename(trained.parent / "elsewhere")
    try:
        done = features(asked)
        assert not done.lens
        assert "no logit lens: its model" in capsys.readouterr().err
        assert pq.read_table(done.folder / "latents.parquet")["lens"].null_count == 40
        with pytest.raises(UserError, match=r"was made without a logit lens. Add --overwrite"):
            features(asked.model_copy(update={"overwrite": False, "model": str(moved)}))
        assert features(asked.model_copy(update={"model": str(moved)})).lens
        weights = (moved / "model.safetensors").read_bytes()
        (moved / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        with pytest.raises(UserError, match="is not the model that the store was harvested from"):
            features(asked.model_copy(update={"model": str(moved)}))
        (moved / "model.safetensors").write_bytes(weights)
    finally:
        moved.rename(model)


def test_a_store_without_a_hookpoint_on_the_residual_stream_has_no_lens(
    store: Store,
) -> None:
    hook = next(iter(store.spec.hookpoints))
    point = store.spec.hookpoints[hook].model_copy(update={"name": "blocks.1.attn.hook_z"})
    spec = store.spec.model_copy(update={"hookpoints": {hook: point}})
    with pytest.raises(NoLens, match="is not on the residual stream"):
        find_unembedding(Store(store.files, spec, store.state, store.commits), hook, None)
