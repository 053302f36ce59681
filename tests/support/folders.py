"""What is in a store's or a run's folder, and changes to it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import shared.files.local


def before_each_file(patch: pytest.MonkeyPatch, check: Callable[[Path], None]) -> None:
    """`check` is called with the path of every file that is about to be written, and may raise."""
    real = shared.files.local.written_together

    @contextmanager
    def checked() -> Iterator[Callable[..., None]]:
        with real() as write:

            def write_checked(path: Path, pieces: Any) -> None:
                check(path)
                write(path, pieces)

            yield write_checked

    patch.setattr(shared.files.local, "written_together", checked)


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a store or a run that must not depend on when or how often it was interrupted."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in ("record.json", ".lock"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes a file of JSON that carries a checksum, and leaves the checksum out, as older files do."""
    value = json.loads(path.read_text())
    value.pop("crc32c", None)
    path.write_text(json.dumps(change(value)))


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda value: {key: item for key, item in value.items() if key not in names}
