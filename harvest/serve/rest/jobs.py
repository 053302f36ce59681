"""The queue: jobs, their logs, their live progress."""

import os
from typing import Any, Final, get_args

from anyio import to_thread
from starlette.responses import Response

from harvest.serve.rest.endpoint import Endpoint, HttpError, Level, Query, RestCall, answer
from harvest.serve.rest.events import MOST_STREAMS, Event, Events, event_stream
from harvest.serve.rest.open_stores import opened
from harvest.serve.state import State
from shared.request import Job, JobPage, JobState, LogPart

LOG_BYTES: Final = 256 << 10
"""Bytes of a log in one answer."""
MOST_ROWS: Final = 500
"""Entries of one page of a list."""
STATES: Final = get_args(JobState)
ENDED: Final = ("done", "failed", "cancelled")
CURSOR: Final = Query("cursor", {"type": "string", "maxLength": 200}, "`next` of the page before.")
LIMIT: Final = Query("limit", {"type": "integer", "minimum": 1, "maximum": MOST_ROWS}, "Entries of one page.")


async def list_jobs(call: RestCall) -> Response:
    """GET /v1/jobs"""
    state: Any = call.query("state")
    if state is not None and state not in STATES:
        raise HttpError(422, "invalid", f"state={state[:40]}: must be one of {', '.join(STATES)}")
    limit = call.query_number("limit", 100, 1, MOST_ROWS)
    page = await to_thread.run_sync(call.state.jobs, state, call.query("cursor"), limit)
    return answer(page)


async def show_job(call: RestCall) -> Response:
    """GET /v1/jobs/{job}"""
    return answer(await to_thread.run_sync(call.state.job, call.number("job")))


async def cancel_job(call: RestCall) -> Response:
    """POST /v1/jobs/{job}/cancel"""
    return answer(await to_thread.run_sync(call.state.cancel, call.number("job")))


async def retry_job(call: RestCall) -> Response:
    """POST /v1/jobs/{job}/retry"""
    return answer(await to_thread.run_sync(call.state.retry, call.number("job")))


async def show_log(call: RestCall) -> Response:
    """GET /v1/jobs/{job}/log"""
    start = call.query_number("from", 0, -LOG_BYTES, 1 << 50)
    return answer(await to_thread.run_sync(log_part, call.state, call.number("job"), start))


def log_part(state: State, number: int, start: int) -> LogPart:
    """A part of a job's log from a byte on; a negative one counts from the end."""
    job = state.job(number)
    ended = job.state in ENDED
    place = state.log_path(number)
    try:
        with opened(place.parent, place.name) as (handle, status):
            at = max(0, status.st_size + start) if start < 0 else min(start, status.st_size)
            data = os.pread(handle, LOG_BYTES, at)
            more = at + len(data) < status.st_size
    except FileNotFoundError:
        return LogPart(text="", next=max(0, start), ended=ended)
    if more or not ended:
        data = data[: len(data) - cut_letter(data)]
    return LogPart(text=data.decode("utf-8", "replace"), next=at + len(data), ended=ended and not more)


def cut_letter(data: bytes) -> int:
    """Bytes at the end that begin a letter of UTF-8 whose rest is not there yet."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < length else 0
        if byte < 0x80:
            return 0
    return 0


async def follow_job(call: RestCall) -> Response:
    """GET /v1/jobs/{job}/events"""
    number, seen = call.number("job"), last_event(call)
    job = await to_thread.run_sync(call.state.job, number)
    if job.state in ENDED and seen is not None and seen >= job.revision:
        return Response(status_code=204)  # tells a browser not to come again

    async def look(after: int) -> Events:
        now = await to_thread.run_sync(call.state.job, number)
        events: list[Event] = [("job", now.model_dump(mode="json"))] if now.revision > after else []
        return max(after, now.revision), events, now.state in ENDED

    return stream(call, -1 if seen is None else seen, look)


async def follow_all(call: RestCall) -> Response:
    """GET /v1/events"""
    seen = last_event(call)
    if seen is None:
        seen = (await to_thread.run_sync(call.state.changes_since, 1 << 62)).revision

    async def look(after: int) -> Events:
        changes = await to_thread.run_sync(call.state.changes_since, after)
        events: list[Event] = [("job", job.model_dump(mode="json")) for job in changes.jobs]
        if changes.stores:
            events.append(("stores", {"stores": list(changes.stores)}))
        return changes.revision, events, False

    return stream(call, seen, look)


def stream(call: RestCall, after: int, look: Any) -> Response:
    """A stream of events, unless too many are open."""
    counters = call.service.counters
    if counters.streams >= MOST_STREAMS:
        message = f"{MOST_STREAMS} event streams are open already. Close one, or read the job now and then instead"
        raise HttpError(429, "too_many_streams", message, {"Retry-After": "10"})
    counters.streams += 1

    def ended() -> None:
        counters.streams -= 1

    return event_stream(call.service.announcer, after, look, ended)


def last_event(call: RestCall) -> int | None:
    """The revision of the last event that a browser saw before it lost the connection."""
    text = call.request.headers.get("last-event-id", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None


STATE: Final = Query("state", {"type": "string", "enum": list(STATES)}, "Only jobs in this state.")
FROM: Final = Query("from", {"type": "integer"}, "The first byte; a negative number counts from the end.")
ENDPOINTS: Final = (
    Endpoint(
        "GET", "/v1/jobs", list_jobs, Level.READ, "List the jobs, newest first.",
        answers={200: JobPage}, queries=(STATE, CURSOR, LIMIT), errors=(401, 422),
    ),
    Endpoint(
        "GET", "/v1/jobs/{job}", show_job, Level.READ, "Show one job.", answers={200: Job}, errors=(401, 404),
    ),
    Endpoint(
        "GET", "/v1/jobs/{job}/log", show_log, Level.READ, "Read a part of a job's log.",
        answers={200: LogPart}, queries=(FROM,), errors=(401, 404, 422),
    ),
    Endpoint(
        "GET", "/v1/jobs/{job}/events", follow_job, Level.READ,
        "Follow one job (server-sent events; the id is the revision, Last-Event-ID resumes).",
        answers={200: "text/event-stream", 204: None}, errors=(401, 404, 429),
    ),
    Endpoint(
        "GET", "/v1/events", follow_all, Level.READ, "Follow every job and store (server-sent events).",
        answers={200: "text/event-stream"}, errors=(401, 429),
    ),
    Endpoint(
        "POST", "/v1/jobs/{job}/cancel", cancel_job, Level.ASK, "Cancel an open job. What it has written stays.",
        answers={200: Job}, errors=(401, 403, 404, 409),
    ),
    Endpoint(
        "POST", "/v1/jobs/{job}/retry", retry_job, Level.ASK, "Queue a failed or cancelled job again.",
        answers={200: Job}, errors=(401, 403, 404, 409, 429, 507),
    ),
)  # fmt: skip
