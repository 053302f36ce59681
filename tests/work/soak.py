"""A soak of the service: `sagsae serve` with its own worker, one of the two killed at random every 20 s.

python tests/work/soak.py --minutes 30

Four requests are asked again and again; a store that is done is compared with that of an undisturbed harvest and
deleted, so that the next harvest begins. At the end every job must be done. It prints one line a minute, then a JSON
document: jobs, kills, differences, and how the server's memory grows with its age and with the time of the soak.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.processes import children, kill  # noqa: E402
from support.serving.boxes import differences, free_port  # noqa: E402

from shared.errors import BusyError, UserError  # noqa: E402
from shared.refusals import HeldError  # noqa: E402
from shared.request import CacheAnswer, StoreRequest  # noqa: E402
from shared.service import Client  # noqa: E402

REQUESTS = [
    StoreRequest(model="tiny", layers=(layer,), hooks=("mlp_out",), tokens=163_840, seed=seed)
    for seed in (0, 1)
    for layer in (1, 2)
]
WARM_S = 15.0
"""Age from which a server's memory counts: before, it imports."""


@dataclass
class Soak:
    """One server, its worker, and what became of the requests."""

    folder: Path
    every_s: float
    port: int = field(default_factory=free_port)
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    kills: dict[str, int] = field(default_factory=lambda: {"server": 0, "worker": 0})
    made: int = 0
    different: list[str] = field(default_factory=list)
    memory: list[tuple[float, float, float]] = field(default_factory=list)
    """Seconds of the soak, the server's age, MiB."""

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.root = self.folder / "stores"
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.start()

    def sagsae(self, *words: object) -> list[str]:
        return [sys.executable, str(ROOT / "cli.py"), *map(str, words)]

    def start(self) -> None:
        words = ("serve", "--root", self.root, "--port", self.port, "--device", "cpu")
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(self.sagsae(*words), env=self.environment, stdout=log, stderr=log)
        self.started = time.monotonic()

    def expected(self, request: StoreRequest) -> Path:
        """The store of an undisturbed harvest, by the same command without a service."""
        place = self.folder / f"expected-{request.seed}-{request.layers[0]}"
        if not place.is_dir():
            words = ("request", "--root", place, "--device", "cpu", "--model=tiny", "--hook=mlp_out")
            asked = (f"--layer={request.layers[0]}", f"--tokens={request.tokens}", f"--seed={request.seed}")
            subprocess.run(self.sagsae(*words, *asked), env=self.environment, check=True, capture_output=True)
        return next(path.parent for path in place.glob("*/zarr.json"))

    def kill_one(self) -> None:
        workers = [pid for pid in children(self.server.pid) if b"work" in words_of(pid)]
        victim = self.draw.choice(["server", "worker"]) if workers else "server"
        self.kills[victim] += 1
        if victim == "worker":
            kill(workers[0])
            return
        self.server.kill()
        self.server.wait()
        self.start()

    def look(self) -> None:
        now = time.monotonic()
        if now - self.started > WARM_S:
            with suppress(OSError):
                self.memory.append((now - self.began, now - self.started, resident(self.server.pid)))

    def ask(self, client: Client, again: bool) -> list[CacheAnswer]:
        """Asks for everything; what is done is compared, and deleted when it is to be made `again`."""
        answers = []
        for request in REQUESTS:
            answer = client.request(request)
            answers.append(answer)
            if answer.state != "ready" or not again:
                continue
            store = next(iter(answer.hookpoints.values())).store
            self.compare(request, store)
            with suppress(HeldError):  # its job has not been told yet that it is done
                client.remove(store)
                self.made += 1
        return answers

    def compare(self, request: StoreRequest, store: str) -> None:
        self.different += differences(self.root / store, self.expected(request))

    def run(self, minutes: float) -> None:
        """Kills for so many minutes, then lets everything end."""
        last, told = time.monotonic(), time.monotonic()
        with Client(f"http://127.0.0.1:{self.port}") as client:
            while time.monotonic() - self.began < 60 * minutes:
                with suppress(BusyError, UserError):  # the server is away, or a job holds the store for a moment
                    self.ask(client, again=True)
                self.look()
                now = time.monotonic()
                if now - last > self.every_s * self.draw.uniform(0.5, 1.5):
                    self.kill_one()
                    last = now
                if now - told > 60:
                    told = now
                    say(f"{(now - self.began) / 60:.0f} min: {self.made} made, {self.kills} killed, {self.size()}")
                time.sleep(0.5)
            self.settle(client)

    def size(self) -> str:
        return f"{self.memory[-1][2]:.0f} MiB" if self.memory else ""

    def settle(self, client: Client) -> None:
        """Waits until every request is answered by a finished store."""
        patience = time.monotonic() + 600
        while time.monotonic() < patience:
            with suppress(BusyError):
                answers = self.ask(client, again=False)
                if all(answer.state == "ready" for answer in answers) and not unfinished(client):
                    break
            time.sleep(1)
        for request, answer in zip(REQUESTS, self.ask(client, again=False), strict=True):
            assert answer.state == "ready", answer
            self.compare(request, next(iter(answer.hookpoints.values())).store)
        self.states = [job.state for job in client.jobs()]

    def report(self) -> dict[str, Any]:
        ages = [(age, size) for _, age, size in self.memory]
        whole = [(since, size) for since, _, size in self.memory]
        return {
            "minutes": round((time.monotonic() - self.began) / 60, 1),
            "stores": self.made,
            "different": self.different,
            "kills": self.kills,
            "jobs": {state: self.states.count(state) for state in sorted(set(self.states))},
            "server_MiB": round(max((size for _, size in ages), default=0.0), 1),
            "MiB_per_minute_of_age": slope(ages),
            "MiB_per_minute_of_soak": slope(whole),
        }

    def close(self) -> None:
        self.server.terminate()
        try:
            self.server.wait(60)
        except subprocess.TimeoutExpired:
            self.server.kill()


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of the least squares line, for each minute."""
    if len(points) < 2:
        return None
    middle, level = (sum(column) / len(points) for column in zip(*points, strict=True))
    spread = sum((at - middle) ** 2 for at, _ in points)
    return round(60 * sum((at - middle) * (size - level) for at, size in points) / spread, 3) if spread else None


def unfinished(client: Client) -> list[int]:
    return [job.id for job in client.jobs() if job.state not in ("done", "failed", "cancelled")]


def words_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def resident(pid: int) -> float:
    """MiB of memory that a process has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def soak(folder: Path, minutes: float, every_s: float) -> dict[str, Any]:
    """Runs one. Its report is what the module says."""
    made = Soak(folder, every_s)
    try:
        made.run(minutes)
        return made.report()
    finally:
        made.close()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--minutes", type=float, default=30.0)
    options.add_argument("--every", type=float, default=20.0, help="seconds between kills, on average")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), asked.minutes, asked.every)
    print(json.dumps(found, indent=2))  # noqa: T201
    sys.exit(bool(found["different"]) or set(found["jobs"]) != {"done"})


if __name__ == "__main__":
    main()
