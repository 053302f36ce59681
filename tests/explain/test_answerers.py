"""Servers whose score is known: one that knows the truth, one that tosses a coin, one that always says yes."""

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.explain.endpoint import Body, kind_of, served
from support.explain.oracle import Oracle
from support.explain.runs import NamedRun, make_named_run
from support.explain.words import windows_in


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> NamedRun:
    return make_named_run(tmp_path_factory.mktemp("answerers"))


@pytest.fixture(autouse=True)
def forget(named: NamedRun) -> None:
    for name in ("explain.jsonl", "explanations.parquet", "explanations.json"):
        (named.features / name).unlink(missing_ok=True)


def test_who_knows_the_truth_is_right_everywhere(named: NamedRun) -> None:
    oracle = Oracle(named.truth)
    with served(oracle) as server:
        done = named.explain(endpoint=server.url, model="oracle", latents=16)
    rows = pq.read_table(done.file).to_pylist()
    explained = [row for row in rows if row["state"] == "explained"]
    assert len(explained) >= 16
    assert oracle.unclear == 0
    for row in explained:
        assert row["explanation"] == f"pole {row['latent']} {row['sign']}", "the windows are of this pole"
        assert row["fuzz"] == 1.0
        assert row["poles"] in (1.0, None)
        assert row["detection"] in (1.0, None), "the files say where the pole is silent"
        assert row["detection_windows"] is None or row["detection_low"] < 1.0 == row["detection_high"]
    assert sum(row["detection"] is not None for row in explained) >= 16
    assert sum(row["poles"] is not None for row in explained) >= 16
    assert done.means["detection"] == done.means["fuzz"] == done.means["poles"] == 1.0


def test_a_coin_is_right_half_of_the_time(named: NamedRun) -> None:
    rng = random.Random(3)

    def toss(body: Body) -> str:
        return "no idea" if kind_of(body) == "explain" else str([rng.randint(0, 1) for _ in windows_in(body)])

    with served(toss) as server:
        done = named.explain(endpoint=server.url, model="coin", latents=16, windows=40)
    rows = pq.read_table(done.file).to_pylist()
    for test in ("fuzz", "detection"):
        asked = sum(row[f"{test}_windows"] or 0 for row in rows)
        assert asked >= 400
        assert abs(done.means[test] - 0.5) <= 0.05
    inside = [row["fuzz_low"] <= 0.5 <= row["fuzz_high"] for row in rows if row["fuzz"] is not None]
    assert sum(inside) >= 0.85 * len(inside)


def test_always_yes_is_worth_nothing(named: NamedRun) -> None:
    with served(lambda body: "always" if kind_of(body) == "explain" else str([1] * len(windows_in(body)))) as server:
        done = named.explain(endpoint=server.url, model="yes", latents=16)
    rows = pq.read_table(done.file).to_pylist()
    scores = [row[test] for row in rows for test in ("detection", "fuzz", "poles") if row[test] is not None]
    assert len(scores) > 40
    assert set(scores) == {0.5}


def test_tests_are_on_other_windows_than_the_explanation(named: NamedRun) -> None:
    shown: set[tuple[int, ...]] = set()
    tested: list[tuple[int, ...]] = []

    def note(body: Body) -> str:
        windows = [tuple(window.ids) for window in windows_in(body)]
        if kind_of(body) == "explain":
            shown.update(windows)
            return "it fires"
        tested.extend(windows)
        return str([1] * len(windows))

    with served(note) as server:
        named.explain(endpoint=server.url, model="note", only=(3,))
    assert len(shown) > 8
    assert len(tested) > 40
    assert not any(contains(whole, part) for whole in shown for part in tested)


def contains(whole: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))


def test_unsigned_latents_have_one_pole_and_no_question_about_two(tmp_path: Path) -> None:
    named = make_named_run(tmp_path, 6_000, "gated")
    oracle = Oracle(named.truth)
    with served(oracle) as server:
        done = named.explain(endpoint=server.url, model="oracle", latents=4)
        assert {kind_of(body) for body in server.bodies} == {"explain", "detection", "fuzz"}
    rows = pq.read_table(done.file).to_pylist()
    assert {row["sign"] for row in rows} == {1}
    assert done.means["detection"] == 1.0
