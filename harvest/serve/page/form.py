"""The form with which people ask for activations: what it offers, and the request that its fields mean."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from harvest.serve.view import PlanLine
from shared.errors import UserError
from shared.request import StoreRequest
from shared.schema import build

LISTS: Final = ("layers", "hooks")
SWITCHES: Final = ("refresh",)
NUMBERS: Final = ("tokens", "context", "skip_positions", "seed")
UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
FIELDS: Final = (
    *("model", "revision", "layers", "hooks", "corpus", "corpus_config", "corpus_split", "tokens", "context", "bos"),
    *("skip_positions", "store_dtype", "codec", "seed", "attention", "accept", "environment", "priority", "pin"),
    "refresh",
)
"""The fields of a request that the form has; it carries no others."""
LONGEST: Final = 4096
"""Characters of one field."""


@dataclass(frozen=True)
class Option:
    """A choice of a list."""

    value: str
    label: str


@dataclass(frozen=True)
class Site:
    """A hook that the chosen model has, with the width of its rows."""

    name: str
    width: int | None


@dataclass(frozen=True)
class SitesView:
    """The layers and the hooks of the chosen model; no layers where its configuration is not on this machine."""

    model: str = ""
    layers: int | None = None
    hooks: tuple[Site, ...] = ()
    note: str = ""
    pending: bool = False
    """Whether the list is being made: it can be had in a moment."""


@dataclass(frozen=True)
class FormView:
    """The form: its choices, what was entered, and what came of it."""

    models: tuple[Option, ...]
    corpora: tuple[Option, ...]
    sites: SitesView
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    plan: PlanLine | None = None
    error: str = ""

    def value(self, name: str, default: str = "") -> str:
        """The first value of a field."""
        return next(iter(self.values.get(name, ())), default)

    def chosen(self, name: str, value: str) -> bool:
        return value in self.values.get(name, ())

    @property
    def other_hooks(self) -> str:
        """The hooks that were entered and that the model's list does not have."""
        known = {site.name for site in self.sites.hooks}
        return ", ".join(name for name in self.values.get("hooks", ()) if name not in known)

    @property
    def more(self) -> bool:
        """Whether a setting beyond the first ones was entered."""
        return bool(self.values.keys() - {"model", "corpus", "tokens", "context", "layers", "hooks"} - self.plain)

    @property
    def plain(self) -> set[str]:
        """The settings that stand as they do by default."""
        fields = StoreRequest.model_fields
        return {name for name, given in self.values.items() if given == (str(fields[name].default),)}


def model_options(table: Sequence[Mapping[str, Any]], allowed: Sequence[str]) -> tuple[Option, ...]:
    """The aliases of `sagsae models`, and the names that the server allows beside them."""
    options = {str(row["alias"]): alias_label(row) for row in table}
    return tuple(Option(name, label) for name, label in {**{name: name for name in allowed}, **options}.items())


def alias_label(row: Mapping[str, Any]) -> str:
    known = f" ({row['layers']} layers, width {row['width']})" if row.get("layers") else ""
    return f"{row['alias']}{known}"


def entered(fields: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """What was entered, without blanks. Raises UserError for a field that is too long."""
    found = {}
    for name in FIELDS:
        values = tuple(value.strip() for value in fields.get(name, ()) if value.strip())
        if any(len(value) > LONGEST for value in values):
            raise UserError(f"{name}: has over {LONGEST:,} characters. Enter a shorter value")
        if values:
            found[name] = values
    return found


def request_of(values: Mapping[str, tuple[str, ...]]) -> StoreRequest:
    """The request that the entered values mean. Raises UserError naming the field that cannot be used."""
    asked: dict[str, Any] = {}
    for name, given in values.items():
        if name in LISTS:
            asked[name] = tuple(part for value in given for part in re.split(r"[,\s]+", value) if part)
        elif name in SWITCHES:
            asked[name] = True
        elif name in NUMBERS:
            asked[name] = whole_number(name, given[0])
        else:
            asked[name] = given[0]
    return build(StoreRequest, asked, {name: LABELS.get(name, name) for name in asked})


def whole_number(name: str, text: str) -> int:
    """`20M`, `1.5M`, `20,000` or `20000`. Raises UserError."""
    found = re.fullmatch(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?([kmbg]?)", re.sub(r"[,_\s]", "", text.lower()))
    if found:
        unit, decimals = UNITS[found[3]], found[2] or ""
        whole, rest = divmod(int(found[1] + decimals) * unit, int("1" + "0" * len(decimals)))
        if not rest:
            return whole
    raise UserError(f"{LABELS.get(name, name)}: {text[:40]!r} is no whole number. Enter one such as 20000, 20M or 1.5M")


LABELS: Final = {
    "model": "Model",
    "layers": "Layers",
    "hooks": "Hooks",
    "corpus": "Corpus",
    "tokens": "Tokens",
    "context": "Context",
    "skip_positions": "Skipped positions",
    "seed": "Seed",
    "pin": "Pin",
    "revision": "Revision",
}
"""What the form calls a field."""
