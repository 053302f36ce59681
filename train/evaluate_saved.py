"""sagsae eval --sae: measures autoencoders, trained here or imported, on the held-out rows of any store that fits.

The rows are those that a run on the store holds out (train/data/order.py), so that `sagsae report` can put the results
beside that run's. They go into one file, measured.json: the content of evaluation.json, with `rows`, `record` and, for
each autoencoder, its settings and where it comes from.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.config import EvalConfig, TrainConfig
from shared.errors import UserError
from shared.files.local import error_kind, explained
from shared.gate import BadData, members, text
from shared.record import provenance
from shared.saes import SAEConfig
from shared.store.listing import folder_name
from shared.store.opened import Store, find_hookpoint
from train.autoencoder import Autoencoder, settings_of
from train.data.order import SplitSettings
from train.data.snapshot import as_ranges, content_of
from train.exchange.fitting import Origin, check_fits
from train.exchange.saved import SavedSAE, find_saes
from train.measure.heldout import HeldOutRows, measure_asked
from train.measure.written import MEASURED, Evaluation, check_replaceable, earlier_evaluation, with_losses_of
from train.runs.folder import write_sealed
from train.runs.owner import owner_of
from train.runs.rows import trained_rows

SPLIT: Final = ("seed", "heldout_tokens", "exclude_positions", "exclude_special", "max_norm")
"""The settings of a run that decide which rows it holds out and counts."""


@dataclass(frozen=True)
class UsualSplit:
    """The held-out rows of a run that sets nothing, but perhaps their number."""

    heldout_tokens: int
    seed: int = TrainConfig.model_fields["seed"].default
    exclude_positions: tuple[int, ...] | None = None
    exclude_special: bool = TrainConfig.model_fields["exclude_special"].default
    max_norm: float | None = None


@dataclass(frozen=True)
class AskedRows:
    """The rows to measure on."""

    store: Store
    hook: str
    settings: SplitSettings
    limit: float | None
    about: dict[str, Any]
    """What says which rows they are, by the names of a run's config.json."""


@dataclass(frozen=True)
class Described:
    """One autoencoder to measure, by its cfg.json."""

    saved: SavedSAE
    config: SAEConfig
    digest: str
    """SHA-256 of the weights."""
    origin: Origin
    imported: dict[str, str] | None
    """`tool` and `source` of an imported one."""

    @property
    def label(self) -> str:
        """Where it comes from, for the labels of a report: `from RUN`, or the name of its folder."""
        return f"from {self.saved.run.name}" if self.saved.run is not None else self.saved.name


