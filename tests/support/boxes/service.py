"""`sagsae serve`, its workers and its clients as processes, each in a box of its own where that is asked for."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.boxes.slurm import free_ports
from support.command import ROOT
from support.processes import wait_for

TOKEN = "admin-token-of-a-test-0123456789"
Inside = Callable[..., list[str]]
"""Puts the words of a command into a box."""


def here(*words: str) -> list[str]:
    return list(words)


class ServiceProcess:
    """A service of one folder of stores, with the processes that a test starts around it."""

    def __init__(self, folder: Path, more: Mapping[str, str], inside: Inside = here) -> None:
        self.folder, self.root, self.inside = folder, folder / "stores", inside
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.token = folder / "token"
        self.token.write_text(TOKEN)
        self.token.chmod(0o600)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SAGSAE_")}
        self.environment = {
            **kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "SAGSAE_CACHE": str(folder / "cache"), **more,
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []
        self.server: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Starts the server and waits until it answers."""
        fixed = (f"--root={self.root}", f"--port={self.port}", "--device=cpu", f"--token-file={self.token}")
        self.server = self.process("serve", *fixed, *options, inside=self.inside, log="serve.log")
        wait_for(lambda: self.answers(), 90, lambda: self.log("serve.log"))

    def answers(self) -> bool:
        assert self.server is not None
        assert self.server.poll() is None, self.log("serve.log")
        return self.try_client("jobs", "ls").returncode == 0

    def process(self, *words: str, inside: Inside = here, log: str, url: str = "") -> subprocess.Popen[bytes]:
        """A command of ours that runs beside the test, and ends with `end`."""
        command = inside(sys.executable, str(ROOT / "cli.py"), *words)
        environment = self.environment | self.client_variables(url)
        with (self.folder / log).open("ab") as out:
            started = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        self.processes.append(started)
        return started

    def client_variables(self, url: str = "") -> dict[str, str]:
        return {"SAGSAE_SERVICE": url or self.url, "SAGSAE_TOKEN_FILE": str(self.token)}

    def try_client(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A client's command, in the server's box."""
        command = self.inside(sys.executable, str(ROOT / "cli.py"), *words, "--json")
        environment = self.environment | self.client_variables()
        return subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=120)

    def client(self, *words: str) -> Any:
        """What a client's command prints. Tries again while the service is busy, as it is while it plans at first."""
        end = time.monotonic() + 300
        while not (done := self.try_client(*words)).stdout and done.returncode == 75 and time.monotonic() < end:
            time.sleep(1)
        assert done.stdout, (words, done.returncode, done.stderr, self.all_logs())
        return json.loads(done.stdout)

    def ask(self, *words: str) -> tuple[int, Path]:
        """The job that a request for one hookpoint makes, and the folder of its store."""
        answer = self.client("request", *words)
        (place,) = answer["hookpoints"].values()
        return int(answer["job"]), self.root / place["store"]

    def job(self, job: int) -> dict[str, Any]:
        found: dict[str, Any] = next(row for row in self.client("jobs", "ls") if row["job"] == job)
        return found

    def wait_until_done(self, job: int, seconds: float = 400) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while (found := self.job(job))["state"] not in ("done", "failed", "cancelled") and time.monotonic() < end:
            time.sleep(0.5)
        assert found["state"] == "done", (found, self.all_logs())
        return found

    def log(self, name: str) -> str:
        with suppress(OSError):
            return (self.folder / name).read_text(errors="replace")
        return ""

    def all_logs(self) -> dict[str, str]:
        paths = [*self.folder.glob("*.log"), *self.root.glob(".jobs/*.log")]
        return {path.name: path.read_text(errors="replace")[-3000:] for path in paths}

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
