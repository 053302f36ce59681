"""The client against a service that is right, wrong, slow, away or hostile."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.processes import until
from support.serving.stub import Reply, ServiceStub, as_json, refusal, serving

from shared.errors import BusyError, UserError
from shared.refusals import LapsedError, NotYoursError, RefusedError, UnknownError
from shared.request import StoreRequest, WorkerInfo
from shared.service import Client, address, exchange

JOB = {
    "id": 7, "state": "running", "action": "harvest", "key": "k", "store": "s", "request": {}, "asked": 1,
    "attempt": 1, "priority": "normal",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's counts, and nothing waits long."""
    for name in (address.SERVICE, address.TOKEN, address.TOKEN_FILE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(exchange, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(exchange, "PATIENCE_SECONDS", 0.2)


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[ServiceStub]:
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def client(stub: ServiceStub) -> Iterator[Client]:
    with Client(stub.url, timeout=2.0) as made:
        yield made


def test_a_request_is_answered_and_what_a_newer_service_adds_is_left_out(client: Client, stub: ServiceStub) -> None:
    place = {"store": "s", "url": f"{stub.url}/v1/stores/s", "shelf": 3}
    stub.on(
        "POST /v1/requests", as_json(200, {"state": "ready", "key": "k", "hookpoints": {"layer_01/mlp_out": place}})
    )
    answer = client.request(StoreRequest(model="tiny", hooks=("mlp_out",), tokens=100))
    assert answer.state == "ready"
    assert answer.hookpoints["layer_01/mlp_out"].store == "s"
    sent = stub.asked[-1].body
    assert (sent["model"], sent["hooks"], sent["tokens"], "corpus" in sent) == ("tiny", ["mlp_out"], 100, False)


def test_lists_are_read_to_their_end(client: Client, stub: ServiceStub) -> None:
    stub.on(r"GET /v1/jobs\?state=running", as_json(200, {"jobs": [JOB], "next": "a&b"}))
    stub.on(r"GET /v1/jobs\?state=running&cursor=a%26b", as_json(200, {"jobs": [{**JOB, "id": 6}]}))
    assert [job.id for job in client.jobs("running")] == [7, 6]


def test_one_connection_serves_many_requests_and_is_replaced_when_it_was_closed(
    client: Client, stub: ServiceStub
) -> None:
    stub.on("GET /v1/jobs/7", as_json(200, JOB))
    connections = set()
    for _ in range(3):
        client.job(7)
        connections.add(client.exchange.idle[0].sock)
    assert len(connections) == 1
    client.exchange.idle[0].sock.shutdown(socket.SHUT_RDWR)  # as a server does that restarts
    assert client.job(7).id == 7


def test_what_the_service_says_is_the_error(client: Client, stub: ServiceStub) -> None:
    stub.on("POST /v1/plan", refusal(422, "invalid", "model: \x1b[31mno\x1b[0m such model.\nGive another"))
    with pytest.raises(RefusedError) as caught:
        client.plan(StoreRequest(model="nothing"))
    assert str(caught.value) == "model: \\x1b[31mno\\x1b[0m such model. Give another"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "unknown", UnknownError),
        (409, "not_yours", NotYoursError),
        (410, "lapsed", LapsedError),
        (418, "tea", RefusedError),
    ],
)
def test_refusals_come_back_as_the_errors_that_they_were(
    client: Client, stub: ServiceStub, status: int, code: str, kind: type[Exception]
) -> None:
    stub.on("POST /v1/jobs/7/beat", refusal(status, code, "no"))
    with pytest.raises(kind, match=r"^no$"):
        client.beat(7, 1, 0)


@pytest.mark.parametrize("status", [429, 503, 507])
def test_what_passes_has_its_own_exit_code(client: Client, stub: ServiceStub, status: int) -> None:
    stub.on("POST /v1/requests", refusal(status, "quota", "the quota of 2 TB is used"))
    with pytest.raises(BusyError, match="quota of 2 TB") as caught:
        client.request(StoreRequest(model="tiny"))
    assert caught.value.exit_code == 75
    tries = len(stub.asked)
    assert tries == 1 if status == 507 else tries > 2, "space does not come back in seconds; a busy service does"


def test_what_may_be_repeated_is_tried_again(client: Client, stub: ServiceStub) -> None:
    answers = iter([refusal(503, "", ""), Reply(200, b"{", length=300), as_json(200, JOB)])
    stub.on("GET /v1/jobs/7", lambda *_: next(answers))
    assert client.job(7).id == 7


def test_a_job_is_not_taken_twice(client: Client, stub: ServiceStub) -> None:
    stub.on(r"POST /v1/workers/w/take\?wait=0.*", refusal(503, "", ""))
    with pytest.raises(BusyError):
        client.take(WorkerInfo(name="w"), wait=0.0)
    assert len(stub.asked) == 1


