"""Run folders with made-up measurements, for reports."""

import json
import math
from pathlib import Path
from typing import Any

RISING = [0.05 + tenth / 11 for tenth in range(10)]


def measured(arch: str, d_sae: int, sparsity: float, seed: int = 0, **values: Any) -> dict[str, Any]:
    """One entry of evaluation.json, plausible and made up."""
    l0 = 4 / sparsity + seed * 0.1 + (1 if arch == "gated" else 0)
    signed = arch == "sa-gsae"
    entry = {
        "name": f"{arch}-{d_sae}-lambda{sparsity:g}-seed{seed}",
        "arch": arch,
        "d_sae": d_sae,
        "sparsity": sparsity,
        "seed": seed,
        "r2": 0.6 + 0.08 * math.log(l0),
        "l0": l0,
        "l0_pos": 0.6 * l0 if signed else l0,
        "l0_neg": 0.4 * l0 if signed else 0.0,
        "dead_fraction": 0.2 * sparsity,
        "bipolar_fraction": 0.9 - sparsity if signed else None,
        "bipolar_mass": 0.95 - sparsity if signed else None,
        "bipolar_energy": 0.6 - sparsity if signed else None,
        "rescaling": 1.01,
        "census": {"deciles": {"bipolar": RISING, "bipolar_mass": [*RISING[:-1], None]}} if signed else None,
        "directions": {"latents": d_sae, "antipodal_pairs": 0 if signed else seed + 3},
        "ce_spliced": 4.0 + sparsity,
        "ce_recovered": 0.99 - 0.1 * sparsity,
        "ce_recovered_mean": 0.97 - 0.1 * sparsity,
        "tokens": 4321,
        "ce_tokens": 4242,
    }
    return entry | values


def write_run(folder: Path, saes: list[dict[str, Any]], hook: str = "layer_02/resid_post", model: str = "tiny") -> Path:
    folder.mkdir(parents=True)
    config = {"store": "stores/tiny", "hook": hook, "saes": [], "batch": 64, "lr": 0.003, "seed": 0}
    record = {
        "command": "sagsae train --store stores/tiny",
        "versions": {"sagsae": "0.1.0", "torch": "2.13.0"},
        "started": "2026-11-22T10:26:31+00:00",
        "seconds": 75.2,
        "device": "cpu",
        "precision": "float32",
        "steps": 20,
        "store": {"path": "stores/tiny", "model": model, "hook": hook, "d_in": 64},
    }
    logs = [
        {
            "step": step,
            "tokens": step * 64,
            "saes": {
                sae["name"]: {"fvu": 1 / step, "l0": 100 / step, "loss": 1.0, "dead_fraction": 0.0} for sae in saes
            },
        }
        for step in range(1, 21)
    ]
    evaluation = {"tokens": 4321, "ce_tokens": 4242, "ce_clean": 3.9, "ce_zero": 9.0, "ce_mean": 8.0, "saes": saes}
    for name, value in (("config", config), ("record", record), ("evaluation", evaluation)):
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logs), encoding="utf-8")
    return folder


def sweep(seeds: tuple[int, ...] = (0, 1), **values: Any) -> list[dict[str, Any]]:
    pairs = (("sa-gsae", 96), ("gated", 192))
    return [
        measured(*pair, sparsity, seed, **values) for pair in pairs for sparsity in (0.1, 0.2, 0.4) for seed in seeds
    ]
