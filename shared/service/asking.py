"""A request on the command line: from `key=value` to the place of the store that answers it."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, get_origin

from shared.errors import DamagedError, Interrupted, UserError
from shared.files.base import is_remote
from shared.files.open import open_files
from shared.gate import quoted
from shared.progress import progress, say
from shared.request import CacheAnswer, Job, Place, StoreRequest
from shared.schema import build, parse_set
from shared.service.address import SERVICE, parse_service
from shared.service.client import OPEN, Client, finished
from shared.store.opened import is_store, read_state

POLL_SECONDS: Final = 1.0
SHORT: Final = {"layer": "layers", "hook": "hooks"}
"""Options of the command line, by the setting that they are."""
OPTION: Final = "--request"


def name_service(url: str | None) -> None:
    """Makes a typed --service the service of this process and of those that it starts."""
    if url is not None:
        os.environ[SERVICE] = parse_service(url).url


def parse_request(assignments: Sequence[str], **defaults: Any) -> StoreRequest:
    """The request of `("model=tiny", "hook=mlp_out")`. Values are as in --set; a list may be written with commas.
    Raises UserError, which names what was typed."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, _ = assignment.partition("=")
        if not equals or not name:
            raise UserError(f"{OPTION} {quoted(assignment)}: expected key=value, such as model=pythia-1b")
        key = SHORT.get(name.replace("-", "_"), name.replace("-", "_"))
        (value,) = parse_set([assignment]).values()
        if key in values and not is_list(key):
            raise UserError(f"{OPTION} {name}: is given twice")
        values[key] = (*values.get(key, ()), *as_list(value)) if is_list(key) else value
    labels = {key: f"{OPTION} {key}" for key in values}
    return build(StoreRequest, {**defaults, **values}, labels)


def is_list(key: str) -> bool:
    field = StoreRequest.model_fields.get(key)
    return field is not None and get_origin(field.annotation) is tuple


def as_list(value: Any) -> list[Any]:
    """The entries of `[1, 2]`, `1` or `"resid_post,mlp_out"`."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return value if isinstance(value, list) else [value]


def ask_and_wait(client: Client, request: StoreRequest, follow: bool = False) -> CacheAnswer:
    """The answer once its stores are ready; with `follow`, once the first of them can be followed. Shows the job's
    progress. Raises UserError when the job fails."""
    answer = client.request(request)
    while answer.state != "ready" and answer.job is not None:
        say(waiting_words(answer))
        if follow:
            if can_follow(client, answer):
                return answer
        else:
            with stopping(answer.job), shown_progress(answer.job) as seen:
                client.wait(answer.job, seen=seen)
        answer = client.request(request)
    return answer


def waiting_words(answer: CacheAnswer) -> str:
    """The job that a request waits for, in one line."""
    words = [f"job {answer.job} is {answer.state}"]
    words += [f"{answer.place} before it"] if answer.place else []
    words += [answer.plan.text] if answer.plan and answer.plan.text else []
    words += [f"about {answer.eta_s / 60:.0f} min"] if answer.eta_s else []
    return f"{', '.join(words)}. To see it: sagsae jobs log {answer.job} --follow"


@contextmanager
def stopping(job: int) -> Iterator[None]:
    """Says what Ctrl-C leaves behind. Raises Interrupted."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        raise Interrupted(
            f"stopped waiting; job {job} continues on the service. To wait again, run the same command; to end the "
            f"job: sagsae jobs cancel {job}"
        ) from error


def can_follow(client: Client, answer: CacheAnswer) -> bool:
    """Waits until the store of a job can be followed, and returns True; False when the job is done before that."""
    assert answer.job is not None
    with stopping(answer.job):
        while True:
            job = client.job(answer.job)
            if job.state not in OPEN:
                finished(job)
                return False
            if job.state != "queued" and answer.hookpoints and all_begun(client, answer):
                return True
            time.sleep(POLL_SECONDS)


def all_begun(client: Client, answer: CacheAnswer) -> bool:
    return all(is_store(open_files(location_of(client, place))) for place in answer.hookpoints.values())


@contextmanager
def shown_progress(number: int) -> Iterator[Callable[[Job], None]]:
    """Yields a function that shows a job: a bar once it runs, and a line for every other change."""
    with ExitStack() as stack:
        advance: Callable[[int, str], None] | None = None
        rows, state = 0, "queued"

        def seen(job: Job) -> None:
            nonlocal advance, rows, state
            if job.state != state:
                state = job.state
                say(f"job {number}: {state}" + (f", attempt {job.attempt}" if job.attempt > 1 else ""))
            if advance is None and job.total and job.rows < job.total:
                advance = stack.enter_context(progress(f"job {number}", job.total, "rows"))
            if advance is not None:
                advance(job.rows - rows, job.note)
                rows = job.rows

        yield seen


def chosen_place(answer: CacheAnswer, hook: str | None) -> tuple[str, Place]:
    """The hookpoint's path and place. Raises UserError when `hook` names none, or several, of the answer."""
    names = list(answer.hookpoints)
    matches = [name for name in names if hook is None or name == hook or name.split("/")[-1] == hook]
    if len(matches) == 1:
        return matches[0], answer.hookpoints[matches[0]]
    if not matches:
        raise UserError(f"--hook {hook}: the request has no such hookpoint. It has: {', '.join(names) or 'none'}")
    raise UserError(f"the request has several hookpoints. Say which one with --hook: {', '.join(matches)}")


def place_here(client: Client, place: Place) -> str:
    """Where a store is read from here: its folder, when that is really on this machine, else its URL."""
    location = location_of(client, place)
    if place.file is None or is_remote(place.file) or not Path(place.file).is_absolute():
        return location
    try:
        here = open_files(place.file)
        if is_store(here) and read_state(here)[0] == read_state(open_files(location))[0]:
            return place.file
    except (UserError, DamagedError, OSError):
        return location
    return location


def location_of(client: Client, place: Place) -> str:
    """The URL of a store: at this service, under the address that was given for it, or in a bucket."""
    in_bucket = place.url is not None and place.url.startswith(("s3://", "gs://"))
    return str(place.url) if in_bucket else client.store_url(place.store)
