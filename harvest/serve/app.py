"""The activation cache over HTTP: the application, and the process that serves it."""

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from harvest.serve.children import EmbeddedWorkers
from harvest.serve.pages import Pages
from harvest.serve.planner import Planner
from harvest.serve.rest import health, jobs, stores, workers
from harvest.serve.rest.endpoint import (
    CALLER,
    Caller,
    Endpoint,
    HttpError,
    Level,
    RestCall,
    Service,
    TokenBook,
    answer,
    parse_body,
    read_body,
)
from harvest.serve.rest.errors import answer_error, error_answer
from harvest.serve.rest.events import Announcer
from harvest.serve.rest.files import FileRoutes
from harvest.serve.rest.names import AllowedNames
from harvest.serve.rest.open_stores import OpenStores
from harvest.serve.rest.openapi import openapi_document
from harvest.serve.rest.requests import RequestRoutes
from harvest.serve.rest.security import Guard, Tokens, check_level, is_loopback, read_tokens
from harvest.serve.slurm.workers import SlurmWorkers, name_for_nodes
from harvest.serve.state import State
from shared.config import ServeConfig
from shared.errors import BusyError, UserError
from shared.progress import say
from shared.record import version

SWEEP_S: Final = 1.0
"""Seconds between two looks for attempts and leases whose time is over."""
CLOSING_S: Final = 5
"""Seconds that open connections have to end."""
KEEP_ALIVE_S: Final = 30
HEADER_BYTES: Final = 16 << 10
CONNECTIONS: Final = 1024


def all_endpoints(requests: RequestRoutes) -> tuple[Endpoint, ...]:
    """Every endpoint, in the order of the reference."""
    return (
        *requests.endpoints(),
        *stores.StoreRoutes().endpoints(),
        *FileRoutes().endpoints(),
        *jobs.ENDPOINTS,
        *workers.ENDPOINTS,
        *health.ENDPOINTS,
    )


def rest_document() -> dict[str, Any]:
    """The OpenAPI document of this version."""
    return openapi_document(all_endpoints(RequestRoutes(AllowedNames({}, {}))), version("sagsae") or "0")


def make_service(state: State, planner: Planner, config: ServeConfig, tokens: TokenBook | None = None) -> Service:
    """What the endpoints work with. `tokens` open the server; without any, every caller is an admin."""
    root = config.root.resolve()
    return Service(state, planner, config, root, OpenStores(root), Announcer(), tokens)


def make_app(service: Service) -> Guard:
    """The application: the REST interface and the pages."""
    config = service.config
    requests = RequestRoutes(AllowedNames.of(config))
    endpoints, pages = all_endpoints(requests), Pages(service, requests)
    document = openapi_document(endpoints, version("sagsae") or "0")

    async def show_document(request: Request) -> Response:  # noqa: ARG001 (Starlette's signature)
        return answer(document)

    routes: list[BaseRoute] = [route_of(service, one) for one in endpoints]
    routes.append(Route("/openapi.json", show_document))
    routes += pages.routes()
    handlers: dict[Any, Any] = {HTTPException: answer_http_error, Exception: answer_error, UserError: answer_error}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lambda app: upkeep(service, pages))  # noqa: ARG005
    names = frozenset({config.host, *config.allow_host, *name_for_nodes(config)})
    return Guard(app, service.tokens, names, not is_loopback(config.host))


