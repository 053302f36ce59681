"""Asks the activation cache: `sagsae serve` on this machine or another one."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode

from pydantic import ValidationError

from shared.errors import BusyError, UserError
from shared.gate import quoted
from shared.progress import say
from shared.request import (
    CacheAnswer,
    Job,
    JobPage,
    LeaseGrant,
    LogFile,
    LogPart,
    RequestPlan,
    StorePage,
    StoreRequest,
    StoreRow,
    TakenJob,
    WorkerInfo,
)
from shared.schema import Frozen
from shared.service.address import (
    SERVICE,
    STORE_ID,
    checked_token,
    configured_service,
    environment_token,
    parse_service,
)
from shared.service.exchange import ANSWER_SECONDS, Exchange, json_of
from shared.service.lease import RENEW_SECONDS, Lease

LEASE_SECONDS: Final = 600.0
AWAY_SECONDS: Final = 900.0
"""Seconds for which `wait` bears with a service that is away."""
LONGEST_WAIT: Final = 25.0
"""Seconds for which one request may be held back by the server."""
PLAN_SECONDS: Final = 120.0
"""Seconds for which an answer may wait for the service's plan: a model's configuration, its tokenizer, a corpus."""
PAGES: Final = 10_000
"""Largest number of parts of one list."""
OPEN: Final = ("queued", "running", "verifying")

Message = TypeVar("Message", bound=Frozen)


class Client:
    """A connection to the activation cache.

    Every method sends one request and returns its answer as a model of shared/request.py. Requests that may be repeated
    are tried again for about 20 seconds while the service is away. Errors of all methods:

    * UserError: the service refused the request; the message is its sentence. shared/refusals.py has the kinds.
    * BusyError: the service cannot be reached, is busy or has no space; the same call can succeed later.

    ```python
    from shared.request import StoreRequest
    from shared.service import Client

    with Client("http://127.0.0.1:8642") as cache:
        answer = cache.request(StoreRequest(model="tiny", hooks=("mlp_out",), tokens=100_000))
        if answer.job is not None:
            cache.wait(answer.job)
    ```
    """

    def __init__(self, url: str | None = None, token: str | None = None, timeout: float = ANSWER_SECONDS) -> None:
        """Makes a client; sends nothing.

        url: the address of the service, `http://HOST:PORT`. Default: SAGSAE_SERVICE.
        token: sent to this address only. Default: SAGSAE_TOKEN or the content of SAGSAE_TOKEN_FILE, unless
        SAGSAE_SERVICE names another service.
        timeout: seconds for one answer, beyond the time that the service is asked to wait.
        """
        configured = configured_service()
        address = parse_service(url, "the service's URL") if url else configured
        if address is None:
            raise UserError(f"which service? Give its URL, such as http://127.0.0.1:8642, or set {SERVICE}")
        if token is None and (configured is None or configured.origin == address.origin):
            token = environment_token()
        if token is not None:
            checked_token(token, "the token")
        self.exchange = Exchange(address, token, timeout)

    @classmethod
    def over(cls, exchange: Exchange) -> "Client":
        """A client that uses connections that are there."""
        client = cls.__new__(cls)
        client.exchange = exchange
        return client

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self.exchange.close()

    @property
    def url(self) -> str:
        """The address of the service, without a slash at the end."""
        return self.exchange.address.url

    def store_url(self, store: str) -> str:
        """The URL of a store at this service, as `--store` and `Store.open` take it."""
        return self.exchange.address.store_url(checked_id(store))

    # Requests

    def request(self, request: StoreRequest, wait: float = 0.0) -> CacheAnswer:
        """Asks for activations. Returns the stores that hold them, or the job that makes them; the service may wait
        `wait` seconds (at most 25) for the job. Asking twice makes one job."""
        wait = min(max(wait, 0.0), LONGEST_WAIT)
        headers = {"Prefer": f"wait={wait:.0f}"} if wait else None
        answer = self.exchange.ask("POST", "/v1/requests", asked(request), wait=wait + PLAN_SECONDS, headers=headers)
        return self.checked(CacheAnswer, json_of(answer, self.url))

    def plan(self, request: StoreRequest) -> RequestPlan:
        """Returns what answering a request would take. Queues nothing."""
        answer = self.exchange.ask("POST", "/v1/plan", asked(request), wait=PLAN_SECONDS)
        return self.checked(RequestPlan, json_of(answer, self.url))

    # Stores

    def stores(self, **filters: str | int | None) -> Iterator[StoreRow]:
        """Yields the stores of the catalog. Filters: model, layer, hook, corpus, state, sort."""
        for page in self.pages("/v1/stores", StorePage, filters):
            yield from page.stores

    def store(self, store: str, texts: int = 0) -> Mapping[str, Any]:
        """Returns what a store holds and where it came from, with `texts` decoded contexts."""
        found = self.get(self.store_path(store), texts=texts or None)
        if not isinstance(found, dict):
            raise UserError(f"{self.url}: describes {store} with {quoted(found)} instead of an object")
        return found

    def logs(self, store: str) -> list[LogFile]:
        """Returns the logs of a store's manifest in their present state."""
        found = self.get(f"{self.store_path(store)}/logs")
        if not isinstance(found, list):
            raise UserError(f"{self.url}: lists the logs of {store} as {quoted(found)} instead of a list")
        return [self.checked(LogFile, entry) for entry in found]

    def remove(self, store: str, force: bool = False) -> None:
        """Deletes a store. A leased or pinned one is refused; `force`, for the admin's token, deletes it all the
        same."""
        self.exchange.ask("DELETE", self.store_path(store) + ("?force=true" if force else ""))

    def pin(self, store: str, name: str) -> None:
        """Pins a store under a name, so that it is never evicted."""
        self.exchange.ask("PUT", f"{self.store_path(store)}/pins/{quote(name, safe='')}")

    def unpin(self, store: str, name: str) -> None:
        """Takes a pin off a store."""
        self.exchange.ask("DELETE", f"{self.store_path(store)}/pins/{quote(name, safe='')}")

    # Jobs

    def jobs(self, state: str | None = None) -> Iterator[Job]:
        """Yields the jobs, the newest first; those of one state, when it is given."""
        for page in self.pages("/v1/jobs", JobPage, {"state": state}):
            yield from page.jobs

    def job(self, job: int) -> Job:
        """Returns a job as it is now."""
        return self.checked(Job, self.get(f"/v1/jobs/{job:d}"))

    def log(self, job: int, start: int = 0) -> LogPart:
        """Returns a part of a job's log, from the byte `start`."""
        return self.checked(LogPart, self.get(f"/v1/jobs/{job:d}/log", **{"from": start}))

    def cancel(self, job: int) -> Job:
        """Cancels a job that is queued or running. What it has written stays."""
        return self.post(Job, f"/v1/jobs/{job:d}/cancel")

    def retry(self, job: int) -> Job:
        """Queues a failed or cancelled job again."""
        return self.post(Job, f"/v1/jobs/{job:d}/retry", again=False)

    def wait(self, job: int, every: float = 1.0, seen: Callable[[Job], None] | None = None) -> Job:
        """Returns a job once it is done. `seen` is called with every look. Raises UserError when the job failed or was
        cancelled, BusyError when the service stays away for a quarter of an hour."""
        away_since: float | None = None
        while True:
            try:
                found = self.job(job)
            except BusyError as error:
                if away_since is None:
                    away_since = time.monotonic()
                    say(f"{error}. Trying again for {AWAY_SECONDS / 60:.0f} minutes")
                elif time.monotonic() - away_since > AWAY_SECONDS:
                    raise
            else:
                away_since = None
                if seen is not None:
                    seen(found)
                if found.state not in OPEN:
                    return finished(found)
            time.sleep(every)

    # Leases

    def lease(self, store: str, holder: str, ttl: float = LEASE_SECONDS, every: float = RENEW_SECONDS) -> Lease:
        """Returns a context manager: while its block runs, the store is not evicted. A thread renews the lease every
        `every` seconds; it lapses `ttl` seconds after the last renewal. `holder` says who reads, for people."""
        checked_id(store)
        return Lease(store, lambda: self.take_lease(store, holder, ttl), self.renew, self.release, every)

    def take_lease(self, store: str, holder: str, ttl: float = LEASE_SECONDS) -> LeaseGrant:
        """Takes a lease that nothing renews."""
        return self.post(LeaseGrant, f"{self.store_path(store)}/leases", {"holder": holder[:200], "ttl_s": ttl})

    def renew(self, lease: str) -> None:
        """Renews a lease for its whole time. Raises LapsedError when its time is over."""
        self.exchange.ask("PUT", f"/v1/leases/{quote(lease, safe='')}", {})

    def release(self, lease: str) -> None:
        """Ends a lease."""
        self.exchange.ask("DELETE", f"/v1/leases/{quote(lease, safe='')}")

    # Workers

    def take(self, worker: WorkerInfo, wait: float = LONGEST_WAIT, job: int | None = None) -> TakenJob | None:
        """Takes the next job for a worker, or only `job`; None when there was none for `wait` seconds."""
        path = f"/v1/workers/{quote(worker.name, safe='')}/take?{urlencode({'wait': int(wait), 'job': job or 0})}"
        answer = self.exchange.ask("POST", path, worker.model_dump(mode="json"), wait=wait, again=False)
        return None if answer.status == 204 else self.checked(TakenJob, json_of(answer, self.url))

    def beat(
        self,
        job: int,
        attempt: int,
        rows: int = 0,
        rate: float | None = None,
        note: str = "",
        verifying: bool = False,
    ) -> bool:
        """Says that a job is alive, and whether its bytes are being checked by now. Returns False when the worker is to
        stop it. Raises NotYoursError when the attempt is no longer the worker's."""
        body = {"attempt": attempt, "rows": rows, "rate": rate, "note": note[:500], "verifying": verifying}
        found = json_of(self.exchange.ask("POST", f"/v1/jobs/{job:d}/beat", body), self.url)
        if not isinstance(found, dict) or type(found.get("go_on")) is not bool:
            raise UserError(f"{self.url}: answers a beat with {quoted(found)} instead of go_on")
        return bool(found["go_on"])

    def end(self, job: int, attempt: int, code: int, words: str = "") -> None:
        """Says how a job's command ended: its exit code (negative: the signal) and its last lines."""
        self.exchange.ask("POST", f"/v1/jobs/{job:d}/end", {"attempt": attempt, "code": code, "words": words[-4000:]})

    # Parts

    def get(self, path: str, **query: str | int | None) -> Any:
        """The JSON at a path."""
        return json_of(self.exchange.ask("GET", path + query_string(query)), self.url)

    def post(self, model: type[Message], path: str, body: Any = None, again: bool = True) -> Message:
        answer = self.exchange.ask("POST", path, {} if body is None else body, again=again)
        return self.checked(model, json_of(answer, self.url))

    def pages(self, path: str, model: type[Message], filters: Mapping[str, str | int | None]) -> Iterator[Any]:
        cursor: str | None = None
        for _ in range(PAGES):
            page: Any = self.checked(model, self.get(path, **filters, cursor=cursor))
            yield page
            if page.next is None or page.next == cursor:
                return
            cursor = page.next
        raise UserError(f"{self.url}: lists more than {PAGES:,} pages. Check that sagsae serve answers there")

    def store_path(self, store: str) -> str:
        return f"/v1/stores/{checked_id(store)}"

    def checked(self, model: type[Message], value: Any) -> Message:
        """The answer as a model; members that a newer service adds are left out. Raises UserError when it is none."""
        try:
            return model.model_validate(value, extra="ignore")
        except (ValidationError, RecursionError) as error:
            raise UserError(
                f"{self.url}: the answer is no {model.__name__} ({first_of(error)}). Check that a sagsae serve of this "
                "version answers there"
            ) from error


def finished(job: Job) -> Job:
    """A job that is done. Raises UserError for one that ended otherwise."""
    if job.state == "failed":
        raise UserError(f"job {job.id} failed: {job.error or 'the service does not say why'}")
    if job.state == "cancelled":
        raise UserError(f"job {job.id} was cancelled. To queue it again: sagsae jobs retry {job.id}")
    return job


def asked(request: StoreRequest) -> dict[str, Any]:
    """A request as JSON, without what is not set."""
    return request.model_dump(mode="json", exclude_none=True)


def checked_id(store: str) -> str:
    """A store's id. Raises UserError when it cannot be one."""
    if not STORE_ID.fullmatch(store) or store in (".", ".."):
        raise UserError(f"{quoted(store)}: is no store of a service. `sagsae store ls --service URL` lists them")
    return store


def query_string(query: Mapping[str, str | int | None]) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    return f"?{urlencode(given)}" if given else ""


def first_of(error: ValidationError | RecursionError) -> str:
    """The first mistake of an answer in words, bounded."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    first = error.errors(include_url=False, include_input=False)[0]
    return quoted(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 200)
