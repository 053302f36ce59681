"""Asking for activations: POST /v1/requests answers at once from the catalog, or queues one job; POST /v1/plan says
what that would take."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

from anyio import to_thread
from starlette.responses import Response

from harvest.serve.rest.endpoint import Endpoint, HttpError, Level, RestCall, Service, answer
from harvest.serve.rest.names import Admitted, AllowedNames, admit
from harvest.serve.state import State
from shared.errors import DamagedError, UserError
from shared.request import CacheAnswer, Job, Place, RequestPlan, StoreRequest, TakenJob, WorkerInfo

PLANNER: Final = WorkerInfo(name="planner", light=True)
"""The worker that the server itself is, for stores that are made of parts of others."""
IN_LINE_S: Final = 2.0
"""Seconds for which an answer waits for such a store."""
MOST_WAIT_S: Final = 60.0
"""Seconds of `Prefer: wait=…` at most."""
RETRY_S: Final = "2"


class RequestRoutes:
    """Answers requests. Equal ones that arrive together are planned once."""

    def __init__(self, names: AllowedNames) -> None:
        self.names = names
        self.planning: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self.making: dict[int, asyncio.Task[None]] = {}
        """Views that the planner makes now, by job."""

    async def post(self, call: RestCall) -> Response:
        """POST /v1/requests"""
        admitted = admit(call.body, self.names, call.service.config)
        found = await self.ask(call, admitted)
        if found.state != "ready" and found.job is not None:
            found = await self.made_in_line(call, admitted, found)
        if found.state != "ready" and (seconds := wait_asked(call)):
            found = await self.waited(call, admitted, found, seconds)
        call.service.counters.hits += found.state == "ready"
        call.service.counters.misses += found.state != "ready"
        return answered(call, found)

    async def plan(self, call: RestCall) -> Response:
        """POST /v1/plan"""
        admitted = admit(call.body, self.names, call.service.config)
        planned = await self.planned(call.service, admitted)
        return answer(await to_thread.run_sync(call.state.preview, with_request(planned, admitted)))

    async def ask(self, call: RestCall, admitted: Admitted) -> CacheAnswer:
        """The state's answer; what is remembered needs no planner, and one step in a thread."""
        if not admitted.request.refresh:
            known = await to_thread.run_sync(ask_remembered, call.state, admitted, call.caller.name)
            if known is not None:
                return known
        planned = with_request(await self.planned(call.service, admitted), admitted)
        return await to_thread.run_sync(call.state.ask, planned, call.caller.name)

    async def planned(self, service: Service, admitted: Admitted) -> dict[str, Any]:
        """What the planner says of a request, which the state remembers for an hour."""
        if admitted.hash is None:
            return await service.planner.plan(admitted.request, service.root, service.config.device)
        if not admitted.request.refresh:
            remembered = await to_thread.run_sync(service.state.remembered, admitted.hash)
            if remembered is not None:
                return dict(remembered)
        task = self.planning.get(admitted.hash)
        if task is None:
            task = self.planning[admitted.hash] = asyncio.create_task(self.plan_once(service, admitted, admitted.hash))
        return await asyncio.shield(task)

    async def plan_once(self, service: Service, admitted: Admitted, key: str) -> dict[str, Any]:
        try:
            planned = await service.planner.plan(admitted.request, service.root, service.config.device)
            await to_thread.run_sync(service.state.remember, key, planned)
            return planned
        finally:
            del self.planning[key]

    async def made_in_line(self, call: RestCall, admitted: Admitted, found: CacheAnswer) -> CacheAnswer:
        """The same answer once more, when the server itself could make the store in two seconds."""
        assert found.job is not None
        task = self.making.get(found.job)
        if task is None:
            job = await to_thread.run_sync(call.state.job, found.job)
            if job.action != "view" or job.state != "queued":
                return found
            task = self.making[job.id] = asyncio.create_task(self.make(call.service, job.id))
        done, _ = await asyncio.wait([task], timeout=IN_LINE_S)
        return await self.ask(call, admitted) if done else found

    async def make(self, service: Service, job: int) -> None:
        try:
            await make_view(service, job)
        finally:
            del self.making[job]

    async def waited(self, call: RestCall, admitted: Admitted, found: CacheAnswer, seconds: float) -> CacheAnswer:
        """The answer once its job has ended, or after so many seconds. Raises HttpError when the job failed."""
        end = time.monotonic() + seconds
        while found.job is not None and (left := end - time.monotonic()) > 0:
            waiting = call.service.announcer.event
            job = await to_thread.run_sync(call.state.job, found.job)
            if job.state == "done":
                return await self.ask(call, admitted)
            if job.state in ("failed", "cancelled"):
                raise failed(job)
            if waiting is call.service.announcer.event:
                await call.service.announcer.wait(min(left, 5.0))
        return found

    def endpoints(self) -> tuple[Endpoint, ...]:
        errors = (400, 401, 403, 413, 422, 429, 503)
        prefer = "Prefer: wait=SECONDS (at most 60) waits for the job before it answers."
        return (
            Endpoint(
                "POST",
                "/v1/requests",
                self.post,
                Level.ASK,
                f"Ask for activations. {prefer}",
                StoreRequest,
                {200: CacheAnswer, 202: CacheAnswer},
                errors=(*errors, 507),
            ),
            Endpoint(
                "POST",
                "/v1/plan",
                self.plan,
                Level.ASK,
                "Say what answering a request takes. Queues nothing.",
                StoreRequest,
                {200: RequestPlan},
                errors=errors,
            ),
        )


