"""A server of `sagsae view` inside the test, and a client that speaks to it as a browser does, or does not."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from shared.model.language_model import LanguageModel
from train.view.live import LiveModel
from train.view.server import ServedPage, ViewServer


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def sentence(self) -> str:
        """What an answer that refuses says."""
        found: str = json.loads(self.body)["error"]
        return found


@dataclass(frozen=True)
class ViewClient:
    """Asks a server."""

    server: ViewServer

    @property
    def own(self) -> dict[str, str]:
        """The headers that its page sends."""
        return {"Authorization": f"Bearer {self.server.key}", "Content-Type": "application/json"}

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        connection = HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Reply(answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()})
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, None, headers)

    def ask(self, what: str, question: Any) -> Reply:
        return self.send("POST", f"/api/{what}", json.dumps(question).encode(), self.own)


@contextmanager
def viewing(folder: Path, live: LiveModel | None, missing: str = "") -> Iterator[ViewClient]:
    """Serves a page while the block runs."""
    with ViewServer(ServedPage(folder, live, missing), 0) as server, server.serving():
        yield ViewClient(server)


@contextmanager
def slowed(model: LanguageModel, seconds: float) -> Iterator[list[float]]:
    """Makes a language model take its time while the block runs. Yields when each pass began."""
    passes: list[float] = []

    def logits(*arguments: Any) -> Tensor:
        passes.append(time.monotonic())
        time.sleep(seconds)
        return LanguageModel.logits(model, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "logits", logits)
        yield passes
