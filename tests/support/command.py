"""Where the project is, and its command line as the `sagsae` fixture gives it."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[2]


class Sagsae(Protocol):
    def __call__(
        self, *arguments: object, stop: tuple[int, Callable[[], bool]] | None = None
    ) -> subprocess.CompletedProcess[str]: ...
