"""`sagsae bench serve`: what the server of the activation cache takes, measured from outside, against its limits."""

import http.client
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from harvest.reuse.key import rows_key, store_key, token_key
from harvest.reuse.match import Shape, Wanted
from harvest.run import harvest
from harvest.serve.state import State
from shared.bench.options import ServeBenchOptions
from shared.config import HarvestConfig
from shared.errors import UserError
from shared.progress import hush, say
from shared.store.manifest import INDEX, Commit
from shared.store.opened import Store, state_document
from shared.store.spec import StoreSpec, shard_file

REQUEST: Final = {"model": "tiny", "hooks": ["mlp_out"], "tokens": 65_536}
RANGE_BYTES: Final = 2_900_000
"""Bytes of one range: two chunks of a store whose model is 1,024 wide."""
LISTS: Final = 20
"""Lists that medians are taken over."""
START_S: Final = 60.0
END_S: Final = 30.0


@dataclass(frozen=True)
class ServerFigure:
    """One figure and the most that it may be; None: it is only told."""

    what: str
    value: float
    unit: str
    limit: float | None = None

    def row(self) -> dict[str, Any]:
        holds = "" if self.limit is None else "yes" if self.value <= self.limit else "NO"
        return {"measurement": self.what, "value": round(self.value, 3), "unit": self.unit, "limit": self.limit,
                "holds": holds}  # fmt: skip


class MeasuredServer:
    """A running server, and one connection to it that is kept."""

    def __init__(self, process: subprocess.Popen[str], url: str, seconds: float) -> None:
        self.process, self.url, self.seconds = process, url, seconds
        self.line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> bytes:
        """The body of an answer. Raises RuntimeError for an error."""
        self.line.request(method, path, None if body is None else json.dumps(body), headers)
        response = self.line.getresponse()
        data = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {data[:300]!r}")
        return data

    def cpu_seconds(self) -> float:
        """CPU time of the server itself, without its children."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1000

    def has_torch(self) -> bool:
        return "libtorch" in Path(f"/proc/{self.process.pid}/maps").read_text()


@contextmanager
def measured_server(command: Sequence[str], root: Path) -> Iterator[MeasuredServer]:
    """A server on a free port, without workers. Raises UserError when it does not start; its own message says why."""
    words = [*command, "serve", "--root", str(root), "--port", "0", "--launch", "none", "--device", "cpu"]
    began = time.monotonic()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1:]
            if not url:
                raise UserError(f"the server did not start (exit code {process.wait(START_S)})")
            yield MeasuredServer(process, url[0], time.monotonic() - began)
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()


def measure_server(options: ServeBenchOptions, folder: Path, command: Sequence[str]) -> list[ServerFigure]:
    """Every figure. `command` runs the command line."""
    root = folder / "root"
    with hush():
        asked = HarvestConfig(model="tiny", hooks=("mlp_out",), tokens=65_536, device="cpu", out=str(root), name="a")
        store = Store.open(harvest(asked).store)
    with measured_server(command, root) as server:
        figures = [*hits(server, options.requests), *ranges(server, store, options.gigabytes)]
    for size in options.sizes:
        say(f"a catalog of {size:,} stores and {size:,} jobs")
        grown = folder / f"catalog-{size}"
        fill_catalog(grown, store.spec, size)
        with measured_server(command, grown) as server:
            figures += growth(server, size)
    return figures


def hits(server: MeasuredServer, count: int) -> Iterator[ServerFigure]:
    """The same request again and again."""
    yield ServerFigure("start until it answers", server.seconds, "s", 3.0)
    yield ServerFigure("start, CPU time", server.cpu_seconds(), "s")
    began = time.monotonic()
    server.ask("POST", "/v1/requests", REQUEST)
    yield ServerFigure("first request (planned)", time.monotonic() - began, "s")
    before, seconds = server.cpu_seconds(), []
    for _ in range(count):
        began = time.perf_counter()
        server.ask("POST", "/v1/requests", REQUEST)
        seconds.append(time.perf_counter() - began)
    cpu = (server.cpu_seconds() - before) / count
    yield ServerFigure(f"hit, median of {count:,}", 1000 * float(np.median(seconds)), "ms")
    yield ServerFigure("hit, 99th percentile", 1000 * float(np.quantile(seconds, 0.99)), "ms", 50.0)
    yield ServerFigure("hit, CPU time", 1000 * cpu, "ms", 5.0)
    yield ServerFigure("jobs that hits made", len(json.loads(server.ask("GET", "/v1/jobs"))["jobs"]), "jobs", 0)
    yield ServerFigure("memory", server.resident_mb(), "MB", 120.0)
    yield ServerFigure("torch in the server", float(server.has_torch()), "modules", 0)


def ranges(server: MeasuredServer, store: Store, gigabytes: float) -> Iterator[ServerFigure]:
    """Ranges of the first shard's file, in turns."""
    path = shard_file(next(iter(store.spec.hookpoints)), 0, True)
    size = store.commits[0].files[next(iter(store.spec.hookpoints))][0]
    length = min(RANGE_BYTES, size)
    count = max(1, int(gigabytes * 1e9 / length))
    began, before = time.monotonic(), server.cpu_seconds()
    for number in range(count):
        first = number * 4096 % (size - length + 1)
        server.ask("GET", f"/v1/stores/a/files/{path}", None, Range=f"bytes={first}-{first + length - 1}")
    cpu, seconds = server.cpu_seconds() - before, time.monotonic() - began
    read = count * length / 1e9
    yield ServerFigure("bytes by ranges, CPU time", cpu / read, "s/GB", 1.3)
    yield ServerFigure("bytes by ranges, one client", 1000 * read / seconds, "MB/s")


