"""sagsae eval: measures every autoencoder of a run, or autoencoders that stand alone, on held-out tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.config import EvalConfig
from shared.errors import DamagedError, UserError
from shared.files.base import WHOLE_BYTES
from shared.files.local import explained, read_whole
from shared.gate import integer, number, parse_json, quoted
from shared.saes import SAEConfig
from train.autoencoder import Autoencoder
from train.evaluate_saved import evaluate_saved
from train.measure.heldout import HeldOutRows, Measurements, measure_asked
from train.measure.written import (
    Evaluation,
    check_replaceable,
    earlier_evaluation,
    with_losses_of,
    write_evaluation,
)
from train.runs.folder import RunFolder
from train.runs.rows import TrainedRows, trained_rows


def evaluate(config: EvalConfig) -> Evaluation:
    """Evaluates a finished run, or the autoencoders that `sae` names. Raises UserError when the run is not finished,
    its store changed, the language model is another than the store's, or an autoencoder does not fit the store."""
    if config.sae is not None:
        return evaluate_saved(config)
    assert config.run is not None, "EvalConfig has one of the two"
    return evaluate_run(config, config.run)


def evaluate_run(config: EvalConfig, run: Path) -> Evaluation:
    """Evaluates a finished run on the shards that it was trained on."""
    found = trained_rows(run, config.store)
    folder = found.folder
    check_replaceable(folder.evaluation)
    with found.store.files.reading():
        measured = measured_run(config, found)
    results = measured.results
    if results["ce_clean"] is None:
        results = with_losses_of(earlier_evaluation(folder.evaluation), results)
    with explained(run):
        results = write_evaluation(folder, results, measured.firings)
    return Evaluation(folder.evaluation, results)


def measured_run(config: EvalConfig, run: TrainedRows) -> Measurements:
    """Measures the run's autoencoders on its held-out rows."""
    store, hook, folder, trained = run.store, run.hook, run.folder, run.config
    diverged = diverged_of(folder)
    good = [sae for sae in trained.saes if sae.name not in diverged]
    d_in = store.spec.hookpoints[hook].d_in

    def saes(device: str) -> Iterator[tuple[str, Autoencoder]]:
        for sae in good:
            yield sae.name, load_checked(folder.sae(sae.name), sae, device, d_in, f"{store.name}/{hook}")

    tokens = store.token_rows(check=False)
    rows = HeldOutRows.of(store, hook, tokens, trained, run.limit, config.peer_conventions)
    inactive = last_logged_inactive(folder, trained.dead_after_tokens)
    return measure_asked(rows, tokens, config, saes, len(good), inactive)


def diverged_of(folder: RunFolder) -> dict[str, Any]:
    """Returns the autoencoders of a finished run whose loss became NaN or infinite, with the step of each."""
    found = folder.read("record.json").get("diverged", {})
    if not isinstance(found, dict):
        raise folder.damaged("record.json", f"diverged is {quoted(found)}")
    return found


def load_checked(place: Path, config: SAEConfig, device: str, d_in: int, what: str) -> Autoencoder:
    """Loads an autoencoder of the run. Raises DamagedError when the folder holds another one than `config`, UserError
    when its d_in is not that of the hookpoint `what`."""
    sae = Autoencoder.load(place, device)
    if sae.config != config:
        raise DamagedError(f"{place}: holds {sae.config.name} with other settings than its run. Restore it from a copy")
    if sae.d_in != d_in:
        raise UserError(f"{sae.config.name}: is for activations of d_in {sae.d_in}; {what} has {d_in}")
    return sae


def last_logged_inactive(folder: RunFolder, window: int) -> dict[str, dict[str, Any]]:
    """Returns, by autoencoder, the share of latents that were inactive for the last `window` training tokens (or for
    all of them, if they were fewer) when training last logged it. Empty when the log cannot be read."""
    try:
        lines = [parse_json(line) for line in read_whole(folder.metrics, WHOLE_BYTES).splitlines()]
        last = {line.get("wave", 1): line for line in lines}.values()
        return {
            name: {
                "fraction": number(sae["dead_fraction"], "dead_fraction", 0.0, 1.0),
                "tokens": min(integer(line["tokens"], "tokens"), window),
            }
            for line in last
            for name, sae in line["saes"].items()
        }
    except (OSError, DamagedError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # there is no log, or its last line was torn
