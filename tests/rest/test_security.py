"""Who may ask what of the server: tokens, Host and Origin headers, the limits of a request."""

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from support.command import Sagsae
from support.serving.rest import ADMIN, ASK, READ, TOKENS, client_of, service_of

from harvest.serve.rest.endpoint import Level
from harvest.serve.rest.names import ALLOWED_KEYS
from harvest.serve.rest.security import COOKIE, HEADERS, is_loopback, read_tokens
from shared.errors import UserError
from shared.request import StoreRequest

REQUEST = {"model": "tiny", "hooks": ["mlp_out"], "tokens": 1000}
LEVELS = [
    ("GET", "/v1/stores", Level.READ),
    ("GET", "/v1/stores/s", Level.READ),
    ("GET", "/v1/stores/s/files/zarr.json", Level.READ),
    ("GET", "/v1/jobs", Level.READ),
    ("GET", "/v1/events", Level.READ),
    ("GET", "/metrics", Level.READ),
    ("POST", "/v1/requests", Level.ASK),
    ("POST", "/v1/plan", Level.ASK),
    ("POST", "/v1/jobs/1/cancel", Level.ASK),
    ("POST", "/v1/jobs/1/retry", Level.ASK),
    ("DELETE", "/v1/stores/s", Level.ASK),
    ("PUT", "/v1/stores/s/pins/p", Level.ASK),
    ("DELETE", "/v1/stores/s/pins/p", Level.ASK),
    ("POST", "/v1/stores/s/leases", Level.ASK),
    ("POST", "/v1/stores/s/damage", Level.ASK),
    ("PUT", "/v1/leases/x", Level.ASK),
    ("DELETE", "/v1/leases/x", Level.ASK),
    ("DELETE", "/v1/stores/s?force=true", Level.ADMIN),
    ("POST", "/v1/workers/w/take", Level.ADMIN),
    ("POST", "/v1/jobs/1/beat", Level.ADMIN),
    ("POST", "/v1/jobs/1/end", Level.ADMIN),
]
OF_LEVEL = {Level.OPEN: None, Level.READ: READ, Level.ASK: ASK, Level.ADMIN: ADMIN}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server that needs tokens; the client has none."""
    service = service_of(tmp_path_factory.mktemp("root"))
    with client_of(service, TOKENS) as client:
        yield client
    service.state.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of a server that needs no token."""
    service = service_of(tmp_path_factory.mktemp("root"), allow_host=("cache.lab.example",), max_tokens=5000)
    with client_of(service) as client:
        yield client
    service.state.close()


