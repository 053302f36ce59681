"""Pages of the documentation as programs: their code blocks, run in order, and the output that a page shows for them.

A block of ```sh or ```python is run; ```text straight behind one is its output. Other blocks are only read.
"""

import os
import re
import shlex
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.command import ROOT

PROGRESS = re.compile(r"\w+( \S+)?: # of # \w+ \(#%\)")
"""A line of progress, which a command prints every 30 seconds when it works for longer. Numbers are #."""
NUMBER = re.compile(r"(\d+ h )?(\d+ min )?[-+]?\d[\d,]*(\.\d+)?(e-?\d+)?( [kMGT]?B\b)?")
"""A number, a duration or a size: what differs from machine to machine, with its unit."""


THREE = """
sagsae harvest --model tiny --tokens 30000 --layer 2 --hook resid_post --hook mlp_out
sagsae train --store stores/tiny --hook resid_post --arch sa-gsae:512 --arch gated:512 --arch relu:512 --sparsity 0.1 \
    --batch 512 --lr 5e-3 --out runs/three
"""
"""What the pages on other tools and on the hub have already: stores/tiny and runs/three."""


@dataclass(frozen=True)
class PageBlock:
    """One block that is run, and the output that the page shows for it."""

    language: str
    code: str
    output: str | None


def blocks_of(page: Path) -> list[PageBlock]:
    """The blocks of a page that are run, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    following = [*found[1:], ("", "")]
    return [
        PageBlock(language, code, then[1] if then[0] == "text" else None)
        for (language, code), then in zip(found, following, strict=True)
        if language in ("sh", "python")
    ]


def commands_of(page: Path) -> list[list[str]]:
    """The `sagsae` commands of a page, as words; comments and the folder of the program left out."""
    blocks = re.findall(
        r"^```(?:sh|console|bash)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [
        shlex.split(line.removeprefix("$ "), comments=True) for line in lines if "sagsae" in line or "cli.py" in line
    ]
    starts = [(each, [n for n, word in enumerate(each) if Path(word).name in ("sagsae", "cli.py")]) for each in words]
    return [each[places[0] + 1 :] for each, places in starts if places]


def environment(folder: Path) -> dict[str, str]:
    """Variables with which a block is run: `sagsae` is this checkout's, and threads do not spin on a busy machine."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    program = tools / "sagsae"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / "cli.py"))} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    quiet = {"GOMP_SPINCOUNT": "3000", "OMP_NUM_THREADS": "2", "COLUMNS": "200"}
    return {**os.environ, **quiet, "PATH": path, "PYTHONPATH": str(ROOT)}


def run_block(block: PageBlock, folder: Path) -> str:
    """What a block prints, in a process of its own. Fails the test when it does not end with 0."""
    command = ["sh", "-e", "-c", block.code] if block.language == "sh" else [sys.executable, "-c", block.code]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{block.code}\n{done.stdout}"
    return done.stdout


def shape(output: str) -> list[str]:
    """The lines of an output with what is stable in them: every number is #, progress is left out."""
    lines = (re.sub(r"\s+", " ", NUMBER.sub("#", line)).strip() for line in output.splitlines())
    return [line for line in lines if line and not PROGRESS.match(line)]


def column(table: str, name: str) -> list[float]:
    """The numbers of one column of a printed table: what ends where its title ends, or begins where it begins."""
    lines = [line for line in table.splitlines() if line.strip()]
    head = next(n for n, line in enumerate(lines) if re.search(rf"(^|\s){re.escape(name)}(\s|$)", line))
    titles = re.split(r"\s\s+|\s(?=\S)", lines[head].strip())
    place = titles.index(name)
    return [float(line.split()[place].rstrip("%")) for line in lines[head + 1 :]]
