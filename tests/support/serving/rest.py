"""The service's application in this process, with a planner that loads no model."""

import asyncio
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.testclient import TestClient
from starlette.types import Message

from harvest.serve.app import make_app, make_service
from harvest.serve.planner import Planner
from harvest.serve.rest.endpoint import Level, Service
from harvest.serve.rest.security import Tokens
from harvest.serve.state import State
from shared.config import ServeConfig
from shared.request import StoreRequest

READ, ASK, ADMIN = (f"{word}-0123456789abcdef" for word in ("read", "ask", "admin"))
TOKENS = Tokens.of([(READ, Level.READ), (ASK, Level.ASK), (ADMIN, Level.ADMIN)])


class ScriptedPlanner(Planner):
    """Says what `plan` returns, and counts."""

    def __init__(self, planning: Callable[[StoreRequest], dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.planning = planning
        self.plans: list[StoreRequest] = []
        self.made: list[str] = []

    async def plan(self, request: StoreRequest, root: Path, device: str) -> dict[str, Any]:  # noqa: ARG002
        assert self.planning is not None, "this test plans nothing"
        self.plans.append(request)
        return self.planning(request)

    async def make(self, root: Path, store: str, settings: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.made.append(store)


def service_of(root: Path, planner: Planner | None = None, **settings: Any) -> Service:
    root.mkdir(parents=True, exist_ok=True)
    config = ServeConfig(root=root, launch="none", **settings)
    return make_service(State.open(root, config.quota_bytes), planner or ScriptedPlanner(), config)


def client_of(service: Service, tokens: Tokens | None = None, token: str | None = None, **options: Any) -> TestClient:
    """A client on loopback. Use it in a `with` block, so that upkeep runs."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    service.tokens = tokens
    app = make_app(service)
    options = {"base_url": "http://127.0.0.1:8642", "client": ("127.0.0.1", 50000), **options}
    return TestClient(app, headers=headers, raise_server_exceptions=True, **options)


def copy_of(store: Path, root: Path, name: str = "s") -> Path:
    """A store's copy in another root."""
    root.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(store, root / name))


def raw_get(client: TestClient, path: str) -> tuple[int, bytes]:
    """Status and body of a GET whose path no library tidies up, decoded as uvicorn decodes it."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": unquote(path), "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"host", b"127.0.0.1:8642")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8642),
    }  # fmt: skip
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type]
    return int(sent[0]["status"]), b"".join(message.get("body", b"") for message in sent[1:])