def bearer(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(("method", "path", "needed"), LEVELS, ids=lambda value: str(value))
def test_each_endpoint_needs_a_token_of_its_level(guarded: TestClient, method: str, path: str, needed: Level) -> None:
    for level, token in OF_LEVEL.items():
        if level >= needed:
            continue
        response = guarded.request(method, path, headers=bearer(token))
        assert response.status_code == (401 if level is Level.OPEN else 403), (level, response.text)
    if path != "/v1/events":  # which never ends
        assert guarded.request(method, path, headers=bearer(OF_LEVEL[needed]), json={}).status_code not in (401, 403)


def test_the_table_of_levels_names_every_endpoint_that_needs_a_token(guarded: TestClient) -> None:
    document = guarded.get("/openapi.json").json()
    needs = {
        (method.upper(), path)
        for path, methods in document["paths"].items()
        for method, one in methods.items()
        if "security" not in one
    }
    shapes = [path.partition("?")[0].split("/") for _, path, _ in LEVELS]
    unnamed = {
        (method, path)
        for method, path in needs
        if not any(
            method == known and fits(path.split("/"), shape)
            for (known, _, _), shape in zip(LEVELS, shapes, strict=True)
        )
    }
    assert unnamed == {
        ("GET", "/v1/stores/{store}/logs"),
        ("GET", "/v1/stores/{store}/manifest"),
        ("GET", "/v1/jobs/{job}"),
        ("GET", "/v1/jobs/{job}/log"),
        ("GET", "/v1/jobs/{job}/events"),
    }


def fits(path: list[str], shape: list[str]) -> bool:
    return len(path) == len(shape) and all(
        part == word or part.startswith("{") for part, word in zip(path, shape, strict=True)
    )


@pytest.mark.parametrize("token", ["", "x", READ + "x", READ[:-1], "Bearer", "é" * 20, "a" * 5000])
def test_a_wrong_token_is_refused_and_never_repeated(guarded: TestClient, token: str) -> None:
    response = guarded.get("/v1/jobs", headers={b"Authorization": b"Bearer " + token.encode()})
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    error = response.json()["error"]
    assert "SAGSAE_TOKEN" in error["message"]
    assert len(token) < 6 or token not in response.text


def test_a_token_counts_as_a_cookie_too(guarded: TestClient) -> None:
    assert guarded.get("/v1/jobs", headers={"Cookie": f"a=b; {COOKIE}={READ}"}).status_code == 200
    assert guarded.get("/v1/jobs", headers={"Cookie": f"{COOKIE}={READ}x"}).status_code == 401


def test_a_browser_keeps_its_token_in_a_cookie(guarded: TestClient) -> None:
    for wrong in (READ + "x", "x", ""):
        assert guarded.post("/login", data={"token": wrong}).status_code == 401
    response = guarded.post("/login", data={"token": f" {READ}"}, follow_redirects=False)
    assert response.status_code == 303
    cookie = response.headers["set-cookie"]
    assert all(part in cookie for part in ("HttpOnly", "SameSite=strict", "Path=/", f"{COOKIE}={READ}"))
    guarded.cookies.clear()
    evil = {"Origin": "http://evil.example"}
    assert guarded.post("/login", data={"token": READ}, headers=evil).status_code == 403
    assert guarded.post("/login", content=b"[]").status_code == 415


def test_health_needs_no_token(guarded: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert guarded.get(path).status_code == 200


def test_every_answer_keeps_a_browser_from_loading_anything_else(guarded: TestClient) -> None:
    for path in ("/healthz", "/nothing", "/v1/jobs"):
        response = guarded.get(path)
        assert {name: response.headers[name] for name in HEADERS} == HEADERS
    assert "default-src 'self'" in HEADERS["content-security-policy"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8642", 200), ("localhost", 200), ("[::1]:8642", 200), ("cache.lab.example", 200),
        ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("10.0.0.7", 421), ("", 421), ("[", 421),
        ("localhost.", 421), ("evil.example@127.0.0.1", 200),
    ],
)  # fmt: skip
def test_a_name_that_is_not_the_servers_is_refused(client: TestClient, host: str, status: int) -> None:
    response = client.get("/v1/jobs", headers={"Host": host})
    assert response.status_code == status, response.text
    if status == 421:
        assert "--allow-host" in response.json()["error"]["message"]


def test_a_server_for_other_machines_is_reached_by_its_address(tmp_path: Path) -> None:
    service = service_of(tmp_path, host="0.0.0.0")
    with client_of(service, TOKENS, READ) as client:
        assert client.get("/v1/jobs", headers={"Host": "10.0.0.7:8642"}).status_code == 200
        assert client.get("/v1/jobs", headers={"Host": "evil.example"}).status_code == 421
    service.state.close()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:9"}, {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
    ],
)  # fmt: skip
def test_a_page_of_another_site_changes_nothing(client: TestClient, headers: dict[str, str]) -> None:
    for method, path in (("POST", "/v1/plan"), ("DELETE", "/v1/stores/s"), ("PUT", "/v1/stores/s/pins/p")):
        response = client.request(method, path, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "origin")
    own = {"Origin": "http://127.0.0.1:8642", "Sec-Fetch-Site": "same-origin"}
    assert client.delete("/v1/stores/s", headers=own).status_code == 404
    assert client.get("/v1/jobs", headers=headers).status_code == 200


def test_a_body_has_a_limit(client: TestClient) -> None:

    def endless() -> Iterator[bytes]:
        yield from [b"x" * 1024] * 65

    for body in (b"x" * (65 << 10), endless()):
        response = client.post("/v1/plan", content=body)
        assert response.status_code == 413
        assert "65,536 bytes" in response.json()["error"]["message"]
    for body in (
        b"",
        b"[]",
        b"1",
        b"{",
        b'{"a": NaN}',
        b"[" * 2000,
        b'{"model": "\\ud800"}',
        b"\xff",
        b'{"a":1,"a":1}',
    ):
        response = client.post("/v1/plan", content=body)
        assert response.status_code == (422 if body == b"" else 400), response.text


