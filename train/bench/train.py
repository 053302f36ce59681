"""Runs `sagsae bench train`. It compares the time of the sparse step, the dense step, a step by autograd and the steps
of other tools; and of many autoencoders in one pass with separate runs. It measures how long training waits for data.

Steps include the optimiser and use rows of a real store. Thresholds are set so that the requested number of latents is
active, and the learning rate is nearly zero, so that this number does not change.
"""

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from shared.bench.timing import machine
from shared.errors import UserError
from shared.store.opened import find_hookpoint
from train.bench.peers import PACKAGES
from train.bench.steps import Advance, StepBenchPlan, step_seconds


@dataclass(frozen=True)
class TrainBenchReport:
    """Ratios of times, and the times themselves."""

    ratios: dict[str, float | None]
    raw: dict[str, Any]
    table: list[dict[str, Any]]


def bench_train(
    place: str, hook: str, folder: Path, plan: StepBenchPlan, command: Sequence[str], advance: Advance
) -> TrainBenchReport:
    """Runs the benchmark on the store at `place`. `command` starts sagsae for the whole runs; `folder` holds temporary
    files. Raises UserError when the store holds fewer rows than a batch, or another tool fails."""
    store, hook = find_hookpoint(place, hook)
    steps = step_seconds(store, hook, folder, plan, advance)
    rounds = [
        whole_runs(place, hook, folder / str(number), plan, command, advance) for number in range(plan.run_rounds)
    ]
    ratios = step_ratios(steps)
    ratios["one_pass_vs_separate"] = round(median(one / apart for one, apart, _ in rounds), 3) if rounds else None
    ratios["data_wait_share"] = round(median(waiting for _, _, waiting in rounds), 4) if rounds else None
    table = step_table(steps)
    about = {
        "machine": machine(),
        "device": device_name(plan.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "d_in": store.spec.hookpoints[hook].d_in,
        "batch": plan.batch,
        "l0": plan.l0,
        "precision": plan.precision,
        "one_pass_s": [round(one, 2) for one, _, _ in rounds],
        "separate_s": [round(apart, 2) for _, apart, _ in rounds],
        "peers": {peer.name: {**asdict(peer), "package": PACKAGES[peer.name]} for peer in plan.peers.found},
        "peers_left_out": plan.peers.left_out,
    }
    return TrainBenchReport(ratios, {**about, "figures": table}, table)


def step_ratios(steps: dict[int, dict[str, list[float]]]) -> dict[str, float | None]:
    """Returns the ratios between kinds of steps, for each width."""
    ratios: dict[str, float | None] = {}
    for width, found in steps.items():
        ratios[f"sparse_vs_dense_{width}"] = against(found, "dense", "sparse")
        ratios[f"sparse_vs_compiled_{width}"] = against(found, "compiled", "sparse")
        ratios[f"dense_vs_autograd_{width}"] = against(found, "autograd", "dense")
        for peer in PACKAGES:
            for ours in ("sparse", "dense"):
                ratios[f"{peer}_vs_{ours}_{width}"] = against(found, peer, ours)
        ratios[f"products_share_{width}"] = against(found, "products", "dense")
    return ratios


def step_table(steps: dict[int, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Returns a row per width and kind: milliseconds of one step, median, lowest and highest."""
    return [
        {
            "what": f"{'products' if kind == 'products' else f'step, {kind}'}, d_sae {width}",
            "ms": round(1000 * median(seconds), 2),
            "lowest": round(1000 * min(seconds), 2),
            "highest": round(1000 * max(seconds), 2),
        }
        for width, found in steps.items()
        for kind, seconds in found.items()
    ]


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def against(found: dict[str, list[float]], one: str, other: str) -> float | None:
    """Returns the time of `one` divided by that of `other`, the median over the rounds; None when `one` was not
    measured."""
    if one not in found:
        return None
    return round(median(a / b for a, b in zip(found[one], found[other], strict=True)), 3)


def whole_runs(
    place: str, hook: str, folder: Path, plan: StepBenchPlan, command: Sequence[str], advance: Advance
) -> tuple[float, float, float]:
    """Returns the seconds of one run with all autoencoders, the seconds of separate runs with one each, and the share
    of the first that was spent waiting for data. All are started as a user would start them."""
    sparsities = [round(0.1 * 1.2**i, 4) for i in range(plan.together)]
    one, waiting = timed_run(place, hook, folder / "together", sparsities, plan, command)
    advance(1, "one pass")
    apart = sum(timed_run(place, hook, folder / str(s), [s], plan, command)[0] for s in sparsities)
    advance(1, "separate runs")
    return one, apart, waiting


def timed_run(
    place: str, hook: str, out: Path, sparsities: Sequence[float], plan: StepBenchPlan, command: Sequence[str]
) -> tuple[float, float]:
    """Runs `sagsae train` and returns its seconds and the share spent waiting for data. Raises UserError when it
    fails."""
    options: dict[str, object] = {
        "--store": place,
        "--hook": hook,
        "--arch": "sa-gsae",
        "--d-sae": 1024,
        "--tokens": plan.tokens,
        "--batch": plan.batch,
        "--set": f"precision={plan.precision}",
        "--device": plan.device,
        "--out": out,
    }
    pairs = [*options.items(), *(("--sparsity", value) for value in sparsities)]
    arguments = [*command, "train", *(str(part) for pair in pairs for part in pair), "--json"]
    started = time.perf_counter()
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
    return time.perf_counter() - started, float(json.loads(done.stdout)["waiting_for_data"])
