"""The report: its arithmetic by hand, its page as text, and its page as Chromium draws it."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.reports import RISING, measured, sweep, write_run
from support.serving.chromium import CHROMIUM, Watched, launched

import train.report
from shared.errors import UserError
from shared.saes import ARCHITECTURES, sae_config
from train.report import write_report
from train.report.answer import answer
from train.report.comparable import differences
from train.report.data import ReportedRun, read_run
from train.report.figures import DASHES, MARKERS
from train.report.frontier import FrontierPoint, compare, mean_of_seeds, seed_spread
from train.report.sae import FrontierKey, MeasuredSAE
from train.report.settings import sections

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")


def test_other_rows_are_another_setting(tmp_path: Path) -> None:
    """Of one model and hookpoint, but another corpus, revision, codec or synthetic world: never averaged as seeds."""
    runs: list[Any] = []
    for name, rows in (("a", "one-10"), ("b", "two-10"), ("c", "one-10")):
        folder = write_run(tmp_path / name, sweep(seeds=(len(runs),)))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "snapshot": rows}))
        runs.append(read_run(folder))
    one, other = sections(runs)
    places = [tmp_path.name + f"/{name}" for name in "acb"]
    assert [one.title, other.title] == [", ".join(places[:2]), places[2]]
    assert [dict(section.facts)["Store"] for section in (one, other)] == ["tiny (one-10)", "tiny (two-10)"]
    assert [len(dict(section.facts)["Autoencoders"].split()) > 1 for section in (one, other)] == [True, False]
    assert dict(one.facts)["Autoencoders"] == "12 in 2 runs"
    assert [section.title for section in sections(runs[::2])] == ["tiny · layer_02/resid_post"]


def test_settings_are_named_by_their_folders_and_site_where_it_differs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, sweep((0,))) for name in ("x/runs/first", "y/runs/first", "x/runs/b")]
    folders.append(write_run(tmp_path / "attn", sweep((0,)), hook="layer_02/attn_out"))
    parts = sections([read_run(folder) for folder in folders])
    named = "x/runs/first, y/runs/first, x/runs/b · tiny · layer_02/resid_post"
    assert parts[0].title == named
    assert parts[1].title.endswith(f"{tmp_path.name}/attn · tiny · layer_02/attn_out")


def test_a_digest_is_short_enough_for_one_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", sweep((0,)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "snapshot": "0123456789abcdef" * 2}))
    assert read_run(folder).rows == "tiny (0123456789ab)"


def test_what_follows_from_another_value_is_no_difference(tmp_path: Path) -> None:
    """The default warm-up and the clamped dead window differ where the steps do; one that was asked for is listed."""

    def runs(*warmups: int) -> list[ReportedRun]:
        found = []
        for number, (batch, warmup) in enumerate(zip((64, 128), warmups, strict=True)):
            folder = write_run(tmp_path / f"{warmups}-{number}", sweep((0,)))
            config = json.loads((folder / "config.json").read_text())
            own = {"tokens": 64 * 401, "batch": batch, "warmup_steps": warmup}
            (folder / "config.json").write_text(json.dumps({**config, **own}))
            found.append(read_run(folder))
        return found

    def names(found: list[ReportedRun]) -> list[str]:
        return [each.name for each in differences([[run] for run in found])]

    assert names(runs(20, 10)) == ["training tokens", "batch"]
    assert names(runs(20, 11)) == ["training tokens", "batch", "warmup steps"]


def test_one_that_diverged_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", sweep())
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "diverged": {"gated-192-lambda0.8-seed0": 140}}))
    (section,) = sections([read_run(folder)])
    assert "gated-192-lambda0.8-seed0 diverged: its loss is no number since step 140" in " ".join(section.notes)


NOT_SPLICED: dict[str, Any] = {"ce_spliced": None, "ce_recovered": None, "ce_recovered_mean": None, "ce_tokens": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two settings: one with two seeds and cross-entropy, one with neither."""
    root = tmp_path_factory.mktemp("runs")
    return [
        write_run(root / "resid", sweep()),
        write_run(root / "attn", sweep((0,), **NOT_SPLICED), hook="layer_02/attn_out"),
    ]


