"""`sagsae serve` as a process: what it takes, how it ends, what a kill leaves, what any client can send it."""

import http.client
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.cache import fake_store, spec_of
from support.command import ROOT, Sagsae
from support.processes import children
from support.serving.process import ServerProcess, server_process
from support.serving.rest import ADMIN, ASK, READ

from harvest.reuse.key import store_key
from harvest.serve.database import DATABASE
from shared.store.opened import Store

MODEL = {"model": "tiny", "hooks": ["mlp_out"], "tokens": 20_000, "layers": [1]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("serve") / "root"
    root.mkdir()
    with server_process(root, "--launch", "none", "--quota", "2GB") as server:
        yield server


def ask(server: ServerProcess, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of one request."""
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        line.request(method, path, None if body is None else json.dumps(body), headers)
        response = line.getresponse()
        data = response.read()
        return response.status, json.loads(data) if data.startswith((b"{", b"[")) else data
    finally:
        line.close()


def test_it_starts_soon_and_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    with server_process(tmp_path / "root", "--launch", "none") as server:
        assert ask(server, "GET", "/readyz") == (200, {"status": "ready"})
        mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert "libtorch" not in mapped
        assert "sqlite" in mapped
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        resident = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
        assert resident < 120 << 10
        assert server.stop() == 0
        assert not children(server.process.pid)


@pytest.mark.slow
def test_an_answer_from_nothing_to_a_view(server: ServerProcess, sagsae: Sagsae, tmp_path: Path) -> None:
    """The planner plans a real request; a plain harvest fills the store; a shorter request is linked in line."""
    root = server.root
    status, plan = ask(server, "POST", "/v1/plan", MODEL)
    assert (status, plan["action"]) == (200, "harvest"), plan
    hooks = ("--layer", 1, "--hook", "mlp_out", "--device", "cpu")
    done = sagsae("harvest", "--model", "tiny", *hooks, "--tokens", 40_000, "--out", root, "--name", "large")
    assert done.returncode == 0, done.stderr
    status, found = ask(server, "POST", "/v1/requests", MODEL)
    assert (status, found["hookpoints"]["layer_01/mlp_out"]["store"], found["exact"]) == (200, "large", False)
    status, found = ask(server, "POST", "/v1/requests", {**MODEL, "accept": "exact"}, Prefer="wait=60")
    assert (status, found["state"]) == (200, "ready"), found
    view = Store.open(root / found["hookpoints"]["layer_01/mlp_out"]["store"])
    assert (view.n_rows, view.state) == (20_000, "final")
    done = sagsae("harvest", "--model", "tiny", *hooks, "--tokens", 20_000, "--out", tmp_path, "--name", "fresh")
    assert done.returncode == 0, done.stderr
    fresh = Store.open(tmp_path / "fresh")
    assert store_key(fresh.spec) == store_key(view.spec) == found["key"]
    assert list(view.commits.lines()) == list(fresh.commits.lines())
    status, about = ask(server, "GET", "/v1/stores/large?texts=3")
    assert [isinstance(context["text"], str) for context in about["texts"]["contexts"]] == [True] * 3
    for body, words in (({**MODEL, "model": "pythia-1bb"}, "Did you mean pythia-1b?"), ({**MODEL, "hooks": ["x"]}, "x"),
                        ({**MODEL, "layers": [9]}, "9")):  # fmt: skip
        status, refused = ask(server, "POST", "/v1/requests", body)
        assert (status, refused["error"]["code"]) == (422, "invalid")
        assert words in refused["error"]["message"]


@pytest.mark.slow
def test_an_alias_and_a_copied_folder_are_one_request(tmp_path: Path) -> None:
    """The key follows from the content of a model, not from its name."""
    copy = shutil.copytree(ROOT / "shared" / "tiny", tmp_path / "copy")
    root = tmp_path / "root"
    root.mkdir()
    with server_process(root, "--launch", "none", "--allow-model", f"mine={copy}") as other:
        keys = {ask(other, "POST", "/v1/requests", {**MODEL, "model": name})[1]["key"] for name in ("tiny", "mine")}
        _, jobs = ask(other, "GET", "/v1/jobs")
        assert len(keys) == 1
        assert [job["asked"] for job in jobs["jobs"]] == [2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_seconds(tmp_path: Path, number: int) -> None:
    """Also while an event stream is open and a worker waits for a job."""
    root = tmp_path / "root"
    root.mkdir()
    with server_process(root, "--launch", "none") as server:
        open_lines = []
        for path, method, body in (
            ("/v1/events", "GET", b""),
            ("/v1/workers/w/take?wait=25", "POST", b'{"name": "w"}'),
        ):
            line = socket.create_connection(("127.0.0.1", server.port))
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            line.sendall(head.encode() + body)
            open_lines.append(line)
        assert open_lines[0].recv(100).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        assert server.stop(number) == 0
        assert time.monotonic() - began < 20
        for line in open_lines:
            line.close()
        assert not [line for line in server.errors if "Traceback" in line]


def test_a_second_server_on_the_same_folder_or_port_is_refused(server: ServerProcess, sagsae: Sagsae) -> None:
    root = server.root
    done = sagsae("serve", "--root", root, "--port", 0, "--launch", "none")
    assert done.returncode == 2
    assert "another sagsae serve works in this folder" in done.stderr
    done = sagsae("serve", "--root", root, "--port", server.port, "--launch", "none")
    assert done.returncode == 75
    assert f"--port {server.port}" in done.stderr


def test_a_database_that_is_none_or_newer_is_refused(sagsae: Sagsae, tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / DATABASE).write_bytes(b"no database" * 1000)
    done = sagsae("serve", "--root", tmp_path, "--port", 0, "--launch", "none")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    (tmp_path / DATABASE).unlink()
    with sqlite3.connect(tmp_path / DATABASE) as database:
        database.execute("PRAGMA user_version=99")
    database.close()
    done = sagsae("serve", "--root", tmp_path, "--port", 0, "--launch", "none")
    assert done.returncode == 2
    assert "version 99" in done.stderr


def test_tokens_open_it(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    file = tmp_path / "tokens"
    file.write_text(f"read:{READ}\nask:{ASK}\nadmin:{ADMIN}\n")
    file.chmod(0o600)
    with server_process(tmp_path / "root", "--launch", "none", "--token-file", file) as server:
        assert ask(server, "GET", "/v1/jobs")[0] == 401
        assert ask(server, "GET", "/v1/jobs", Authorization=f"Bearer {READ}")[0] == 200
        assert ask(server, "POST", "/v1/plan", MODEL, Authorization=f"Bearer {READ}")[0] == 403
        ask(server, "GET", "/v1/nothing", Authorization=f"Bearer {READ}x")
        server.stop()
        assert not any(token in line for line in server.errors for token in (READ, ASK, ADMIN))


def raw(server: ServerProcess, data: bytes) -> bytes:
    """What the server sends back for these bytes before it closes, or falls silent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as line:
        found = b""
        try:
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
            while part := line.recv(65536):
                found += part
        except OSError:
            pass
        return found


def test_bytes_that_are_no_request(server: ServerProcess) -> None:
    random.seed(1)
    good = b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX-A: b\r\n\r\n"
    for _ in range(60):
        altered = bytearray(good)
        for _ in range(random.randint(1, 6)):
            altered[random.randrange(len(altered))] = random.randrange(256)
        assert not raw(server, bytes(altered)).startswith(b"HTTP/1.1 5"), bytes(altered)
    for data in (b"\0" * 100_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 50_000, b"GET /" + b"x" * 100_000,
                 b"POST /v1/plan HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
                 b"POST /v1/plan HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n{",
                 b"POST /v1/plan HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n",
                 b"GET /v1/jobs HTTP/1.1\r\n\r\n", b"GET /v1/jobs HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
                 b"GET http://evil/v1/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n"):  # fmt: skip
        assert not raw(server, data).startswith(b"HTTP/1.1 5"), data[:60]
    assert ask(server, "GET", "/healthz")[0] == 200


def test_a_body_that_is_too_long_is_answered(server: ServerProcess) -> None:
    status, found = ask(server, "POST", "/v1/plan", {"model": "x" * (65 << 10)})
    assert (status, found["error"]["code"]) == (413, "too_large")


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_request_loses_nothing(tmp_path: Path) -> None:
    """SIGKILL while requests are answered: what was answered is there afterwards, once, and the database opens."""
    root = tmp_path / "root"
    root.mkdir()
    fake_store(root, "s", spec_of())
    random.seed(5)
    answered: set[int] = set()
    for turn in range(4):
        with server_process(root, "--launch", "none") as server:
            if turn == 0:
                assert ask(server, "POST", "/v1/plan", MODEL)[0] == 200

            def one(number: int, server: ServerProcess = server, turn: int = turn) -> int | None:
                body = {**MODEL, "tokens": 10_000 + number % 5 + 10 * turn}
                try:
                    status, found = ask(server, "POST", "/v1/requests", body)
                except (OSError, http.client.HTTPException):
                    return None
                return int(found["job"]) if status == 202 else None

            with ThreadPoolExecutor(8) as pool:
                jobs = [pool.submit(one, number) for number in range(40)]
                while not any(job.done() for job in jobs):
                    time.sleep(0.01)
                time.sleep(random.random())
                os.kill(server.process.pid, signal.SIGKILL)
                answered |= {found for job in jobs if (found := job.result()) is not None}
    with server_process(root, "--launch", "none") as server:
        _, page = ask(server, "GET", "/v1/jobs?limit=500")
        jobs_there = {job["id"] for job in page["jobs"]}
        assert answered
        assert answered <= jobs_there
        requests = [json.dumps(job["request"], sort_keys=True) for job in page["jobs"]]
        assert len(requests) == len(set(requests))
        assert ask(server, "GET", "/v1/stores")[1]["stores"][0]["id"] == "s"