def test_no_job_is_none(client: Client, stub: ServiceStub) -> None:
    stub.on(r"POST /v1/workers/w/take\?wait=0.*", Reply(204, b""))
    assert client.take(WorkerInfo(name="w"), wait=0.0) is None


def test_a_service_that_is_away_is_named(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        url = server.url
    with pytest.raises(BusyError, match=rf"{url}: the service cannot be reached \(Connection refused\)\. Check"):
        Client(url).job(7)


# Hostile answers


HTML = Reply(200, b"<html>Sign in</html>", {"Content-Type": "text/html"})
WRONG: dict[str, tuple[Reply, str]] = {
    "html": (HTML, "answers with 'text/html' instead of JSON"),
    "no json": (Reply(200, b"{]", {"Content-Type": "application/json"}), "is not JSON"),
    "nan": (Reply(200, b'{"id": NaN}', {"Content-Type": "application/json"}), "NaN, which is not JSON"),
    "deep": (Reply(200, b"[" * 5000, {"Content-Type": "application/json"}), "nested more than|not JSON"),
    "digits": (Reply(200, b'{"id": ' + b"9" * 5000 + b"}", {"Content-Type": "application/json"}), "5,000 digits"),
    "a list": (as_json(200, [JOB]), "the answer is no Job"),
    "a wrong type": (as_json(200, {**JOB, "rows": "many"}), r"the answer is no Job \('rows: .*integer"),
    "a wrong state": (as_json(200, {**JOB, "state": "\x1b[2J"}), "the answer is no Job"),
    "lacking": (as_json(200, {"id": 7}), "the answer is no Job"),
    "huge": (Reply(200, b"", {"Content-Type": "application/json"}, 1 << 60), "announces .* bytes; at most"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_one_sentence(client: Client, stub: ServiceStub, name: str) -> None:
    reply, words = WRONG[name]
    stub.on("GET /v1/jobs/7", reply)
    with pytest.raises(UserError, match=words) as caught:
        client.job(7)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_redirect_is_not_followed(client: Client, stub: ServiceStub, tmp_path: Path) -> None:
    with serving(tmp_path) as other:
        stub.on("GET /v1/jobs/7", Reply(302, b"", {"Location": f"{other.url}/v1/jobs/7"}))
        with pytest.raises(UserError, match="redirect"):
            client.job(7)
        assert other.asked == []


def raw_server(write: Callable[[socket.socket], None]) -> str:
    """A server of one connection, which sends what `write` sends."""
    listening = socket.create_server(("127.0.0.1", 0))

    def work() -> None:
        with listening, listening.accept()[0] as connection:
            connection.recv(65536)
            try:
                write(connection)
            except OSError:
                return

    threading.Thread(target=work, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "ANSWER_BYTES", 1 << 20)

    def write(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
        while True:
            connection.sendall(b" " * 65536)

    with Client(raw_server(write)) as client, pytest.raises(UserError, match="without end"):
        client.exchange.ask("GET", "/v1/jobs/7", most=1 << 20)


@pytest.mark.parametrize("part", ["head", "body"])
def test_an_answer_that_drips_is_given_up(part: str) -> None:
    def write(connection: socket.socket) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head if part == "body" else b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.05)

    started = time.monotonic()
    with Client(raw_server(write), timeout=0.4) as client, pytest.raises(BusyError, match=r"timed out|took too long"):
        client.exchange.ask("GET", "/v1/jobs/7", again=False)
    assert time.monotonic() - started < 2


def test_what_is_no_http_is_away() -> None:
    url = raw_server(lambda connection: connection.sendall(b"SSH-2.0-x\r\n"))
    with Client(url) as client, pytest.raises(BusyError, match="cannot be reached"):
        client.exchange.ask("GET", "/v1/jobs/7", again=False)


# Tokens


def set_token(monkeypatch: pytest.MonkeyPatch, service: str, token: str = "s3cret") -> None:
    monkeypatch.setenv(address.SERVICE, service)
    monkeypatch.setenv(address.TOKEN, token)


def test_the_token_goes_to_the_service_of_the_environment_only(
    monkeypatch: pytest.MonkeyPatch, stub: ServiceStub, tmp_path: Path
) -> None:
    stub.token = "s3cret"
    stub.on(
        "GET /v1/jobs/7", lambda server, asked, _: as_json(200, JOB) if server.token in asked.authorization else HTML
    )
    set_token(monkeypatch, stub.url)
    assert Client().job(7).id == 7
    with serving(tmp_path) as other:
        other.on("GET /v1/jobs/7", as_json(200, JOB))
        Client(other.url).job(7)
        assert [asked.authorization for asked in other.asked] == [""]


def test_a_missing_or_wrong_token_says_which_variable_to_set(
    monkeypatch: pytest.MonkeyPatch, stub: ServiceStub
) -> None:
    stub.token = "s3cret"
    with pytest.raises(UserError, match=rf"needs a token\. Set SAGSAE_SERVICE={stub.url}, and SAGSAE_TOKEN"):
        Client(stub.url).job(7)
    set_token(monkeypatch, stub.url, "another-one")
    with pytest.raises(UserError, match="does not know the token in SAGSAE_TOKEN or SAGSAE_TOKEN_FILE") as caught:
        Client().job(7)
    assert "another-one" not in str(caught.value)


def test_a_token_is_read_from_a_file(monkeypatch: pytest.MonkeyPatch, stub: ServiceStub, tmp_path: Path) -> None:
    file = tmp_path / "token"
    monkeypatch.setenv(address.SERVICE, stub.url)
    monkeypatch.setenv(address.TOKEN_FILE, str(file))
    with pytest.raises(UserError, match=r"SAGSAE_TOKEN_FILE=.*cannot be read \(No such file"):
        Client()
    for data, words in (
        (b"\n", "is empty"),
        (b"two words", "no spaces"),
        (b"x" * 4096, "at most 512"),
        (b"\xff", "letters"),
    ):
        file.write_bytes(data)
        with pytest.raises(UserError, match=words) as caught:
            Client()
        assert "two words" not in str(caught.value)
    file.write_bytes(b"s3cret\n")
    stub.on("GET /v1/jobs/7", as_json(200, JOB))
    Client().job(7)
    assert stub.asked[-1].authorization == "Bearer s3cret"


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8642",
        "ftp://here",
        "http://",
        "http://a:b@here",
        "http://here?x=1",
        "http://here:99999",
        "http://he re",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"the service's URL|URL here has no user"):
        Client(url)


def test_without_an_address_there_is_no_client() -> None:
    with pytest.raises(UserError, match=r"which service.*SAGSAE_SERVICE"):
        Client()


@pytest.mark.parametrize("store", ["../x", "a/b", "..", "", "a b", "x" * 300])
def test_no_other_path_is_asked_for_than_a_stores(client: Client, stub: ServiceStub, store: str) -> None:
    with pytest.raises(UserError, match="is no store of a service"):
        client.remove(store)
    assert stub.asked == []


# Waiting and leases


def test_a_job_is_waited_for_while_the_service_restarts(
    client: Client, stub: ServiceStub, capsys: pytest.CaptureFixture[str]
) -> None:
    away = [refusal(503, "", "")] * 60
    answers = iter([as_json(200, JOB), *away, as_json(200, {**JOB, "rows": 9}), as_json(200, {**JOB, "state": "done"})])
    stub.on("GET /v1/jobs/7", lambda *_: next(answers))
    seen: list[int] = []
    assert client.wait(7, 0.01, lambda job: seen.append(job.rows)).state == "done"
    assert seen == [0, 9, 0]
    assert capsys.readouterr().err.count("Trying again for 15 minutes") == 1


@pytest.mark.parametrize(("state", "words"), [("failed", "job 7 failed: no such hook"), ("cancelled", "jobs retry 7")])
def test_a_job_that_did_not_end_well_is_an_error(client: Client, stub: ServiceStub, state: str, words: str) -> None:
    stub.on("GET /v1/jobs/7", as_json(200, {**JOB, "state": state, "error": "no such hook"}))
    with pytest.raises(UserError, match=words):
        client.wait(7)


def test_a_lease_is_renewed_taken_anew_and_released(client: Client, stub: ServiceStub) -> None:
    with client.lease("s", "me", every=0.01) as lease:
        until(lambda: any(asked.method == "PUT" for asked in stub.asked))
        assert list(stub.leases) == ["lease-0"]
        stub.leases.clear()  # it lapsed
        until(lambda: lease.grant is not None and lease.grant.id == "lease-1")
    assert stub.leases == {}


def test_work_goes_on_while_no_lease_can_be_had(
    stub: ServiceStub, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.on("POST /v1/stores/s/leases", refusal(503, "", "starting"))
    with client.lease("s", "me", every=0.01) as lease:
        until(lambda: lease.failures > 3)
        assert lease.grant is None
        stub.routes.clear()
        until(lambda: "lease-0" in stub.leases)
    assert stub.leases == {}
    assert capsys.readouterr().err.count("has no lease at the moment. starting") == 1


def test_a_lease_that_cannot_be_released_ends_the_block(client: Client, stub: ServiceStub) -> None:
    with client.lease("s", "me"):
        stub.on("DELETE .*", refusal(503, "", ""))
    assert list(stub.leases) == ["lease-0"], "it lapses"
