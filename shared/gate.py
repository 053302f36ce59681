"""The gate: checks every name, number and text of a store, a run or a server before it is used.

These are pure functions. Each returns the value when it is valid, and raises BadData with an explanation when it is
not. The caller knows the file, and turns BadData into a DamagedError or a UserError: `passed` does that for a block.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TypeVar

from shared.errors import DamagedError

MIB: Final = 1 << 20
SMALL: Final = 16 * MIB
"""Largest JSON file that describes something, in bytes."""
DEPTH: Final = 64
"""Largest nesting of lists and objects. Ours have fewer than ten levels."""
DIGITS: Final = 400
"""Largest number of digits of a number. A float64 written out has fewer."""
MOST: Final = 1 << 40
"""Largest count of anything."""
PATH_LENGTH: Final = 512
PATH_PARTS: Final = 12
QUOTED: Final = 120
"""Characters of a wrong value that a message repeats."""

Value = TypeVar("Value")


class BadData(ValueError):
    """Outside data that is not what it must be. The message says what was found and what was expected."""


@contextmanager
def passed(what: str, cure: str = "Restore it from a copy") -> Iterator[None]:
    """Turns BadData into a DamagedError that names the file."""
    try:
        yield
    except BadData as error:
        raise DamagedError(f"{what}: {error}. {cure}") from error


def quoted(value: object, longest: int = QUOTED) -> str:
    """A value as a message repeats it: on one line, without control characters, and of limited length."""
    if isinstance(value, str | bytes) and len(value) > longest:
        return f"{value[:longest]!r}… ({len(value):,} {'characters' if isinstance(value, str) else 'bytes'})"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1:,} digits"
    if isinstance(value, list | tuple | dict | set | frozenset) and len(value) > longest // 4:
        return f"{type(value).__name__} of {len(value):,}"
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except (RecursionError, ValueError):  # nested too deep, or an integer of thousands of digits inside
        return f"a {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest]}…"


def named(parts: Iterable[object]) -> str:
    """The name of a place inside a document: `saes.0.d_sae`."""
    words = (str(part) for part in parts)
    return ".".join(word if len(word) <= 60 and word.isprintable() else quoted(word, 60) for word in words)


# JSON


def parse_json(data: bytes | str, limit: int = SMALL) -> Any:
    """Parses JSON of at most `limit` bytes, without NaN and infinities, without a member twice in one object, not
    nested deeper than DEPTH, and without numbers of hundreds of digits. Raises BadData."""
    if len(data) > limit:
        raise BadData(f"has {len(data):,} bytes; more than {limit:,} is no file of ours")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise BadData(f"is not UTF-8 (byte {error.start:,})") from error
    except json.JSONDecodeError as error:
        raise BadData(f"is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from error
    except RecursionError as error:
        raise BadData(f"is nested more than {DEPTH} deep") from error
    if depth_is_over(value, DEPTH):
        raise BadData(f"is nested more than {DEPTH} deep")
    return value


def depth_is_over(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more than `most` levels deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for items in inside for child in items if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def whole_number(text: str) -> int:
    if len(text) > DIGITS:
        raise BadData(f"has a number of {len(text):,} digits")
    return int(text)


def real_number(text: str) -> float:
    value = float(text) if len(text) <= DIGITS else math.inf
    if math.isinf(value):
        raise BadData(f"has the number {quoted(text, 40)}, which is too large or too long")
    return value


def no_constant(text: str) -> NoReturn:
    raise BadData(f"has {text}, which is not JSON")


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise BadData(f"has the member {quoted(twice)} twice in one object")
    return found


DECODER: Final = json.JSONDecoder(
    object_pairs_hook=each_once, parse_int=whole_number, parse_float=real_number, parse_constant=no_constant
)


# Values


def members(value: Any, needed: Iterable[str], optional: Iterable[str] | None = ()) -> dict[str, Any]:
    """An object with all members `needed` and no others but `optional` (None: any). Raises BadData."""
    needed = set(needed)
    if not isinstance(value, dict):
        raise BadData(f"is {quoted(value)} instead of an object")
    if lacking := sorted(needed - value.keys()):
        raise BadData(f"lacks {', '.join(lacking)}")
    if optional is not None and (others := sorted(value.keys() - needed - set(optional))):
        raise BadData(f"has a member that it cannot have: {quoted(others[0])}")
    return value


def integer(value: Any, name: str, low: int = 0, high: int = MOST) -> int:
    """An integer (no bool, no float) from `low` to `high`. Raises BadData."""
    if type(value) is not int or not low <= value <= high:
        raise BadData(f"{name} is {quoted(value)} instead of an integer from {low:,} to {high:,}")
    return value


def number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number (no bool) from `low` to `high`. Raises BadData."""
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        found = math.nan
    if not (math.isfinite(found) and low <= found <= high):
        bounds = "" if (low, high) == (-math.inf, math.inf) else f" from {low:g} to {high:g}"
        raise BadData(f"{name} is {quoted(value)} instead of a number{bounds}")
    return found


def text(value: Any, name: str, longest: int = 1024) -> str:
    """A text of at most `longest` characters, all of them printable and harmless to a terminal. Raises BadData."""
    if not isinstance(value, str):
        raise BadData(f"{name} is {quoted(value)} instead of a text")
    if len(value) > longest:
        raise BadData(f"{name} has {len(value):,} characters; at most {longest:,} are expected")
    if UNPRINTABLE.search(value):
        raise BadData(f"{name} is {quoted(value)}, which has control characters or halves of characters")
    return value


UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(message: str) -> str:
    """A message in which whatever moves a terminal's cursor, colours it or cannot be printed is an escape (`\\x1b`):
    names of files and columns, and what libraries say of them, are others' words."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], message)


def choice(value: Any, name: str, choices: tuple[Value, ...]) -> Value:
    """One of `choices`. Raises BadData."""
    for known in choices:
        if type(value) is type(known) and value == known:
            return known
    raise BadData(f"{name} is {quoted(value)} instead of {' or '.join(map(str, choices))}")


# Names of files


def safe_path(path: Any) -> str:
    """A relative path with `/` that stays in its folder: no empty part, no `.` or `..`, no backslash, no control
    character, no drive or scheme, bounded in length and depth. Raises BadData."""
    if not isinstance(path, str):
        raise BadData(f"the path {quoted(path)} is no text")
    if len(path) > PATH_LENGTH or path.count("/") >= PATH_PARTS:
        raise BadData(f"the path {quoted(path)} is longer than any of ours")
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:]", path) or UNPRINTABLE.search(path):
        raise BadData(f"the path {quoted(path)} does not stay in its folder, or is no name that we give")
    if "\t" in path or "\n" in path:
        raise BadData(f"the path {quoted(path)} has white space that we never give")
    return path


def file_entry(value: Any, name: str) -> tuple[int, int]:
    """(length, crc32) of `{"bytes": n, "crc32": crc}`. Raises BadData."""
    entry = members(value, ("bytes", "crc32"))
    return integer(entry["bytes"], f"bytes of {name}"), integer(entry["crc32"], f"crc32 of {name}", 0, 2**32 - 1)
