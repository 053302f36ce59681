"""Work: taking jobs, beating while they run, ending them."""

import asyncio
import time
from typing import Annotated, Final

from anyio import to_thread
from pydantic import Field
from starlette.responses import Response

from harvest.serve.rest.endpoint import Endpoint, HttpError, Level, Query, RestCall, answer, no_content
from harvest.serve.rest.events import BETWEEN_S
from shared.request import Job, TakenJob, WorkerInfo
from shared.schema import Frozen

LOOK_S: Final = 1.0
"""Seconds between two looks of a worker that waits: a job that must wait before its next attempt announces nothing."""
MOST_WAIT_S: Final = 25
MOST_JOB: Final = 10**15 - 1

Attempt = Annotated[int, Field(ge=0, lt=1 << 31)]
Rows = Annotated[int, Field(ge=0, lt=1 << 50)]


class BeatBody(Frozen):
    """What a worker says while a job runs."""

    attempt: Attempt
    rows: Rows = 0
    """Rows that are committed."""
    rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Rows per second."""
    note: Annotated[str, Field(max_length=500)] = ""
    """The last line of progress."""
    verifying: bool = False
    """Whether the command has ended and its bytes are being checked."""


class EndBody(Frozen):
    """How a job's command ended."""

    attempt: Attempt
    code: Annotated[int, Field(ge=-256, le=255)]
    """Its exit code; negative: the signal."""
    words: Annotated[str, Field(max_length=4000)] = ""
    """Its last lines."""


class GoOn(Frozen):
    """The answer to a beat."""

    go_on: bool
    """False: the job was cancelled, and the worker stops it."""


async def take_job(call: RestCall) -> Response:
    """POST /v1/workers/{worker}/take"""
    worker: WorkerInfo = call.body
    if worker.name != call.path("worker"):
        raise HttpError(422, "invalid", f"name: is {worker.name}, but the path names {call.path('worker')[:64]!r}")
    end = time.monotonic() + call.query_number("wait", 0, 0, MOST_WAIT_S)
    only = call.query_number("job", 0, 0, MOST_JOB) or None
    while True:
        if await call.request.is_disconnected():
            return no_content()  # a job that is given away now would be lost for the time of its lease
        taken = await to_thread.run_sync(call.state.take, worker, only)
        if taken is not None:
            return answer(taken)
        left = end - time.monotonic()
        if left <= 0 or call.service.announcer.closing:
            return no_content()
        await call.service.announcer.wait(min(left, LOOK_S))
        await asyncio.sleep(BETWEEN_S)


async def beat_job(call: RestCall) -> Response:
    """POST /v1/jobs/{job}/beat"""
    body: BeatBody = call.body
    job = call.number("job")
    asked = (job, body.attempt, body.rows, body.rate, body.note, body.verifying)
    return answer(GoOn(go_on=await to_thread.run_sync(call.state.beat, *asked)))


async def end_job(call: RestCall) -> Response:
    """POST /v1/jobs/{job}/end"""
    body: EndBody = call.body
    return answer(await to_thread.run_sync(call.state.end, call.number("job"), body.attempt, body.code, body.words))


WAIT: Final = Query(
    "wait", {"type": "integer", "minimum": 0, "maximum": MOST_WAIT_S}, "Seconds to wait for a job where there is none."
)
ONLY: Final = Query(
    "job", {"type": "integer", "minimum": 0, "maximum": MOST_JOB}, "Take this job only, once it is due."
)
ENDPOINTS: Final = (
    Endpoint(
        "POST", "/v1/workers/{worker}/take", take_job, Level.ADMIN, "Take the next job that this worker can do.",
        WorkerInfo, {200: TakenJob, 204: None}, (WAIT, ONLY), (400, 401, 403, 413, 422),
    ),
    Endpoint(
        "POST", "/v1/jobs/{job}/beat", beat_job, Level.ADMIN, "Say that a job is alive, and how far it is.",
        BeatBody, {200: GoOn}, errors=(400, 401, 403, 404, 409, 413, 422),
    ),
    Endpoint(
        "POST", "/v1/jobs/{job}/end", end_job, Level.ADMIN, "Say how a job's command ended.",
        EndBody, {200: Job}, errors=(400, 401, 403, 404, 409, 413, 422),
    ),
)  # fmt: skip
