"""What the commands do that ask an activation cache: `--service URL` or SAGSAE_SERVICE."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from shared.command.tables import request_text
from shared.config import RequestConfig
from shared.errors import UserError
from shared.request import CacheAnswer, Job, Place, RequestPlan, StoreRequest
from shared.service.address import STORE_ID, configured_service
from shared.service.asking import ask_and_wait, location_of, name_service, place_here, stopping, waiting_words
from shared.service.client import OPEN, Client

OF_A_FOLDER: Final = ("root", "device", "batch_tokens")
"""Settings of a request that is answered from a folder."""
LOOK_SECONDS: Final = 1.0


def asks_service(service: str | None, place: str | None) -> bool:
    """Whether a store is meant that a service has: --service is typed; or SAGSAE_SERVICE is set, and the place is none,
    or no folder here but a plain name."""
    name_service(service)
    if service is not None:
        return True
    if configured_service() is None:
        return False
    return place is None or (STORE_ID.fullmatch(place) is not None and not Path(place).exists())


# Requests


def ask_cache(config: RequestConfig, wait: bool) -> CacheAnswer:
    """The answer of the service: where the stores are, or without `wait` the job that makes them."""
    with Client() as client:
        request = request_of(config)
        return with_places(client, ask_and_wait(client, request) if wait else client.request(request))


def plan_at_cache(config: RequestConfig) -> RequestPlan:
    """What answering takes, as the service says."""
    with Client() as client:
        return client.plan(request_of(config))


def request_of(config: RequestConfig) -> StoreRequest:
    """What goes to a service. Raises UserError for a setting that only a folder has."""
    for key in OF_A_FOLDER:
        if key in config.model_fields_set:
            raise UserError(
                f"--{key.replace('_', '-')}: is for requests that this machine answers from a folder; the service has "
                "its own. Leave it out, or leave --service and SAGSAE_SERVICE out"
            )
    return StoreRequest(**{key: getattr(config, key) for key in config.model_fields_set})


def with_places(client: Client, answer: CacheAnswer) -> CacheAnswer:
    """The answer with the URLs at which this machine reaches the service, and only folders that are here."""
    places: dict[str, Place] = {}
    for hook, place in answer.hookpoints.items():
        url = location_of(client, place)
        here = place_here(client, place) if answer.state == "ready" else url
        places[hook] = Place(store=place.store, url=url, file=None if here == url else here)
    return answer.model_copy(update={"hookpoints": places})


def is_queued(found: CacheAnswer | RequestPlan) -> bool:
    """Whether a request is not answered yet."""
    return isinstance(found, CacheAnswer) and found.state != "ready"


def answer_text(found: CacheAnswer | RequestPlan) -> str:
    """A plan or an answer, for people."""
    if isinstance(found, CacheAnswer) and is_queued(found):
        return f"{waiting_words(found)}. To wait for it, run the same command with --wait"
    return request_text(found)


# Jobs


def job_rows(state: str | None) -> list[dict[str, Any]]:
    """One row for each job, the newest first."""
    with Client() as client:
        return [job_row(job) for job in client.jobs(state)]


def job_row(job: Job) -> dict[str, Any]:
    done = None if not job.total else f"{job.rows / job.total:.0%}"
    rate = None if not job.rows_per_s else round(job.rows_per_s)
    return {
        "job": job.id, "state": job.state, "action": job.action, "store": job.store, "done": done, "tokens/s": rate,
        "attempt": job.attempt, "asked": job.asked, "worker": job.worker, "error": job.error,
    }  # fmt: skip


def job_log(number: int, follow: bool) -> Iterator[str]:
    """Yields the parts of a job's log; with `follow`, until the job ends."""
    with Client() as client:
        start = 0
        while True:
            part = client.log(number, start)
            if part.text:
                yield part.text
            moved, start = part.next > start, part.next
            if (part.ended or not follow) and not moved:
                return
            if not moved:
                with stopping(number):
                    time.sleep(LOOK_SECONDS)


def cancel_job(number: int) -> Job:
    with Client() as client:
        return client.cancel(number)


def retry_job(number: int) -> Job:
    with Client() as client:
        return client.retry(number)


def job_text(job: Job) -> str:
    """A job in one line."""
    tail = "To queue it again: sagsae jobs retry" if job.state == "cancelled" else "Its log: sagsae jobs log"
    return f"job {job.id} is {job.state}. {tail} {job.id}" if job.state not in OPEN else f"job {job.id} is {job.state}"


# Stores


def store_rows_at_cache() -> list[dict[str, Any]]:
    """One row for each store of the catalog."""
    with Client() as client:
        return [
            {
                "store": row.id, "model": row.model, "corpus": row.corpus, "hookpoints": " ".join(row.hookpoints),
                "tokens": row.n_tokens, "codec": row.codec,
                "MB": None if row.bytes is None else round(row.bytes / 1e6, 1),
                "state": row.state if row.state == "final" else f"{row.rows / max(1, row.n_tokens):.0%} written",
                "pins": " ".join(row.pins) or None, "leases": row.leases or None,
            }
            for row in client.stores()
        ]  # fmt: skip


def describe_at_cache(store: str) -> Mapping[str, Any]:
    with Client() as client:
        return client.store(store)


def what_is_removed(store: str) -> str:
    """The store in a few words, for the question before it is deleted."""
    with Client() as client:
        row = next((row for row in client.stores() if row.id == store), None)
        if row is None:
            client.store(store)  # raises UnknownError with the service's sentence
        size = f", {row.bytes / 1e6:,.1f} MB" if row and row.bytes else ""
        return f"{row.n_tokens:,} tokens{size} at {client.url}" if row else f"at {client.url}"


def remove_at_cache(store: str, force: bool) -> None:
    with Client() as client:
        client.remove(store, force)


def set_pin(store: str, name: str, pinned: bool) -> str:
    """Pins or unpins a store of the service, and says so."""
    with Client() as client:
        if pinned:
            client.pin(store, name)
            return f"{store}: is pinned as {name} and is never evicted"
        client.unpin(store, name)
        return f"{store}: is no longer pinned as {name}"
