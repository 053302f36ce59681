"""`sagsae bench scale`: how seconds and memory grow with a store: measured in fresh processes, fitted, and reported."""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from shared.errors import UserError

STATUS: Final = Path("/proc/self/status")
SAMPLE_SECONDS: Final = 0.01
MAX_EXPONENT: Final = 1.1
"""Largest exponent that counts as linear: larger data is somewhat slower because of a machine's caches."""
GROWN: Final = 0.25
"""A value counts as grown when it exceeds the smallest store's by this share of it, and by SECONDS_FLOOR or
BYTES_FLOOR."""
SECONDS_FLOOR: Final = 0.05
BYTES_FLOOR: Final = 16e6
BARS: Final = {
    ("shards", "open", "seconds"): 3.0,
    ("shards", "open", "bytes_each"): 2000.0,
    ("rows", "train", "bytes_each"): 1.0,
    ("rows", "harvest", "bytes_each"): 1.0,
}
"""Promised limits, for stores at least as large as PROMISED."""
PROMISED: Final = {"shards": 10**5, "rows": 10**9}


@dataclass(frozen=True)
class ScaleMeasurement:
    """The cost of one operation on one store, in a process of its own."""

    seconds: float
    cpu_seconds: float
    anonymous: int
    """Peak anonymous memory (RssAnon) beyond what the process had before, in bytes."""


@dataclass(frozen=True)
class ScalePoint:
    """A measurement with its place in the table."""

    axis: str
    """The quantity that is varied: shards or rows."""
    what: str
    size: int
    measured: ScaleMeasurement


def anonymous_bytes() -> int:
    """Anonymous memory of this process, now. Raises UserError where the system does not report it."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    except (OSError, StopIteration) as error:
        raise UserError("bench scale: needs RssAnon of /proc/self/status, which Linux has") from error
    return int(line.split()[1]) * 1024


def measured(run: Callable[[], Any]) -> ScaleMeasurement:
    """Runs a function once and measures it. Its result is kept until the memory has been read."""
    before, done, most = anonymous_bytes(), threading.Event(), [0]

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            most[0] = max(most[0], anonymous_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    most[0] = max(most[0], anonymous_bytes())
    done.set()
    sampler.join()
    del result
    return ScaleMeasurement(wall, cpu, max(0, most[0] - before))


def in_a_process(command: Sequence[str]) -> ScaleMeasurement:
    """Runs `measured` in another process, which prints the result as its last line on stdout. Raises UserError when it
    fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return ScaleMeasurement(**json.loads(done.stdout.splitlines()[-1]))


def exponent(sizes: Sequence[int], values: Sequence[float], floor: float) -> float | None:
    """The exponent of a power law in the size, fitted to the values beyond the smallest store's; None where nothing
    grows beyond the noise."""
    base = values[0]
    grown = [
        (n, value - base) for n, value in zip(sizes, values, strict=True) if value - base > max(GROWN * base, floor)
    ]
    if len(grown) < 2:
        return None
    x, y = np.log(np.array(grown)).T
    return float(np.polyfit(x, y, 1)[0])


def cost_per_unit(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Cost of one more shard or row, between the two largest stores."""
    return max(0.0, (values[-1] - values[-2]) / (sizes[-1] - sizes[-2]))


def report(points: Sequence[ScalePoint]) -> dict[str, Any]:
    """A row for every point, a row for the growth of every measure, and the limits that were exceeded."""
    table = [
        {
            "against": p.axis,
            "size": p.size,
            "what": p.what,
            "s": round(p.measured.seconds, 2),
            "CPU s": round(p.measured.cpu_seconds, 2),
            "MB": round(p.measured.anonymous / 1e6, 1),
        }
        for p in points
    ]
    growth, failed = [], []
    for axis, what in dict.fromkeys((p.axis, p.what) for p in points):
        mine = [p for p in points if (p.axis, p.what) == (axis, what)]
        sizes = [p.size for p in mine]
        cpu, memory = [p.measured.cpu_seconds for p in mine], [float(p.measured.anonymous) for p in mine]
        found = {
            "seconds": round(mine[-1].measured.seconds, 3),
            "exponent_cpu": exponent(sizes, cpu, SECONDS_FLOOR),
            "exponent_memory": exponent(sizes, memory, BYTES_FLOOR),
            "bytes_each": cost_per_unit(sizes, memory) if len(mine) > 1 else 0.0,
        }
        growth.append(
            {"against": axis, "what": what, "largest": sizes[-1], **{k: shortened(v) for k, v in found.items()}}
        )
        failed += [
            f"{what} against {axis}: {name} {value:.2f}, at most {most:g} is linear"
            for name, most in (("exponent_cpu", MAX_EXPONENT), ("exponent_memory", MAX_EXPONENT))
            if (value := found[name]) is not None and value > most
        ]
        failed += [
            f"{what} against {axis}: {name} {found[name]:.3g}, at most {bar:g} is promised"
            for (a, w, name), bar in BARS.items()
            if (a, w) == (axis, what) and sizes[-1] >= PROMISED[axis] and (found[name] or 0) > bar
        ]
    return {"holds": not failed, "failed": failed, "growth": growth, "table": table}


def shortened(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def as_json(found: ScaleMeasurement) -> str:
    return json.dumps(asdict(found))
