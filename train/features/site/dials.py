"""Reads what `sagsae dial` found, for the page: dial.json beside the Parquet files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.gate import BadData, integer, number
from train.runs.folder import read_sealed

FILE: Final = "dial.json"
MOST: Final = 1 << 16
"""Numbers in a list."""


@dataclass(frozen=True)
class DialTests:
    """The tests of some latents."""

    grid: list[float]
    """The dial values."""
    latents: dict[int, dict[str, Any]]

    @property
    def slopes(self) -> dict[str, list[Any]]:
        """Slope and verdict of each latent."""
        return {str(latent): [test["slope"], test["passes"]] for latent, test in self.latents.items()}


def read_dials(folder: Path) -> DialTests | None:
    """None where nothing was tested. Raises BadData for a file that says something else."""
    try:
        found = read_sealed(folder / FILE)
    except FileNotFoundError:
        return None
    try:
        grid = floats(found["grid"], "grid")
        return DialTests(
            grid, {integer(each["latent"], "latent"): test_of(each, len(grid)) for each in found["latents"]}
        )
    except (KeyError, TypeError) as error:
        raise BadData(f"{FILE} is not what sagsae dial writes ({error})") from error


def test_of(found: dict[str, Any], points: int) -> dict[str, Any]:
    """The part of a latent's test that the page shows. Raises BadData."""
    lists = {name: floats(found[name], name) for name in ("y", "kl", "interval", "controls")}
    if not len(lists["y"]) == len(lists["kl"]) == points or len(lists["interval"]) != 2:
        raise BadData(f"{FILE} has lists of other lengths than its grid")
    if found["passes"] not in (True, False, None):
        raise BadData(f"{FILE} has no verdict")
    return {
        **lists,
        **{name: number(found[name], name) for name in ("slope", "unit", "clean")},
        **{name: [integer(token, name) for token in found[name][:MOST]] for name in ("plus", "minus")},
        "p": None if found["p"] is None else number(found["p"], "p"),
        "passes": found["passes"],
    }


def floats(values: Any, name: str) -> list[float]:
    if not isinstance(values, list) or len(values) > MOST:
        raise BadData(f"{FILE}: {name} is no list of numbers")
    return [number(value, name) for value in values]


def some_of(tests: DialTests | None, first: int, end: int) -> dict[str, Any]:
    """The tests of the latents `first` to `end`, by latent."""
    return {} if tests is None else {str(n): test for n, test in tests.latents.items() if first <= n < end}
