"""The Markdown block that `make gpu` writes: every figure beside its aim, and what is missing and why. Pure."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Expected:
    """One line of the table: which figure of which part, its aim, and what one NVIDIA H200 gave before."""

    part: str
    key: str
    label: str
    form: str
    """A format string for the figure."""
    before: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def aim(self) -> str:
        if self.at_most is not None:
            return f"at most {self.form.format(self.at_most)}"
        return "" if self.at_least is None else f"at least {self.form.format(self.at_least)}"

    def verdict(self, value: float) -> str:
        if self.at_most is None and self.at_least is None:
            return ""
        low = self.at_least if self.at_least is not None else float("-inf")
        high = self.at_most if self.at_most is not None else float("inf")
        return "met" if low <= value <= high else "**missed**"


@dataclass(frozen=True)
class PartResult:
    """What became of one part. `figures` may hold some although `problem` says why others are missing."""

    name: str
    command: str
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""


WIDTH = 32_768
AIMS = (
    Expected("tests", "passed", "GPU tests passed", "{:.0f}", "120", at_least=1),
    Expected("tests", "failed", "GPU tests failed", "{:.0f}", "0", at_most=0),
    Expected("tests", "seconds", "seconds of the GPU tests", "{:.0f}", "57"),
    Expected("steps", "step, sparse", "ms a step, open gates alone", "{:.2f}", "3.10"),
    Expected("steps", "step, dense", "ms a step, every latent", "{:.2f}", "16.3"),
    Expected("steps", "step, compiled", "ms a step, every latent, torch.compile", "{:.2f}", "8.14"),
    Expected("steps", "step, autograd", "ms a step, every latent, autograd", "{:.2f}"),
    Expected("steps", "products", "ms of the dense step's matrix products", "{:.2f}", "5.11"),
    Expected("steps", "sparse_vs_compiled", "compiled / sparse", "{:.2f}", "2.63", at_least=2.5),
    Expected("steps", "sparse_vs_dense", "dense / sparse", "{:.2f}", "5.26"),
    Expected("harvest", "tokens_per_second", "harvest, tokens/s", "{:,.0f}", "184,000"),
    Expected("harvest", "waiting_for_writer", "harvest: time waiting for the writer", "{:.1%}", "0.0%", at_most=0.05),
    Expected("training", "tokens", "training, tokens", "{:,.0f}", "16,000,000"),
    Expected("training", "tokens_per_second", "training, tokens/s", "{:,.0f}", "442,000"),
    Expected("training", "waiting_for_data", "training: time waiting for data", "{:.1%}", "1.3%", at_most=0.05),
    Expected("bench harvest", "capture_vs_forward", "forward with capture / bare forward", "{:.3f}", at_most=1.05),
    Expected("bench harvest", "harvest_vs_limit", "whole harvest / its slower half", "{:.3f}", at_most=1.25),
    Expected("bench harvest", "stalled", "time waiting for the writer", "{:.1%}", at_most=0.05),
    Expected("together", "one_pass_vs_separate", "eight SAEs: one pass / eight runs", "{:.2f}", at_most=0.85),
    Expected("together", "data_wait_share", "eight SAEs: time waiting for data", "{:.1%}", at_most=0.05),
)


def figures_of_json(stdout: str) -> dict[str, float]:
    """All numbers of a command's JSON by key, and the milliseconds of a bench's table by what they are of. Widths are
    left out of the keys: there is one."""
    document = json.loads(stdout)
    figures = {key: value for key, value in document.items() if isinstance(value, int | float)}
    rows = document.get("figures", [])
    figures |= {row["what"]: row["ms"] for row in rows if isinstance(row, dict) and "ms" in row}
    return {re.sub(r"(_|, d_sae )\d+$", "", key): float(value) for key, value in figures.items()}


def figures_of_pytest(stdout: str) -> dict[str, float]:
    """The counts and the seconds of pytest's last line. Empty when there is none."""
    last = next((line for line in reversed(stdout.splitlines()) if re.search(r" in [\d.]+s", line)), "")
    figures = {name: float(count) for count, name in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    if not last:
        return {}
    failed = figures.pop("failed", 0.0) + figures.pop("error", 0.0) + figures.pop("errors", 0.0)
    seconds = float(re.findall(r" in ([\d.]+)s", last)[-1])
    return {"passed": 0.0, **figures, "failed": failed, "seconds": seconds}


def block(about: Mapping[str, str], results: Sequence[PartResult], expected: Sequence[Expected] = AIMS) -> str:
    """The whole block. A figure that was not measured says so in its line, and why below the table."""
    by_part = {result.name: result for result in results}
    lines = [f"## {about['device']}, {about['date']}", ""]
    lines += [f"* {name}: {text}" for name, text in about.items() if name not in ("device", "date")]
    lines += ["", "| figure | measured | aim | | an H200 before |", "|---|---|---|---|---|"]
    for line in expected:
        value = by_part[line.part].figures.get(line.key) if line.part in by_part else None
        measured, verdict = ("not measured", "") if value is None else (line.form.format(value), line.verdict(value))
        lines.append(f"| {line.label} | {measured} | {line.aim} | {verdict} | {line.before} |")
    problems = [f"* **{result.name}** {result.problem}" for result in results if result.problem]
    lines += ["", *problems, ""] if problems else [""]
    lines += [f"* {result.name}, {result.seconds:.0f} s: `{result.command}`" for result in results]
    return "\n".join(lines) + "\n"
