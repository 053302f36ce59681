"""What can be set, as a person reads it: every field of a schema with its option, type, default and meaning.

`--help`, `sagsae settings` and docs/reference/settings.md are three views of these lists. Nothing here knows typer.
"""

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from keyword import iskeyword
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from shared.bench.options import (
    FeaturesBenchOptions,
    RemoteBenchOptions,
    ScaleBenchOptions,
    ServeBenchOptions,
    StoreBenchOptions,
    TrainBenchOptions,
)
from shared.config import (
    EvalConfig,
    HarvestConfig,
    RecodeConfig,
    ReportConfig,
    ReproduceConfig,
    RequestConfig,
    ServeConfig,
    SynthConfig,
    TrainConfig,
    WorkConfig,
)
from shared.errors import UserError
from shared.gate import named
from shared.saes import ARCHITECTURES, SAEConfig, sae_grid
from shared.schema import Frozen, Shown, plain
from shared.schemas.exchange import ExportConfig, ImportConfig, PullConfig, PushConfig
from shared.schemas.features import ExplainConfig, FeaturesConfig
from shared.schemas.steer import DialConfig, SteerConfig
from shared.schemas.view import ViewConfig

SCHEMAS: Final[Mapping[str, type[Frozen]]] = {
    "harvest": HarvestConfig,
    "request": RequestConfig,
    "synth": SynthConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "report": ReportConfig,
    "features": FeaturesConfig,
    "explain": ExplainConfig,
    "steer": SteerConfig,
    "dial": DialConfig,
    "view": ViewConfig,
    "reproduce": ReproduceConfig,
    "export": ExportConfig,
    "import": ImportConfig,
    "push": PushConfig,
    "pull": PullConfig,
    "serve": ServeConfig,
    "work": WorkConfig,
    "store recode": RecodeConfig,
    "bench store": StoreBenchOptions,
    "bench remote": RemoteBenchOptions,
    "bench train": TrainBenchOptions,
    "bench features": FeaturesBenchOptions,
    "bench scale": ScaleBenchOptions,
    "bench serve": ServeBenchOptions,
}
"""The schema of each command that has one."""
AUTOENCODERS: Final = "saes"
"""The field of TrainConfig that the command line builds from the settings of architectures."""
GRID: Final = ("d_sae", "sparsity", "l0_target", "k", "seed", "lr")
"""Settings of an autoencoder of which several values make several autoencoders."""


@dataclass(frozen=True)
class Setting:
    """One field of a schema, in words."""

    key: str
    """The name in TOML files and behind `--set`."""
    option: str
    """`--clip-norm`; with both forms of a switch that is on by default: `--directions/--no-directions`."""
    annotation: Any
    """The field's type, without None."""
    metavar: str
    """What stands for the value in `--help`: `NUMBER`. Empty for a switch."""
    type: str
    """The type and its limits in words: `number above 0`."""
    default: str | None
    """The default, or what it depends on, in words. None: a value is needed."""
    meaning: str
    """One or two sentences."""
    details: str
    """What the reference says beyond that."""
    group: str
    """The heading that it stands under."""
    repeatable: bool
    """Whether the option can be given several times."""
    sae: bool = False
    """Whether it is a setting of the autoencoders that a command line names."""

    @property
    def name(self) -> str:
        """The option without dashes, as an identifier: `clip_norm`."""
        word = self.flag.removeprefix("--").replace("-", "_")
        return f"{word}_" if iskeyword(word) else word

    @property
    def flag(self) -> str:
        """The option as messages name it: `--clip-norm`."""
        return self.option.partition("/")[0]

    @property
    def is_argument(self) -> bool:
        """Whether it is an argument of the command, without a name of its own."""
        return not self.option.startswith("--")

    @property
    def left(self) -> str:
        """The option as help texts show it: `--clip-norm NUMBER`, `--[no-]directions`."""
        name = self.option.replace("--", "--[no-]", 1) if "/" in self.option else self.option
        return f"{name.partition('/')[0]} {self.metavar}".strip()

    @property
    def help(self) -> str:
        """The text in `--help`: meaning, whether it repeats, default."""
        repeats = " Repeatable." if self.repeatable else ""
        return f"{self.meaning}{repeats} [{'required' if self.default is None else f'default: {self.default}'}]"


@cache
def settings_of(schema: type[Frozen]) -> tuple[Setting, ...]:
    """The settings of a schema, in the order of its groups; fields of no group last."""
    texts = docstrings(schema)
    groups = {key: group for group, keys in schema.groups.items() for key in keys.split()}
    ordered = [*groups, *(key for key in schema.model_fields if key not in groups)]
    return tuple(
        setting(key, field, field.description or texts.get(key, ""), groups.get(key, "Settings"))
        for key, field in ((key, schema.model_fields[key]) for key in ordered)
    )