PATHS = [
    "/etc/passwd", "../secret", "~/texts", "./here", "a/b/c", "..", ".", "", "a/..", "file:///etc", "C:\\x", "a\x00b",
    "http://example.org/x", "owner/name.gguf", "notes.txt", "owner/data.parquet", "-x/../y", "é/x", "a b", "/", "a/",
    "s3://bucket/x", "$HOME", "x" * 300,
]  # fmt: skip


@pytest.mark.parametrize("place", PATHS)
@pytest.mark.parametrize("key", ["model", "corpus", "tokenizer"])
def test_a_request_names_no_path(client: TestClient, key: str, place: str) -> None:
    for path in ("/v1/requests", "/v1/plan"):
        response = client.post(path, json={**REQUEST, key: place})
        expected = (422, "invalid") if "\0" in place else (403, "not_allowed")
        assert (response.status_code, response.json()["error"]["code"]) == expected, response.text


@pytest.mark.parametrize(
    ("key", "value"),
    [("revision", "../x"), ("corpus_revision", "/x"), ("corpus_config", "../x"), ("corpus_split", "a/b"),
     ("text_field", "/etc")],
)  # fmt: skip
def test_nor_do_its_other_words(client: TestClient, key: str, value: str) -> None:
    assert client.post("/v1/plan", json={**REQUEST, key: value}).status_code == 403


@pytest.mark.parametrize("key", ["out", "name", "overwrite", "device", "allow_nonfinite", "batch_tokens", "shard_rows"])
def test_a_request_has_no_other_settings(client: TestClient, key: str) -> None:
    response = client.post("/v1/plan", json={**REQUEST, key: "x"})
    assert response.status_code == 422
    assert key in response.json()["error"]["fields"]


def test_a_new_setting_of_requests_is_decided_on() -> None:
    """StoreRequest inherits from the settings of a harvest: what is added there is not for everybody by itself."""
    assert set(ALLOWED_KEYS) == set(StoreRequest.model_fields)


def test_too_many_tokens_are_refused(client: TestClient) -> None:
    response = client.post("/v1/plan", json={**REQUEST, "tokens": 5001})
    assert response.status_code == 422
    assert "at most 5,000" in response.json()["error"]["message"]
    response = client.post("/v1/plan", json={"model": "tiny", "corpus": "owner/name"})
    assert response.status_code == 422
    assert "tokens: is needed" in response.json()["error"]["message"]


def token_file(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_a_token_file_names_levels(tmp_path: Path) -> None:
    file = token_file(tmp_path, f"# the lab\nread:{READ}\n\nask:{ASK}\nadmin:{ADMIN}\n")
    assert read_tokens(file) == [(READ, Level.READ), (ASK, Level.ASK), (ADMIN, Level.ADMIN)]
    assert read_tokens(token_file(tmp_path, f"{ADMIN}\n")) == [(ADMIN, Level.ADMIN)]


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        (ADMIN, 0o644, "chmod 600"),
        (ADMIN, 0o640, "chmod 600"),
        ("", 0o600, "holds no token"),
        (f"{ADMIN}\n{ASK}\n", 0o600, "needs its level"),
        ("short", 0o600, "16 to 512"),
        ("read:with space in it 0123456789", 0o600, "16 to 512"),
    ],
)
def test_a_token_file_that_is_none_is_refused(tmp_path: Path, text: str, mode: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        read_tokens(token_file(tmp_path, text, mode))
    assert not text or text not in str(refused.value)


def test_a_host_for_other_machines_needs_a_token(sagsae: Sagsae, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "cache.lab.example"):
        done = sagsae("serve", "--root", tmp_path / "root", "--host", host, "--port", 0)
        assert done.returncode == 2
        assert "--token-file" in done.stderr
        assert not (tmp_path / "root").exists()


def test_what_counts_as_this_machine() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "")))


def test_the_mode_of_a_file_is_what_stat_says(tmp_path: Path) -> None:
    assert stat.S_IMODE(token_file(tmp_path, ADMIN).stat().st_mode) == 0o600
