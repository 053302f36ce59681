"""What pages ask the planner's process for, and how long they wait: a page never waits long for something that can be
shown later."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Final

KEPT: Final = 256
"""Answers that are kept."""


class LaterAnswers:
    """Answers that may take long. Each question is asked once, and its answer kept; an error is not kept. Used in the
    server's event loop alone."""

    def __init__(self) -> None:
        self.tasks: OrderedDict[Hashable, asyncio.Task[Any]] = OrderedDict()

    async def get(self, key: Hashable, ask: Callable[[], Awaitable[Any]], seconds: float) -> Any:
        """The answer; None when it is not there after so many seconds. Raises what `ask` raises. The question stays
        asked when the caller goes away."""
        task = self.tasks.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self.tasks[key] = asyncio.ensure_future(ask())
        self.tasks.move_to_end(key)
        while len(self.tasks) > KEPT:
            self.drop_oldest()
        done, _ = await asyncio.wait([task], timeout=seconds)
        return task.result() if done else None

    def drop_oldest(self) -> None:
        _, task = self.tasks.popitem(last=False)
        task.cancel()

    def close(self) -> None:
        while self.tasks:
            self.drop_oldest()
