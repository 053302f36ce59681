"""Live changes: how what waits is woken, and streams of server-sent events.

The state changes in this process alone and says so, so nothing polls. An event's id is the
revision of the state: a browser that lost its connection sends the last one, and misses nothing.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

from starlette.responses import StreamingResponse

BETWEEN_S: Final = 0.2
"""Seconds between two looks of a stream: several changes become one event."""
SILENCE_S: Final = 15.0
"""Seconds after which a comment shows that the connection lives."""
MOST_STREAMS: Final = 64
Event = tuple[str, Mapping[str, Any]]
"""A name and data."""
Events = tuple[int, list[Event], bool]
"""A revision, the events up to it (name, data), and whether they were the last."""


class Announcer:
    """Wakes the coroutines that wait for a change of the state. Used in the server's event loop, but for `heard`."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.closing = False
        self.loop: asyncio.AbstractEventLoop | None = None

    def heard(self, revision: int) -> None:  # noqa: ARG002 (what waits looks itself)
        """The state's listener, called in any thread."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.announce)

    def announce(self) -> None:
        event, self.event = self.event, asyncio.Event()
        event.set()

    def close(self) -> None:
        """Ends every stream."""
        self.closing = True
        self.announce()

    async def wait(self, seconds: float) -> None:
        """Returns at the next change, or after so many seconds."""
        if not self.closing:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.event.wait(), seconds)


def event_stream(
    announcer: Announcer, after: int, look: Callable[[int], Awaitable[Events]], ended: Callable[[], None]
) -> StreamingResponse:
    """An answer that never ends by itself, or when `look` says so. `look(revision)` returns what changed since."""

    async def events() -> AsyncIterator[bytes]:
        revision, last = after, False
        try:
            yield b"retry: 2000\n\n"
            while not last and not announcer.closing:
                waiting = announcer.event
                revision, found, last = await look(revision)
                for name, data in found:
                    yield as_event(revision, name, data)
                if not last and waiting is announcer.event:
                    await announcer.wait(SILENCE_S)
                    if waiting is announcer.event:
                        yield b": here\n\n"
                await asyncio.sleep(BETWEEN_S)
        finally:
            ended()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), 200, headers, "text/event-stream")


def as_event(revision: int, name: str, data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, separators=(",", ":"))
    return f"id: {revision}\nevent: {name}\ndata: {text}\n\n".encode()
