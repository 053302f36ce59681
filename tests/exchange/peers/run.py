"""`make test-peers`: exports of every family and tie, loaded by the tools themselves. Slow: minutes, and a download.

    python tests/exchange/peers/run.py [FOLDER] [--record]      default: .peers

FOLDER/env is the tools' environment (versions.txt), made once and again when the list changes. prepare.py trains and
exports in sagsae's own; check.py, evals.py, same_rows.py and hub.py ask the tools. FOLDER/peers.md says what they said;
--record puts it into docs/records/peers.md, in the place of the last result. The exit code is 1 when a bound does not
hold.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import venv
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
MODEL = ROOT / "shared/tiny"
PAGE = ROOT / "docs/records/peers.md"
BEGIN, END = "<!-- `make test-peers` wrote what follows -->\n", "<!-- the end of it -->\n"
FIGURES = {
    "r2": "R²", "l0": "L0", "clean": "CE clean", "spliced": "CE spliced", "zero": "CE zero", "recovered": "recovered",
}  # fmt: skip
DIGITS = {**dict.fromkeys(FIGURES, 5), "l0": 4}
"""Decimals that are printed, and that have to agree. SAELens' mean of L0 is a float32, exact to 1e-5."""
EQUAL = [
    ("SAELens, recomputed", "SAELens"),
    ("sagsae on SAELens' rows", "SAELens"),
    ("evaluation.json, every position", "SAELens"),
    ("evaluation.json", "sagsae's conventions, in SAELens"),
]
"""Pairs of programs that must report equal figures."""
FLIPS = 3e-6 * 256
"""How far L0 may lie apart where each has rows of its own: three of a million codes, 256 a row."""


def requirements() -> tuple[list[str], list[str]]:
    """Packages that are installed with their requirements, and those that are without."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in (HERE / "versions.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# with"):
            heading = line.removeprefix("# ")
        elif line and not line.startswith("#"):
            found.setdefault(heading, []).append(line)
    return found["with requirements"], found["without requirements"]


def make_environment(folder: Path) -> Path:
    """Makes the tools' environment, unless it is there already. Returns its Python."""
    python, mark = folder / "bin/python", folder / "made-of.json"
    torch = f"torch=={version('torch').partition('+')[0]}"  # a CPU build is not in every index
    of = json.dumps([torch, *requirements()])
    if mark.exists() and mark.read_text() == of:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(f"Installing the tools into {folder}: minutes, and 2 GB")  # noqa: T201
    venv.create(folder, with_pip=True)
    with_them, without = requirements()
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, torch, *with_them], check=True)
    subprocess.run([*install, "--no-deps", *without], check=True)
    mark.write_text(of)
    return python


def step(python: Path | str, script: str, *arguments: object) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT) if python == sys.executable else ""}
    subprocess.run([str(python), str(HERE / script), *map(str, arguments)], check=True, env=environment)


def wrong_figures(evals: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    """Lists figures that differ in a printed digit."""
    for name, rows in evals.items():
        for ours, theirs in EQUAL:
            for key, value in rows[ours].items():
                own_rows = key == "l0" and ours.startswith("evaluation.json")
                if abs(value - rows[theirs][key]) > max(0.5 * 10 ** -DIGITS[key], FLIPS if own_rows else 0):
                    yield f"{name}: {key} of {ours} is {value:.7f}, of {theirs} {rows[theirs][key]:.7f}"


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line of a table for each tool and reader: the worst case over forms and autoencoders."""
    yield "| export | read by | files | max \\|df\\| | max \\|dx̂\\| | flips | of codes |"
    yield "|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kind = ", our class" if row["form"] == "bijumprelu" else ", b_dec folded" if row["b_dec"] else ""
        groups.setdefault((row["tool"], kind, row["reader"]), []).append(row)
    for (tool, kind, reader), group in sorted(groups.items()):
        forms = ", ".join(sorted({row["form"] for row in group}))
        worst = [f"{max(row[key] for row in group):.1e}" for key in ("df", "dx")]
        counts = [f"{sum(row[key] for row in group):,}" for key in ("flips", "codes")]
        yield f"| {tool}{kind}: {forms} | {reader} | {len(group)} | {' | '.join([*worst, *counts])} |"


def eval_lines(evals: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    for name, rows in evals.items():
        yield f"| {name} | {' | '.join(FIGURES.values())} |"
        yield "|---" * (len(FIGURES) + 1) + "|"
        for row, figures in rows.items():
            cells = [f"{figures[key]:.{DIGITS[key]}f}" if key in figures else "" for key in FIGURES]
            yield f"| {row} | {' | '.join(cells)} |"
        yield ""


def hub_line(loaded: list[dict[str, Any]]) -> str:
    """What the tools' own loaders made of autoencoders that were pushed to a stand-in for the hub."""
    tools = ", ".join(f"{tool} {sum(row['tool'] == tool for row in loaded)}" for tool in ("saelens", "sparsify"))
    differ, rows = (sum(row[key] for row in loaded) for key in ("differ", "rows"))
    return f"Loaded from a stand-in for the hub: {tools}; {differ:,} of {rows:,} rows are reconstructed otherwise."


def report(folder: Path) -> tuple[list[str], list[str]]:
    """The result as lines of Markdown, and what lies outside the bounds."""
    names = ("readers", "evals", "hub", "rows")
    readers, evals, loaded, rows = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    wrong = [json.dumps(row) for row in [*readers, *loaded] if not row["holds"]] + list(wrong_figures(evals))
    tools = ", ".join(line.replace("==", " ") for part in requirements() for line in part if "==" in line)
    count, bound = len({row["name"] for row in readers}), max(row["bound"] for row in readers)
    flips, codes = (sum(row[key] for row in readers) for key in ("flips", "codes"))
    prose = (
        f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, torch {version('torch')}, {tools}.",
        f"**{len(readers)} comparisons of {count} autoencoders, {len(wrong)} figures outside the bounds**, "
        f"{flips} flips in {codes / 1e6:.0f} million codes. df and dx̂ may be {bound:.1e}.",
    )
    lines = [
        *(line for text in prose for line in (*textwrap.wrap(text, 120), "")),
        *summary(readers),
        "",
        hub_line(loaded),
        "",
        f"SAELens' evaluation of {rows['many']:,} rows, which lie at most {rows['apart']:.1e} from the store's:",
        "",
        *eval_lines(evals),
    ]
    return lines[:-1], wrong


def record(lines: list[str]) -> None:
    """Puts the result into the page, in the place of the last one."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=".peers", type=Path)
    parser.add_argument("--python", type=Path, help="the tools' environment, where there is one already")
    parser.add_argument("--record", action="store_true", help=f"write the result into {PAGE.relative_to(ROOT)}")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    python = asked.python or make_environment((asked.folder / "env").absolute())
    step(sys.executable, "prepare.py", asked.folder)
    step(python, "check.py", asked.folder)
    step(python, "evals.py", asked.folder, MODEL)
    step(sys.executable, "same_rows.py", asked.folder)
    step(sys.executable, "hub.py", asked.folder, python)
    step(sys.executable, "pages.py", asked.folder, python)
    lines, wrong = report(asked.folder)
    (asked.folder / "peers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join([*lines, "", *(f"outside: {line}" for line in wrong)]))  # noqa: T201
    if asked.record and not wrong:
        record(lines)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
