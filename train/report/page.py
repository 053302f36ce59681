"""Renders the page: one HTML file that contains its style, its script and plotly, and makes no network requests.

Everything read from a run is escaped: by jinja2 in the page, by `tojson` in the plots. Only this package's own files
and plotly's are inserted unescaped.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import shared
from shared.saes import ARCHITECTURES
from train.measure.written import MEASURED
from train.report import wording
from train.report.comparable import differences
from train.report.data import ReportedRun, SkippedFolder
from train.report.naming import labelled
from train.report.sae import MeasuredSAE
from train.report.settings import grouped, measured, sections

HERE = Path(__file__).parent
LOOK = Path(shared.__file__).parent / "look.css"


@dataclass(frozen=True)
class TableColumn:
    """A column of the table. Numbers are right-aligned and sorted as numbers."""

    title: str
    number: bool = True


@dataclass(frozen=True)
class TableCell:
    """A cell of the table. `value` is what sorting compares; it is empty where nothing was measured."""

    text: str
    value: str


@dataclass(frozen=True)
class TableRow:
    """A row of the table: one autoencoder."""

    arch: str
    cells: tuple[TableCell, ...]


@dataclass(frozen=True)
class Provenance:
    """The command, versions and settings that produced one run."""

    folder: str
    command: str
    versions: tuple[tuple[str, str], ...]
    documents: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class LatentPage:
    """A page of `sagsae features`."""

    name: str
    """The autoencoder."""
    href: str


COLUMNS = (
    TableColumn("Architecture", number=False),
    *(TableColumn(title) for title in ("Width", "λ or k", "Seed", "R²", "R² rest", "L0", "L0+", "L0−", "Dead")),
    *(TableColumn(title) for title in ("Both poles", "Both by energy", "Mass of both poles")),
    *(TableColumn(title) for title in ("Rescaling", "Antipodal pairs")),
    *(
        TableColumn(title)
        for title in ("CE spliced", "CE recovered (zero)", "CE recovered (mean)", "Tokens", "CE tokens")
    ),
    TableColumn("Run / autoencoder", number=False),
)
SETTING = TableColumn("Setting")
SITE = TableColumn("Model and hookpoint", number=False)


def render(
    runs: Sequence[ReportedRun], left_out: Sequence[SkippedFolder] = (), latents: Sequence[LatentPage] = ()
) -> str:
    """Returns the page as HTML. `latents`: pages that it links to."""
    runs, shared = labelled(runs)
    parts, groups = sections(runs), grouped(runs)
    several = (len(parts) > 1, len({_site(run) for run in runs}) > 1)
    settings_of: dict[Path, list[int]] = {}
    for number, part in enumerate(parts, 1):
        for run in part.runs:
            settings_of.setdefault(run.folder, []).append(number)
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=parts[0].title if len(parts) == 1 else f"Sparse autoencoders in {len(parts)} settings",
        sections=parts,
        differences=[each.text for each in differences(groups)],
        shared=shared,
        left_out=[each.reason for each in left_out],
        latents=latents,
        columns=(*COLUMNS, *(column for column, more in zip((SETTING, SITE), several, strict=True) if more)),
        rows=[_row(run, sae, several, settings_of[run.folder]) for run in runs for sae in measured(run)],
        runs=[_provenance(run) for run in runs],
        plots={plot.name: plot.json for part in parts for figure in part.figures for plot in figure.plots},
        css=Markup(LOOK.read_text(encoding="utf-8")) + _own("page.css") + _architectures(),
        js=_own("page.js"),
        plotly=Markup(get_plotlyjs()),
    )


def latent_pages(runs: Sequence[ReportedRun], out: Path) -> list[LatentPage]:
    """Finds the pages of `sagsae features` in runs. Links are relative to the report's file `out`."""
    found = sorted(page for run in runs for page in (run.folder / "features").glob("*/index.html"))
    base = out.resolve().parent
    return [LatentPage(page.parent.name, quote(os.path.relpath(page.resolve(), base))) for page in found]


def _own(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))


def _architectures() -> Markup:
    """Each architecture's colour as a custom property, and its swatch in the table, round where latents are signed."""
    light, dark = (
        " ".join(f"--{name}: {architecture.colours[ground]};" for name, architecture in ARCHITECTURES.items())
        for ground in (0, 1)
    )
    swatches = "\n".join(
        f".swatch.{name} {{ background: var(--{name});{'' if architecture.signed else ' border-radius: 1px;'} }}"
        for name, architecture in ARCHITECTURES.items()
    )
    on_screens = f"@media screen and (prefers-color-scheme: dark) {{ :root:not([data-paper]) {{ {dark} }} }}"
    return Markup(f":root {{ {light} }}\n{on_screens}\n{swatches}\n")


def _site(run: ReportedRun) -> str:
    return f"{run.model} {run.hook}"


def _row(run: ReportedRun, sae: MeasuredSAE, several: tuple[bool, bool], settings: list[int]) -> TableRow:
    """Returns the cells in the order of COLUMNS, then SETTING and SITE when the page has several."""
    where = f"{run.folder.name}/{sae.name}"
    pairs = sae.directions.antipodal_pairs if sae.directions else None
    return TableRow(
        sae.arch,
        (
            _cell(wording.architecture(sae.key), sae.arch),
            _cell(str(sae.d_sae), sae.d_sae),
            _cell(wording.knob(sae.knob), sae.knob.value),
            _cell(wording.ABSENT if sae.seed is None else str(sae.seed), sae.seed),
            *(_cell(wording.fixed(value, 4), value) for value in (sae.r2, sae.r2_rest)),
            *(_cell(wording.fixed(value, 2), value) for value in (sae.l0, sae.l0_pos, sae.l0_neg)),
            *(_cell(wording.percent(value), value) for value in (sae.dead_fraction, sae.bipolar_fraction)),
            *(_cell(wording.percent(value), value) for value in (sae.bipolar_energy, sae.bipolar_mass)),
            _cell(wording.fixed(sae.rescaling, 3), sae.rescaling),
            _cell(("≈" if sae.directions and sae.directions.sampled else "") + wording.count(pairs), pairs),
            _cell(wording.fixed(sae.ce_spliced, 4), sae.ce_spliced),
            *(_cell(wording.percent(value, 2), value) for value in (sae.ce_recovered, sae.ce_recovered_mean)),
            *(_cell(wording.count(value), value) for value in (sae.tokens, sae.ce_tokens)),
            _cell(where, where),
            *([_cell(", ".join(map(str, settings)), settings[0])] if several[0] else []),
            *([_cell(_site(run), _site(run))] if several[1] else []),
        ),
    )


def _cell(text: str, value: float | int | str | None) -> TableCell:
    return TableCell(text, "" if value is None else str(value))


def _provenance(run: ReportedRun) -> Provenance:
    versions = run.record.get("versions")
    references: dict[str, Any] = run.evaluation.model_dump(exclude={"saes"})
    return Provenance(
        folder=str(run.folder),
        command=str(run.record.get("command") or "not recorded"),
        versions=tuple((str(name), str(value)) for name, value in versions.items())
        if isinstance(versions, dict)
        else (),
        documents=(
            (f"Configuration ({'config.json' if run.trained else MEASURED})", _pretty(run.config)),
            (f"Record ({'record.json' if run.trained else MEASURED})", _pretty(run.record)),
            (
                f"Reference values of the evaluation ({'evaluation.json' if run.trained else MEASURED})",
                _pretty(references),
            ),
        ),
    )


def _pretty(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
