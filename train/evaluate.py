"""Measures every autoencoder of a run on the run's held-out tokens and writes evaluation.json."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from shared.config import EvalConfig, TrainConfig
from shared.device import pick_device
from shared.errors import DamagedError, UserError
from shared.files.base import WHOLE_BYTES, is_remote
from shared.files.local import explained, read_whole
from shared.gate import BadData, integer, number, parse_json, quoted
from shared.model.language_model import LanguageModel
from shared.model.source import ModelSource, in_words, local_place, resolve_model, same_model
from shared.progress import progress, say
from shared.saes import SAEConfig
from shared.store.norms import MASSIVE, WORTH_SAYING, share
from shared.store.opened import Store, find_hookpoint
from shared.store.tokens import TokenRows
from shared.synthetic import truth_of
from train.autoencoder import Autoencoder
from train.data.follow import check_segments
from train.data.norm_filter import FilteredRows, left_out, recorded_limit, statistics, without
from train.data.order import Split, split_rows
from train.data.row_mask import RowMask
from train.data.rows import HookRows, norms_and_places
from train.data.snapshot import SnapshotWatch, as_recorded, content_of
from train.measure.metrics import ModelLosses, RowGroups, entry, language_losses, measure, read_heldout
from train.measure.peers import by_peers
from train.measure.recovery import KnownFeatures
from train.measure.useless import useless
from train.runs.folder import RunFolder, read_sealed, write_sealed


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation and the file that holds them."""

    run: Path
    file: Path
    results: dict[str, Any]


def evaluate(config: EvalConfig) -> Evaluation:
    """Evaluates a finished run. Raises UserError when the run is not finished, its store changed, or the language model
    is another than the store's."""
    folder = RunFolder(config.run)
    trained = folder.config()
    if not folder.exists() or "finished" not in folder.read("record.json"):
        raise UserError(f"{config.run}: its training is not finished. Run the same sagsae train command again first")
    check_replaceable(folder.evaluation)
    if config.store is None and not (is_remote(trained.store) or Path(trained.store).exists()):
        raise UserError(f"{config.run}: its store {trained.store} does not exist. Name its new place with --store")
    store, hook = find_hookpoint(config.store or trained.store, trained.hook)
    store = as_recorded(store, hook, folder.read("config.json"), f"{config.run}")
    if trained.follow:
        check_segments(store, config.run, partial(content_of, hook=hook))
    with store.files.reading():
        return evaluate_on(store, hook, config, folder, trained)


def evaluate_on(store: Store, hook: str, config: EvalConfig, folder: RunFolder, trained: TrainConfig) -> Evaluation:
    """Evaluates a run on the shards that it was trained on; `trained` is the run's configuration."""
    watch = SnapshotWatch(store, hook)
    device = pick_device(config.device)
    source = find_model(store, config.model) if wants_ce(config, store) else None
    for key in {"model", "ce_tokens"} & config.model_fields_set if source is None else ():
        say(f"--{key.replace('_', '-')}: has no effect, for the language model's loss is not measured")
    diverged = diverged_of(folder)
    good = [sae for sae in trained.saes if sae.name not in diverged]
    d_in = store.spec.hookpoints[hook].d_in

    def saes() -> Iterator[Autoencoder]:
        """Loads one autoencoder at a time, because those of all waves together may not fit into memory."""
        for config in good:
            yield load_checked(folder.sae(config.name), config, device, d_in, f"{store.name}/{hook}")

    next(saes(), None)  # reports a fault in the first one before the language model is loaded
    tokens = store.token_rows(check=False)
    parts = split_rows(tokens, trained)
    limit = recorded_limit(folder.read("config.json"), f"{config.run}")
    losses = None
    if source is not None:
        left = left_out(store, hook, limit)
        losses = heldout_losses(source, device, store, hook, tokens, without(parts, left), left, saes(), config)
    inactive = last_logged_inactive(folder, trained.dead_after_tokens)
    results = measure_all(
        store,
        hook,
        parts,
        saes(),
        len(good),
        losses,
        device,
        inactive,
        config.peer_conventions,
        limit,
        config.directions,
    )
    watch.check([store], thorough=True)
    for line in [*massive_text(results), *useless(results["saes"])]:
        say(line)
    if losses is None:
        results = with_losses_of(earlier_evaluation(folder), results)
    with explained(config.run):
        write_sealed(folder.evaluation, results)
    return Evaluation(config.run, folder.evaluation, results)


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


def wants_ce(config: EvalConfig, store: Store) -> bool:
    """Whether to measure the language model's loss. Raises UserError when it is asked for on a synthetic store."""
    synthetic = truth_of(store.spec.model) is not None
    if synthetic and config.ce:
        raise UserError(f"--ce: {store.name} is synthetic and has no language model. Leave --ce out")
    return not synthetic if config.ce is None else config.ce


