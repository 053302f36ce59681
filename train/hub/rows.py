"""The autoencoders of a repository as its card lists them: one row each, kept in `sagsae/saes.json` there."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from shared.errors import DamagedError, UserError
from shared.gate import BadData, integer, members, number, parse_json, safe_path, text
from shared.record import to_json
from shared.schemas.exchange import PushConfig
from train.exchange.about import About
from train.exchange.export import Exported
from train.exchange.saved import SavedSAE
from train.runs.folder import RunFolder

VERSION: Final = 1
MOST_ROWS: Final = 10_000
MOST_TEXT: Final = 2_000
TEXTS: Final = ("name", "arch", "knob", "tool", "form")
KNOWN_TEXTS: Final = ("model", "hook_name", "dataset", "version")
NUMBERS: Final = ("l0", "r2", "ce_recovered", "dead", "setting")
SWITCHES: Final = ("local_model", "subtracts")
COUNTS: Final = ("trained_tokens", "heldout_tokens", "context")


@dataclass(frozen=True)
class SAERow:
    """One autoencoder of a repository. None stands for what is not known or was not measured."""

    name: str
    own: str
    """The folder with sagsae's own files."""
    folder: str
    """The folder with the other tool's files."""
    tool: str
    form: str
    arch: str
    d_in: int
    d_sae: int
    width: int
    """Latents in the other tool's files."""
    subtracts: bool
    """Whether those files' function subtracts b_dec from its input."""
    knob: str
    """What set its sparsity: `λ 0.1`, `k 32`."""
    setting: float | None
    model: str | None
    local_model: bool
    """Whether the model is a folder of its owner's, not a repository."""
    hook_name: str | None
    dataset: str | None
    context: int | None
    version: str | None
    """The sagsae that pushed it."""
    notes: tuple[str, ...] = ()
    l0: float | None = None
    r2: float | None = None
    ce_recovered: float | None = None
    dead: float | None = None
    trained_tokens: int | None = None
    heldout_tokens: int | None = None

    @property
    def key(self) -> str:
        """What `sagsae pull OWNER/NAME/…` calls it."""
        return self.own.partition("/")[2]

    @property
    def doubled(self) -> bool:
        """Whether each latent's two poles are two latents in the other tool's files."""
        return self.width == 2 * self.d_sae


def row_of(saved: SavedSAE, about: About, exported: Exported, own: str, folder: str, config: PushConfig) -> SAERow:
    """Returns the row of an autoencoder that is about to be pushed."""
    from shared.record import version

    measured, settings = about.measured or {}, about.settings
    recorded = saved.about().get("model")
    knob, setting = knob_of(settings)
    return SAERow(
        name=about.name,
        own=own,
        folder=folder,
        tool=exported.tool,
        form=exported.form,
        arch=settings["arch"],
        d_in=settings["d_in"],
        d_sae=settings["d_sae"],
        width=exported.width,
        subtracts=not config.fold_b_dec and config.to != "gemma-scope",
        knob=knob,
        setting=setting,
        model=about.model,
        local_model=isinstance(recorded, dict) and bool(recorded.get("local")),
        hook_name=about.hook_name,
        dataset=about.dataset,
        context=about.context,
        version=version("sagsae"),
        notes=tuple(exported.notes),
        l0=measured.get("l0"),
        r2=measured.get("r2"),
        ce_recovered=measured.get("ce_recovered"),
        dead=measured.get("dead_fraction"),
        trained_tokens=trained_tokens(saved.run),
        heldout_tokens=measured.get("tokens"),
    )


def knob_of(settings: Any) -> tuple[str, float | None]:
    """Returns what set the sparsity, in words and as a number."""
    for name, key in (("k", "k"), ("target L0", "l0_target"), ("λ", "lambda"), ("λ", "sparsity")):
        value = settings.get(key)
        if isinstance(value, int | float):
            return f"{name} {value:g}", float(value)
    return "not known", None


def trained_tokens(run: Path | None) -> int | None:
    """Returns how many tokens a run trained on; None for an autoencoder without a run."""
    found = RunFolder(run).read("record.json").get("tokens") if run else None
    return found if isinstance(found, int) else None


def merge_rows(old: Iterable[SAERow], new: Iterable[SAERow]) -> list[SAERow]:
    """Returns all rows sorted; a new one replaces the old one of the same autoencoder."""
    found = {row.own: row for row in (*old, *new)}
    return [found[own] for own in sorted(found)]


def rows_text(rows: Sequence[SAERow]) -> bytes:
    """Returns the content of saes.json."""
    return to_json({"version": VERSION, "saes": [asdict(row) for row in rows]}, indent=2).encode() + b"\n"


def read_rows(data: bytes, what: str) -> list[SAERow]:
    """Returns the rows of saes.json, each value checked. Raises DamagedError for anything else, UserError for a newer
    version."""
    try:
        about = members(parse_json(data), ("version", "saes"), None)
        if about["version"] != VERSION:
            raise UserError(f"{what}: was written by another version of sagsae. Install that one")
        if not isinstance(about["saes"], list) or len(about["saes"]) > MOST_ROWS:
            raise BadData(f"lists no autoencoders, or more than {MOST_ROWS:,}")
        return [checked_row(each) for each in about["saes"]]
    except BadData as error:
        raise DamagedError(f"{what}: {error}. Delete it on the hub, and push again") from error


def checked_row(value: Any) -> SAERow:
    row = members(value, {each.name for each in fields(SAERow)})
    for key in TEXTS:
        text(row[key], key, MOST_TEXT)
    for key, check in (("own", safe_path), ("folder", safe_path)):
        check(row[key])
    for key in ("d_in", "d_sae", "width"):
        integer(row[key], key, 1)
    for key in KNOWN_TEXTS:
        row[key] is None or text(row[key], key, MOST_TEXT)
    for key in NUMBERS:
        row[key] is None or number(row[key], key)
    for key in COUNTS:
        row[key] is None or integer(row[key], key)
    if not isinstance(row["notes"], list) or {type(row[key]) for key in SWITCHES} != {bool}:
        raise BadData(f"has a row whose notes, {' or '.join(SWITCHES)} are of another type")
    return SAERow(**{**row, "notes": tuple(text(note, "notes", MOST_TEXT) for note in row["notes"])})
