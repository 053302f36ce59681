"""The record of what produced an output: the command, the configuration, versions, the code's commit. Written beside
the output."""

import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from shared.files.local import write_file
from shared.store.spec import as_bytes, seal

PACKAGES: Final = ("sagsae", "torch", "transformers", "transformer-lens", "zarr", "numcodecs", "numpy", "accelerate")


def provenance() -> dict[str, Any]:
    """The command line, the time, the versions and the code's commit (null outside a git checkout)."""
    return {
        "command": shlex.join(["sagsae", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in PACKAGES},
        "git": git_state(),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state() -> dict[str, Any] | None:
    """Commit of this code and whether it was changed since; None when it does not run from a checkout."""
    folder = Path(__file__).parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder:
            return None
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def sealed_json(value: dict[str, Any]) -> bytes:
    """JSON that carries its own checksum, for a file that no other checksum covers."""
    return as_bytes(seal(value))


def write_json(path: Path, value: Any) -> None:
    """Writes the file whole or not at all."""
    write_file(path, to_json(value, indent=2).encode() + b"\n")


def to_json(value: Any, **options: Any) -> str:
    """JSON text, with `null` for NaN and infinities: JSON has no such numbers, and other programs could not read
    them."""
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
