"""`make test-peers`: exports of every family and tie, loaded by the tools themselves. Slow: minutes, and a download.

    python tests/exchange/peers/run.py [FOLDER]      default: .peers

FOLDER/env is the tools' environment (versions.txt), made once and again when the list changes. prepare.py trains and
exports in sagsae's own; check.py, evals.py and hub.py ask the tools. FOLDER/peers.md says what they said. The exit code
is 1 when a bound does not hold.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
MODEL = ROOT / "shared/tiny"
BOUNDS = {"r2": 2e-5, "l0": 2e-2, "clean": 2e-4, "spliced": 2e-4, "zero": 2e-3, "recovered": 2e-5}
"""How far sagsae's figures may lie from those that the tools give by the same conventions: the store is bfloat16."""


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
    of = json.dumps([f"torch=={version('torch')}", *requirements()])
    if mark.exists() and mark.read_text() == of:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(f"Installing the tools into {folder}: minutes, and 2 GB")  # noqa: T201
    venv.create(folder, with_pip=True)
    with_them, without = requirements()
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, f"torch=={version('torch')}", *with_them], check=True)
    subprocess.run([*install, "--no-deps", *without], check=True)
    mark.write_text(of)
    return python


def step(python: Path | str, script: str, *arguments: object) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT) if python == sys.executable else ""}
    subprocess.run([str(python), str(HERE / script), *map(str, arguments)], check=True, env=environment)


def wrong_figures(evals: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    """Lists our figures that differ from the tool's by more than BOUNDS."""
    for name, rows in evals.items():
        ours, theirs = rows["sagsae"], rows["sagsae's conventions, in SAELens"]
        pairs = [(key, ours[key], theirs[key]) for key in BOUNDS]
        again = rows["SAELens' R² and L0 recomputed"]
        pairs += [(key, again[key], rows["SAELens"][key]) for key in again]
        yield from (f"{name}: {key} is {a:.6f}, the tool's {b:.6f}" for key, a, b in pairs if abs(a - b) > BOUNDS[key])


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line of a table for each tool's form and reader: the worst case over the autoencoders."""
    yield "| export | read by | autoencoders | max \\|df\\| | max \\|dx̂\\| | flips | of codes |"
    yield "|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kind = f"{row['tool']} {row['form']}{', b_dec folded' if row['b_dec'] else ''}"
        groups.setdefault((kind, row["reader"]), []).append(row)
    for (kind, reader), group in groups.items():
        worst = [f"{max(row[key] for row in group):.1e}" for key in ("df", "dx")]
        counts = [f"{sum(row[key] for row in group):,}" for key in ("flips", "codes")]
        yield f"| {kind} | {reader} | {len(group)} | {' | '.join([*worst, *counts])} |"


def eval_lines(evals: dict[str, dict[str, dict[str, float]]]) -> Iterator[str]:
    for name, rows in evals.items():
        yield f"| {name} | {' | '.join(BOUNDS)} |"
        yield "|---" * (len(BOUNDS) + 1) + "|"
        for row, figures in rows.items():
            cells = [f"{figures[key]:.5f}" if key in figures else "" for key in BOUNDS]
            yield f"| {row} | {' | '.join(cells)} |"
        yield ""


def hub_line(loaded: list[dict[str, Any]]) -> str:
    """What the tools' own loaders made of autoencoders that were pushed to a stand-in for the hub."""
    tools = ", ".join(f"{tool} {sum(row['tool'] == tool for row in loaded)}" for tool in ("saelens", "sparsify"))
    differ, rows = (sum(row[key] for row in loaded) for key in ("differ", "rows"))
    return f"Loaded from a stand-in for the hub: {tools}; {differ:,} of {rows:,} rows are reconstructed otherwise."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=".peers", type=Path)
    parser.add_argument("--python", type=Path, help="the tools' environment, where there is one already")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    python = asked.python or make_environment((asked.folder / "env").absolute())
    step(sys.executable, "prepare.py", asked.folder)
    step(python, "check.py", asked.folder)
    step(python, "evals.py", asked.folder, MODEL)
    step(sys.executable, "hub.py", asked.folder, python)
    names = ("readers.json", "evals.json", "hub.json")
    rows, evals, loaded = (json.loads((asked.folder / name).read_text()) for name in names)
    tools = ", ".join(line for line in (line for part in requirements() for line in part) if "==" in line)
    bound = max(row["bound"] for row in rows)
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, torch {version('torch')}, {tools}. Bound: {bound:.1e}, 3 flips in 10⁶.",
        "",
    ]
    lines += [*summary(rows), "", *eval_lines(evals)]
    lines += [hub_line(loaded), ""]
    wrong = [json.dumps(row) for row in [*rows, *loaded] if not row["holds"]] + list(wrong_figures(evals))
    lines += [f"{len(rows)} comparisons, {len(wrong)} outside the bounds.", *wrong]
    (asked.folder / "peers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))  # noqa: T201
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