def setting(key: str, field: FieldInfo, text: str, group: str) -> Setting:
    kind, marks = core_type(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
    shown = shown_in(marks)
    meaning, details, words = split(text)
    many = get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    option = shown.option or f"--{(key.removesuffix('s') if many else key).replace('_', '-')}"
    if key == AUTOENCODERS:
        option = "--arch"
    if kind is bool and field.default is not False:
        option = f"{option}/--no-{option.removeprefix('--')}"
    return Setting(
        key,
        option,
        kind,
        shown.metavar or metavar(kind),
        type_words(kind, marks),
        default_words(field, words),
        meaning,
        details,
        group,
        repeatable=many or shown.repeatable,
    )


def core_type(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without Annotated and None, and the marks that stood around it."""
    if get_origin(annotation) is Annotated:
        kind, marks = core_type(get_args(annotation)[0])
        return kind, (*annotation.__metadata__, *marks)
    if get_origin(annotation) in (Union, UnionType):
        others = [each for each in get_args(annotation) if each is not NoneType]
        if len(others) == 1:
            return core_type(others[0])
        return Union[tuple(others)], ()  # noqa: UP007 (made at run time)
    return annotation, ()


def split(text: str) -> tuple[str, str, str]:
    """A docstring's first paragraph without its `Default: …`, the other paragraphs, and what the default is."""
    first, _, rest = inspect.cleandoc(text).partition("\n\n")
    paragraph = " ".join(first.split())
    found = re.search(r"\s*Default: (.+?)\.?$", paragraph)
    meaning = paragraph[: found.start()] if found else paragraph
    return meaning, "\n\n".join(" ".join(each.split()) for each in rest.split("\n\n")), found[1] if found else ""


@cache
def docstrings(schema: type) -> Mapping[str, str]:
    """The string below each field, of a class and of those that it inherits from: the nearest class wins."""
    found: dict[str, str] = {}
    for each in reversed(schema.__mro__):
        if issubclass(each, Frozen) and each is not Frozen:
            body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
            assert isinstance(body, ast.ClassDef)
            for field, text in zip(body.body, body.body[1:], strict=False):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                        found[name] = words
    return found


# words


def metavar(kind: Any) -> str:
    """What stands for a value of a type: `INTEGER`, `zstd|lz4`, or nothing for a switch."""
    if kind is bool:
        return ""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is Union:
        parts = [core_type(each) for each in get_args(kind)]
        return "|".join(dict.fromkeys(shown_as(marks) or metavar(each) for each, marks in parts))
    if get_origin(kind) is tuple:
        members = [core_type(each) for each in get_args(kind) if each is not Ellipsis]
        return " ".join(shown_as(marks) or metavar(each) for each, marks in members)
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def number_type(kind: Any) -> type[int] | type[float] | None:
    """int or float for a setting that takes only such numbers, one or several."""
    if get_origin(kind) is tuple:
        kind, _ = core_type(get_args(kind)[0])
    return kind if kind in (int, float) else None


def shown_as(marks: Sequence[Any]) -> str:
    return shown_in(marks).metavar


def shown_in(marks: Sequence[Any]) -> Shown:
    """All that the marks say together."""
    found = [mark for mark in marks if isinstance(mark, Shown)]
    return Shown(
        metavar=next((mark.metavar for mark in found if mark.metavar), ""),
        option=next((mark.option for mark in found if mark.option), ""),
        repeatable=any(mark.repeatable for mark in found),
        type=next((mark.type for mark in found if mark.type), ""),
    )


def type_words(kind: Any, marks: Sequence[Any] = ()) -> str:
    """A type with its limits: `integer, 1 or more`, `zstd, lz4 or none`, `list: path`."""
    if said := shown_in(marks).type:
        return said
    if get_origin(kind) is Literal:
        return listed([str(each) for each in get_args(kind)])
    if get_origin(kind) is Union:
        several = [type_words(*core_type(each)) for each in get_args(kind)]
        return "; or ".join(several) if any("," in each for each in several) else listed(several)
    if get_origin(kind) is tuple:
        members = [type_words(*core_type(each)) for each in get_args(kind) if each is not Ellipsis]
        return f"list: {members[0]}" if len(members) == 1 else "; ".join(members)
    words = {int: "integer", float: "number", bool: "true or false", Path: "path", str: "text"}.get(kind, "table")
    return ", ".join([words, *limits(marks)])


def limits(marks: Sequence[Any]) -> list[str]:
    """The limits of a number: `1 or more`, `above 0`, `0 to 1`. Those that only bound an int64 are left out."""
    given = [each for mark in marks for each in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
    found: dict[str, Any] = {name: getattr(each, name) for each in given for name in LIMITS if hasattr(each, name)}
    if "ge" in found and "le" in found:
        return [f"{plain(found['ge'])} to {plain(found['le'])}"]
    return [text.format(plain(found[name])) for name, text in LIMITS.items() if found.get(name, 2**62) < 2**62]


LIMITS: Final = {"ge": "{} or more", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


def listed(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def default_words(field: FieldInfo, words: str) -> str | None:
    """A default as it would be typed; where it is None, the docstring's words for it."""
    if field.default is PydanticUndefined:
        return None
    return words or value_words(field.default)


def value_words(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(value_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# autoencoders


def architectures() -> Mapping[str, type[SAEConfig]]:
    """The schema of each architecture."""
    return {name: architecture.config for name, architecture in ARCHITECTURES.items()}


@cache
def sae_settings() -> tuple[Setting, ...]:
    """The options that say which autoencoders to train: `--arch`, and each setting of the architectures once. `start`
    has no option, because training sets it."""
    owners: dict[str, list[str]] = {}
    for arch, schema in architectures().items():
        for key in schema.model_fields:
            owners.setdefault(key, []).append(arch)
    settings = [each for each in owners if each not in ("arch", "start")]
    ordered = [*(key for key in GRID if key in settings), *(key for key in settings if key not in GRID)]
    named = {key: sae_setting(key, owners[key]) for key in ordered if key != "lr"}
    return (ARCH, named.pop("d_sae"), EXPANSION, *named.values())


ARCH: Final = Setting(
    key="arch",
    option="--arch",
    annotation=str,
    metavar="ARCH[:WIDTH]",
    type="text",
    default="sa-gsae, with --d-sae or --expansion",
    meaning=f"Architecture, or architecture and width: gated:8192. One of {', '.join(ARCHITECTURES)}.",
    details="",
    group="Autoencoders",
    repeatable=True,
    sae=True,
)
EXPANSION: Final = Setting(
    key="expansion",
    option="--expansion",
    annotation=float,
    metavar="NUMBER",
    type="number",
    default="none",
    meaning="Number of latents as a multiple of d_in, beside --d-sae; needs --store.",
    details="",
    group="Autoencoders",
    repeatable=True,
    sae=True,
)


def sae_setting(key: str, archs: Sequence[str]) -> Setting:
    """A setting of one or several architectures; whose it is stands in its meaning unless all have it."""
    found = next(each for each in settings_of(architectures()[archs[0]]) if each.key == key)
    some = len(archs) < len(architectures())
    return Setting(
        key,
        found.option,
        found.annotation,
        found.metavar,
        found.type,
        grid_default(key, archs) or found.default or "what --arch ARCH:WIDTH says",
        f"{found.meaning} For {', '.join(archs)}." if some else found.meaning,
        found.details,
        "Autoencoders" if key in GRID else "Architectures",
        repeatable=key in GRID,
        sae=True,
    )


def grid_default(key: str, archs: Sequence[str]) -> str:
    """The values that a command line trains where it names none, and each architecture's own where they differ."""
    grids: dict[str, list[str]] = {}
    for arch in archs if key in ("sparsity", "k") else ():
        values = dict.fromkeys(f"{point[key]:g}" for point in sae_grid([f"{arch}:4096"], {}, {}) if key in point)
        grids.setdefault(", ".join(values), []).append(arch)
    common = max(grids, key=lambda grid: len(grids[grid]), default="")
    return "; ".join([common, *(f"{', '.join(archs)}: {grid}" for grid, archs in grids.items() if grid != common)])


def all_settings(name: str) -> tuple[Setting, ...]:
    """The settings of a command or an architecture. Raises UserError for another name."""
    known: dict[str, type[Frozen]] = {**SCHEMAS, **architectures()}
    if not name:
        raise UserError(f"NAME: is needed. Give one of {', '.join(known)}")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{named([name])}: has no settings. Those that have are {', '.join(known)}.{hint}")
    return settings_of(known[name])


def settings_rows(name: str) -> list[dict[str, Any]]:
    """The settings of a command or an architecture as rows of a table, for people and for `--json`."""
    return [
        {
            "setting": each.key,
            "option": each.option,
            "type": each.type,
            "default": each.default,
            "required": each.default is None,
            "group": each.group,
            "meaning": " ".join(f"{each.meaning} {each.details}".split()),
        }
        for each in all_settings(name)
    ]
