"""Measures autoencoders on a store's held-out rows: what the end of a training and `sagsae eval` share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.config import EvalConfig
from shared.device import pick_device
from shared.errors import UserError
from shared.model.language_model import LanguageModel
from shared.model.source import ModelSource, in_words, local_place, resolve_model, same_model
from shared.progress import progress, say
from shared.store.norms import MASSIVE, WORTH_SAYING, share
from shared.store.opened import Store
from shared.store.tokens import TokenRows
from shared.synthetic import truth_of
from train.autoencoder import Autoencoder
from train.data.norm_filter import left_out, statistics, without
from train.data.order import Split, SplitSettings, split_rows
from train.data.row_mask import RowMask
from train.data.rows import HookRows, norms_and_places
from train.data.snapshot import SnapshotWatch
from train.measure.metrics import ModelLosses, RowGroups, entry, language_losses, measure, read_heldout
from train.measure.peers import by_peers
from train.measure.recovery import KnownFeatures
from train.measure.useless import useless

NamedSAEs = Iterable[tuple[str, Autoencoder]]
"""Autoencoders with the names that evaluations list them by. Only one is in memory at a time."""


@dataclass(frozen=True)
class EveryPosition:
    """Settings of a split that excludes no position."""

    seed: int
    heldout_tokens: int
    exclude_special: bool
    exclude_positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class HeldOutRows:
    """The held-out rows of one hookpoint."""

    store: Store
    """Restricted to the shards that count."""
    hook: str
    parts: Split
    limit: float | None = None
    """Rows with a larger norm do not count (setting `max_norm`)."""
    every_position: NDArray[np.bool_] | RowMask | None = None
    """A mask of the same contexts in which the excluded positions count too; None where it is not needed."""

    @classmethod
    def of(
        cls,
        store: Store,
        hook: str,
        tokens: TokenRows,
        settings: SplitSettings,
        limit: float | None,
        every_position: bool = False,
    ) -> "HeldOutRows":
        """Returns the rows that a training with these settings holds out, with all positions of their contexts where
        `every_position` asks for them."""
        whole = None
        if every_position:
            uncut = EveryPosition(settings.seed, settings.heldout_tokens, settings.exclude_special)
            whole = split_rows(tokens, uncut).heldout
        return cls(store, hook, split_rows(tokens, settings), limit, whole)


def measure_asked(
    rows: HeldOutRows,
    tokens: TokenRows,
    config: EvalConfig,
    saes: Callable[[str], Iterator[tuple[str, Autoencoder]]],
    many: int,
    inactive: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Returns the content of evaluation.json for the measures that `config` asks for. `saes` loads the autoencoders
    onto a device, one at a time: those of all waves together may not fit into memory. `many`: their number. Raises
    DamagedError when the store was replaced meanwhile."""
    store, hook = rows.store, rows.hook
    watch = SnapshotWatch(store, hook)
    device = pick_device(config.device)
    source = find_model(store, config.model) if wants_ce(config, store) else None
    for key in {"model", "ce_tokens"} & config.model_fields_set if source is None else ():
        say(f"--{key.replace('_', '-')}: has no effect, for the language model's loss is not measured")
    next(saes(device), None)  # reports a fault in the first one before the language model is loaded
    losses = None
    if source is not None:
        losses = heldout_losses(source, device, rows, tokens, (sae for _, sae in saes(device)), config)
    results = measure_all(
        rows, saes(device), many, losses, device, inactive, config.peer_conventions, config.directions
    )
    watch.check([store], thorough=True)
    for line in [*massive_text(results), *useless(results["saes"])]:
        say(line)
    return results


def wants_ce(config: EvalConfig, store: Store) -> bool:
    """Whether to measure the language model's loss. Raises UserError when it is asked for on a synthetic store."""
    synthetic = truth_of(store.spec.model) is not None
    if synthetic and config.ce:
        raise UserError(f"--ce: {store.name} is synthetic and has no language model. Leave --ce out")
    return not synthetic if config.ce is None else config.ce


