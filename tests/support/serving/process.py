"""`sagsae serve` in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from support.command import ROOT
from support.processes import children, kill


class ServerProcess:
    """A server that answers at `url`."""

    def __init__(self, process: subprocess.Popen[str], root: Path, url: str, errors: deque[str]) -> None:
        self.process, self.root, self.url, self.errors = process, root, url, errors

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Sends a signal. Returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def server_process(root: Path, *options: object) -> Iterator[ServerProcess]:
    """A server on a free port of loopback, without a worker unless `options` say otherwise. No process of it is left
    afterwards."""
    command = [sys.executable, str(ROOT / "cli.py"), "serve", "--root", str(root), "--port", "0", "--json"]
    command += ["--device", "cpu", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root.parent
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors: deque[str] = deque(maxlen=1000)
    reader = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
    reader.start()  # a full pipe would stop the server
    below: list[int] = []
    try:
        line = process.stdout.readline()
        assert line, f"the server ended: {process.wait(10)} {list(errors)}"
        document = line if line.rstrip().endswith("}") else line + rest_of(process.stdout)
        yield ServerProcess(process, root, json.loads(document)["url"], errors)
        below = children(process.pid)
    finally:
        below += children(process.pid)
        process.kill()
        process.wait()
        for pid in below:
            kill(pid)
        process.stdout.close()
        reader.join(5)
        process.stderr.close()


def rest_of(output: IO[str]) -> str:
    """The other lines of a JSON document."""
    text = ""
    for line in output:
        text += line
        if line.startswith("}"):
            break
    return text
