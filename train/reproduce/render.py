"""Writes the results of a reproduction: reproduction.json, reproduction.md, report.html, and an SVG of each cell's
frontiers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from shared.files.local import write_file
from shared.record import write_json
from train.reproduce.analysis import Arms, CellResult
from train.reproduce.claims import Finding
from train.reproduce.figure import frontier_svg
from train.reproduce.pilot import Pilot
from train.reproduce.plan import FRONTIERS, slug
from train.reproduce.tables import (
    ReproductionTable,
    cells_table,
    changed_table,
    claims_table,
    dead_table,
    frontier_table,
    pilot_table,
    widths_table,
)

STYLE: Final = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}td,th{border-bottom:1px solid #ddd;
padding:.3rem .6rem;text-align:left;vertical-align:top}figure{display:inline-block;width:min(36rem,100%);margin:0}
td:last-child{white-space:nowrap}svg{width:100%;height:auto}"""


@dataclass(frozen=True)
class Results:
    """All results of a reproduction."""

    protocol: dict[str, Any]
    cost: dict[str, Any]
    pilots: Mapping[str, Pilot]
    points: Mapping[str, Arms]
    """The autoencoders of each arm of each cell, ablations included."""
    cells: Sequence[CellResult]
    findings: Sequence[Finding]
    record: dict[str, Any]

    def key_results(self) -> dict[str, Any]:
        """Returns the object that `--json` prints."""
        return {
            "preset": self.protocol["preset"],
            "claims": {finding.claim: finding.mark for finding in self.findings},
            "cells": {
                cell.cell: {
                    "verdict": cell.verdict,
                    "certain": cell.certain,
                    "r2_difference": asdict(cell.r2) if cell.r2 else None,
                    "dead": asdict(cell.dead) if cell.dead else None,
                    "dead_ratio": asdict(cell.dead_ratio) if cell.dead_ratio else None,
                }
                for cell in self.cells
            },
        }

    def document(self) -> dict[str, Any]:
        """Returns the content of reproduction.json."""
        return {
            **self.record,
            "protocol": self.protocol,
            "estimate": self.cost,
            "claims": [asdict(finding) for finding in self.findings],
            "cells": [asdict(cell) for cell in self.cells],
            "pilots": {cell: asdict(pilot) for cell, pilot in self.pilots.items()},
            "autoencoders": {
                cell: {arm: [asdict(point) for point in points] for arm, points in arms.items()}
                for cell, arms in self.points.items()
            },
        }

    def tables(self) -> list[ReproductionTable]:
        return [
            claims_table(self.findings),
            cells_table(self.cells),
            dead_table(self.cells),
            widths_table(self.cells),
            changed_table(self.cells),
            pilot_table(self.pilots),
            frontier_table(self.points),
        ]


def write_results(results: Results, out: Path) -> None:
    """Writes every file atomically, the JSON last."""
    figures = {
        cell: frontier_svg(cell, {arm: arms[arm] for arm in FRONTIERS if arm in arms})
        for cell, arms in results.points.items()
    }
    for cell, svg in figures.items():
        write_file(out / figure_name(cell), svg.encode())
    write_file(out / "reproduction.md", markdown(results, list(figures)).encode())
    write_file(out / "report.html", page(results, figures).encode())
    write_json(out / "reproduction.json", results.document())


def figure_name(cell: str) -> str:
    return f"frontier-{slug(cell)}.svg"


def title(results: Results) -> str:
    return f"Reproduction on {', '.join(results.protocol['models'])}, preset {results.protocol['preset']}"


def markdown(results: Results, cells: Sequence[str]) -> str:
    parts = [f"# {title(results)}", summary(results)]
    for table in results.tables():
        rows = [table.header, ("---",) * len(table.header), *table.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        parts += [f"## {table.title}", table.note, text]
    parts += [f"![{cell}]({figure_name(cell)})" for cell in cells]
    return "\n\n".join(parts) + "\n"


def page(results: Results, figures: Mapping[str, str]) -> str:
    """Returns one self-contained HTML page that makes no network requests."""
    parts = [f"<h1>{escape(title(results))}</h1><p>{escape(summary(results))}</p>"]
    parts.append("".join(f"<figure>{svg}</figure>" for svg in figures.values()))
    for table in results.tables():
        head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
        parts.append(
            f"<h2>{escape(table.title)}</h2><p>{escape(table.note)}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title(results))}</title>'
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n'


def summary(results: Results) -> str:
    marks = [finding.mark for finding in results.findings]
    counts = ", ".join(f"{marks.count(mark)} {mark}" for mark in dict.fromkeys(marks))
    asked = results.protocol
    return (
        f"SA-GSAE at H = {asked['width']} against Gated at {2 * asked['width']}, {len(asked['sparsities'])} λ, "
        f"{asked['seeds']} seeds, {asked['tokens']:,} training tokens each, {len(results.cells)} cells. "
        f"Claims: {counts}."
    )
