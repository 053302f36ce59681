"""What `sagsae features` writes equals a direct computation over all rows at once, for every pole."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.exact.runs import ARCHS, VOCABULARY, AllLatents, all_latents, make_run, make_sae, make_store

from shared.schemas.features import FeaturesConfig
from train.features.run import features
from train.features.slots import lottery

TOKENS = 20_000


def table(folder: Path, name: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = pq.read_table(folder / f"{name}.parquet").to_pydict()
    return columns


def counted(folder: Path, truth: AllLatents, signed: bool, rtol: float) -> None:
    """Compares every pole with what all latents at once say."""
    latents, examples, pairs = (table(folder, name) for name in ("latents", "examples", "pairs"))
    sides = (1, -1) if signed else (1,)
    assert list(zip(latents["latent"], latents["sign"], strict=True)) == list(
        itertools.product(range(truth.f.shape[1]), sides)
    )
    rows_of: dict[tuple[int, int], list[int]] = {}
    for at, key in enumerate(zip(examples["latent"], examples["sign"], strict=True)):
        rows_of.setdefault(key, []).append(at)
    found_pairs = dict(
        zip(zip(pairs["latent"], pairs["sign"], pairs["token"], strict=True), pairs["count"], strict=True)
    )
    expected_pairs: dict[tuple[int, int, int], int] = {}
    for at, (latent, sign) in enumerate(zip(latents["latent"], latents["sign"], strict=True)):
        size = np.maximum(sign * truth.f[:, latent], 0)
        on = np.flatnonzero(size)
        row = {key: values[at] for key, values in latents.items()}
        assert row["firings"] == len(on)
        assert row["mass"] == pytest.approx(size.astype(float).sum(), rel=1e-6)
        assert row["energy"] == pytest.approx((size.astype(float) ** 2).sum(), rel=1e-6)
        assert row["max"] == pytest.approx(size.max(), rel=rtol)
        assert sum(row["hist"]) == len(on)
        both = (truth.f[:, latent].astype(float) ** 2).sum()
        assert row["share_of_energy"] == pytest.approx(row["energy"] / both if both else 0, rel=1e-6)
        tokens(row, truth, on)
        ids, counts = np.unique(truth.ids[on], return_counts=True)
        expected_pairs |= {(latent, sign, int(i)): int(n) for i, n in zip(ids, counts, strict=True) if n >= 3}
        chosen = [{key: values[i] for key, values in examples.items()} for i in rows_of.get((latent, sign), [])]
        best(chosen, size, truth, rtol)
        drawn(chosen, size, len(sides) * latent + (sign < 0), truth, rtol)
        for example in chosen:
            window(example, truth, rtol)
    assert found_pairs == expected_pairs
    assert pairs["token"] == sorted(pairs["token"])


def tokens(row: dict[str, Any], truth: AllLatents, on: np.ndarray) -> None:
    position = on % truth.context
    inside = (position < truth.context - 1) & (on < len(truth.ids) - 1)
    streams = {"on": on, "before": on[position > 0] - 1, "after": on[inside] + 1}
    for name, places in streams.items():
        counts = Counter(truth.ids[places].tolist())
        wanted = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:16]
        assert [(each["token"], each["count"]) for each in row[name]] == wanted


def best(chosen: list[dict[str, Any]], size: np.ndarray, truth: AllLatents, rtol: float) -> None:
    """The strongest firing of each of the 16 strongest contexts; of equal ones, the first."""
    padded = np.pad(size, (0, -len(size) % truth.context)).reshape(-1, truth.context)
    places = np.arange(len(padded)) * truth.context + padded.argmax(1)
    values = padded.max(1)
    order = np.lexsort((places, -values))[:16]
    order = order[values[order] > 0]
    found = [each for each in chosen if each["group"] == 0]
    assert [each["rank"] for each in found] == list(range(len(order)))
    assert [abs(each["value"]) for each in found] == pytest.approx(values[order].tolist(), rel=rtol)
    if not rtol:
        assert [each["context"] * truth.context + each["position"] for each in found] == places[order].tolist()


def drawn(chosen: list[dict[str, Any]], size: np.ndarray, pole: int, truth: AllLatents, rtol: float) -> None:
    """The firings of smallest hash, in four bands of magnitude."""
    on = np.flatnonzero(size)
    hashes = lottery(np.full(len(on), pole), size[on], on)
    places = on[np.argsort(hashes)[:12]]
    found = [each for each in chosen if each["group"] > 0]
    where = [each["context"] * truth.context + each["position"] for each in found]
    assert sorted(where) == sorted(places.tolist())
    for each, place in zip(found, where, strict=True):
        assert abs(each["value"]) == pytest.approx(size[place], rel=rtol)
        share = size[place] / size.max()
        assert each["group"] == min(4, 1 + int(4 * share)) or abs(4 * share % 1) < 1e-5


def window(example: dict[str, Any], truth: AllLatents, rtol: float) -> None:
    """Signed values and tokens around the firing, to the ends of the context."""
    begin = example["context"] * truth.context
    place = begin + example["position"]
    before, after = (11, 4) if example["group"] else (20, 11)
    first, last = max(begin, place - before), min(begin + truth.context, place + after + 1, len(truth.ids))
    assert example["start"] == first - begin
    assert example["tokens"] == truth.ids[first:last].tolist()
    values = truth.f[first:last, example["latent"]].astype(np.float16)
    assert np.allclose(np.array(example["values"], np.float16), values, rtol=max(rtol, 1e-3) if rtol else 0)
    assert example["value"] == pytest.approx(truth.f[place, example["latent"]], rel=rtol)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_pole_of_every_architecture_is_counted_exactly(arch: str, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", TOKENS, nan=(100, 101, 5000, 19_999))
    sae = make_sae(arch)
    run = make_run(tmp_path / "run", store, [sae])
    truth = all_latents(store, sae)
    done = features(FeaturesConfig(run=run, device="cpu"))
    assert not truth.counts[[100, 101, 5000, 19_999]].any()
    assert done.rows == truth.counts.sum()
    assert done.l0 == pytest.approx((truth.f != 0).sum() / done.rows)
    assert (truth.f < 0).any() == sae.signed
    counted(done.folder, truth, sae.signed, 0.0)


def test_int8_stores_are_counted_as_they_are_read_back(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", TOKENS, codec="int8")
    sae = make_sae("sa-gsae")
    done = features(FeaturesConfig(run=make_run(tmp_path / "run", store, [sae]), device="cpu"))
    counted(done.folder, all_latents(store, sae), True, 1e-5)


def test_the_vocabulary_is_small_enough_for_equal_counts() -> None:
    """Otherwise the order of equal counts would go untested."""
    assert VOCABULARY < 64