def ask_remembered(state: State, admitted: Admitted, who: str) -> CacheAnswer | None:
    """The answer to a request that was planned within the last hour; None for any other."""
    planned = state.remembered(admitted.hash) if admitted.hash is not None else None
    return None if planned is None else state.ask(with_request(planned, admitted), who)


def with_request(planned: Mapping[str, Any], admitted: Admitted) -> dict[str, Any]:
    """What was planned, with this request's own words: its priority and its pin."""
    return {**planned, "request": admitted.asked.model_dump(mode="json", exclude_unset=True)}


async def make_view(service: Service, number: int) -> None:
    """Makes a store of parts of others in the planner, as a worker does."""
    taken: TakenJob | None = await to_thread.run_sync(service.state.take, PLANNER, number)
    if taken is None:
        return
    beating = asyncio.create_task(beat(service, taken))
    try:
        await service.planner.make(service.root, taken.store, taken.settings)
        code, words = 0, ""
    except (UserError, DamagedError) as error:
        code, words = error.exit_code, str(error)
    except Exception as error:
        code, words = 1, str(error)
    finally:
        beating.cancel()
    try:
        await to_thread.run_sync(service.state.end, taken.job, taken.attempt, code, words)
    except UserError:  # it lapsed, or was cancelled meanwhile: another one's now
        return


async def beat(service: Service, taken: TakenJob) -> None:
    while True:
        await asyncio.sleep(taken.beat_s)
        await to_thread.run_sync(service.state.beat, taken.job, taken.attempt)


def failed(job: Job) -> HttpError:
    words = job.error or f"was {job.state}"
    return HttpError(422, "job_failed", f"job {job.id}: {words}. Its log: sagsae jobs log {job.id}")


def wait_asked(call: RestCall) -> float:
    """Seconds of the header `Prefer: wait=30`; 0 without it."""
    for part in call.request.headers.get("prefer", "").split(","):
        name, _, value = part.strip().partition("=")
        if name == "wait" and value.isascii() and value.isdecimal() and len(value) < 6:
            return min(float(value), MOST_WAIT_S)
    return 0.0


def answered(call: RestCall, found: CacheAnswer) -> Response:
    """The answer with the places of its stores, as this caller can reach them."""
    base = str(call.request.base_url).rstrip("/")
    here = call.caller.here
    places = {
        hook: Place(
            store=place.store,
            url=f"{base}/v1/stores/{place.store}",
            file=str(call.service.root / place.store) if here else None,
        )
        for hook, place in found.hookpoints.items()
    }
    document = found.model_copy(update={"hookpoints": places})
    if found.state == "ready":
        return answer(document)
    return answer(document, 202, {"Location": f"{base}/v1/jobs/{found.job}", "Retry-After": RETRY_S})
