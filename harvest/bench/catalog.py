"""`sagsae bench catalog`: how the service's start, lists and memory grow with the number of stores and of ended jobs.

A store is here what the catalog reads: a zarr.json and a record, each of another key. Every size is measured in a fresh
process: python -m harvest.bench.catalog FOLDER
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from harvest.bench.scale import CONTEXT, MANIFEST, spec_of
from harvest.serve.database import DATABASE
from harvest.serve.planner import child_environment
from harvest.serve.state import State
from shared.bench.scale import anonymous_bytes
from shared.errors import UserError
from shared.progress import hush
from shared.request import StoreFilter
from shared.store.create import RECORD
from shared.store.opened import STATE_FILE, state_document

SIZES: Final = (10, 1000, 10_000)
QUICK: Final = (10, 100)
ROUNDS: Final = 15
LIMITS: Final = {"start_s": 3.0, "stores_ms": 50.0, "filtered_ms": 50.0, "jobs_ms": 50.0}
"""What is promised of every size."""


def measure_growth(folder: Path, quick: bool, advance: Callable[[int, str], None]) -> dict[str, Any]:
    """A row for each size, and what exceeds the limits."""
    rows = []
    for size in QUICK if quick else SIZES:
        place = folder / f"{size}"
        make_stores(place, size)
        rows.append({"stores": size, "jobs": size, **in_a_process(place)})
        shutil.rmtree(place)
        advance(1, f"{size:,} stores")
    failed = [
        f"{row['stores']:,} stores: {name} {row[name]:g}, at most {most:g}"
        for row in rows
        for name, most in LIMITS.items()
        if row[name] > most
    ]
    return {"table": rows, "failed": failed, "holds": not failed}


def make_stores(root: Path, size: int) -> None:
    """Descriptions of finished stores."""
    spec = spec_of(MANIFEST, 16, "0" * 32)
    for number in range(size):
        folder = root / f"store-{number:05d}"
        folder.mkdir(parents=True)
        changed = spec.model_copy(update={"seed": number, "model": {**spec.model, "name": f"model-{number % 7}"}})
        (folder / STATE_FILE).write_bytes(state_document(changed, "final"))
        (folder / RECORD).write_text("{}")
        os.utime(folder / STATE_FILE, (number, number))


def in_a_process(place: Path) -> dict[str, Any]:
    """Raises UserError when it fails."""
    command = [sys.executable, "-P", "-m", "harvest.bench.catalog", str(place)]
    environment = child_environment()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(root: Path) -> dict[str, Any]:
    """Figures of one size: seconds of the first start, which reads every store, and of later ones; milliseconds of
    lists (100 rows, the median of several); MB of memory that is no file's, beyond what the imports took."""
    before = anonymous_bytes()
    first, state = timed(lambda: State.open(root))
    add_jobs(state, len(list(root.glob("store-*"))))
    state.close()
    start, state = timed(lambda: State.open(root))
    usage, _ = timed(state.usage)
    figures = {
        "first_s": round(first, 2),
        "start_s": round(start, 2),
        "stores_ms": middle(state.stores),
        "filtered_ms": middle(lambda: state.stores(StoreFilter(model="model-3", layer=8, hook="mlp_out"), "tokens")),
        "jobs_ms": middle(state.jobs),
        "changes_ms": middle(lambda: state.changes_since(0)),
        "usage_s": round(usage, 2),
        "MB": round((anonymous_bytes() - before) / 1e6, 1),
        "database_MB": round(sum(path.stat().st_size for path in root.glob(f"{DATABASE}*")) / 1e6, 1),
    }
    state.close()
    return figures


def add_jobs(state: State, size: int) -> None:
    """Ended jobs, as the queue keeps them."""
    asked = {"model": "pythia-1b", "layers": [8], "hooks": ["mlp_out"], "corpus": "fineweb", "tokens": 20_000_000}
    request = json.dumps(asked)
    with state.database.transaction():
        for number in range(size):
            times = {"created": float(number), "started": float(number), "ended": float(number)}
            values = {
                "key": f"{number:032x}", "extent": f"[{CONTEXT}, []]", "state": "done", "action": "harvest",
                "store": f"store-{number:05d}", "planned": json.dumps({"wanted": "x" * 2000}), "request": request,
                "model": "pythia-1b", "who": "bench", "priority": 0, "donors": "[]", "expected": 0, "rate": 100.0,
                "attempt": 1, "revision": state.database.revise(), **times,
            }  # fmt: skip
            state.database.put("job", values)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def middle(run: Callable[[], Any]) -> float:
    """Milliseconds: the median of several runs."""
    return round(1000 * statistics.median(timed(run)[0] for _ in range(ROUNDS)), 1)


def main() -> None:
    with hush():
        sys.stdout.write(json.dumps(measure(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
