"""How fast earlier harvests into a folder were, kept in a small file beside the stores."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any, Final

from shared.files.base import Files
from shared.files.local import LocalFiles, append_line, read_whole
from shared.gate import BadData, parse_json
from shared.request import RATES
from shared.store.spec import StoreSpec

MOST_BYTES: Final = 1 << 20
"""Size at which the file begins again."""
LINE_BYTES: Final = 4096


def remember_rate(root: Files, spec: StoreSpec, device: str, rows: int, rate: float) -> None:
    """Adds what one harvest measured. `rate` is in tokens per second and process. Does nothing for an object store, or
    where the folder cannot be written to."""
    if not isinstance(root, LocalFiles) or not rows:
        return
    line = {**of_model(spec, device), "hookpoints": sorted(spec.hookpoints), "rows": rows, "rate": round(rate, 1)}
    text = json.dumps(line).encode() + b"\n"
    file = root.root / RATES
    with contextlib.suppress(OSError):
        if file.is_file() and file.stat().st_size > MOST_BYTES:
            file.unlink()
        if len(text) <= LINE_BYTES:
            append_line(file, text)


def known_rate(root: Files, spec: StoreSpec, device: str) -> float | None:
    """Tokens per second that the longest earlier harvest of the same model on the same kind of device measured, if
    possible one of the same hookpoints. None where there was none."""
    wanted = of_model(spec, device)
    alike = [line for line in rates(root) if {key: line.get(key) for key in wanted} == wanted]
    same = [line for line in alike if line.get("hookpoints") == sorted(spec.hookpoints)]
    best = max(same or alike, key=lambda line: float(line["rows"]), default=None)
    return None if best is None else float(best["rate"])


def of_model(spec: StoreSpec, device: str) -> dict[str, Any]:
    """What the speed of a harvest depends on most."""
    model = {name: spec.model.get(name) for name in ("commit", "dtype", "attention")}
    return {**model, "device": device, "context": spec.context}


def rates(root: Files) -> Iterator[dict[str, Any]]:
    """The lines that can be read and hold a rate."""
    if not isinstance(root, LocalFiles):
        return
    try:
        lines = read_whole(root.root / RATES, 2 * MOST_BYTES).splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(BadData):
            found = parse_json(line)
            if isinstance(found, dict) and all(is_rate(found.get(name)) for name in ("rate", "rows")):
                yield found


def is_rate(value: Any) -> bool:
    return type(value) in (int, float) and value > 0