def growth(server: MeasuredServer, size: int) -> Iterator[ServerFigure]:
    """Start and lists of a catalog."""
    yield ServerFigure(f"{size:,} stores: start", server.seconds, "s", 3.0)
    yield ServerFigure(f"{size:,} stores: start, CPU time", server.cpu_seconds(), "s")
    for what, path in (("stores", "/v1/stores"), ("jobs", "/v1/jobs")):
        seconds = []
        for _ in range(LISTS):
            began = time.perf_counter()
            server.ask("GET", path)
            seconds.append(time.perf_counter() - began)
        yield ServerFigure(f"{size:,} {what}: list of 100", 1000 * float(np.median(seconds)), "ms", 50.0)
    yield ServerFigure(f"{size:,} stores: memory", server.resident_mb(), "MB", 120.0)


def fill_catalog(root: Path, like: StoreSpec, size: int) -> None:
    """A folder of `size` stores, each with one shard that only its manifest knows, and as many ended jobs."""
    spec = like.model_copy(update={"n_tokens": like.shard_rows})
    files = dict.fromkeys(spec.arrays(), (4096, 0))
    line = Commit(0, spec.shard_rows, 0, spec.shard_rows, spec.shard_rows, files).line()
    root.mkdir(parents=True)
    state = State.open(root)  # before the stores are there: a request that finds none looks at all folders
    try:
        for number in range(size):
            answer = state.ask(planned(spec.model_copy(update={"seed": size + number})), "bench")
            state.cancel(answer.job or 0)
    finally:
        state.close()
    for number in range(size):
        folder = root / f"store-{number:06d}"
        (folder / INDEX).parent.mkdir(parents=True)
        (folder / INDEX).write_text(line)
        (folder / "record.json").write_text("{}")
        (folder / "zarr.json").write_bytes(state_document(spec.model_copy(update={"seed": number}), "final"))


def planned(spec: StoreSpec) -> dict[str, Any]:
    """A request for a store that is not there, as the planner would say it."""
    wanted = Wanted(
        label="bench",
        shapes=(Shape(store_key(spec), (), spec.chunk_rows, spec.shard_rows),),
        rows_key=rows_key(spec),
        token_key=token_key(spec),
        hookpoints=spec.hookpoints,
        tokens=spec.n_tokens,
        context=spec.context,
        accept="exact",
        environment=None,
        codec=spec.codec,
        dtype=spec.dtype,
    )
    return {"wanted": wanted.as_json(), "config": {"model": "tiny"}, "request": {}}
