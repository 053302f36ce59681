"""Is the server up, and what does it do: for health checks and for Prometheus."""

import json
import os
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from anyio import to_thread
from starlette.responses import Response

from harvest.serve.rest.endpoint import Endpoint, HttpError, Level, RestCall, Service, answer
from shared.request import JobState

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
PREFIX: Final = "sagsae_"


async def show_health(call: RestCall) -> Response:
    """GET /healthz"""
    del call
    return answer({"status": "up"})


async def show_readiness(call: RestCall) -> Response:
    """GET /readyz"""
    if call.service.announcer.closing:
        raise HttpError(503, "closing", "the server is stopping. Ask again in a minute", {"Retry-After": "5"})
    await to_thread.run_sync(call.state.usage)
    return answer({"status": "ready"})


async def show_metrics(call: RestCall) -> Response:
    """GET /metrics"""
    text = await to_thread.run_sync(lambda: "".join(metrics(call.service)))
    return Response(text, 200, {"Cache-Control": "no-store"}, "text/plain; version=0.0.4")


def metrics(service: Service) -> Iterator[str]:
    """Prometheus' text format, version 0.0.4."""
    counters, usage = service.counters, service.state.usage()
    yield from family("answers_total", "counter", "HTTP answers by status", counters.answers, "status")
    asked = {"hit": counters.hits, "queued": counters.misses}
    yield from family("requests_total", "counter", "Requests for activations by outcome", asked, "outcome")
    yield from family("sent_bytes_total", "counter", "Bytes of stores' files", {"": counters.bytes_sent})
    yield from family("jobs", "gauge", "Open jobs by state", job_counts(service), "state")
    sizes = {"used": usage.used, "reserved": usage.reserved, "pinned": usage.pinned, "free": usage.free}
    sizes |= {} if usage.quota is None else {"quota": usage.quota}
    yield from family("disk_bytes", "gauge", "Bytes of the cache's disk", sizes, "kind")
    yield from family("workers", "gauge", "Workers that were heard of lately", {"": len(service.state.workers())})
    yield from family("event_streams", "gauge", "Open event streams", {"": counters.streams})
    yield from family("planner_up", "gauge", "Whether the planner runs", {"": int(service.planner.alive)})
    yield from family("resident_bytes", "gauge", "Resident memory of the server", {"": resident_bytes()})
    yield from family("cpu_seconds_total", "counter", "CPU time of the server", {"": round(time.process_time(), 3)})


def job_counts(service: Service) -> dict[str, int]:
    open_states: tuple[JobState, ...] = ("queued", "running", "verifying")
    found = dict.fromkeys(open_states, 0)
    for job in service.state.queue():
        found[job.state] += 1
    return {str(state): count for state, count in found.items()}


def family(name: str, kind: str, text: str, values: Mapping[Any, int | float], label: str = "") -> Iterator[str]:
    """One metric with all of its values."""
    yield f"# HELP {PREFIX}{name} {text}\n# TYPE {PREFIX}{name} {kind}\n"
    for value, number in values.items():
        labels = f"{{{label}={json.dumps(str(value))}}}" if label else ""
        yield f"{PREFIX}{name}{labels} {number}\n"


def resident_bytes() -> int:
    """Resident memory of this process now; where the system does not say, its peak."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


ENDPOINTS: Final = (
    Endpoint(
        "GET", "/healthz", show_health, Level.OPEN, "Say that the server is up.", answers={200: {"type": "object"}},
    ),
    Endpoint(
        "GET", "/readyz", show_readiness, Level.OPEN, "Say whether the server answers requests.",
        answers={200: {"type": "object"}}, errors=(503,),
    ),
    Endpoint(
        "GET", "/metrics", show_metrics, Level.READ, "Figures in Prometheus' text format.",
        answers={200: "text/plain"}, errors=(401,),
    ),
)  # fmt: skip