@pytest.fixture(scope="module")
def report(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(runs, tmp_path_factory.mktemp("out") / "report.html")


# ---------------------------------------------------------------------------------------------------- arithmetic


def test_matched_l0_by_hand() -> None:
    """a is 0.5, 0.7 at L0 10, 1000; b is 0.55 at 1, 0.65 at 100: on 10..100, a - b goes from -0.1 to -0.05."""
    a, b = (
        [FrontierPoint(10.0, 0.5), FrontierPoint(1000.0, 0.7)],
        [FrontierPoint(1.0, 0.55), FrontierPoint(100.0, 0.65)],
    )
    matched = compare(a, b)
    assert matched is not None
    assert (matched.l0_low, matched.l0_high) == (10, 100)
    assert matched.lowest == pytest.approx(-0.1)
    assert matched.highest == pytest.approx(-0.05)
    assert matched.mean == pytest.approx(-0.075)
    assert matched.mean_a == pytest.approx(0.55)
    assert matched.crossings == ()


def test_a_crossing_is_found_between_knots() -> None:
    matched = compare(
        [FrontierPoint(1.0, 0.0), FrontierPoint(100.0, 1.0)], [FrontierPoint(1.0, 0.5), FrontierPoint(100.0, 0.5)]
    )
    assert matched is not None
    assert matched.crossings == pytest.approx((10.0,))
    assert matched.mean == pytest.approx(0.0)
    flat = [FrontierPoint(l0, 0.5) for l0 in (1.0, 10.0, 100.0)]
    through_a_knot = compare([FrontierPoint(1.0, 0.25), FrontierPoint(10.0, 0.5), FrontierPoint(100.0, 0.625)], flat)
    assert through_a_knot is not None
    assert through_a_knot.crossings == pytest.approx((10.0,))


def test_frontiers_that_touch_or_miss() -> None:
    touching = compare([FrontierPoint(1.0, 0.1), FrontierPoint(5.0, 0.2)], [FrontierPoint(5.0, 0.5)])
    assert touching is not None
    assert touching.mean == pytest.approx(-0.3)
    assert compare([FrontierPoint(1.0, 0.1), FrontierPoint(4.0, 0.2)], [FrontierPoint(5.0, 0.5)]) is None
    assert compare([], [FrontierPoint(5.0, 0.5)]) is None


def test_seeds_are_averaged_and_silent_autoencoders_left_out() -> None:
    values = [(0.1, 0, 10.0, 0.8), (0.1, 1, 40.0, 0.9), (0.3, 0, 5.0, 0.6), (0.9, 0, 0.0, 0.0)]
    saes = [MeasuredSAE(**measured("gated", 8, lam, seed, l0=l0, r2=r2)) for lam, seed, l0, r2 in values]
    low, high = mean_of_seeds(saes, "r2")
    assert (low.l0, low.value) == pytest.approx((5.0, 0.6))
    assert (high.l0, high.value) == pytest.approx((20.0, 0.85))
    assert seed_spread(saes) == pytest.approx(0.1)
    assert seed_spread(saes[2:]) is None


@pytest.mark.parametrize(
    ("settings", "scalars"),
    [
        ({"arch": "sa-gsae"}, 3),
        ({"arch": "sa-gsae", "tie": "none"}, 6),
        ({"arch": "gated"}, 3),
        ({"arch": "relu"}, 1),
        ({"arch": "topk", "k": 2}, 1),
    ],
)
def test_parameters_of_a_small_autoencoder(tmp_path: Path, settings: dict[str, Any], scalars: int) -> None:
    """8 x 64 encoder and decoder, scalars for each of 8 latents, 64 offsets."""
    config = sae_config(d_sae=8, **settings)
    run = write_run(tmp_path / "run", [measured(config.arch, 8, 0.1, name=config.name)])
    written = json.loads((run / "config.json").read_text()) | {"saes": [config.model_dump(mode="json")]}
    (run / "config.json").write_text(json.dumps(written))
    (sae,) = read_run(run).saes
    assert sae.parameters == 2 * 8 * 64 + scalars * 8 + 64


def series_of(r2_gain: float, l0_factor: float = 1.0) -> dict[FrontierKey, list[MeasuredSAE]]:
    def one(arch: str, width: int, lam: float) -> MeasuredSAE:
        own = arch == "sa-gsae"
        l0 = 4 / lam * (l0_factor if own else 1)
        return MeasuredSAE(**measured(arch, width, lam, l0=l0, r2=0.8 - lam / 2 + (r2_gain if own else 0)))

    return {
        key: [one(key.arch, key.d_sae, lam) for lam in (0.1, 0.2, 0.4)]
        for key in (FrontierKey("sa-gsae", 96), FrontierKey("gated", 192))
    }


@pytest.mark.parametrize(
    ("gain", "factor", "words"),
    [
        (0.01, 1.0, "reaches a higher R² than Gated 192 throughout, by 0.0100."),
        (-0.02, 1.0, "reaches a lower R² than Gated 192 throughout, by 0.0200."),
        (0.0001, 1.0, "reach the same R² to within 0.0005"),
        (0.01, 50.0, "The frontiers do not overlap: SA-GSAE 96 covers L0 500 to 2,000, Gated 192 L0 10.0 to 40.0."),
    ],
)
def test_the_answer_in_words(gain: float, factor: float, words: str) -> None:
    (verdict,) = answer(series_of(gain, factor)).verdicts
    assert words in verdict.text


def test_the_answer_names_the_crossing_and_the_missing_pair() -> None:
    series = series_of(0.0)
    tilted = [
        sae.model_copy(update={"r2": sae.r2 + 0.1 * (0.2 - (sae.sparsity or 0))})
        for sae in series[FrontierKey("sa-gsae", 96)]
        if sae.r2
    ]
    (verdict,) = answer(series | {FrontierKey("sa-gsae", 96): tilted}).verdicts
    assert re.search(r"higher by up to 0\.0100.*lower by up to 0\.0200.*cross at L0\s≈\s20\.0\.", verdict.text)
    alone = answer({FrontierKey("sa-gsae", 96): tilted})
    assert not alone.verdicts
    assert "no pair" in alone.remarks[0]


def test_a_series_is_what_differs_in_its_knob_and_seed_only() -> None:
    plain, tied = measured("sa-gsae", 96, 0.1), "sa-gsae-96-lambda0.1-seed0-tie-none-theta0-1.6"
    assert MeasuredSAE(**plain).key == FrontierKey("sa-gsae", 96, "")
    assert MeasuredSAE(**plain | {"name": tied}).key == FrontierKey("sa-gsae", 96, "tie-none-theta0-1.6")
    top = MeasuredSAE(**plain | {"arch": "abs-topk", "sparsity": None, "k": 32})
    assert (top.knob, top.signed) == (("k", 32), True)
    steered = MeasuredSAE(**plain | {"sparsity": 0.2, "l0_target": 20.0})
    assert steered.knob == ("l0", 20), "where λ began does not tell one from another"
    apart = [top, top.model_copy(update={"r2": 0.3, "seed": 1}), top.model_copy(update={"r2": 0.9, "k": 64})]
    assert seed_spread(apart) == pytest.approx((top.r2 or 0) - 0.3)
    assert len(mean_of_seeds(apart, "r2")) == 2


@pytest.mark.parametrize(
    ("mine", "others", "against"),
    [
        ("", ["", "theta0-1"], ""),
        ("theta0-1", ["", "theta0-1"], "theta0-1"),
        ("tie-none-theta0-1", ["", "theta0-1"], "theta0-1"),
        ("one-sided-true", ["", "theta0-1"], ""),
        ("theta0-2", [""], ""),
    ],
)
def test_a_variant_is_set_against_its_like(mine: str, others: list[str], against: str) -> None:
    def series(key: FrontierKey) -> list[MeasuredSAE]:
        names = [f"{key.arch}-{key.d_sae}-lambda{lam}-seed0-{key.variant}".rstrip("-") for lam in (0.1, 0.4)]
        return [
            MeasuredSAE(**measured(key.arch, key.d_sae, lam, name=name))
            for lam, name in zip((0.1, 0.4), names, strict=True)
        ]

    keys = [FrontierKey("sa-gsae", 96, mine), *(FrontierKey("gated", 192, variant) for variant in others)]
    (verdict,) = answer({key: series(key) for key in keys}).verdicts
    label = "Gated 192" + (f" ({against})" if against else "")
    assert verdict.title.endswith(f"against {label}, half the width")
    assert ("They differ in other settings too (theta0-2)" in verdict.text) == (mine == "theta0-2")
    assert ("They differ" in verdict.text) == (mine == "theta0-2")


def test_the_answer_counts_antipodal_pairs_and_mass() -> None:
    series = series_of(0.0)
    remarks = " ".join(answer(series).remarks)
    assert "Gated 192 has 3 antipodal pairs of live latents" in remarks
    alone = [MeasuredSAE(**measured("gated", 8, 0.1, directions={"latents": 8, "antipodal_pairs": 1}))]
    assert "Gated 8 has 1 antipodal pair of live latents" in " ".join(answer({alone[0].key: alone}).remarks)
    assert re.search(r"SA-GSAE 96 use both poles.*They carry between 55\s% and 85\s% of the activation mass", remarks)


# ------------------------------------------------------------------------------------------------------ the page


def test_every_autoencoder_and_definition_is_on_the_page(runs: list[Path], report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    table = html[html.index("<tbody>") : html.index("</tbody>")]
    for run in runs:
        for sae in read_run(run).evaluation.saes:
            assert f"{run.name}/{sae.name}" in table
            assert f"{sae.r2:.4f}" in table
    for text in ("4,321 held-out tokens", "predictions of 4,242 tokens", "1,280 tokens", "sagsae train --store"):
        assert text in html
    assert "is an effect of optimisation, not of capacity" in html
    assert "Cross-entropy was not measured for any autoencoder here." in html
    assert html.count("<h1") == html.count("<main") == 1


def test_one_setting_is_one_section_and_repeats_are_dropped(runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "more", sweep((2,)))
    html = write_report([runs[0], other, runs[0]], tmp_path / "r.html").read_text(encoding="utf-8")
    assert html.count('class="setting"') == 1
    assert "18 in 2 runs" in html


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = "</script><script>window.owned=1</script><img src=x onerror=window.owned=1>"
    saes = [measured("sa-gsae", 96, 0.1, name=evil), measured("gated", 192, 0.1)]
    run = write_run(tmp_path / "run", saes, model=evil)
    html = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>window.owned" not in html
    assert "<img src=x" not in html
    assert "&lt;/script&gt;&lt;script&gt;window.owned" in html


def test_what_was_not_measured_is_not_fatal(tmp_path: Path) -> None:
    """NaN, L0 = 0, no log, an almost empty record: still a page, which says so."""
    saes = [measured("sa-gsae", 96, 0.1, r2=math.nan, tokens=None, **NOT_SPLICED), measured("gated", 192, 9.0, l0=0.0)]
    run = write_run(tmp_path / "run", saes)
    (run / "record.json").write_text("{}", encoding="utf-8")
    (run / "metrics.jsonl").unlink()
    html = write_report([run], tmp_path / "new" / "r.html").read_text(encoding="utf-8")
    assert "1 of 2 autoencoders has no L0 above zero" in html
    assert "no metrics.jsonl" in html
    assert html.count('data-value="4321"') == 2, "an autoencoder without its own count was measured on its run's"
    assert "NaN" not in html[html.index('id="plots"') : html.index("</script>", html.index('id="plots"'))]


def test_every_architecture_and_variant_has_its_place(tmp_path: Path) -> None:
    """Null λ with k or an L0 target, another variant of one width, an entry without any of the newer numbers."""
    saes = [
        measured("sa-gsae", 96, 0.1),
        measured("sa-gsae", 96, 0.1, name="sa-gsae-96-lambda0.1-seed0-tie-none"),
        measured("gated", 192, 0.1) | {"sparsity": None, "l0_target": 20.0},
        measured("relu", 192, 0.1, directions=None, rescaling=None),
        measured("jumprelu", 192, 0.1),
        measured("batch-topk", 192, 0.1) | {"sparsity": None, "k": 32},
        measured("abs-topk", 96, 0.1) | {"sparsity": None, "k": 32, "census": measured("sa-gsae", 96, 0.1)["census"]},
    ]
    html = write_report([write_run(tmp_path / "run", saes)], tmp_path / "r.html").read_text(encoding="utf-8")
    table = html[html.index("<tbody>") : html.index("</tbody>")]
    assert table.count("<tr>") == len(saes)
    for text in (
        "SA-GSAE",
        "Gated",
        "ReLU",
        "JumpReLU",
        "BatchTopK",
        "AbsTopK",
        "SA-GSAE (tie-none)",
        "k 32",
        "target 20",
        "λ 0.1",
    ):
        assert f">{text}<" in table, text
    plots = json.loads(html[html.index('id="plots">') + 11 : html.index("</script>", html.index('id="plots"'))])
    groups = {trace["meta"]["group"] for trace in plots["setting-1-r2-plot"]["data"]}
    assert groups == {
        "SA-GSAE 96", "SA-GSAE 96 (tie-none)", "Gated 192", "ReLU 192", "JumpReLU 192", "BatchTopK 192", "AbsTopK 96",
    }  # fmt: skip
    census = plots["setting-1-census-share"]["data"]
    assert {trace["meta"]["group"] for trace in census} == {"SA-GSAE 96", "SA-GSAE 96 (tie-none)", "AbsTopK 96"}
    assert census[0]["y"] == RISING
    assert plots["setting-1-census-mass"]["data"][0]["y"] == [*RISING[:-1], None]


def plots_of(page: Path) -> dict[str, Any]:
    html = page.read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(
        html[html.index('id="plots">') + 11 : html.index("</script>", html.index('id="plots"'))]
    )
    return found


def test_an_architecture_keeps_its_marker(tmp_path: Path) -> None:
    """SA-GSAE changed its marker when another width or architecture came into the report."""
    others = [measured("relu", 64, 0.1), measured("gated", 8, 0.1), measured("topk", 96, 0.1) | {"k": 8}]
    seen = []
    for number in range(len(others) + 1):
        run = write_run(tmp_path / str(number), [measured("sa-gsae", 96, 0.1), *others[:number]])
        data = plots_of(write_report([run], tmp_path / f"{number}.html"))["setting-1-r2-plot"]["data"]
        looks = {trace["meta"]["arch"]: trace["marker"]["symbol"] for trace in data if "marker" in trace}
        seen.append((looks["sa-gsae"], {trace["line"]["dash"] for trace in data[:1]}))
    assert seen == seen[:1] * len(seen)
    assert len(set(looks.values())) == len(looks)
    assert len(set(MARKERS)) >= len(ARCHITECTURES) <= len(set(DASHES)), "no two architectures share a look"
    script = (Path(train.report.__file__).parent / "page.js").read_text(encoding="utf-8")
    assert [each for each in (*MARKERS, *DASHES) if f"{each}: " not in script and f'"{each}": ' not in script] == []


def test_labels_leave_out_what_an_architecture_shares(tmp_path: Path) -> None:
    saes = [
        measured("sa-gsae", 96, 0.1, name="sa-gsae-96-lambda0.1-seed0-theta0-1.6"),
        measured("sa-gsae", 96, 0.1, name="sa-gsae-96-lambda0.1-seed0-theta0-1.6-tie-none"),
        measured("gated", 192, 0.1, name="gated-192-lambda0.1-seed0-theta0-1.6"),
        measured("relu", 192, 0.1),
    ]
    page = write_report([write_run(tmp_path / "run", saes)], tmp_path / "r.html")
    html = page.read_text(encoding="utf-8")
    assert "Every SA-GSAE and Gated autoencoder on this page has theta0-1.6; labels leave it out." in html
    groups = {trace["meta"]["group"] for trace in plots_of(page)["setting-1-r2-plot"]["data"]}
    assert groups == {"SA-GSAE 96", "SA-GSAE 96 (tie-none)", "Gated 192", "ReLU 192"}
    assert "SA-GSAE 96 against Gated 192, half the width" in html


def test_an_unfinished_last_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", sweep((0,)))
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 21, "tok')
    assert {len(curve.tokens) for curve in read_run(run).curves.values()} == {20}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", None, r"is not a training run: it has no config\.json.*sagsae train"),
        ("record.json", None, r"is not a training run: it has no record\.json"),
        ("evaluation.json", None, r"has no evaluation\.json: run `sagsae eval .*run` first"),
        ("evaluation.json", '{"tokens": 3', r"evaluation\.json: is not valid JSON"),
        ("evaluation.json", '{"tokens": 3, "saes": []}', r"lists no autoencoder.*sagsae eval"),
        ("evaluation.json", '{"tokens": 3, "saes": [{"name": "x"}]}', r"saes\.0\.arch: Field required.*sagsae eval"),
        ("config.json", "[]", r"config\.json: expected a JSON object, found list"),
        ("record.json", b"\xff\xfe", r"record\.json: cannot be read as UTF-8"),
        ("metrics.jsonl", "{}\n", r"metrics\.jsonl, line 1: expected"),
        ("metrics.jsonl", '{"a"\n{}\n', r"metrics\.jsonl, line 1: is not valid JSON"),
    ],
)
def test_a_bad_run_is_named_with_the_way_out(tmp_path: Path, file: str, text: str | bytes | None, message: str) -> None:
    run = write_run(tmp_path / "run", sweep((0,)))
    if text is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        write_report([run], tmp_path / "r.html")
    assert str(run) in str(error.value)
    assert not (tmp_path / "r.html").exists()