def find_model(store: Store, name: str | None, otherwise: str = "--no-ce") -> ModelSource:
    """Returns the language model that the store was harvested from. `otherwise`: the option that does without one;
    empty: there is none. Raises UserError when the one found is another."""
    harvested = store.spec.model
    if lacking := [key for key in ("commit", "dtype", "attention") if harvested.get(key) is None]:
        cure = f". Use {otherwise}" if otherwise else ", so nothing can be run on it"
        raise UserError(f"{store.name}: does not record its language model's {', '.join(lacking)}{cure}")
    name = name or harvested["name"]
    source = resolve_model(name, None if local_place(name) else harvested["commit"])
    if not same_model(source, harvested["commit"]):
        raise UserError(
            f"--model {source.name}: is not the model that {store.name} was harvested from "
            f"({in_words(harvested['name'], harvested['commit'])}; this is {in_words(source.name, source.commit)}). "
            f"Give that model with --model{f', or {otherwise}' if otherwise else ''}"
        )
    return source


def measure_all(
    rows: HeldOutRows,
    saes: NamedSAEs,
    many: int,
    losses: ModelLosses | None,
    device: str,
    inactive: Mapping[str, dict[str, Any]] | None = None,
    peer_conventions: bool = False,
    look_at_directions: bool = True,
) -> dict[str, Any]:
    """Returns the content of evaluation.json. `many`: the number of autoencoders in `saes`. `inactive`: the result of
    `last_logged_inactive`."""
    read = HookRows.of(rows.store, rows.hook)
    heldout = read_heldout(read, rows.parts.heldout)
    lengths, where = norms_and_places(read, rows.parts.heldout)
    groups = RowGroups.of(lengths, rows.limit)
    counts = RowMask.of(rows.parts.heldout).without(where[~groups.counted.numpy()])
    mine = heldout if groups.counted.all() else heldout[groups.counted]
    if not len(mine):
        raise UserError(f"{rows.store.name}: holds no row of the held-out contexts that counts. Harvest more tokens")
    known, entries = KnownFeatures.of(read, counts), []
    more = None if rows.every_position is None else read_heldout(read, rows.every_position)
    with progress("evaluate", many * len(heldout), "rows") as advance:
        for index, (name, sae) in enumerate(saes):

            def taken(n: int, name: str = name) -> None:
                advance(n, name)

            fit = measure(sae, heldout, device, (inactive or {}).get(name), groups, look_at_directions, taken)
            peers = {"peers": by_peers(sae, mine, device, more)} if peer_conventions else {}
            found = asdict(known.recovery(sae, mine, device)) if known else {}
            entries.append({**entry(sae, fit, losses, index), "name": name, **peers, **found})
            if fit.directions and fit.directions["sampled"]:
                few, all_of_them = fit.directions["sampled"], fit.directions["latents"]
                say(f"{name}: compared a sample of {few:,} of its {all_of_them:,} directions with all others")
    return {
        "tokens": len(mine),
        "massive": groups.about(heldout),
        "norm_limit": rows.limit,
        "left_out": len(heldout) - len(mine),
        "ce_tokens": losses.tokens if losses else None,
        "ce_clean": losses.clean if losses else None,
        "ce_zero": losses.zero if losses else None,
        "ce_mean": losses.mean if losses else None,
        "saes": entries,
    }


def massive_text(results: dict[str, Any]) -> list[str]:
    """Returns a line when massive rows hold much of the variance and are measured with the others."""
    found = results["massive"]
    if found["variance"] < WORTH_SAYING or results["left_out"]:
        return []
    return [
        f"{share(found['tokens'] / results['tokens'])} of the held-out tokens (norm above {MASSIVE:g} times the "
        f"median) hold {share(found['variance'])} of the variance, and so dominate R². R² rest leaves them out"
    ]


def heldout_losses(
    source: ModelSource,
    device: str,
    rows: HeldOutRows,
    tokens: TokenRows,
    saes: Iterable[Autoencoder],
    config: EvalConfig,
) -> ModelLosses:
    """Loads the language model and returns its losses on held-out contexts: as many as hold `ce_tokens` tokens, at
    least one."""
    store, hook, left = rows.store, rows.hook, left_out(rows.store, rows.hook, rows.limit)
    model = LanguageModel(source, device, store.spec.model["dtype"], store.spec.model["attention"])
    heldout = RowMask.of(without(rows.parts, left).heldout)
    contexts = heldout.contexts()[: max(1, config.ce_tokens // store.spec.context)]
    counted, special = heldout.of_contexts(contexts), store.spec.special_ids
    mean, name = statistics(store, hook, left).mean, store.spec.hookpoints[hook].name
    losses = language_losses(model, name, tokens.take(contexts), counted, special, mean, saes)
    if "ce_tokens" in config.model_fields_set and losses.tokens < config.ce_tokens:
        say(f"ce_tokens = {config.ce_tokens:,}: there are {losses.tokens:,} held-out predictions")
    return losses
