"""`make gpu`: everything that one GPU is asked for, in one prepared run of at most eight minutes.

The GPU tests, a training step and a harvest at the shapes of the H200 in docs (records, benchmarks), and a training run
of 16,000,000 tokens from a store that is harvested first. Each part is a command in a process of its own with a time
limit; a part that fails or runs out of time is named, and the others are reported all the same. `--small` runs the same
parts for seconds on a CPU: it shows that they work, and its figures say nothing.

Exit codes: 0 every part ran to its end, 1 one did not, 2 there is no GPU. A missed aim is marked, and no failure.
"""

import argparse
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # runs from a bare checkout, as the tests do

from gpu.block import WIDTH, PartResult, block, figures_of_json, figures_of_pytest  # noqa: E402

TOTAL_SECONDS = 480
GRACE_SECONDS = 10
"""Between SIGTERM and SIGKILL."""
STORE_BYTES = 32 << 30
"""Free space that the store, the model and a checkpoint need, with a margin."""


@dataclass(frozen=True)
class Shapes:
    """How large everything is."""

    device: str
    model: dict[str, int]
    """Sizes of a GPT-NeoX model with random weights."""
    context: int
    store_tokens: int
    train_tokens: int
    bench_tokens: int
    rounds: int
    width: int
    batch: int
    l0: int
    window_rows: int

    @property
    def layer(self) -> str:
        return str(self.model["num_hidden_layers"] - 1)


H200 = Shapes(
    device="cuda",
    model={"vocab_size": 50_304, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8,
           "intermediate_size": 8192, "max_position_embeddings": 2048},
    context=1024, store_tokens=4_194_304, train_tokens=16_000_000, bench_tokens=1_048_576, rounds=15,
    width=WIDTH, batch=4096, l0=64, window_rows=524_288,
)  # fmt: skip
SMALL = Shapes(
    device="cpu",
    model={"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 256, "max_position_embeddings": 128},
    context=64, store_tokens=8192, train_tokens=16_384, bench_tokens=4096, rounds=1,
    width=128, batch=256, l0=8, window_rows=4096,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One command, how long it may take, and how its figures are read."""

    name: str
    command: list[str]
    limit: float
    read: Callable[[str], dict[str, float]]


def parts(shapes: Shapes, place: Path) -> list[Part]:
    """All parts in order: what later ones need is made by earlier ones."""
    sagsae = [sys.executable, "cli.py"]
    model, corpus, stores, device = place / "model", place / "ids.npy", place / "stores", ["--device", shapes.device]
    source = ["--model", model, "--corpus", corpus, "--context", shapes.context, "--layer", shapes.layer,
              "--hook", "mlp_out", *device]  # fmt: skip
    steps = ["bench", "train", "--store", stores / "synthetic", "--hook", "synthetic", "--batch", shapes.batch,
             "--precision", "bfloat16", "--l0", shapes.l0, *device, "--json"]  # fmt: skip

    def part(
        name: str, limit: float, *arguments: object, read: Callable[[str], dict[str, float]] | None = None
    ) -> Part:
        return Part(name, [str(word) for word in arguments], limit, read or figures_of_json)

    return [
        part("model", 60, sys.executable, "tests/gpu/run.py", "--make-model", place, *(["--small"] * (shapes is SMALL)),
             read=lambda _: {}),
        part("synthetic rows", 60, *sagsae, "synth", "--d-in", shapes.model["hidden_size"], "--features", 3000,
             "--l0", 20, "--tokens", 8 * shapes.batch, "--out", stores, "--name", "synthetic", "--json"),
        part("tests", 150, sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu",
             "tests/train/test_plan.py",
             read=figures_of_pytest),
        part("steps", 120, *sagsae, *steps, "--width", shapes.width, "--rounds", shapes.rounds, "--runs", 0),
        part("harvest", 90, *sagsae, "harvest", *source, "--tokens", shapes.store_tokens, "--out", stores,
             "--name", "harvested", "--json"),
        part("training", 120, *sagsae, "train", "--store", stores / "harvested", "--hook", "mlp_out",
             "--arch", f"sa-gsae:{shapes.width}", "--l0-target", shapes.l0, "--tokens", shapes.train_tokens,
             "--batch", shapes.batch, "--set", f"window_rows={shapes.window_rows}", "--set", "precision=bfloat16",
             *device, "--out", place / "run", "--json"),
        part("bench harvest", 120, *sagsae, "bench", "harvest", *source, "--tokens", shapes.bench_tokens,
             "--rounds", min(2, shapes.rounds), "--folder", place, "--json"),
        part("together", 120, *sagsae, *steps, "--width", min(1024, shapes.width), "--rounds", 1,
             "--runs", int(shapes is not SMALL), "--no-compiled"),
    ]  # fmt: skip


def run_part(part: Part, seconds_left: float, place: Path) -> PartResult:
    """Runs it until it ends or its time is up; then every process that it started is ended, too. `place` is the
    temporary folder, which the command is quoted without."""
    limit, started = min(part.limit, seconds_left), time.monotonic()
    command = shlex.join(["python", *part.command[1:]]).replace(f"{place}", "$DIR")
    if limit <= 0:
        return PartResult(part.name, command, 0, problem="was not begun: the parts before it used up the time")
    process = subprocess.Popen(
        part.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=limit)
        problem = f"ended with exit code {process.returncode}: {tail(stderr or stdout)}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        stdout, problem = end(process), f"ran out of time after {limit:.0f} seconds"
    seconds = time.monotonic() - started
    try:
        figures = part.read(stdout)
    except (ValueError, AttributeError):  # no JSON, or another document than expected
        figures, problem = {}, problem or f"printed no figures: {tail(stdout)}"
    return PartResult(part.name, command, seconds, figures, problem)


def end(process: "subprocess.Popen[str]") -> str:
    """Ends a part and all that it started. Returns what it had printed."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.communicate(timeout=GRACE_SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def tail(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was printed"


def make_model(shapes: Shapes, place: Path) -> None:
    """A language model with random weights in bfloat16, and as many random token ids as the harvest reads."""
    import numpy as np
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(**shapes.model, bos_token_id=0, eos_token_id=0)
    with torch.device(shapes.device):
        model = GPTNeoXForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(place / "model")
    ids = np.random.default_rng(0).integers(1, shapes.model["vocab_size"], shapes.store_tokens * 2, dtype=np.uint16)
    np.save(place / "ids.npy", ids)


def about(device: str, commit: str, place: Path) -> dict[str, str]:
    import torch

    name = torch.cuda.get_device_name(0) if device == "cuda" else "a CPU stand-in: the figures say nothing"
    cores = len(os.sched_getaffinity(0))
    return {
        "device": name,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit or commit_here(),
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}, {cores} CPU cores",
        "stores": "in memory (/dev/shm)" if place.is_relative_to("/dev/shm") else "on disk",
    }


def commit_here() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout: name it with --commit)"


