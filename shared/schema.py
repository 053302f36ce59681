"""How configurations are read and built: TOML files, `--set key=value`, and errors that name the offending key."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from shared.errors import UserError
from shared.gate import named, quoted

LARGEST: Final = 1 << 50
"""Of an integer in a setting that has no upper bound of its own: more than any count of bytes or tokens."""


class Frozen(BaseModel):
    """A configuration that does not change once it is built, and has no setting beside those that are listed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

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


def build(schema: type[Section], values: dict[str, Any]) -> Section:
    """The validated configuration. Raises UserError naming the first offending key."""
    try:
        return schema.model_validate(values)
    except (ArithmeticError, RecursionError) as error:  # of a check that computes with the values
        raise UserError(f"the settings are out of any range that can be computed with ({error})") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = named(first["loc"])
        if first["type"] == "missing":
            option = {"saes": "--arch ARCH:WIDTH"}.get(key, f"--{key}")
            raise UserError(f"{key}: is needed; give {option}, or {key} in the --config file") from error
        if first["type"] == "extra_forbidden":
            known = list(schema.model_fields)
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(known)}"
            raise UserError(f"unknown setting {quoted(key)}: {hint}") from error
        message = cut(first["msg"].removeprefix("Value error, "))
        if not key:
            raise UserError(message) from error
        raise UserError(f"{key}: {message} (got {quoted(first['input'])})") from error


def cut(message: str, longest: int = 1000) -> str:
    """A message that repeats what it was given, which may be megabytes."""
    return message if len(message) <= longest else f"{message[:longest]}… ({len(message):,} characters)"
