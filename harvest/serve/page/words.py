"""How the page writes numbers, sizes and times. Absent numbers are an en dash."""

from dataclasses import dataclass
from typing import Final

from shared.progress import duration

ABSENT: Final = "–"
UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")
THIN: Final = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Fact:
    """A name and its value, as texts."""

    name: str
    value: str


def count(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def size(value: int | float | None) -> str:
    """Bytes in decimal units: `62.3 GB`."""
    if value is None:
        return ABSENT
    power = 0
    while value >= 999.5 and power < len(UNITS) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{THIN}{UNITS[power]}"


def number(value: int | float | None) -> str:
    """Four significant digits."""
    return ABSENT if value is None else f"{value:,.4g}".replace("-", "−") if abs(value) < 1e5 else f"{value:.3e}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def percent(part: int, whole: int | None) -> float | None:
    """0 to 100, or None where the whole is not known."""
    return round(min(100.0, 100 * part / whole), 1) if whole else None


def ago(then: float | None, now: float) -> str:
    """A past time in words: `3 min ago`."""
    if not then:
        return ABSENT
    passed = max(0.0, now - then)
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= seconds:
            return f"{int(passed // seconds)}{THIN}{unit} ago"
    return "just now"


def left(seconds: int | float | None) -> str:
    return ABSENT if seconds is None else duration(max(1.0, seconds))
