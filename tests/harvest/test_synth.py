"""Synthetic stores: rows as the closed form says, the same bytes however they come about, and recovery of the truth."""

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.command import Sagsae
from support.folders import contents
from support.stores import manifest_lines
from torch import Tensor

import harvest.synth
from harvest.synth import HOOK, synth
from shared.config import EvalConfig, SynthConfig, TrainConfig
from shared.errors import Interrupted, UserError
from shared.permute import permutation
from shared.saes import sae_config
from shared.schema import build
from shared.store.opened import Store
from shared.store.reader import open_reader, read_shard
from shared.store.shard import as_float32
from shared.store.verify import verify
from shared.synthetic import BLOCK, Synthetic, TrueFeatures
from train.autoencoder import Autoencoder
from train.data.rows import HookRows
from train.evaluate import evaluate
from train.measure.metrics import measure, read_heldout
from train.measure.recovery import KnownFeatures, best_poles, places
from train.run import train
from train.sae.gated import GatedWeights

SMALL = {"d_in": 48, "features": 24, "l0": 2.0, "tokens": 5000, "context": 16, "chunk_rows": 64, "shard_rows": 512}


def config(out: Path, **changes: Any) -> SynthConfig:
    return SynthConfig(**{**SMALL, "out": str(out), **changes})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """5,000 rows in 10 shards; all features are bipolar. Read only."""
    return Store.open(synth(config(tmp_path_factory.mktemp("stores"))).store)


@pytest.fixture
def synth_config(tmp_path: Path) -> Callable[..., SynthConfig]:
    return lambda **changes: config(tmp_path / "stores", **changes)


def stream(store: Store) -> NDArray[np.float32]:
    """The rows of a store in the order of its token stream, [n_tokens, d_in]."""
    rows = np.full((store.spec.n_tokens, store.spec.hookpoints[HOOK].d_in), np.nan, np.float32)
    for shard in store.commits:
        contexts, positions = (read_shard(open_reader(store, f"index/{n}"), shard) for n in ("context", "position"))
        at = contexts.astype(np.int64) * store.spec.context + positions
        rows[at] = as_float32(read_shard(open_reader(store, HOOK), shard), store.spec.dtype)
    return rows


# The generator


def test_frequencies_signs_and_sizes_follow_the_closed_form() -> None:
    """Each within five standard errors, over 76,800 rows."""
    truth = TrueFeatures(Synthetic(d_in=16, features=40, p_bipolar=0.3, l0=2.5, zipf=0.8, coefficients=(0.4, 2.0)))
    n = 300 * BLOCK
    codes = truth.codes(np.arange(n))
    p = truth.probabilities
    assert p.sum() == pytest.approx(2.5)
    assert p[0] / p[7] == pytest.approx(8**0.8)
    assert truth.bipolar.sum() == 12
    counts = np.bincount(codes.features, minlength=40)
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()
    assert len(codes.rows) / n == pytest.approx(2.5, abs=5 * np.sqrt((p * (1 - p)).sum() / n))
    negative = np.bincount(codes.features[codes.values < 0], minlength=40)
    assert (negative[~truth.bipolar] == 0).all()
    assert (np.abs(negative - counts / 2) < 2.5 * np.sqrt(counts))[truth.bipolar].all()
    sizes = np.abs(codes.values) * truth.scale
    assert 0.4 <= sizes.min() < 0.401
    assert 1.999 < sizes.max() <= 2.0
    assert sizes.mean() == pytest.approx(1.2, abs=0.01)
    together = np.bincount(codes.rows, minlength=n)
    assert together.var() == pytest.approx((p * (1 - p)).sum(), rel=0.03), "features are active independently"


def test_rows_are_the_features_that_are_active() -> None:
    truth = TrueFeatures(Synthetic(d_in=7, features=20, l0=3, noise=0))
    np.testing.assert_allclose(np.linalg.norm(truth.directions, axis=1), 1)
    codes = truth.codes(np.arange(2 * BLOCK))
    dense = np.zeros((2 * BLOCK, 20))
    dense[codes.rows, codes.features] = codes.values
    rows = np.concatenate([truth.block_rows(0), truth.block_rows(1)])
    np.testing.assert_allclose(rows, dense @ truth.directions, atol=1e-12)
    noisy = TrueFeatures(Synthetic(d_in=7, features=20, l0=3, noise=0.1))
    noise = (noisy.block_rows(0) * noisy.scale - truth.block_rows(0) * truth.scale).reshape(-1)
    assert noise.std() == pytest.approx(0.1, rel=0.08)
    assert abs(noise.mean()) < 0.01


