"""The planner: one child process that imports torch, so that the server does not.

It answers what needs the model's outline, its tokenizer or the corpus: what a request means (harvest/reuse/plan.py),
stores that are made of parts of others without a model, and texts of stored contexts. Parent and child exchange lines
of JSON over two pipes. The child is started again when it dies, does one thing at a time, and is killed when one takes
too long.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from shared.command.parent import end_with_parent, parent_variable
from shared.errors import BusyError, DamagedError, Interrupted, UserError
from shared.refusals import QueueFullError
from shared.request import StoreRequest

LINE_BYTES: Final = 8 << 20
"""Largest line of the protocol: 20 contexts of 65,536 tokens as text stay below it."""
WAITING: Final = 64
"""Questions that may wait for the child."""
SECONDS: Final = 600.0
"""Seconds that one question may take. The first plan of a local corpus of 1 TB reads all of it."""
BACKOFF_S: Final = (0.0, 0.5, 2.0, 10.0)
"""Seconds before the child is started again, by how often it died without an answer."""
PACKAGES: Final = str(Path(__file__).resolve().parents[2])
"""Where this program's packages are."""
KINDS: Final[Mapping[str, type[Exception]]] = {"user": UserError, "busy": BusyError, "damaged": DamagedError}
WORKERS_OWN: Final = ("out", "name", "device", "batch_tokens")
"""Settings of a harvest that its worker decides."""


def child_environment() -> dict[str, str]:
    """The environment of a child process that runs this same program, whatever its working directory."""
    paths = [PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


class PlannerFault(RuntimeError):
    """The child met a fault of its own; its traceback is in the server's log."""


class Planner:
    """The server's end. Used in its event loop alone."""

    def __init__(self, seconds: float = SECONDS, module: str = "harvest.serve.planner") -> None:
        self.seconds, self.module = seconds, module
        self.turn = asyncio.Lock()
        self.waiting = 0
        self.process: asyncio.subprocess.Process | None = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.numbers = itertools.count(1)
        self.deaths = 0
        """How often the child died since it last answered."""

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def plan(self, request: StoreRequest, root: Path, device: str) -> dict[str, Any]:
        """What a request means: the document that State.ask takes. Raises what the command line raises."""
        asked = request.model_dump(mode="json", exclude_unset=True)
        found: dict[str, Any] = await self.ask("plan", request=asked, root=str(root), device=device)
        return found

    async def make(self, root: Path, store: str, settings: Mapping[str, Any]) -> None:
        """Makes a store of parts of others, without a model."""
        await self.ask("make", root=str(root), store=store, settings=dict(settings))

    async def texts(self, folder: Path, contexts: int) -> dict[str, Any]:
        """Contexts of a store as text: see stored_texts."""
        found: dict[str, Any] = await self.ask("texts", folder=str(folder), contexts=contexts)
        return found

    async def ask(self, action: str, **arguments: Any) -> Any:
        """The child's answer. Raises the error that it names; BusyError when it died or took too long, QueueFullError
        when too many wait for it."""
        if self.waiting >= WAITING:
            raise QueueFullError(f"{self.waiting} requests are waiting to be planned already. Ask again in a minute")
        self.waiting += 1
        try:
            async with self.turn:
                return await self.exchange({"id": next(self.numbers), "do": action, **arguments})
        finally:
            self.waiting -= 1

    async def exchange(self, question: Mapping[str, Any]) -> Any:
        process = await self.started()
        try:
            async with asyncio.timeout(self.seconds):
                found = await self.line_from(process, json.dumps(question).encode() + b"\n")
        except TimeoutError as error:
            await self.kill()
            raise BusyError(
                f"planning took longer than {self.seconds:g} s and was stopped. Ask again; a large corpus is read once"
            ) from error
        except asyncio.CancelledError:
            await self.kill()  # its answer would be taken for that of the next question
            raise
        if found is None or found.get("id") != question["id"]:
            await self.kill()
            self.deaths += 1
            raise BusyError("the process that plans requests died (its last words are in the server's log). Ask again")
        self.deaths = 0
        return answer_in(found)

    async def line_from(self, process: asyncio.subprocess.Process, question: bytes) -> dict[str, Any] | None:
        """Sends a question. Returns the answer; None when the child ended or said something else."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(question)
            await process.stdin.drain()
            found = json.loads(await process.stdout.readline() or b"null")
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    async def started(self) -> asyncio.subprocess.Process:
        """The child, which is started where there is none."""
        if self.process is not None and self.process.returncode is None:
            return self.process
        await asyncio.sleep(BACKOFF_S[min(self.deaths, len(BACKOFF_S) - 1)])
        if self.folder is None:  # an empty one: no name in a request can be one of a file in it
            self.folder = tempfile.TemporaryDirectory(prefix="sagsae-planner-")
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", self.module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=self.folder.name,
            env={**child_environment(), **parent_variable(signal.SIGKILL)},
            limit=LINE_BYTES,
        )
        return self.process

    async def warm(self) -> None:
        """Starts the child before it is needed. What goes wrong is said when it is."""
        with contextlib.suppress(Exception):
            await self.ask("warm")

    async def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
            self.process = None

    async def close(self) -> None:
        """Ends the child at once: what it makes can be made again."""
        await self.kill()
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None


def answer_in(found: Mapping[str, Any]) -> Any:
    """The result in an answer. Raises the error that it holds instead."""
    if "error" not in found:
        return found.get("result")
    kind, message = found["error"]["kind"], found["error"]["message"]
    raise KINDS.get(kind, PlannerFault)(message)


# the child


def main() -> None:
    """Answers questions until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the parent's
    end_with_parent()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    for line in sys.stdin.buffer:
        question = json.loads(line)
        answers.write(json.dumps({"id": question.pop("id"), **replied(question)}).encode() + b"\n")
        answers.flush()


def replied(question: dict[str, Any]) -> dict[str, Any]:
    """The result of a question, or its error."""
    try:
        return {"result": ACTIONS[question.pop("do")](**question)}
    except BusyError as error:
        return failed("busy", error)
    except (UserError, OSError) as error:
        return failed("user" if isinstance(error, UserError) else "busy", error)
    except (DamagedError, Interrupted) as error:
        return failed("damaged" if isinstance(error, DamagedError) else "busy", error)
    except Exception as error:
        traceback.print_exc()
        return failed("internal", error)


def failed(kind: str, error: Exception) -> dict[str, Any]:
    return {"error": {"kind": kind, "message": str(error)[:4000]}}


def plan(request: Mapping[str, Any], root: str, device: str) -> dict[str, Any]:
    from harvest.reuse.plan import plan_request

    planned = plan_request(StoreRequest.model_validate(request), root, device)
    config = planned.config.model_dump(mode="json", exclude_none=True, exclude=set(WORKERS_OWN))
    return {"wanted": planned.wanted.as_json(), "config": config, "bytes": planned.bytes}


def make(root: str, store: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    from harvest.run import harvest
    from shared.config import HarvestConfig

    summary = harvest(HarvestConfig.model_validate({**settings, "out": root, "name": store}))
    return {"store": str(summary.store)}


def texts(folder: str, contexts: int) -> dict[str, Any]:
    from harvest.serve.texts import stored_texts

    return stored_texts(Path(folder), contexts)


def warm() -> bool:
    import harvest.reuse.plan  # noqa: F401 (imports torch and transformers)

    return True


ACTIONS: Final[Mapping[str, Callable[..., Any]]] = {"plan": plan, "make": make, "texts": texts, "warm": warm}

if __name__ == "__main__":
    main()
