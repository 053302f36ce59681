"""Server and workers as processes that can be killed, and the store that they should make."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harvest.reuse.match import harvest_of
from harvest.reuse.plan import plan_request, shape_of_spec
from harvest.run import harvest
from shared.command.parent import parent_variable
from shared.errors import BusyError
from shared.request import CacheAnswer, Job, StoreRequest
from shared.service import Client
from support.command import ROOT
from support.processes import children

TOKENS, SHARD = 163_840, 2048
ASKED = StoreRequest(model="tiny", layers=(1,), hooks=("mlp_out",), tokens=TOKENS)


def plans(*sizes: int, shard_rows: int = SHARD) -> dict[str, Any]:
    """The planner's documents for requests of the shipped model, by number of tokens. Shards are small."""
    found = {}
    for tokens in sizes:
        planned = plan_request(ASKED.model_copy(update={"tokens": tokens}), "stores", "cpu")
        spec = planned.spec.model_copy(update={"chunk_rows": shard_rows, "shard_rows": shard_rows})
        wanted = replace(planned.wanted, shapes=(shape_of_spec(spec),))
        config = planned.config.model_dump(mode="json", exclude_none=True, exclude={"device", "out"})
        found[str(tokens)] = {"wanted": wanted.as_json(), "config": config}
    return found


def undisturbed(document: dict[str, Any], out: Path) -> Path:
    """The store that a plan asks for, made in this process without a service."""
    from harvest.reuse.match import Wanted, find_answer
    from shared.config import HarvestConfig

    new = find_answer(Wanted.from_json(document["wanted"]), []).new[0]
    config = HarvestConfig.model_validate({**document["config"], "device": "cpu", "out": str(out)})
    return Path(harvest(harvest_of(config, new)).store)


def differences(store: Path, other: Path) -> list[str]:
    """What differs between two stores, apart from the record of how they were made and from locks."""
    command = ["diff", "-rq", "-x", "record.json", "-x", ".lock*", str(store), str(other)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Boxes:
    """A server and its workers on this machine."""

    root: Path
    documents: dict[str, Any]
    lease_s: float = 3.0
    port: int = field(default_factory=free_port)
    server: subprocess.Popen[bytes] | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> "Boxes":
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root.parent / "plans.json").write_text(json.dumps(self.documents))
        self.start_server()
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.workers, *([self.server] if self.server else [])]:
            below = children(process.pid)
            for pid in (process.pid, *below):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def spawn(self, *command: object) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **parent_variable(signal.SIGKILL)}
        for name in ("SAGSAE_SERVICE", "SAGSAE_TOKEN", "SAGSAE_TOKEN_FILE"):
            environment.pop(name, None)
        return subprocess.Popen([sys.executable, *map(str, command)], env=environment)

    def start_server(self) -> None:
        words = (self.root, self.port, self.root.parent / "plans.json", self.lease_s)
        self.server = self.spawn("-m", "support.serving.short", *words)
        until(self.answers, 60)

    def answers(self) -> bool:
        assert self.server is not None
        assert self.server.poll() is None, "the server ended"
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def kill_server(self) -> None:
        assert self.server is not None
        self.server.kill()
        self.server.wait()

    def start_worker(self) -> subprocess.Popen[bytes]:
        work = ("-m", "cli", "work", "--service", self.url, "--root", self.root, "--device", "cpu")
        self.workers.append(self.spawn(*work))
        return self.workers[-1]

    def ask(self, tokens: int = TOKENS) -> CacheAnswer:
        with Client(self.url) as client:
            return client.request(ASKED.model_copy(update={"tokens": tokens}))

    def job(self, number: int | None) -> Job:
        assert number is not None
        with Client(self.url) as client:
            return client.job(number)

    def until_rows(self, number: int | None, rows: int) -> None:
        until(lambda: self.job(number).rows >= rows or self.job(number).state == "done", 120)

    def until_done(self, number: int | None, seconds: float = 200.0) -> Job:
        """Waits while the server may come and go."""
        seen: list[Job] = []

        def ended() -> bool:
            with suppress(BusyError):
                seen.append(self.job(number))
            return bool(seen) and seen[-1].state in ("done", "failed", "cancelled")

        until(ended, seconds)
        return seen[-1]


def harvests(root: Path) -> list[int]:
    """Processes that run commands of jobs in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            inside = any(word.removeprefix(b"--config=").startswith(str(root).encode()) for word in words)
            if inside and (b"harvest" in words or b"verify" in words):
                found.append(int(path.parent.name))
    return found


def until(true: Callable[[], bool], seconds: float) -> None:
    patience = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < patience, "nothing came of it"
        time.sleep(0.05)