@pytest.mark.parametrize("p_bipolar", [0, 0.5, 1])
def test_unit_variance(p_bipolar: float) -> None:
    truth = TrueFeatures(Synthetic(d_in=24, features=30, p_bipolar=p_bipolar, l0=4, noise=0.2))
    x = np.concatenate([truth.block_rows(block) for block in range(200)])
    assert x.var(axis=0).sum() == pytest.approx(1, abs=0.02)


def test_any_rows_can_be_asked_for() -> None:
    """In any order and number, the codes are those of the whole."""
    truth = TrueFeatures(Synthetic(d_in=8, features=30, l0=2))
    whole = truth.codes(np.arange(5 * BLOCK))
    asked = permutation(5 * BLOCK, 0)[:300]
    part = truth.codes(asked)
    assert (np.diff(part.rows) >= 0).all()
    for row, position in enumerate(asked):
        here, there = part.rows == row, whole.rows == position
        assert part.features[here].tolist() == whole.features[there].tolist()
        assert part.values[here].tolist() == whole.values[there].tolist()
    assert len(truth.codes(np.empty(0, np.int64)).rows) == 0


def test_golden_words() -> None:
    """Stores are only as reproducible as these numbers. They may change with a new kind of store, never by accident."""
    codes = TrueFeatures(Synthetic()).codes(np.array([1, 5, 257]))
    assert codes.rows.tolist() == GOLDEN_ROWS
    assert codes.features.tolist() == GOLDEN_FEATURES
    np.testing.assert_allclose(codes.values, GOLDEN_VALUES, rtol=1e-12)


GOLDEN_ROWS = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
GOLDEN_FEATURES = [1, 5, 32, 77, 10, 43, 4, 9, 18, 60]
GOLDEN_VALUES = [
    -0.6382351093758714, 0.7553064929886834, -0.6915111416015335, -0.3617559306663776, 0.5868405682950408,
    -0.3337158308583676, 0.7374184949415078, -0.6220946157167458, 0.7700813562964983, -0.6641298327871423,
]  # fmt: skip


# The store


def test_a_store_holds_what_the_generator_gives(store: Store) -> None:
    truth = TrueFeatures(Synthetic.model_validate(store.spec.model["synthetic"]))
    x = np.concatenate([truth.block_rows(block) for block in range(20)])[:5000]
    np.testing.assert_allclose(stream(store), x, rtol=2**-8, atol=1e-30)
    statistics = store.statistics(HOOK)
    stored = stream(store).astype(np.float64)
    assert statistics.n == 5000, "every row counts"
    np.testing.assert_allclose(statistics.mean, stored.mean(axis=0), atol=1e-12)
    assert statistics.scale == pytest.approx(1, abs=0.05)
    assert verify(store, full=True).lines == []


def test_the_shape_of_a_store_does_not_change_its_rows(store: Store, synth_config: Callable[..., SynthConfig]) -> None:
    other = Store.open(synth(synth_config(chunk_rows=100, shard_rows=1700, context=50, codec="lz4")).store)
    np.testing.assert_array_equal(stream(other), stream(store))
    longer = Store.open(synth(synth_config(name="longer", tokens=6001)).store)
    np.testing.assert_array_equal(stream(longer)[:5000], stream(store))
    another = Store.open(synth(synth_config(name="another", seed=1)).store)
    assert (stream(another) != stream(store)).any(axis=1).all()


@pytest.mark.parametrize(("dtype", "codec", "error"), [("float32", "none", 1e-6), ("bfloat16", "int8", 0.02)])
def test_other_types_of_numbers(synth_config: Callable[..., SynthConfig], dtype: str, codec: str, error: float) -> None:
    asked = synth_config(store_dtype=dtype, codec=codec, tokens=1000)
    found = Store.open(synth(asked).store)
    rows = HookRows.of(found, HOOK)
    keep = np.ones((found.spec.n_contexts, found.spec.context), dtype=bool)
    order = places(rows, keep)
    truth = TrueFeatures(Synthetic.model_validate(found.spec.model["synthetic"]))
    x = np.concatenate([truth.block_rows(block) for block in range(4)])[order]
    wrong = read_heldout(rows, keep).double().numpy() - x
    assert np.square(wrong).sum() / np.square(x).sum() < error**2