def find_model(store: Store, name: str | None) -> ModelSource:
    """Returns the language model that the store was harvested from. Raises UserError when the one found is another."""
    harvested = store.spec.model
    if lacking := [key for key in ("commit", "dtype", "attention") if harvested.get(key) is None]:
        raise UserError(f"{store.name}: does not record its language model's {', '.join(lacking)}. Use --no-ce")
    name = name or harvested["name"]
    source = resolve_model(name, None if local_place(name) else harvested["commit"])
    if not same_model(source, harvested["commit"]):
        raise UserError(
            f"--model {source.name}: is not the model that {store.name} was harvested from "
            f"({in_words(harvested['name'], harvested['commit'])}; this is {in_words(source.name, source.commit)}). "
            "Give that model with --model, or --no-ce"
        )
    return source


def measure_all(
    store: Store,
    hook: str,
    parts: Split,
    saes: Iterable[Autoencoder],
    many: int,
    losses: ModelLosses | None,
    device: str,
    inactive: Mapping[str, dict[str, Any]] | None = None,
    peer_conventions: bool = False,
    norm_limit: float | None = None,
    look_at_directions: bool = True,
) -> dict[str, Any]:
    """Returns the content of evaluation.json. `many`: the number of autoencoders in `saes`. `inactive`: the result of
    `last_logged_inactive`. `norm_limit`: rows with a larger norm do not count (setting `max_norm`)."""
    rows = HookRows.of(store, hook)
    heldout = read_heldout(rows, parts.heldout)
    lengths, where = norms_and_places(rows, parts.heldout)
    groups = RowGroups.of(lengths, norm_limit)
    counts = RowMask.of(parts.heldout).without(where[~groups.counted.numpy()])
    mine = heldout if groups.counted.all() else heldout[groups.counted]
    if not len(mine):
        raise UserError(f"{store.name}: holds no row of the held-out contexts that counts. Harvest more tokens")
    known, entries = KnownFeatures.of(rows, counts), []
    with progress("evaluate", many * len(heldout), "rows") as advance:
        for index, sae in enumerate(saes):
            name = sae.config.name

            def taken(n: int, name: str = name) -> None:
                advance(n, name)

            fit = measure(sae, heldout, device, (inactive or {}).get(name), groups, look_at_directions, taken)
            peers = {"peers": by_peers(sae, mine, device)} if peer_conventions else {}
            found = asdict(known.recovery(sae, mine, device)) if known else {}
            entries.append({**entry(sae, fit, losses, index), **peers, **found})
            if fit.directions and fit.directions["sampled"]:
                few, all_of_them = fit.directions["sampled"], fit.directions["latents"]
                say(f"{name}: compared a sample of {few:,} of its {all_of_them:,} directions with all others")
    return {
        "tokens": len(mine),
        "massive": groups.about(heldout),
        "norm_limit": norm_limit,
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


def check_replaceable(evaluation: Path) -> None:
    """Raises UserError when the file is not an evaluation. A truncated evaluation may be replaced."""
    if evaluation.is_symlink() or (evaluation.exists() and not evaluation.is_file()):
        raise UserError(f"{evaluation}: is not an ordinary file. Move it away, then run the same command again")
    with evaluation.open("rb") if evaluation.exists() else BytesIO() as file:
        begin = file.read(1024).lstrip()
    if begin and not begin.startswith(b"{"):
        raise UserError(f"{evaluation}: is not an evaluation. Move it away, then run the same command again")


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


def earlier_evaluation(folder: RunFolder) -> dict[str, Any]:
    """Returns the present evaluation.json; empty when it is missing or cannot be read."""
    try:
        found = read_sealed(folder.evaluation)
    except FileNotFoundError:
        return {}
    except BadData as error:
        say(f"{folder.evaluation}: {error}. The losses of the language model in it are not kept")
        return {}
    return found if isinstance(found.get("saes"), list) else {}


def with_losses_of(before: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Adds the language model's losses of an earlier evaluation to `results`, which were measured without the model.
    An autoencoder that the earlier evaluation did not measure gets none."""
    known = {sae.get("name"): sae for sae in before.get("saes", ()) if isinstance(sae, dict)}
    saes = [{**sae, **with_prefix(known.get(sae["name"], {}), "ce_")} for sae in results["saes"]]
    return {**results, **with_prefix(before, "ce_"), "saes": saes}


def with_prefix(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key.startswith(prefix)}


def heldout_losses(
    source: ModelSource,
    device: str,
    store: Store,
    hook: str,
    tokens: TokenRows,
    parts: Split,
    left: FilteredRows | None,
    saes: Iterable[Autoencoder],
    config: EvalConfig,
) -> ModelLosses:
    """Loads the language model and returns its losses on held-out contexts: as many as hold `ce_tokens` tokens, at
    least one. `left`: the rows that `max_norm` leaves out, which are not in `parts` either."""
    model = LanguageModel(source, device, store.spec.model["dtype"], store.spec.model["attention"])
    heldout = RowMask.of(parts.heldout)
    contexts = heldout.contexts()[: max(1, config.ce_tokens // store.spec.context)]
    counted, special = heldout.of_contexts(contexts), store.spec.special_ids
    mean, name = statistics(store, hook, left).mean, store.spec.hookpoints[hook].name
    losses = language_losses(model, name, tokens.take(contexts), counted, special, mean, saes)
    if "ce_tokens" in config.model_fields_set and losses.tokens < config.ce_tokens:
        say(f"ce_tokens = {config.ce_tokens:,}: there are {losses.tokens:,} held-out predictions")
    return losses
