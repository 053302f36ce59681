"""`make gpu` as far as a CPU can show it: its table, its time limits, its refusal, and all parts at a small size."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu.block import AIMS, Expected, PartResult, block, figures_of_json, figures_of_pytest
from support.command import ROOT

RUN = ROOT / "tests" / "gpu" / "run.py"
ABOUT = {"device": "a GPU", "date": "2026-01-02", "commit": "abc", "versions": "torch 0"}
LINES = (
    Expected("steps", "ratio", "ratio", "{:.2f}", "2.63", at_least=2.5),
    Expected("run", "waiting", "waiting", "{:.1%}", at_most=0.05),
    Expected("run", "speed", "speed", "{:,.0f}", "442,000"),
)


def test_every_figure_stands_beside_its_aim() -> None:
    found = [PartResult("steps", "s", 1, {"ratio": 2.4}), PartResult("run", "r", 2.4, {"waiting": 0.05, "speed": 1e6})]
    text = block(ABOUT, found, LINES)
    assert text.startswith("## a GPU, 2026-01-02\n\n* commit: abc\n* versions: torch 0\n")
    assert "| ratio | 2.40 | at least 2.50 | **missed** | 2.63 |" in text
    assert "| waiting | 5.0% | at most 5.0% | met |  |" in text
    assert "| speed | 1,000,000 |  |  | 442,000 |" in text
    assert text.endswith("\n\n* steps, 1 s: `s`\n* run, 2 s: `r`\n")


def test_what_was_not_measured_is_said_and_why() -> None:
    found = [
        PartResult("steps", "s", 9, {"ratio": 3.0}),
        PartResult("run", "r", 5, {}, "ran out of time after 5 seconds"),
    ]
    text = block(ABOUT, found, LINES)
    assert "| ratio | 3.00 | at least 2.50 | met | 2.63 |" in text
    assert "| waiting | not measured | at most 5.0% |  |  |" in text
    assert "\n\n* **run** ran out of time after 5 seconds\n\n* steps, 9 s" in text


def test_figures_are_read_from_what_commands_print() -> None:
    printed = '{"sparse_vs_compiled_32768": 2.6, "peer": null, "device": "x", "figures": [{"what": "step, sparse, d_sae 32768", "ms": 3.1}, {"what": "forward", "seconds": 1}]}'  # noqa: E501
    assert figures_of_json(printed) == {"sparse_vs_compiled": 2.6, "step, sparse": 3.1}
    assert figures_of_pytest("...\n=== 2 failed, 118 passed, 1 error in 57.31s ===") == {
        "passed": 118, "failed": 3, "seconds": 57.31
    }  # fmt: skip
    assert figures_of_pytest("1 passed, 3 skipped in 75.00s (0:01:15)")["seconds"] == 75
    assert figures_of_pytest("no tests were run") == {}


def test_the_aims_are_those_of_the_benchmarks_page() -> None:
    page = next(ROOT.glob("docs/**/benchmarks.md")).read_text(encoding="utf-8")
    told = {float(aim) for aim in re.findall(r"aim ([\d.]+)", page)} | {1.05, 1.25}
    for line in AIMS:
        aim = line.at_most if line.at_least is None else line.at_least
        if aim is not None and line.part != "tests":
            assert aim in told or 100 * aim in told, line


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """Its child is ended, too, what it printed is read, and a part after the end of the time is not begun."""
    child = "import time, pathlib; time.sleep(4); pathlib.Path('late').write_text('')"
    script = f"import subprocess, sys, time; print('{{\"a\": 1}}', flush=True); subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"  # noqa: E501
    code = (
        "import sys, dataclasses; sys.path[:0] = [sys.argv[1]]; import run\n"
        f"part = run.Part('p', [sys.executable, '-c', {script!r}], 1, run.figures_of_json)\n"
        "run.ROOT = run.Path.cwd()\n"
        "print(run.run_part(part, 99, run.ROOT).figures, run.run_part(part, 0, run.ROOT).problem, sep='\\n')"
    )
    started = time.monotonic()
    command = [sys.executable, "-c", code, str(RUN.parent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert time.monotonic() - started < 40, "it was not waited for"
    assert done.stdout.splitlines() == ["{'a': 1.0}", "was not begun: the parts before it used up the time"], done
    time.sleep(4)
    assert not (tmp_path / "late").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(RUN)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "no CUDA device" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parts_run_at_a_small_size(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    command = [sys.executable, str(RUN), "--small", "--seconds", "800", "--out", str(out), "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert text == done.stdout
    missing = re.findall(r"^\| (.*) \| not measured", text, re.MULTILINE)
    assert missing == [
        "ms a step, every latent, torch.compile", "compiled / sparse",  # only on a GPU
        "eight SAEs: one pass / eight runs", "eight SAEs: time waiting for data",  # takes minutes on a CPU
    ]  # fmt: skip
    assert "| training, tokens | 16,384 |" in text
    assert "* commit: abc" in text
