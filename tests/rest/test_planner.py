"""The planner's child may die, hang or talk nonsense: the server says so, and the next question has a new child."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import ROOT

from harvest.serve import planner as planner_module
from harvest.serve.planner import WAITING, Planner, PlannerFault
from shared.errors import BusyError, DamagedError, UserError
from shared.refusals import QueueFullError
from shared.request import StoreRequest

MODULE = "support.serving.wayward_planner"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setattr(planner_module, "BACKOFF_S", (0.0, 0.0))


def with_planner(work: Callable[[Planner], Awaitable[None]], seconds: float = 30.0) -> None:
    async def run() -> None:
        planner = Planner(seconds, MODULE)
        try:
            await work(planner)
        finally:
            await planner.close()

    asyncio.run(run())


async def plan(planner: Planner, model: str) -> dict[str, Any]:
    return await planner.plan(StoreRequest(model=model), Path("/nowhere"), "cpu")


def test_one_child_answers_and_works_in_an_empty_folder() -> None:
    async def work(planner: Planner) -> None:
        first, second = await asyncio.gather(plan(planner, "tiny"), plan(planner, "tiny"))
        assert first == second
        assert first["cwd"] == []
        assert planner.alive

    with_planner(work)


@pytest.mark.parametrize("what", ["die", "nonsense", "another"])
def test_a_child_that_fails_is_replaced(what: str) -> None:
    async def work(planner: Planner) -> None:
        before = (await plan(planner, "tiny"))["pid"]
        with pytest.raises(BusyError, match="died"):
            await plan(planner, what)
        assert (await plan(planner, "tiny"))["pid"] != before
        assert not Path(f"/proc/{before}").exists()

    with_planner(work)


def test_a_child_that_hangs_is_killed() -> None:
    async def work(planner: Planner) -> None:
        await plan(planner, "tiny")
        planner.seconds = 0.3
        began = time.monotonic()
        with pytest.raises(BusyError, match="longer than"):
            await plan(planner, "sleep")
        assert time.monotonic() - began < 10
        planner.seconds = 30.0
        await plan(planner, "tiny")

    with_planner(work)


def test_a_question_that_is_given_up_leaves_no_answer_for_the_next() -> None:
    async def work(planner: Planner) -> None:
        await plan(planner, "tiny")
        asking = asyncio.create_task(plan(planner, "sleep"))
        await asyncio.sleep(0.1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await plan(planner, "tiny"))["cwd"] == []

    with_planner(work)


@pytest.mark.parametrize(
    ("what", "error"),
    [("user", UserError), ("busy", BusyError), ("damaged", DamagedError), ("internal", PlannerFault)],
)
def test_an_error_is_what_the_child_calls_it(what: str, error: type[Exception]) -> None:
    async def work(planner: Planner) -> None:
        with pytest.raises(error, match="as asked"):
            await plan(planner, what)

    with_planner(work)


def test_too_many_questions_are_refused() -> None:
    async def work(planner: Planner) -> None:
        planner.waiting = WAITING
        with pytest.raises(QueueFullError):
            await plan(planner, "tiny")
        planner.waiting = 0
        await plan(planner, "tiny")

    with_planner(work)


def test_the_child_ends_with_its_server() -> None:
    """Also when the server is killed: it is tied to it."""
    code = (
        "import asyncio, os, signal\n"
        "from harvest.serve.planner import Planner\n"
        "async def main():\n"
        "    planner = Planner()\n"
        "    process = await planner.started()\n"
        "    print(process.pid, flush=True)\n"
        "    await asyncio.sleep(1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    pid = int(done.stdout)
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < end
        time.sleep(0.05)
