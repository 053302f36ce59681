"""Runs a reproduction: harvests a store per model, trains in three passes per cell, then analyses the results.

Repeating the command resumes harvests and training runs and repeats the analysis. The caller passes in the harvest,
because the train stage does not import the harvest stage.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from shared.config import EvalConfig, HarvestConfig
from shared.errors import DamagedError, UserError
from shared.files.local import error_kind, read_whole
from shared.gate import SMALL, parse_json
from shared.progress import say
from shared.record import provenance, write_json
from shared.saes import SAEConfig
from train.evaluate import evaluate
from train.reproduce.analysis import Arms as Points
from train.reproduce.analysis import analyse
from train.reproduce.claims import judge_all
from train.reproduce.cost import check_consent, estimate
from train.reproduce.curves import ArmMeasurement
from train.reproduce.look import look
from train.reproduce.pilot import Candidates, Pilot, choose
from train.reproduce.plan import (
    GATED_FULL,
    SA_HALF,
    Arms,
    ReproductionCell,
    ablation_arms,
    every_sae,
    harvest_config,
    main_arms,
    make_cells,
    pilot_arms,
    run_folder,
    train_config,
)
from train.reproduce.preset import Request
from train.reproduce.render import Results, write_results
from train.run import train
from train.runs.folder import RunFolder
from train.runs.owner import owner_of

PLAN: Final = "plan.json"
Harvest = Callable[[HarvestConfig], str]
"""Creates or completes a store and returns its path."""


def reproduce(request: Request, harvest: Harvest, yes: bool = False) -> Results:
    """Runs a reproduction and writes its results. Raises UserError when a model lacks the hookpoints, `--out` holds
    something else, or the job is large and `yes` is not set."""
    started = time.monotonic()
    cells = make_cells(request)
    cost, protocol = estimate(request, cells), describe(request)
    check_folder(request.out, protocol)
    check_consent(cost, yes)
    say(cost.text)
    open_folder(request.out, protocol)
    stores = {model: harvest(harvest_config(request, model)) for model in request.models}
    pilots: dict[str, Pilot] = {}
    points: dict[str, Points] = {}
    results = []
    for number, cell in enumerate(cells, 1):
        say(f"cell {number} of {len(cells)}: {cell.name}")
        pilots[cell.name] = pilot = run_pilot(request, cell, stores[cell.model])
        chosen = pilot.choice(SA_HALF), pilot.choice(GATED_FULL)
        main = run_arms(request, cell, stores[cell.model], "main", main_arms(request, *chosen))
        main = {**main, SA_HALF: look(request, run_folder(request, cell, "main"), main[SA_HALF])}
        ablations = run_arms(request, cell, stores[cell.model], "ablations", ablation_arms(request, *chosen))
        points[cell.name] = {**main, **ablations}
        results.append(analyse(cell.name, cell.hook, main, ablations))
    record = {**provenance(), "seconds": round(time.monotonic() - started, 1)}
    found = Results(protocol, cost.as_dict(), pilots, points, results, judge_all(results), record)
    write_results(found, request.out)
    return found


def run_pilot(request: Request, cell: ReproductionCell, store: str) -> Pilot:
    """Trains every candidate of both methods in one short pass and ranks them."""
    arms = pilot_arms(request)
    saes = [sae for candidates in arms.values() for group in candidates.values() for sae in group]
    run = train(train_config(request, cell, store, "pilot", saes)).run
    entries = read_entries(run)
    measured: Candidates = {
        arm: {choice: measured_of(arm, group, entries) for choice, group in candidates.items()}
        for arm, candidates in arms.items()
    }
    found = choose(measured)
    for arm in arms:
        best = found.choice(arm)
        say(f"{cell.name}: the pilot chose learning rate {best.lr:g} and theta0 {best.theta0:g} for {arm}")
    return found


def run_arms(request: Request, cell: ReproductionCell, store: str, stage: str, arms: Arms) -> Points:
    """Trains and measures all arms in one pass; the ablations also with the language model's loss."""
    run = train(train_config(request, cell, store, stage, every_sae(arms))).run
    if stage == "ablations" and read_evaluation(run).get("ce_tokens") is None:
        evaluate(EvalConfig(run=run, device=request.device, ce_tokens=request.preset.ce_tokens))
    entries = read_entries(run)
    return {arm: measured_of(arm, saes, entries) for arm, saes in arms.items()}


def read_evaluation(run: Path) -> dict[str, Any]:
    return RunFolder(run).read("evaluation.json")


def read_entries(run: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in read_evaluation(run)["saes"]}


def measured_of(arm: str, saes: Iterable[SAEConfig], entries: Mapping[str, Mapping[str, Any]]) -> list[ArmMeasurement]:
    """Returns the measurements of an arm, without autoencoders that diverged."""
    return [point(arm, sae, entries) for sae in saes if sae.name in entries]


def point(arm: str, sae: Any, entries: Mapping[str, Mapping[str, Any]]) -> ArmMeasurement:
    """Returns one autoencoder's measurements from evaluation.json."""
    entry = entries[sae.name]
    every = entry.get("bipolar_fraction")
    top = entry["census"]["deciles"]["bipolar"][0] if entry.get("census") else None
    return ArmMeasurement(
        arm=arm,
        seed=sae.seed,
        name=sae.name,
        d_sae=sae.d_sae,
        setting=float(getattr(sae, "k", None) or sae.sparsity),
        l0=entry["l0"],
        r2=entry["r2"],
        dead=entry["dead_fraction"],
        bipolar=every,
        concentration=None if top is None or every is None else top - every,
        loss_recovered=entry.get("ce_recovered"),
        bipolar_energy=entry.get("bipolar_energy"),
    )


def describe(request: Request) -> dict[str, Any]:
    """Returns everything that decides the results: all settings but the device and the folder."""
    sizes = {**asdict(request.preset), **asdict(request)}
    sizes["preset"] = request.preset.name
    for key in ("name", "device", "out"):
        del sizes[key]
    described: dict[str, Any] = json.loads(json.dumps(sizes))
    return described


def check_folder(out: Path, protocol: dict[str, Any]) -> None:
    """Raises UserError when the folder holds something else, or a reproduction with other settings."""
    if owner := owner_of(out / PLAN):
        raise UserError(f"--out {out}: is in {owner}. Choose another --out")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file. Name a folder")
    try:
        recorded = parse_json(read_whole(out / PLAN, SMALL))
    except FileNotFoundError:
        if any(out.iterdir()):
            raise UserError(f"--out {out}: exists and is not a reproduction. Choose another --out") from None
        return
    except (OSError, ValueError, DamagedError) as error:
        raise UserError(f"--out {out}: its {PLAN} cannot be read ({error}). Choose another --out") from error
    if not isinstance(recorded, dict) or recorded.keys() != protocol.keys():
        raise UserError(f"--out {out}: its {PLAN} is not a reproduction's. Choose another --out")
    differ = [
        f"{key}: it has {recorded[key]}, this asks for {protocol[key]}"
        for key in recorded
        if recorded[key] != protocol[key]
    ]
    if differ:
        raise UserError(f"--out {out}: holds another reproduction. {'; '.join(differ)}. Choose another --out")


def open_folder(out: Path, protocol: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / PLAN).exists():
            write_json(out / PLAN, protocol)
    except OSError as error:
        raise error_kind(error)(f"--out {out}: cannot be written to ({error.strerror})") from error
