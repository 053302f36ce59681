"""`sagsae reproduce`: the arithmetic on constructed curves, marks that flip with the numbers, a small whole run."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.command import Sagsae

from harvest.run import harvest
from shared.errors import UserError
from train.report import frontier
from train.reproduce.analysis import CellResult, analyse, certain, verdict
from train.reproduce.claims import CLAIMS, NOT, NOT_MEASURED, PARTLY, REPRODUCED, judge, judge_all, mark
from train.reproduce.cost import check_consent, estimate
from train.reproduce.curves import (
    ArmMeasurement,
    Frontiers,
    Interval,
    against,
    compare,
    frontiers,
    geometric_ratio,
    interval,
    value_at,
)
from train.reproduce.figure import frontier_svg, round_values
from train.reproduce.pilot import PilotChoice, choose
from train.reproduce.plan import (
    GATED_FULL,
    LARGE,
    LARGE_RESET,
    NO_AUX,
    ONE_SIDED,
    SA_HALF,
    TIE_R,
    UNTIED,
    ablation_arms,
    every_sae,
    main_arms,
    make_cells,
    pilot_arms,
)
from train.reproduce.preset import PRESETS, make_request
from train.reproduce.run import check_folder, describe, reproduce

L0S = (4.0, 16.0, 64.0, 256.0)
LAMBDAS = (0.4, 0.2, 0.1, 0.05)


def constantly(value: float) -> Callable[[float], float]:
    """A line that is level."""
    return lambda _: value


def points(
    arm: str,
    r2: Callable[[float], float],
    dead: Callable[[float], float] = lambda _: 0.1,
    *,
    width: int = 100,
    seeds: int = 3,
    spread: float = 0.001,
    at: Sequence[float] = L0S,
    bipolar: float | None = None,
    loss: float | None = None,
) -> list[ArmMeasurement]:
    """A curve over log2 L0 and its seeds, `spread` apart."""
    return [
        ArmMeasurement(
            arm, seed, f"{arm}-{seed}-{l0}", width, setting, l0, r2(math.log2(l0)) + spread * (seed - 1),
            dead(math.log2(l0)), bipolar, None if bipolar is None else 0.8 - bipolar, loss,
        )
        for seed in range(seeds)
        for setting, l0 in zip(LAMBDAS, at, strict=False)
    ]  # fmt: skip


def line(x: float) -> float:
    return 0.5 + 0.05 * x


def curves(found: list[ArmMeasurement], field: str = "r2") -> Frontiers:
    return frontiers(found, field)


def test_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found is not None
    assert found.low is not None
    assert found.mean == 2
    assert found.low == pytest.approx(2 - 4.303 / math.sqrt(3))
    assert interval([0.5]) == Interval(0.5, None, None, 1)
    assert interval([]) is None


def test_matched_difference_of_parallel_lines() -> None:
    a, b = points("a", lambda x: line(x) + 0.01), points("b", line, at=(8.0, 32.0, 128.0, 512.0))
    found = compare(curves(a), curves(b))
    assert found is not None
    assert [found.l0_low, found.l0_high] == pytest.approx([8, 256])
    for value in (found.mean, found.lowest, found.highest):
        assert value.mean == pytest.approx(0.01)
        assert value.low == pytest.approx(0.01)
        assert value.high == pytest.approx(0.01)
    assert found.ahead == 1


def test_matched_difference_agrees_with_the_reports() -> None:
    a = points("a", lambda x: 0.4 + 0.1 * x - 0.004 * x * x, seeds=1)
    b = points("b", line, seeds=1, at=(5.0, 20.0, 70.0, 300.0))
    ours = compare(curves(a), curves(b))
    sides = [
        [frontier.FrontierPoint(p.l0 or 0, p.r2 or 0) for p in sorted(side, key=lambda p: p.l0 or 0)] for side in (a, b)
    ]
    theirs = frontier.compare(*sides)
    assert ours is not None
    assert theirs is not None
    assert ours.mean.mean == pytest.approx(theirs.mean)
    assert ours.lowest.mean == pytest.approx(theirs.lowest)
    assert ours.highest.mean == pytest.approx(theirs.highest)
    assert ours.mean.low is None


def test_overlap_is_that_of_every_seed_and_nothing_is_extrapolated() -> None:
    a = points("a", line)
    short = [p for p in a if not (p.seed == 2 and p.l0 == 4.0)]
    found = compare(curves(short), curves(a))
    assert found is not None
    assert found.l0_low == pytest.approx(16)
    apart = points("b", line, at=(1000.0, 2000.0, 3000.0, 4000.0))
    assert compare(curves(a), curves(apart)) is None
    assert compare(curves(a), curves([])) is None
    assert verdict(None) == "no overlap"


def test_crossing_curves_are_ahead_over_their_share() -> None:
    a, b = points("a", lambda x: line(x) + 0.01 * (x - 4), spread=0), points("b", line, spread=0)
    found = compare(curves(a), curves(b))
    assert found is not None
    assert found.ahead == pytest.approx(4 / 6)  # log2 L0 from 2 to 8, crossing at 4
    assert found.lowest.mean == pytest.approx(-0.02)
    assert found.lowest_l0 == pytest.approx(4)
    assert found.highest.mean == pytest.approx(0.04)
    assert found.highest_l0 == pytest.approx(256)


@pytest.mark.parametrize(
    ("shift", "expected"), [(0.01, "dominates"), (-0.01, "within 0.025"), (-0.03, "worse"), (-0.0249, "within 0.025")]
)
def test_verdict(shift: float, expected: str) -> None:
    a, b = points("a", lambda x: line(x) + shift), points("b", line)
    found = compare(curves(a), curves(b))
    assert verdict(found) == expected
    assert certain(found)
    noisy = [replace(p, r2=(p.r2 or 0) + 0.02 * (p.seed - 1)) for p in a]
    assert not certain(compare(curves(noisy), curves(b)))
    alone = compare(curves(points("a", lambda x: line(x) + shift, seeds=1)), curves(points("b", line, seeds=1)))
    assert verdict(alone) == expected
    assert not certain(alone)


def test_dead_ratio_counts_half_a_latent_at_least() -> None:
    gated = curves(points("g", line, lambda _: 0.2), "dead")
    for dead, ratio, bound in ((0.1, 2.0, ""), (0.0, 40.0, "≥")):
        found = geometric_ratio(gated, curves(points("s", line, constantly(dead)), "dead"), 0.005)
        assert found is not None
        assert found[0].mean == pytest.approx(ratio)
        assert found[1] == bound
    none = curves(points("g", line, lambda _: 0.0), "dead")
    both = geometric_ratio(none, none, 0.005)
    assert both is not None
    assert both[0].mean == pytest.approx(1)
    assert both[1] == "≈"
    found = geometric_ratio(none, gated, 0.005)
    assert found is not None
    assert found[0].mean == pytest.approx(1 / 40)
    assert found[1] == "≤", "the truth is nothing at all"


def test_dead_ratio_is_geometric_over_log_l0() -> None:
    gated = curves(points("g", line, lambda _: 0.4, at=(4.0, 64.0)), "dead")
    sa = curves(points("s", line, lambda x: 0.4 if x < 3 else 0.1, at=(4.0, 64.0)), "dead")
    found = geometric_ratio(gated, sa, 1e-6)
    assert found is not None
    assert found[0].mean == pytest.approx(2)


def test_points_without_a_place_are_left_out() -> None:
    found = points("a", line)
    broken = [
        replace(found[0], l0=0.0), replace(found[1], r2=math.nan), replace(found[2], r2=None), *found[3:],
    ]  # fmt: skip
    assert len(curves(broken)[0].log_l0) == 1
    assert value_at(curves(broken), math.log(4)) is not None


def test_against_compares_each_seed_with_its_own() -> None:
    reference = curves(points("a", line, spread=0.1))
    point = [replace(p, l0=32.0, r2=line(5) + 0.1 * (p.seed - 1) - 0.004) for p in points("x", line, at=L0S[:1])]
    found = against(point, reference, "r2")
    assert found is not None
    assert found.mean == pytest.approx(-0.004)
    assert found.high is not None
    assert found.high == pytest.approx(-0.004)
    outside = [replace(p, l0=1000.0) for p in point]
    assert against(outside, reference, "r2") is None


def cell(
    hook: str = "mlp_out", r2: float = 0.01, dead: float = 0.5, no_aux: float = 0.1, one_sided: float = -0.01,
    tie: float = 0.0, bipolar: float = 0.6, large: float = 0.5, reset: float = 0.1, name: str = "m",
    nameable: float = 0.01, dial: float = 0.7,
) -> CellResult:  # fmt: skip
    """A cell in which every claim can be made to hold or not."""
    one = L0S[1:2]

    def alone(arm: str, shift: float, of_dead: float = 0.1) -> list[ArmMeasurement]:
        found = points(arm, lambda x: line(x) + shift, lambda _: of_dead, at=one)
        return [replace(p, setting=LAMBDAS[1]) for p in found]

    main = {
        SA_HALF: points(SA_HALF, lambda x: line(x) + r2, lambda _: 0.001, bipolar=bipolar),
        GATED_FULL: points(GATED_FULL, line, lambda _: dead, width=200),
    }
    main[SA_HALF] = [replace(p, nameable=nameable, dial=dial) if p.l0 == L0S[2] else p for p in main[SA_HALF]]
    collapsed = points(NO_AUX, lambda _: no_aux, lambda _: 1 - no_aux, at=(0.5,), loss=no_aux)
    ablations = {
        NO_AUX: collapsed,
        ONE_SIDED: alone(ONE_SIDED, r2 + one_sided),
        TIE_R: alone(TIE_R, r2 + tie),
        UNTIED: alone(UNTIED, r2),
        LARGE: alone(LARGE, r2, large),
        LARGE_RESET: alone(LARGE_RESET, r2, reset),
    }
    return analyse(name, hook, main, ablations)


CLAIM = {claim.name.split(":")[0] + claim.name.partition(":")[2]: claim for claim in CLAIMS}


@pytest.mark.parametrize(
    ("start", "good", "bad", "marks"),
    [
        ("SA-GSAE at H has a higher", {}, {"r2": -0.01}, (REPRODUCED, NOT)),
        ("Where it does not", {"r2": -0.01}, {"r2": -0.03}, (REPRODUCED, NOT)),
        ("There, a smaller share", {"r2": -0.01}, {"r2": -0.01, "dead": 0.2}, (REPRODUCED, PARTLY)),
        ("Fewer dead latents over the sweep MLP", {"dead": 0.25}, {"dead": 0.001}, (PARTLY, NOT)),
        ("Without the auxiliary loss", {}, {"no_aux": 0.7}, (REPRODUCED, NOT)),
        ("Without it the loss recovered", {}, {"no_aux": 0.4}, (REPRODUCED, PARTLY)),
        ("Without it nearly all", {"no_aux": 0.05}, {"no_aux": 0.7}, (REPRODUCED, NOT)),
        ("The two-sided gate", {}, {"one_sided": 0.01}, (REPRODUCED, NOT)),
        ("Tying r of both", {}, {"tie": 0.01}, (REPRODUCED, NOT)),
        ("MLP output", {}, {"bipolar": 0.2}, (REPRODUCED, NOT)),
        ("Attention", {"hook": "attn_out", "bipolar": 0.4}, {"hook": "attn_out", "bipolar": 0.9}, (REPRODUCED, NOT)),
        ("A large initial threshold", {}, {"large": 0.1}, (REPRODUCED, PARTLY)),
        ("Threshold resets", {"reset": 0.02}, {"reset": 0.4}, (REPRODUCED, NOT)),
        ("A nameable opposition", {}, {"nameable": 0.2}, (REPRODUCED, NOT)),
        ("A latent's value is a causal dial", {}, {"dial": 0.3}, (REPRODUCED, PARTLY)),
    ],
)
def test_marks_flip_with_the_numbers(
    start: str, good: dict[str, Any], bad: dict[str, Any], marks: tuple[str, str]
) -> None:
    (claim,) = (claim for name, claim in CLAIM.items() if name.startswith(start))
    assert judge(claim, [cell(**good)]).mark == marks[0]
    assert judge(claim, [cell(**bad)]).mark == marks[1]


def test_dead_ratio_of_hundreds_is_reproduced() -> None:
    main = {
        SA_HALF: points(SA_HALF, line, lambda _: 0.001, width=1000),
        GATED_FULL: points(GATED_FULL, line, lambda _: 0.5, width=2000),
    }
    found = analyse("m", "mlp_out", main, {})
    assert judge(CLAIM["Fewer dead latents over the sweep MLP output"], [found]).mark == REPRODUCED


def test_half_of_the_cells_are_enough_for_dominance_as_in_the_paper() -> None:
    claim = CLAIMS[0]
    wins, loses, also = cell(), cell(r2=-0.01, name="n"), cell(r2=-0.01, name="o")
    assert judge(claim, [wins, loses]).mark == REPRODUCED
    assert judge(claim, [wins, loses, also]).mark == PARTLY
    assert judge(claim, [loses, also]).mark == NOT


def test_a_cell_without_a_number_does_not_pass() -> None:
    claim = next(claim for claim in CLAIMS if claim.most == 1 and claim.value is not CLAIMS[0].value)
    value = claim.bound + (1 if claim.above else -1)
    passes = Interval(value, value, value, 3)
    assert mark(claim, [passes, passes]) == REPRODUCED
    assert mark(claim, [passes, None]) == PARTLY
    assert mark(claim, [None, None]) == NOT_MEASURED


def test_one_seed_or_a_wide_interval_shows_no_more_than_partly() -> None:
    claim = CLAIMS[0]
    assert mark(claim, [Interval(0.01, None, None, 1)]) == PARTLY
    assert mark(claim, [Interval(0.01, -0.001, 0.021, 3)]) == PARTLY
    assert mark(claim, [Interval(0.01, 0.001, 0.019, 3)]) == REPRODUCED
    assert mark(claim, [Interval(-0.01, -0.02, 0.001, 3)]) == NOT
    assert mark(claim, []) == NOT_MEASURED


def test_what_was_not_measured_says_so() -> None:
    empty = analyse("m", "mlp_out", {}, {})
    assert empty.verdict == "no overlap"
    assert {finding.mark for finding in judge_all([empty])} == {NOT_MEASURED}


def test_pilot_chooses_by_r2_at_one_l0_for_both_methods() -> None:
    low, high, far = PilotChoice(1e-3, 1.0), PilotChoice(3e-3, 1.0), PilotChoice(8e-3, 1.0)

    def two(shift: float, at: tuple[float, float]) -> list[ArmMeasurement]:
        return points("p", lambda x: line(x) + shift, seeds=1, spread=0, at=at)

    candidates = {
        "a": {low: two(0.0, (8.0, 64.0)), high: two(0.02, (6.0, 50.0)), far: two(0.5, (400.0, 900.0))},
        "b": {low: two(0.03, (8.0, 64.0)), high: two(0.02, (6.0, 50.0)), far: two(0.5, (2.0, 3.0))},
    }
    found = choose(candidates)
    assert (found.choice("a"), found.choice("b")) == (high, low)
    assert not found.trials["a"][-1].reaches  # however high its R² at another L0
    assert choose({"a": {high: two(0.0, (8.0, 64.0)), low: two(0.0, (8.0, 64.0))}}).choice("a") == low
    assert choose({"a": {low: [replace(p, r2=None) for p in two(0.0, (8.0, 64.0))]}}).choice("a") == low


def test_plan_of_the_tiny_preset() -> None:
    request = make_request("tiny")
    arms = main_arms(request, PilotChoice(1e-3, 1.0), PilotChoice(3e-3, 0.4))
    assert len(arms[SA_HALF]) == len(arms[GATED_FULL]) == 15
    assert {sae.d_sae for sae in arms[SA_HALF]} == {1024}
    assert {sae.d_sae for sae in arms[GATED_FULL]} == {2048}
    assert {(sae.lr, sae.theta0) for sae in arms[GATED_FULL]} == {(3e-3, 0.4)}  # type: ignore[attr-defined]
    for found in (arms, ablation_arms(request, PilotChoice(1e-3, 1.0), PilotChoice(3e-3, 0.4))):
        names = [sae.name for sae in every_sae(found)]
        assert len(set(names)) == len(names)
    candidates = [set(arm) for arm in pilot_arms(request).values()]
    assert candidates[0] == candidates[1]
    cost = estimate(request, make_cells(request))
    assert cost.cells == 3
    assert 0 < cost.gpu_hours < cost.hours
    check_consent(cost, yes=False) if cost.hours < 2 else None
    large = replace(cost, hours=30.0)
    with pytest.raises(UserError, match="--yes"):
        check_consent(large, yes=False)
    check_consent(large, yes=True)


def test_paper_preset_is_two_models_six_cells_three_seeds() -> None:
    paper = PRESETS["paper"]
    assert len(paper.models) == 2
    assert paper.seeds == 3
    assert len(make_request("paper").cells) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "--preset huge: is unknown. Choose from smoke, tiny, paper"),
        ({"cells": "mlp_out,nope"}, "--cells nope: is not a hookpoint"),
        ({"seeds": 0}, "--seeds 0: at least one"),
        ({"tokens": 10}, "--tokens 10: too few to train on. Give at least"),
        ({"layer": 9}, "--layer 9: the model has 4 layers"),
        ({"cells": "resid_mid"}, "--cells resid_mid: tiny has no such hookpoint in layer 2"),
        ({"models": ("nope",)}, "--model nope: is not an alias"),
        ({"preset": "paper", "models": ("tiny",)}, "run the same command again with --yes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    def no_harvest(config: Any) -> str:
        raise AssertionError(config)

    with pytest.raises(UserError, match=message):
        reproduce(make_request(**{"preset": "tiny", "out": tmp_path / "out", **options}), no_harvest)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_wrong(sagsae: Sagsae, tmp_path: Path) -> None:
    done = sagsae("reproduce", "--seeds", "0", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --seeds 0")
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_out_that_is_something_else_is_refused(tmp_path: Path) -> None:
    protocol = describe(make_request("smoke"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_folder(tmp_path / "file", protocol)
    with pytest.raises(UserError, match="not a reproduction"):
        check_folder(tmp_path, protocol)
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(UserError, match="not a reproduction's"):
        check_folder(tmp_path, protocol)
    (tmp_path / "plan.json").write_text(json.dumps({**protocol, "seeds": 7}))
    with pytest.raises(UserError, match="seeds: it has 7, this asks for 2"):
        check_folder(tmp_path, protocol)
    (tmp_path / "plan.json").write_text(json.dumps(protocol))
    check_folder(tmp_path, protocol)


def test_figure_shows_every_point_and_escapes_its_title() -> None:
    svg = frontier_svg("a <b>", {SA_HALF: points(SA_HALF, line), "none": []})
    assert svg.count('r="3"') == 12
    assert "a &lt;b&gt;" in svg
    assert ">none<" not in svg
    assert "<polyline" not in frontier_svg("empty", {})
    assert round_values(0.62, 0.91) == pytest.approx([0.65, 0.7, 0.75, 0.8, 0.85, 0.9])


def test_smoke_on_a_small_model(model_folder: Path, tmp_path: Path) -> None:
    """The whole way on one cell; then once more, when all is there."""
    out = tmp_path / "out"
    request = make_request("smoke", (str(model_folder),), "mlp_out", out=out, device="cpu", tokens=4096)
    preset = replace(request.preset, width=24, thin_sparsities=(0.2,), ks=(4,), pilot_tokens=2560, dial_latents=2)
    request = replace(request, preset=preset)
    stores: list[str] = []

    def make_store(config: Any) -> str:
        stores.append(harvest(config.model_copy(update={"context": 16})).store)
        return stores[-1]

    first = reproduce(request, make_store)
    for name in ("reproduction.json", "reproduction.md", "report.html", "plan.json"):
        assert (out / name).stat().st_size > 0
    (figure,) = out.glob("frontier-*.svg")
    assert figure.read_text().count("<polyline") >= 4
    document = json.loads((out / "reproduction.json").read_text())
    assert len(document["claims"]) == len(CLAIMS)
    assert len(document["cells"]) == 1
    assert set(document["pilots"][first.cells[0].cell]["trials"]) == {SA_HALF, GATED_FULL}
    text = (out / "reproduction.md").read_text()
    assert all(finding.claim in text for finding in first.findings)
    assert "<svg" in (out / "report.html").read_text()
    assert document["autoencoders"][first.cells[0].cell][NO_AUX][0]["loss_recovered"] is not None
    assert document["cells"][0]["nameable"]["n"] == document["cells"][0]["dial"]["n"] == 2, "seeds"
    again = reproduce(request, make_store)
    assert again.cells == first.cells
    assert again.findings == first.findings
    assert stores[0] == stores[1]


@pytest.mark.slow
def test_smoke_preset(sagsae: Sagsae, tmp_path: Path) -> None:
    done = sagsae("reproduce", "--preset", "smoke", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["cells"]) == 3
    assert len(document["claims"]) == len(CLAIMS)
