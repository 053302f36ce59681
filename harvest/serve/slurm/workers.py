"""The workers that the server has Slurm start."""

import asyncio
import os
import secrets
import socket
import threading
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from harvest.serve.database import JOBS
from harvest.serve.planner import child_environment
from harvest.serve.slurm.commands import check_slurm
from harvest.serve.slurm.launcher import SlurmLauncher
from harvest.serve.state import State
from harvest.serve.work.process import PROGRAM
from shared.config import ServeConfig
from shared.errors import UserError
from shared.files.local import explained

TOKEN: Final = "slurm.token"
"""The file beside the jobs' logs that holds the token of Slurm's workers. They outlive the server, and so does it."""
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
ANY: Final = ("0.0.0.0", "::")


def url_for_nodes(config: ServeConfig, port: int) -> str:
    """The address at which Slurm's nodes reach the server. Raises UserError where they cannot."""
    if config.url is not None:
        return config.url
    if config.host in LOOPBACK:
        raise UserError(
            f"--launch slurm: Slurm's nodes do not reach {config.host}. Give --host 0.0.0.0 and --token-file FILE; or "
            "--url, when they reach the server at another address"
        )
    host = socket.gethostname() if config.host in ANY else config.host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def name_for_nodes(config: ServeConfig) -> list[str]:
    """The name by which Slurm's nodes call the server, for its check of the Host header."""
    return [urlsplit(url_for_nodes(config, 1)).hostname or ""] if config.launch == "slurm" else []


def kept_token(root: Path) -> str:
    """The token of Slurm's workers, which is made where there is none. Only this user can read its file."""
    path = root / JOBS / TOKEN
    with explained(path):
        path.parent.mkdir(exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            path.chmod(0o600)
            if token := path.read_text(encoding="utf-8").strip():
                return token
            handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        token = secrets.token_urlsafe(32)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(token)
    return token


class SlurmWorkers:
    """One worker in a Slurm job for each job of the queue. Unlike EmbeddedWorkers, they stay when the server stops."""

    def __init__(self, config: ServeConfig, state: State, port: int) -> None:
        """Raises UserError when Slurm cannot be used."""
        check_slurm(config.slurm_options)
        self.url = url_for_nodes(config, port)
        self.token = kept_token(state.root)
        self.device, self.root = config.device, state.root
        self.processes = config.slurm_processes
        variables = {
            "PYTHONPATH": child_environment()["PYTHONPATH"],
            "SAGSAE_SERVICE": self.url,
            "SAGSAE_TOKEN_FILE": str(state.root / JOBS / TOKEN),
        }
        self.launcher = SlurmLauncher(state, self.command, config.slurm_options, config.slurm_jobs, variables)
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.launcher.run, args=(self.ending,), name="slurm")

    def command(self, job: int) -> list[str]:
        """What a Slurm job runs. It holds no token: a file does."""
        where = [f"--service={self.url}", f"--root={self.root}", f"--device={self.device}"]
        return [*PROGRAM, "work", f"--job={job}", *where, f"--processes={self.processes}"]

    def start(self) -> None:
        self.thread.start()

    def kill(self) -> None:
        """Ends the launcher without waiting for it; the Slurm jobs stay."""
        self.ending.set()

    async def stop(self) -> None:
        """Ends the launcher, and leaves the Slurm jobs as they are."""
        self.ending.set()
        await asyncio.to_thread(self.thread.join)