def test_a_bad_destination_leaves_nothing_behind(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(runs, tmp_path / "file" / "r.html")
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        write_report(runs, tmp_path)
    with pytest.raises(UserError, match="name at least one run folder"):
        write_report([], tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_report(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = write_report(runs, tmp_path / "r.html")
    old = out.read_bytes()
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(runs, out)
    assert out.read_bytes() == old
    assert list(tmp_path.iterdir()) == [out]


def test_the_file_is_replaced_whole(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    out.write_text("old", encoding="utf-8")
    assert write_report(runs, out, overwrite=True) == out
    first = out.read_bytes()
    write_report(runs, out)
    assert out.read_bytes() == first
    assert list(tmp_path.iterdir()) == [out]


# --------------------------------------------------------------------------------------------------- the browser


class Visit(Watched):
    """A report."""

    def open(self, path: Path) -> None:
        self.page.goto(path.as_uri())
        self.page.wait_for_function(
            "[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.scatterlayer .trace'))"
        )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as chromium:
        yield chromium


@pytest.fixture
def visit(browser: Any, request: pytest.FixtureRequest) -> Iterator[Visit]:
    width, scheme = getattr(request, "param", (1280, "light"))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    yield Visit(context.new_page(), "file://")
    context.close()


DRAWN = """plot => {
  const box = plot.querySelector('svg.main-svg').getBoundingClientRect();
  const traces = [...plot.querySelectorAll('.scatterlayer .trace')].map(trace => trace.getBoundingClientRect());
  const most = side => Math.max(...traces.map(trace => trace[side]));
  return [box.width, box.height, traces.length, most("width"), most("height")];
}"""


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("visit", [(w, s) for w in (1280, 390) for s in ("light", "dark")], indirect=True, ids=str)
def test_the_page_draws_alone_and_fits(visit: Visit, report: Path) -> None:
    visit.open(report)
    plots = visit.page.query_selector_all(".plot")
    assert len(plots) == 8 + 7
    for plot in plots:
        width, height, traces, spread, rise = plot.evaluate(DRAWN)
        assert width > 200
        assert height > 200
        assert traces >= 1
        assert spread > 50
        assert rise > 5
    scroll, inner = visit.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert scroll <= inner
    box = visit.page.locator(".scroll").evaluate("box => [box.scrollWidth, box.clientWidth, box.offsetWidth]")
    assert box[0] > box[1], "the table is wider than its box, and says so"
    assert box[2] <= inner
    visit.page.get_by_text("scroll it sideways to see all 23 columns").wait_for()
    assert visit.requests == [report.as_uri()]
    assert visit.complaints == []


@pytest.mark.browser
@needs_chromium
def test_a_column_title_sorts_both_ways(visit: Visit, report: Path) -> None:
    visit.open(report)
    head = visit.page.locator("thead th", has=visit.page.get_by_role("button", name="L0", exact=True))
    column = head.evaluate("th => th.cellIndex")

    def values() -> list[str]:
        cells = visit.page.locator("tbody tr").evaluate_all(
            "(rows, i) => rows.map(r => r.cells[i].dataset.value)", column
        )
        return [str(cell) for cell in cells]

    untouched = [float(value) for value in values()]
    head.locator("button").focus()
    visit.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(value) for value in values()] == sorted(untouched) != untouched
    visit.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(value) for value in values()] == sorted(untouched, reverse=True)

    visit.page.get_by_role("button", name="CE spliced").click()
    assert visit.page.locator("[aria-sort]").count() == 1
    column = visit.page.locator("[aria-sort]").evaluate("th => th.cellIndex")
    spliced = values()
    assert spliced[-6:] == [""] * 6, "what was not measured goes last"
    assert "" not in spliced[:-6]


@pytest.mark.browser
@needs_chromium
def test_the_legend_hides_and_isolates(visit: Visit, report: Path) -> None:
    visit.open(report)
    figure = visit.page.locator("#setting-1-training")
    shown = "f => [...f.querySelectorAll('.plot')].map(p => p.querySelectorAll('.scatterlayer .trace').length)"
    assert figure.evaluate(shown) == [12, 12]
    figure.get_by_role("button", name="Gated 192").click()
    assert figure.evaluate(shown) == [6, 6]
    figure.get_by_role("button", name="λ 0.2").first.click()
    assert figure.evaluate(shown) == [4, 4]
    figure.get_by_role("button", name="λ 0.4").first.click(modifiers=["Shift"])
    assert figure.evaluate(shown) == [2, 2]
    figure.get_by_role("button", name="λ 0.4").first.click(modifiers=["Shift"])
    assert figure.evaluate(shown) == [12, 12]
    assert visit.complaints == []


@pytest.mark.browser
@needs_chromium
def test_the_plots_follow_the_colour_scheme_and_the_paper(visit: Visit, report: Path) -> None:
    visit.open(report)
    look = """() => {
      const style = (selector, key) => getComputedStyle(document.querySelector('.plot ' + selector))[key];
      return [style('.xtick text', 'fill'), style('.gridlayer path', 'stroke'), style('.js-line', 'stroke')];
    }"""
    light = visit.page.evaluate(look)
    visit.page.emulate_media(color_scheme="dark")
    visit.page.wait_for_timeout(300)
    dark = visit.page.evaluate(look)
    assert all(one != other for one, other in zip(light, dark, strict=True))
    visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    visit.page.wait_for_timeout(300)
    assert visit.page.evaluate(look) == light
    visit.page.evaluate("dispatchEvent(new Event('afterprint'))")
    visit.page.wait_for_timeout(300)
    assert visit.page.evaluate(look) == dark


@pytest.mark.browser
@needs_chromium
def test_a_hostile_name_runs_nothing(visit: Visit, tmp_path: Path) -> None:
    evil = "<img src=x onerror=window.owned=1><a href='javascript:window.owned=1'>x</a>"
    evil += "</script><script>window.owned=1</script>"
    run = write_run(
        tmp_path / "run", [measured("sa-gsae", 96, lam, name=f"{evil}{lam}") for lam in (0.1, 0.2)], model=evil
    )
    visit.open(write_report([run], tmp_path / "r.html"))
    visit.page.locator(".plot").first.scroll_into_view_if_needed()
    point = visit.page.locator(".plot .points path").first.bounding_box()
    visit.page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    visit.page.wait_for_selector(".hoverlayer .hovertext")
    text = visit.page.locator(".hoverlayer .hovertext").first.text_content()
    assert evil in text, "a name is shown as it is, no tag of it obeyed"
    assert visit.page.evaluate("window.owned") is None
    assert visit.complaints == []


@pytest.mark.browser
@needs_chromium
def test_without_javascript_the_numbers_are_there(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 900})
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("tbody tr").count() == 18
    page.get_by_text("JavaScript is switched off").first.wait_for()
    assert not page.locator(".plots").first.is_visible()
    context.close()
