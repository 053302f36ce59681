"""How configurations are read and built: TOML files, `--set key=value`, and errors that name the offending key."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import UserError


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Section = TypeVar("Section", bound=Frozen)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UserError when it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: is not valid TOML ({error})") from error


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """`["lr=0.01", "hook=attn_out"]` -> `{"lr": 0.01, "hook": "attn_out"}`: values are JSON, or else text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UserError(f"--set {assignment}: expected key=value")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values


def build(schema: type[Section], values: dict[str, Any]) -> Section:
    """The validated configuration. Raises UserError naming the first offending key."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            option = {"saes": "--arch ARCH:WIDTH"}.get(key, f"--{key}")
            raise UserError(f"{key}: is needed; give {option}, or {key} in the --config file") from error
        if first["type"] == "extra_forbidden":
            known = list(schema.model_fields)
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(known)}"
            raise UserError(f"unknown setting {key!r}: {hint}") from error
        message = first["msg"].removeprefix("Value error, ")
        if not key:
            raise UserError(message) from error
        raise UserError(f"{key}: {message} (got {first['input']!r})") from error