def evaluate_saved(config: EvalConfig) -> Evaluation:
    """Evaluates the autoencoders that `sae` names on the rows that `rows_of`, or `store` and `hook`, name. Raises
    UserError when one does not fit them."""
    assert config.sae is not None, "EvalConfig checks it"
    found = [described(saved) for saved in find_saes(config.sae)]
    rows = asked_rows(config)
    for each in found:
        _, d_in, _, _ = settings_of(each.saved.folder)
        check_fits(each.origin, d_in, rows.store, rows.hook, f"{each.saved.folder}", config.transfer)
    file = (config.out or default_folder(rows, found)) / MEASURED
    check_place(file)
    with rows.store.files.reading():
        results = measured(config, rows, found)
    if results["ce_clean"] is None:
        results = with_losses_of(earlier_evaluation(file), results)
    results |= {"rows": rows.about, "record": record(rows), "transfer": config.transfer}
    results["settings"] = {each.saved.name: each.config.model_dump(mode="json") for each in found}
    with explained(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(file, results)
    return Evaluation(file, results)


def described(saved: SavedSAE) -> Described:
    """Returns what cfg.json says. Raises UserError when it is not an autoencoder's."""
    config, _, _, digest = settings_of(saved.folder)
    about = saved.about()
    return Described(saved, config, digest, Origin.of(about, f"{saved.folder}"), import_of(about, saved.folder))


def import_of(about: Mapping[str, Any], folder: Path) -> dict[str, str] | None:
    """Returns the tool and the source that cfg.json says of an import; None for an autoencoder that was trained here.
    Raises UserError when they are no texts."""
    if about.get("imported") is None:
        return None
    try:
        found = members(about["imported"], ("tool", "source"), None)
        return {key: text(found[key], key) for key in ("tool", "source")}
    except BadData as error:
        raise UserError(f"{folder}: its cfg.json is not an autoencoder's (imported: {error})") from error


def asked_rows(config: EvalConfig) -> AskedRows:
    """Returns the rows that the configuration names. Raises UserError when there are none."""
    if config.rows_of is not None:
        run = trained_rows(config.rows_of, config.store)
        identity = run.folder.read("config.json")
        about: dict[str, Any] = {"store": run.store.location, "hook": run.hook}
        about |= {key: identity[key] for key in (*SPLIT, "norm_limit", "snapshot", "shards") if key in identity}
        return AskedRows(run.store, run.hook, run.config, run.limit, about)
    assert config.store is not None, "EvalConfig checks it"
    store, hook = find_hookpoint(config.store, config.hook)
    if not store.commits:
        raise UserError(f"{store.name}: no shard is committed yet. Run sagsae harvest to its end first")
    settings = UsualSplit(config.heldout_tokens or TrainConfig.model_fields["heldout_tokens"].default)
    split = {key: getattr(settings, key) for key in SPLIT}
    read = {"snapshot": content_of(store, hook), "shards": as_ranges(store.commits), "norm_limit": None}
    return AskedRows(store, hook, settings, None, {"store": store.location, "hook": hook, **split, **read})


def measured(config: EvalConfig, rows: AskedRows, found: list[Described]) -> dict[str, Any]:
    """Returns the content of evaluation.json, each entry with where the autoencoder comes from."""

    def saes(device: str) -> Iterator[tuple[str, Autoencoder]]:
        for each in found:
            yield each.saved.name, each.saved.load(device)

    tokens = rows.store.token_rows(check=False)
    peers = config.peer_conventions
    heldout = HeldOutRows.of(rows.store, rows.hook, tokens, rows.settings, rows.limit, peers)
    results = measure_asked(heldout, tokens, config, saes, len(found)).results
    entries = [{**entry, **provenance_of(each)} for entry, each in zip(results["saes"], found, strict=True)]
    return {**results, "saes": entries}


def provenance_of(sae: Described) -> dict[str, Any]:
    """Returns what an entry says beside the measurements. The seed of an imported autoencoder is not known."""
    unknown = {"seed": None} if sae.imported else {}
    return {
        "origin": sae.label,
        "sha256": sae.digest,
        "imported": sae.imported,
        "made_for": {"model": sae.origin.model, "hook_name": sae.origin.hook_name},
        **unknown,
    }


def record(rows: AskedRows) -> dict[str, Any]:
    """Returns how the file was produced, by the names of a run's record.json."""
    spec = rows.store.spec
    return {
        **provenance(),
        "store": {
            "path": rows.store.name,
            "model": spec.model["name"],
            "commit": spec.model.get("commit"),
            "hook": rows.hook,
            "hook_name": spec.hookpoints[rows.hook].name,
            "d_in": spec.hookpoints[rows.hook].d_in,
        },
    }


def default_folder(rows: AskedRows, found: list[Described]) -> Path:
    """Returns `evaluations/NAME`. Other weights, other rows and another split have another name."""
    decides = {key: value for key, value in rows.about.items() if key not in ("store", "shards")}
    text_of_all = json.dumps([decides, [each.digest for each in found]], sort_keys=True)
    digest = hashlib.blake2b(text_of_all.encode(), digest_size=4).hexdigest()
    run = found[0].saved.run
    name = run.name if run is not None and len(found) > 1 else found[0].saved.name
    return Path("evaluations") / f"{name}-{folder_name(rows.store.files)}-{rows.hook.replace('/', '-')}-{digest}"


def check_place(file: Path) -> None:
    """Raises UserError when the file is not to be written: in a run, a store or an autoencoder, or over another
    file."""
    owner = owner_of(file)
    if owner:
        raise UserError(f"--out {file.parent}: is in {owner}. Choose another --out")
    try:
        check_replaceable(file)
    except OSError as error:
        raise error_kind(error)(f"--out {file.parent}: cannot be written to ({error.strerror})") from error