def scratch() -> Path | None:
    """Memory where it is large enough, so that no disk is measured. None: the system's folder for temporary files."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > STORE_BYTES else None


def measure(shapes: Shapes, place: Path, total: float, say: Callable[[str], None]) -> list[PartResult]:
    """Runs all parts, one after the other, within `total` seconds."""
    deadline, results = time.monotonic() + total - GRACE_SECONDS, []
    for part in parts(shapes, place):
        say(f"{part.name}: at most {part.limit:.0f} seconds")
        results.append(run_part(part, deadline - time.monotonic(), place))
        if results[-1].problem:
            say(f"{part.name}: {results[-1].problem}")
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description="One prepared run of at most 8 minutes on one GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="the Markdown file to write")
    parser.add_argument("--commit", default="", help="which commit this is, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="limit for everything together")
    parser.add_argument("--small", action="store_true", help="the same parts for seconds on a CPU")
    parser.add_argument("--make-model", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    shapes = SMALL if asked.small else H200
    if asked.make_model:
        make_model(shapes, asked.make_model)
        return 0
    if shapes.device == "cuda" and not has_gpu():
        print("make gpu: this machine has no CUDA device; run it on one with an NVIDIA GPU.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=scratch(), prefix="sagsae-gpu-") as place:
        results = measure(shapes, Path(place), asked.seconds, lambda text: print(text, file=sys.stderr, flush=True))
        text = block(about(shapes.device, asked.commit, Path(place)), results)
    asked.out.write_text(text, encoding="utf-8")
    print(text, end="")
    return int(any(result.problem for result in results))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