def route_of(service: Service, one: Endpoint) -> Route:
    """The route of an endpoint: level, body, handler, and one answer for every error."""

    async def respond(request: Request) -> Response:
        try:
            caller: Caller = request.scope[CALLER]
            check_level(caller, one.level)
            body = parse_body(await read_body(request), one.body) if one.body else None
            response = await one.handler(RestCall(service, request, caller, body))
        except Exception as error:
            response = await answer_error(request, error)
        answers = service.counters.answers
        answers[response.status_code] = answers.get(response.status_code, 0) + 1
        return response

    return Route(one.path, respond, methods=[one.method])


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such path, no such method."""
    assert isinstance(error, HTTPException)
    codes = {404: "unknown", 405: "method"}
    words = {404: "there is nothing at this path", 405: f"{request.method} is no method of this path"}
    message = f"{words.get(error.status_code, error.detail)}. GET /openapi.json lists what there is"
    code = codes.get(error.status_code, "http")
    return error_answer(HttpError(error.status_code, code, message, error.headers))


@contextlib.asynccontextmanager
async def upkeep(service: Service, pages: Pages) -> AsyncIterator[None]:
    """Keeps the state up to date while the application runs."""
    service.announcer.loop = asyncio.get_running_loop()
    unlisten = service.state.listen(service.announcer.heard)
    sweeping = asyncio.create_task(sweep(service))
    try:
        yield
    finally:
        unlisten()
        service.announcer.close()
        pages.close()
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
        await service.planner.close()


async def sweep(service: Service) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        try:
            await to_thread.run_sync(service.state.sweep)
        except Exception as error:  # of the disk, mostly: the next time may be better
            say(f"upkeep: {error}")


# the process


def serve(config: ServeConfig, started: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. `started` is called with the URL once the server answers. Raises UserError for
    what is wrong with the configuration, BusyError when the port is taken."""
    tokens = read_tokens(config.token_file) if config.token_file is not None else None
    if tokens is None and not is_loopback(config.host):
        raise UserError(
            f"--host {config.host}: other machines reach this address, so a token is needed. Give --token-file FILE; "
            "make one with: (umask 077; openssl rand -hex 32 > token)"
        )
    AllowedNames.of(config)
    with contextlib.closing(listening(config.host, config.port)) as listener:
        config.root.mkdir(parents=True, exist_ok=True)
        state = State.open(config.root.resolve(), config.quota_bytes)
        try:
            asyncio.run(Process(config, state, tokens or [], listener).run(started))
        finally:
            state.close()


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises BusyError when the port is taken, UserError when the address is none of ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host}: is no address of this machine ({error.strerror})") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(CONNECTIONS)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE or isinstance(error, PermissionError):
            raise BusyError(
                f"--port {port}: cannot be listened on ({error.strerror}). Stop what uses it, or give another one"
            ) from error
        raise UserError(f"--host {host}: is no address of this machine ({error.strerror})") from error
    return listener


class ListeningServer(uvicorn.Server):
    """uvicorn, which leaves signals to `Process`: its workers end first, while the server still answers them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


class Process:
    """The server, its planner and its workers."""

    def __init__(
        self, config: ServeConfig, state: State, tokens: list[tuple[str, Level]], listener: socket.socket
    ) -> None:
        self.config, self.listener = config, listener
        self.planner = Planner()
        host, port = listener.getsockname()[:2]
        self.url = url_of(host, port)
        self.workers = workers_of(config, state, host, port)
        own = [(self.workers.token, Level.ADMIN)] if self.workers else []
        self.service = make_service(state, self.planner, config, Tokens.of([*tokens, *own]) if tokens else None)
        app = make_app(self.service)
        self.server = ListeningServer(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                http="h11",
                ws="none",
                h11_max_incomplete_event_size=HEADER_BYTES,
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSING_S,
            )
        )

    async def run(self, started: Callable[[str], None]) -> None:
        """Serves until a signal comes, then ends the workers, the connections and the planner, in this order."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.signalled, stop)
        serving = asyncio.create_task(self.server.serve(sockets=[self.listener]))
        while not self.server.started and not serving.done():
            await asyncio.sleep(0.01)
        if self.server.started:
            started(self.url)
            warming = asyncio.create_task(self.planner.warm())
            if self.workers:
                self.workers.start()
            await asyncio.wait([serving, asyncio.create_task(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
            warming.cancel()
        if self.workers:
            await self.workers.stop()
        self.service.announcer.close()
        self.server.should_exit = True
        await serving

    def signalled(self, stop: asyncio.Event) -> None:
        """A first signal ends gently. A second one does not wait for the workers."""
        if stop.is_set() and self.workers:
            self.workers.kill()
        elif self.workers:
            say("stopping: workers commit what they have; once more to stop at once")
        stop.set()


def workers_of(config: ServeConfig, state: State, host: str, port: int) -> EmbeddedWorkers | SlurmWorkers | None:
    """The workers that the server starts. Raises UserError when Slurm cannot be used."""
    match config.launch:
        case "local":
            return EmbeddedWorkers(config, url_of(reachable(host), port))
        case "slurm":
            return SlurmWorkers(config, state, port)
    return None


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reachable(host: str) -> str:
    """The address at which a program on this machine reaches a server that listens on all of them."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