def test_the_same_bytes_again_and_after_a_stop(
    store: Store, synth_config: Callable[..., SynthConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = harvest.synth.shard_rows

    def counted(*arguments: Any) -> Any:
        made.append(arguments[3])
        if len(made) == 4:
            raise Interrupted("stopped")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(harvest.synth, "shard_rows", counted)
        with pytest.raises(Interrupted):
            synth(synth_config())
    root = Path(synth_config().out) / "synthetic"
    assert len(Store.open(root).commits) in (2, 3)
    assert synth(synth_config()).tokens == 5000
    assert contents(root) == contents(store.root)
    assert synth(synth_config()).seconds == 0, "complete: nothing to do"
    assert synth(synth_config(overwrite=True)).tokens == 5000
    assert contents(root) == contents(store.root)


def test_kill_9_and_again(sagsae: Sagsae, tmp_path: Path) -> None:
    """Killed in the middle of writing, stopped, then finished: the same bytes as in one go."""
    command = ["synth", "--tokens", "120000", "--features", "64", "--set", "shard_rows=2048", "--set",
               "chunk_rows=1024", "--json", "--out"]  # fmt: skip
    root = tmp_path / "killed" / "synthetic"
    killed = sagsae(*command, tmp_path / "killed", stop=(signal.SIGKILL, lambda: manifest_lines(root) >= 3))
    assert killed.returncode == -signal.SIGKILL
    half = Store.open(root)
    assert 3 <= len(half.commits) < 59
    assert verify(half, full=True).lines == [], "what is committed is whole"
    asked = sagsae(*command, tmp_path / "killed", stop=(signal.SIGTERM, lambda: manifest_lines(root) >= 10))
    assert asked.returncode == 130
    assert "To continue, run the same command again" in asked.stderr
    for folder in ("killed", "whole"):
        done = sagsae(*command, tmp_path / folder)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert (document["tokens"], document["hookpoints"][HOOK]["d_in"]) == (120_000, 64)
    assert contents(root) == contents(tmp_path / "whole" / "synthetic")


# What bad input gets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": 0}, "features: must be 1 or more"),
        ({"p_bipolar": 1.5}, "p_bipolar: must be 1 or less"),
        ({"p_bipolar": -0.1}, "p_bipolar: must be 0 or more"),
        ({"d_in": 0}, "d_in: must be 1 or more"),
        ({"tokens": 0}, "tokens: must be 1 or more"),
        ({"l0": 0}, "l0: must be above 0"),
        ({"l0": 20}, "more than once per row; with 24 features and zipf 0.5 it can be at most 8.43$"),
        ({"l0": float("nan")}, "l0: must be a finite number"),
        ({"noise": -1}, "noise: must be 0 or more"),
        ({"coefficients": [2, 1]}, r"coefficients: expected two sizes 0 <= low <= high"),
        ({"coefficients": [1]}, "coefficients"),
        ({"features": 1, "l0": 1, "p_bipolar": 0, "coefficients": [1, 1], "noise": 0}, "every row would be the same"),
        ({"shard_rows": 100}, "shard_rows: 100 is not a multiple of chunk_rows = 64"),
        ({"feature": 3}, "unknown setting 'feature': did you mean features"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(SynthConfig, {**SMALL, "out": str(tmp_path / "stores"), **changes})


def test_what_is_there_already(synth_config: Callable[..., SynthConfig]) -> None:
    asked = synth_config(tokens=600)
    out = Path(asked.out)
    synth(asked)
    before = contents(out)
    with pytest.raises(UserError) as caught:
        synth(synth_config(tokens=600, l0=3.0, seed=5, codec="none"))
    said = str(caught.value)
    assert "l0: the store has 2.0, this asks for 3.0" in said
    assert "seed: the store has 0, this asks for 5" in said
    assert "codec: the store has zstd, this asks for none" in said
    assert "features" not in said, "only what differs"
    assert contents(out) == before
    (out / "full").mkdir()
    (out / "full" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a store"):
        synth(synth_config(name="full"))
    (out / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        synth(synth_config(name="file"))


def test_a_harvested_store_is_not_taken_for_a_synthetic_one(synth_config: Callable[..., SynthConfig]) -> None:
    """The other way round too: `sagsae harvest` compares the model, which a synthetic store names."""
    asked = synth_config(tokens=600)
    spec = harvest.synth.spec_of(asked)
    other = spec.model_copy(update={"model": {"name": "tiny"}})
    store = Store.open(synth(asked).store)
    with pytest.raises(UserError, match="model: the store has tiny, this asks for synthetic"):
        harvest.synth.check_same(replace(store, spec=other), spec)


def test_a_disk_too_small(synth_config: Callable[..., SynthConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harvest.synth, "free_bytes", lambda _: 10_000)
    with pytest.raises(UserError, match="are needed, 1e-05 GB are free"):
        synth(synth_config())
    assert not Path(synth_config().out).exists(), "nothing is written"


# Recovery


def perfect(store: Store, arch: str, **changes: Tensor) -> Autoencoder:
    """The true features as a dictionary; the encoder is their dual basis, which gives the coefficients exactly."""
    directions = torch.from_numpy(
        TrueFeatures(Synthetic.model_validate(store.spec.model["synthetic"])).directions
    ).float()
    m, d_in = directions.shape
    scalars = {"theta": torch.full((1, m), 0.1), "r": torch.zeros(1, m), "b": torch.zeros(1, m)}
    weights = GatedWeights(
        W_enc=torch.linalg.pinv(directions).T.contiguous(), W_dec=directions, b_dec=torch.zeros(d_in),
        **{**scalars, **changes},
    )  # fmt: skip
    return Autoencoder(sae_config(arch=arch, d_sae=m), weights, 1.0)


@pytest.fixture(scope="module")
def known(store: Store) -> tuple[KnownFeatures, Tensor]:
    keep = np.zeros((store.spec.n_contexts, store.spec.context), dtype=bool)
    keep[::3] = True
    keep[:, 5] = False
    rows = HookRows.of(store, HOOK)
    found = KnownFeatures.of(rows, keep)
    assert found is not None
    return found, read_heldout(rows, keep)


def test_codes_belong_to_the_rows_that_are_measured(store: Store, known: tuple[KnownFeatures, Tensor]) -> None:
    truth, codes, x = known[0].truth, known[0].codes, known[1]
    dense = np.zeros((len(x), 24))
    dense[codes.rows, codes.features] = codes.values
    error = x.double().numpy() - dense @ truth.directions
    assert np.square(error).sum() / np.square(x.double().numpy()).sum() < 0.01
    keep = np.ones((store.spec.n_contexts, store.spec.context), dtype=bool)
    some = store.only([2, 7])
    assert sorted(places(HookRows.of(some, HOOK), keep)) == [*range(1024, 1536), *range(3584, 4096)]


def test_a_perfect_signed_dictionary(store: Store, known: tuple[KnownFeatures, Tensor]) -> None:
    sae = perfect(store, "sa-gsae")
    found = known[0].recovery(sae, known[1], "cpu")
    assert measure(sae, known[1], "cpu").r2 > 0.99
    assert found.rec == 1
    assert found.mcs == pytest.approx(1, abs=1e-6)
    assert found.slope == pytest.approx(1, abs=0.01)


def test_an_unsigned_dictionary_of_that_width_has_half(store: Store, known: tuple[KnownFeatures, Tensor]) -> None:
    """And one of twice the width, with every negative, has all."""
    sae = perfect(store, "gated")
    found = known[0].recovery(sae, known[1], "cpu")
    assert found.rec == 0.5
    assert 0.5 < found.mcs < 0.8
    assert found.slope == pytest.approx(1, abs=0.01), "over what has a match"
    whole = known[0].recovery(perfect(store, "sa-gsae").split(), known[1], "cpu")
    assert [whole.rec, whole.mcs] == [1, pytest.approx(1, abs=1e-6)]
    assert whole.slope == pytest.approx(known[0].recovery(perfect(store, "sa-gsae"), known[1], "cpu").slope, abs=1e-6)


def test_negated_latents_are_as_good(store: Store, known: tuple[KnownFeatures, Tensor]) -> None:
    sae = perfect(store, "sa-gsae")
    flipped = Autoencoder(
        sae.config, replace(sae.weights, W_enc=-sae.weights.W_enc, W_dec=-sae.weights.W_dec), sae.scale
    )
    assert known[0].recovery(flipped, known[1], "cpu") == known[0].recovery(sae, known[1], "cpu")


def test_shrinkage_and_silence(store: Store, known: tuple[KnownFeatures, Tensor]) -> None:
    shrunk = perfect(store, "sa-gsae", r=torch.full((1, 24), 0.8).log())
    assert known[0].recovery(shrunk, known[1], "cpu").slope == pytest.approx(0.8, abs=0.01)
    theta = torch.full((1, 24), 0.1)
    theta[0, :6] = 1e9
    quarter = known[0].recovery(perfect(store, "sa-gsae", theta=theta), known[1], "cpu")
    assert quarter.rec == 0.75, "a latent that never fires has found nothing"
    silent = known[0].recovery(perfect(store, "sa-gsae", theta=torch.full((1, 24), 1e9)), known[1], "cpu")
    assert (silent.rec, silent.mcs, silent.slope) == (0, 0, None)


def test_only_poles_that_fire_can_match() -> None:
    directed, W_dec = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    found = best_poles(directed, W_dec, torch.tensor([[True, False], [False, False]]))
    assert found.cosine.tolist() == [1, -1]
    found = best_poles(directed, W_dec, torch.tensor([[True, True], [True, True]]))
    assert found.cosine.tolist() == [1, 1]
    assert found.latent.tolist() == [0, 0]
    assert found.sign.tolist() == [1, -1]


# The whole way


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that share a core with others wait for each other longer than products this small take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_train_and_evaluate(synth_config: Callable[..., SynthConfig], tmp_path: Path) -> None:
    """The same path as for a harvested store; a short run already tells signed from unsigned."""
    made = synth(synth_config(d_in=32, features=32, tokens=60_000, shard_rows=8192, chunk_rows=512))
    saes = tuple(sae_config(arch=arch, d_sae=32, sparsity=0.4, theta0=0.16) for arch in ("sa-gsae", "gated"))
    run = TrainConfig(
        store=made.store, saes=saes, tokens=1000 * 256, batch=256, lr=1.5e-2, warmup_steps=10, precision="float32",
        device="cpu", out=tmp_path / "run",
    )  # fmt: skip
    signed, unsigned = train(run).saes
    assert signed["rec"] > 0.8
    assert 0 < unsigned["rec"] <= 0.5, "one latent has one direction"
    assert signed["mcs"] > 0.9 > unsigned["mcs"]
    assert 0.85 < signed["slope"] < 1.05
    entries = evaluate(EvalConfig(run=tmp_path / "run", device="cpu")).results["saes"]
    assert [entry["rec"] for entry in entries] == [signed["rec"], unsigned["rec"]]
    assert [entry["ce_recovered"] for entry in entries] == [None, None]
    assert "rec" in json.loads((tmp_path / "run" / "evaluation.json").read_text())["saes"][0]
    with pytest.raises(UserError, match=r"--ce: .* is synthetic and has no language model"):
        evaluate(EvalConfig(run=tmp_path / "run", ce=True, device="cpu"))


def test_command_line(sagsae: Sagsae, tmp_path: Path) -> None:
    done = sagsae("synth", "--d-in", "8", "--features", "12", "--l0", "1", "--tokens", "2000", "--name", "s",
                  "--set", "coefficients=[1, 2]", "--out", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 's'}: 2,000 tokens" in done.stdout
    assert Store.open(tmp_path / "s").spec.model["synthetic"]["coefficients"] == [1, 2]
    wrong = sagsae("synth", "--p-bipolar", "2", "--out", tmp_path / "new")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: --p-bipolar: must be 1 or less (got 2.0)\n"
    assert not (tmp_path / "new").exists()
    other = sagsae("synth", "--tokens", "2000", "--name", "s", "--out", tmp_path)
    assert other.returncode == 2
    assert "d_in: the store has 8, this asks for 64" in other.stderr
