"""`sagsae bench scale`: how seconds and memory grow with a store. Fresh processes, fits, and what is said of them."""

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
MOST_EXPONENT: Final = 1.1
"""Of what is called linear: a machine's caches make what is larger somewhat slower."""
GROWN: Final = 0.25
"""A value tells of growth when it is above the smallest store's by this share of it, and by the following."""
SECONDS_FLOOR: Final = 0.05
BYTES_FLOOR: Final = 16e6
BARS: Final = {
    ("shards", "open", "seconds"): 3.0,
    ("shards", "open", "bytes_each"): 2000.0,
    ("rows", "train", "bytes_each"): 1.0,
    ("rows", "harvest", "bytes_each"): 1.0,
}
"""The most that is promised, of stores as large as this:"""
PROMISED: Final = {"shards": 10**5, "rows": 10**9}


@dataclass(frozen=True)
class ScaleMeasurement:
    """One thing done with one store in a process of its own."""

    seconds: float
    cpu_seconds: float
    anonymous: int
    """The most memory that was not a file's, beyond what the process had before, in bytes."""


@dataclass(frozen=True)
class ScalePoint:
    """The same with where it belongs."""

    axis: str
    """What is varied: shards or rows."""
    what: str
    size: int
    measured: ScaleMeasurement


def anonymous_bytes() -> int:
    """Of this process, now. Raises UserError where the system does not say it."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    except (OSError, StopIteration) as error:
        raise UserError("bench scale: needs RssAnon of /proc/self/status, which Linux has") from error
    return int(line.split()[1]) * 1024


def measured(run: Callable[[], Any]) -> ScaleMeasurement:
    """Does it once. What it gives is held until the memory was looked at."""
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
    """`measured` in another process, whose last line on stdout is what it found. Raises UserError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return ScaleMeasurement(**json.loads(done.stdout.splitlines()[-1]))


def exponent(sizes: Sequence[int], values: Sequence[float], floor: float) -> float | None:
    """Of a power of the size, which is fitted to what is beyond the smallest store's value; None where nothing grows
    that can be told from noise."""
    base = values[0]
    grown = [
        (n, value - base) for n, value in zip(sizes, values, strict=True) if value - base > max(GROWN * base, floor)
    ]
    if len(grown) < 2:
        return None
    x, y = np.log(np.array(grown)).T
    return float(np.polyfit(x, y, 1)[0])


def each(sizes: Sequence[int], values: Sequence[float]) -> float:
    """What one more shard or row takes, between the two largest stores."""
    return max(0.0, (values[-1] - values[-2]) / (sizes[-1] - sizes[-2]))


def report(points: Sequence[ScalePoint]) -> dict[str, Any]:
    """A row for every point, a row for the growth of every measure, and what is too much."""
    table = [
        {"against": p.axis, "size": p.size, "what": p.what, "s": round(p.measured.seconds, 2),
         "CPU s": round(p.measured.cpu_seconds, 2), "MB": round(p.measured.anonymous / 1e6, 1)}
        for p in points
    ]  # fmt: skip
    growth, failed = [], []
    for axis, what in dict.fromkeys((p.axis, p.what) for p in points):
        mine = [p for p in points if (p.axis, p.what) == (axis, what)]
        sizes = [p.size for p in mine]
        cpu, memory = [p.measured.cpu_seconds for p in mine], [float(p.measured.anonymous) for p in mine]
        found = {
            "seconds": round(mine[-1].measured.seconds, 3),
            "exponent_cpu": exponent(sizes, cpu, SECONDS_FLOOR),
            "exponent_memory": exponent(sizes, memory, BYTES_FLOOR),
            "bytes_each": each(sizes, memory) if len(mine) > 1 else 0.0,
        }
        growth.append(
            {"against": axis, "what": what, "largest": sizes[-1], **{k: shortened(v) for k, v in found.items()}}
        )
        failed += [
            f"{what} against {axis}: {name} {value:.2f}, at most {most:g} is linear"
            for name, most in (("exponent_cpu", MOST_EXPONENT), ("exponent_memory", MOST_EXPONENT))
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
