"""`sagsae bench train`: a step from the open gates alone, a step with every latent, one by autograd and those of other
tools; many autoencoders in one pass over a store against as many runs; how long training waits for data.

Steps are whole ones, optimiser included, on rows of a real store. Thresholds are set so that the asked number of
latents is active, and the learning rate is next to nothing, so that it stays so.
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
    """Ratios of seconds, and what they were made of."""

    ratios: dict[str, float | None]
    raw: dict[str, Any]
    table: list[dict[str, Any]]


def bench_train(
    place: str, hook: str, folder: Path, plan: StepBenchPlan, command: Sequence[str], advance: Advance
) -> TrainBenchReport:
    """On the store at `place`; `command` is what starts sagsae, for the whole runs; `folder` is for what they and the
    other tools need. Raises UserError when the store holds fewer rows than a batch, or another tool fails."""
    store, hook = find_hookpoint(place, hook)
    steps = step_seconds(store, hook, folder, plan, advance)
    rounds = [
        whole_runs(place, hook, folder / str(number), plan, command, advance) for number in range(plan.run_rounds)
    ]
    ratios: dict[str, float | None] = {}
    for width, found in steps.items():
        ratios[f"sparse_vs_dense_{width}"] = against(found, "dense", "sparse")
        ratios[f"sparse_vs_compiled_{width}"] = against(found, "compiled", "sparse")
        ratios[f"dense_vs_autograd_{width}"] = against(found, "autograd", "dense")
        for peer in PACKAGES:
            for ours in ("sparse", "dense"):
                ratios[f"{peer}_vs_{ours}_{width}"] = against(found, peer, ours)
        ratios[f"products_share_{width}"] = against(found, "products", "dense")
    ratios["one_pass_vs_separate"] = round(median(one / apart for one, apart, _ in rounds), 3) if rounds else None
    ratios["data_wait_share"] = round(median(waiting for _, _, waiting in rounds), 4) if rounds else None
    table = [
        {"what": f"{'products' if kind == 'products' else f'step, {kind}'}, d_sae {width}",
         "ms": round(1000 * median(seconds), 2),
         "lowest": round(1000 * min(seconds), 2), "highest": round(1000 * max(seconds), 2)}
        for width, found in steps.items() for kind, seconds in found.items()
    ]  # fmt: skip
    d_in = store.spec.hookpoints[hook].d_in
    peers = {peer.name: {**asdict(peer), "package": PACKAGES[peer.name]} for peer in plan.peers.found}
    about = {"machine": machine(), "device": device_name(plan.device), "threads": torch.get_num_threads(),
             "torch": torch.__version__, "d_in": d_in, "batch": plan.batch, "l0": plan.l0,
             "precision": plan.precision, "one_pass_s": [round(r[0], 2) for r in rounds],
             "separate_s": [round(r[1], 2) for r in rounds], "peers": peers,
             "peers_left_out": plan.peers.left_out}  # fmt: skip
    return TrainBenchReport(ratios, {**about, "figures": table}, table)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def against(found: dict[str, list[float]], one: str, other: str) -> float | None:
    """How many times as long `one` takes, median over the rounds. None where it was not measured."""
    if one not in found:
        return None
    return round(median(a / b for a, b in zip(found[one], found[other], strict=True)), 3)


def whole_runs(
    place: str, hook: str, folder: Path, plan: StepBenchPlan, command: Sequence[str], advance: Advance
) -> tuple[float, float, float]:
    """Seconds of one run with all autoencoders, of as many runs with one each, as a user starts them; and the share of
    the first that was spent waiting for data."""
    sparsities = [round(0.1 * 1.2**i, 4) for i in range(plan.together)]
    one, waiting = timed(place, hook, folder / "together", sparsities, plan, command)
    advance(1, "one pass")
    apart = sum(timed(place, hook, folder / str(s), [s], plan, command)[0] for s in sparsities)
    advance(1, "separate runs")
    return one, apart, waiting


def timed(
    place: str, hook: str, out: Path, sparsities: Sequence[float], plan: StepBenchPlan, command: Sequence[str]
) -> tuple[float, float]:
    options = [part for value in sparsities for part in ("--sparsity", str(value))]
    asked = [*command, "train", "--store", place, "--hook", hook, "--arch", "sa-gsae", "--d-sae", "1024", *options,
             "--tokens", str(plan.tokens), "--batch", str(plan.batch), "--set", f"precision={plan.precision}",
             "--device", plan.device, "--json", "--out", str(out)]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(asked)} ended with {done.returncode}: {done.stderr.strip()}")
    return time.perf_counter() - started, float(json.loads(done.stdout)["waiting_for_data"])
