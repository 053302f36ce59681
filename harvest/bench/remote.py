"""`sagsae bench remote`, the half that serves: a store's activation cache in a process, and what it costs."""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import UserError
from shared.files.base import SERVED

END_SECONDS: Final = 30.0


@dataclass(frozen=True)
class ServerProcess:
    """A running `sagsae serve`."""

    pid: int
    url: str

    def store_url(self, name: str) -> str:
        return f"{self.url}{SERVED}{name}"

    def cpu_seconds(self) -> float:
        """CPU seconds of the server's process so far, without those of its children."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(root: Path, sagsae: Sequence[str]) -> Iterator[ServerProcess]:
    """Serves a folder's stores on a free port of this machine, without a worker. `sagsae` is the command line. Raises
    UserError when the server does not start."""
    command = [*sagsae, "serve", "--root", str(root), "--port", "0", "--launch", "none", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            text = ""
            for line in process.stdout:
                text += line
                if line.rstrip().endswith("}"):
                    break
            if not text:
                raise UserError("sagsae serve ended before it answered; its message stands above")
            yield ServerProcess(process.pid, json.loads(text)["url"])
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
