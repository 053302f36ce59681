"""The workers that the server starts beside itself: child processes, started again when they die."""

import asyncio
import contextlib
import secrets
import sys
import tempfile
import time
from typing import Final

from harvest.serve.planner import child_environment
from shared.command.parent import parent_variable
from shared.config import ServeConfig
from shared.progress import say

STOP_S: Final = 20.0
"""Seconds that a worker has to end its command and give its job back."""
BACKOFF_S: Final = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Seconds before a worker is started again, by how often it died early."""
STEADY_S: Final = 120.0
"""Seconds after which a worker counts as one that works."""


class EmbeddedWorkers:
    """The workers of `sagsae serve`."""

    def __init__(self, config: ServeConfig, url: str) -> None:
        self.config, self.url = config, url
        self.token = secrets.token_urlsafe(32)
        """Opens the server to its own workers, in their environment alone."""
        self.tasks: list[asyncio.Task[None]] = []
        self.folder = tempfile.TemporaryDirectory(prefix="sagsae-worker-")
        """Their working directory, which is empty: no name in a job can be one of a file in it."""

    def start(self) -> None:
        for number in range(self.config.workers):
            self.tasks.append(asyncio.create_task(self.keep(f"local-{number}")))

    async def keep(self, name: str) -> None:
        """Runs one worker for as long as the server runs."""
        deaths = 0
        while True:
            began = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                *self.command(name), stdin=asyncio.subprocess.DEVNULL, cwd=self.folder.name, env=self.environment()
            )
            try:
                code = await process.wait()
            except asyncio.CancelledError:
                await ended(process)
                raise
            deaths = 0 if time.monotonic() - began > STEADY_S else deaths + 1
            seconds = BACKOFF_S[min(deaths, len(BACKOFF_S) - 1)]
            say(f"worker {name}: ended with code {code}; it is started again in {seconds:g} s")
            await asyncio.sleep(seconds)

    def command(self, name: str) -> list[str]:
        worker = ["work", "--service", self.url, "--name", name, "--device", self.config.device]
        return [sys.executable, "-P", "-m", "cli", *worker, "--root", str(self.config.root.resolve())]

    def environment(self) -> dict[str, str]:
        found = child_environment()
        found.pop("SAGSAE_TOKEN_FILE", None)
        return {**found, **parent_variable(), "SAGSAE_SERVICE": self.url, "SAGSAE_TOKEN": self.token}

    async def stop(self) -> None:
        """Ends the workers; each gives its job back first."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.folder.cleanup()


async def ended(process: asyncio.subprocess.Process) -> None:
    """Ends a process: SIGTERM, then SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
