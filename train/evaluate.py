"""evaluate(config): measures every autoencoder of a run on the run's held-out tokens and writes evaluation.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.config import EvalConfig
from shared.device import pick_device
from shared.errors import UserError
from shared.files import explained, is_remote
from shared.model import LanguageModel
from shared.models import ModelSource, local_folder, resolve_model
from shared.progress import progress
from shared.record import write_json
from shared.store import Store, find_hookpoint
from train.autoencoder import Autoencoder
from train.folder import RunFolder
from train.job import following
from train.metrics import Losses, entry, language_losses, measure, read_heldout
from train.order import Split, split
from train.rows import Rows


@dataclass(frozen=True)
class Evaluation:
    """What was measured, as it stands in the file."""

    run: Path
    file: Path
    results: dict[str, Any]


def evaluate(config: EvalConfig) -> Evaluation:
    """Raises UserError for a folder that is no finished run, a store that changed, or another language model."""
    folder = RunFolder(config.run)
    trained = folder.config()
    if not folder.finished():
        raise UserError(f"{config.run}: its training is not finished. Run the same sagsae train command again first")
    if config.store is None and not (is_remote(trained.store) or Path(trained.store).exists()):
        raise UserError(f"{config.run}: its store {trained.store} is not there. Say where it is now: --store")
    store, hook = find_hookpoint(config.store or trained.store, trained.hook)
    if folder.read("config.json")["snapshot"] not in (store.snapshot_id, following(store)):
        raise UserError(
            f"{config.run}: was not trained on what {store.name} holds now: it grew since, or it is another store. "
            "Say where the right one is: --store"
        )
    device = pick_device(config.device)
    source = find_model(store, config.model) if config.ce else None
    saes = [Autoencoder.load(folder.sae(sae.name), device) for sae in trained.saes]
    d_in = store.spec.hookpoints[hook].d_in
    for sae in saes:
        if sae.d_in != d_in:
            raise UserError(f"{sae.config.name}: is for activations of d_in {sae.d_in}; {store.name}/{hook} has {d_in}")
    tokens = store.tokens()
    parts = split(store.spec, tokens, trained)
    losses = None
    if source is not None:
        model = LanguageModel(source, device, store.spec.model["dtype"], store.spec.model["attention"])
        losses = heldout_losses(model, store, hook, tokens, parts, saes, config.ce_tokens)
    results = measure_all(store, hook, parts, saes, losses, device)
    with explained(config.run):
        write_json(folder.evaluation, results)
    return Evaluation(config.run, folder.evaluation, results)


def find_model(store: Store, name: str | None) -> ModelSource:
    """The language model that the store was harvested from. Raises UserError when the one found is another."""
    harvested = store.spec.model
    name = name or harvested["name"]
    source = resolve_model(name, None if local_folder(name) else harvested["commit"])
    if source.commit != harvested["commit"]:
        raise UserError(
            f"--model {source.name}: is not the model that {store.name} was harvested from ({harvested['name']}, "
            f"{harvested['commit'][:12]}; this one is {source.commit[:12]}). Give that model with --model, or --no-ce"
        )
    return source


def measure_all(
    store: Store, hook: str, parts: Split, saes: Sequence[Autoencoder], losses: Losses | None, device: str
) -> dict[str, Any]:
    """The content of evaluation.json."""
    heldout = read_heldout(Rows.of(store, hook), parts.heldout)
    if not len(heldout):
        raise UserError(f"{store.name}: holds no row of the held-out contexts. Harvest more tokens")
    entries = []
    with progress("evaluate", len(saes), "autoencoders") as advance:
        for index, sae in enumerate(saes):
            entries.append(entry(sae, measure(sae, heldout, device), losses, index))
            advance(1, sae.config.name)
    return {
        "tokens": len(heldout),
        "ce_tokens": losses.tokens if losses else None,
        "ce_clean": losses.clean if losses else None,
        "ce_zero": losses.zero if losses else None,
        "ce_mean": losses.mean if losses else None,
        "saes": entries,
    }


def heldout_losses(
    model: LanguageModel,
    store: Store,
    hook: str,
    tokens: NDArray[Any],
    parts: Split,
    saes: Sequence[Autoencoder],
    at_most: int,
) -> Losses:
    contexts = np.flatnonzero(parts.heldout.any(axis=1))[: max(1, at_most // store.spec.context)]
    mean = store.statistics(hook).mean
    name = store.spec.hookpoints[hook].name
    counted = parts.heldout[contexts]
    return language_losses(model, name, tokens[contexts], counted, store.spec.special_ids, mean, saes)
