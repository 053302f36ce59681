"""How configurations are read and built: TOML files, `--set key=value`, and errors that name the offending key."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from shared.errors import UserError
from shared.gate import named, quoted

LARGEST: Final = 1 << 50
"""The largest integer of a setting that has no upper bound of its own: more than any count of bytes or tokens."""
NO_LABELS: Final[Mapping[str, str]] = MappingProxyType({})


class Frozen(BaseModel):
    """A configuration that is checked when it is built and never changes. A field's docstring is its help text: the
    first paragraph stands in `--help`, and a sentence `Default: …` says in words what None stands for."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    groups: ClassVar[Mapping[str, str]] = NO_LABELS
    """Headings of `--help`, each with the names of its fields."""

    @field_validator("*")
    @classmethod
    def check_bounds(cls, value: Any, info: Any) -> Any:
        """Refuses integers beyond LARGEST in a setting that has no upper bound of its own, and texts with a NUL, which
        no name of a file, model or hookpoint can have."""
        each = value if isinstance(value, tuple) else (value,)
        if any("\0" in str(text) for text in each if isinstance(text, str | Path)):
            raise ValueError("expected a text without NUL characters")
        if any(type(number) is int and abs(number) > LARGEST for number in each):
            field = cls.model_fields[str(info.field_name)]
            if not has_upper_bound((field.annotation, *field.metadata)):
                raise ValueError(f"expected at most {LARGEST:,}")
        return value


@dataclass(frozen=True)
class Shown:
    """How a field stands on the command line, where its name and type do not say it. Goes into its Annotated."""

    metavar: str = ""
    """What stands for the value: `PATH`."""
    option: str = ""
    """The option's name. Default: the field's."""
    repeatable: bool = False
    """Whether the option can be given several times although the setting has one value."""
    type: str = ""
    """The type in words."""


def has_upper_bound(parts: tuple[Any, ...]) -> bool:
    """Whether a type, with the constraints that annotate it, says how large an integer may be."""
    return any(
        getattr(part, "le", None) is not None
        or getattr(part, "lt", None) is not None
        or has_upper_bound((*getattr(part, "metadata", ()), *get_args(part)))
        for part in parts
    )


Section = TypeVar("Section", bound=Frozen)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UserError when it is missing or malformed."""
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise UserError(f"--config {path}: is not valid TOML for us (nested too deep)") from error
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, integers of thousands of digits
        raise UserError(f"--config {path}: is not valid TOML ({str(error)[:300]})") from error


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """`["lr=0.01", "hook=attn_out"]` -> `{"lr": 0.01, "hook": "attn_out"}`: values are JSON, or else text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set {quoted(assignment)}: expected key=value")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
        except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
            raise UserError(f"--set {quoted(key)}: the value is too long or nested too deep to be one") from error
    return values


def build(schema: type[Section], values: dict[str, Any], labels: Mapping[str, str] = NO_LABELS) -> Section:
    """The validated configuration. Raises UserError naming the first offending key, or what `labels` calls it: the
    option that was typed, or the file that says it."""
    try:
        return schema.model_validate(values)
    except (ArithmeticError, RecursionError) as error:  # of a check that computes with the values
        raise UserError(f"the settings are out of any range that can be computed with ({error})") from error
    except ValidationError as error:
        raise UserError(complaint(schema, error, labels)) from error


def complaint(schema: type[Frozen], error: ValidationError, labels: Mapping[str, str]) -> str:
    """What a person reads about the first mistake: the place, what it must be, what it is."""
    errors = error.errors(include_url=False)
    first = errors[0]
    place = inside(first)
    if first["type"] == "missing":
        key = named(place)
        if key == "saes":
            return "--arch: which autoencoders, and how wide? Give --arch ARCH:WIDTH, such as --arch sa-gsae:512"
        return f"{key}: is needed; give --{key.replace('_', '-')}, or {key} in the --config file"
    if first["type"] == "extra_forbidden":
        known = list(schema.model_fields)
        near = difflib.get_close_matches(named(place), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(known)}"
        return f"{source_of(named(place), labels)}unknown setting {quoted(named(place))}: {hint}"
    if not place:
        key, colon, rest = cut(first["msg"].removeprefix("Value error, ")).partition(": ")
        return f"{labels.get(key, key)}{colon}{rest}"
    alternatives = dict.fromkeys(in_words(each) for each in errors if inside(each) == place)
    message = cut(" or ".join(alternatives)).replace(" or must be ", ", or ")
    return f"{called(place, labels)}: {message} (got {as_typed(first['input'])})"


def as_typed(value: object) -> str:
    """A wrong value as a message repeats it: numbers bare, though they are texts on a command line."""
    return (
        value if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]{1,30}(e[-+]?\d{1,3})?", value) else quoted(value)
    )


def inside(error: Any) -> tuple[str | int, ...]:
    """Where a value stands in the document; pydantic adds the alternative of a union that it tried."""
    return tuple(part for part in error["loc"] if not ALTERNATIVE.fullmatch(str(part)))


ALTERNATIVE: Final = re.compile(r"(constrained-)?(int|str|float|bool)|.*\[.*")


def called(place: tuple[str | int, ...], labels: Mapping[str, str]) -> str:
    """A place by the name that was typed: `--clip-norm`, `--set clip_norm`, `run.toml: saes.0.d_sae`."""
    label = labels.get(str(place[0]), named(place[:1]))
    is_option = label.startswith("--") and " " not in label
    return label if is_option or len(place) == 1 else f"{label}.{named(place[1:])}"


def source_of(key: str, labels: Mapping[str, str]) -> str:
    """`run.toml: ` or `--set: ` before a complaint about a key that was found there."""
    label = labels.get(key, "")
    return f"{label.removesuffix(key).rstrip(' :')}: " if label.endswith(key) and label != key else ""


PLAIN_WORDS: Final = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "has too many digits",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have {max_length} entries at most",
}
"""Pydantic's kinds of errors, in words. A kind that is not here keeps pydantic's words after `must be`."""


def in_words(error: Any) -> str:
    """One of pydantic's errors as a person says it: `must be above 0`."""
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        return f"must be {context['expected'].replace(chr(39), '')}"
    if error["type"] in PLAIN_WORDS:
        return PLAIN_WORDS[error["type"]].format(**{name: plain(value) for name, value in context.items()})
    return str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")


def plain(value: object) -> str:
    """A limit as people write it: 0, not 0.0."""
    return f"{value:.15g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def cut(message: str, longest: int = 1000) -> str:
    """A message that repeats what it was given, which may be megabytes."""
    return message if len(message) <= longest else f"{message[:longest]}… ({len(message):,} characters)"
