"""The bytes of stores over HTTP: which files there are, and which ranges of them."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support.serving.rest import client_of, copy_of, raw_get, service_of
from support.stores import unfinished

from harvest.serve.rest.files import ACCEL, RANGE_BYTES
from shared.store.commits import Commits
from shared.store.manifest import Manifest
from shared.store.opened import Store
from shared.store.shard import crc32
from shared.store.spec import shard_file

SPELLINGS = [
    "../secret", "..%2fsecret", "%2e%2e/secret", "%2e%2e%2fsecret", "..%5csecret", "....//secret", "..//secret",
    "./zarr.json", "%2e/zarr.json", "manifest/../zarr.json", "manifest/%2e%2e/../secret", "//etc/passwd",
    "%2fetc%2fpasswd", "/etc/passwd", "..%00/secret", "zarr.json%00", "zarr.json/", "zarr.json/.", "zarr.json%20",
    "ZARR.JSON", ".lock", ".sagsae-service.db", "..%c0%af..%c0%afsecret", "%252e%252e/secret", "manifest",
    "layer_01", "layer_01/mlp_out/c", "layer_01/mlp_out/c/00/0", "layer_01/mlp_out/c/-1/0", "layer_01/mlp_out/c/0",
    "layer_01/mlp_out/c/99/0", "layer_01/mlp_out/c/0/0/0", "stats/layer_01/mlp_out/c/0/0", "manifest/rank-../x.jsonl",
    "manifest/index.jsonl.tmp", "~root/x", "C:/x", "file:///etc/passwd", "x" * 3000,
]  # fmt: skip


@pytest.fixture(scope="module")
def root(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    copy_of(store.root, folder)
    (folder / "secret").write_text("secret")
    (folder.parent / "secret").write_text("secret")
    return folder


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[TestClient]:
    service = service_of(root)
    with client_of(service) as client:
        yield client
    service.state.close()


def url(path: str) -> str:
    return f"/v1/stores/s/files/{path}"


def everything(store: Path) -> list[str]:
    return sorted(path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file())


def test_every_file_of_a_store_and_nothing_else(client: TestClient, root: Path) -> None:
    (root / "s" / "notes.txt").write_text("mine")
    (root / "s" / "layer_01" / "notes").write_text("mine")
    served = 0
    for path in everything(root / "s"):
        response = client.get(url(path))
        if path.endswith(("notes", "notes.txt", ".lock")):
            assert response.status_code == 404
        else:
            assert response.status_code == 200, path
            assert response.content == (root / "s" / path).read_bytes()
            served += 1
    assert served > 100


@pytest.mark.parametrize("path", SPELLINGS)
def test_a_path_that_leads_out_is_not_found(client: TestClient, path: str) -> None:
    status, body = raw_get(client, url(path))
    assert status == 404, body
    assert json.loads(body)["error"]["code"] == "unknown"


@pytest.mark.parametrize("name", ["..", "%2e%2e", ".", "s%2f..", "nothing", "secret", "s%00", ".jobs", "x" * 300, "é"])
def test_a_store_that_is_none_is_not_found(client: TestClient, name: str) -> None:
    for tail in ("", "/logs", "/manifest", "/files/zarr.json", "/files/secret"):
        assert raw_get(client, f"/v1/stores/{name}{tail}")[0] == 404


def test_a_committed_file_has_its_checksum_for_a_name(client: TestClient, root: Path) -> None:
    path = shard_file("layer_01/mlp_out", 0, True)
    data = (root / "s" / path).read_bytes()
    response = client.get(url(path))
    assert response.headers["etag"] == f'"{crc32(data):08x}"'
    assert "immutable" in response.headers["cache-control"]
    for header in (response.headers["etag"], f'"x", W/{response.headers["etag"]}', "*"):
        again = client.get(url(path), headers={"If-None-Match": header})
        assert (again.status_code, again.content) == (304, b"")
    part = {"Range": "bytes=0-9", "If-Range": response.headers["etag"]}
    assert client.get(url(path), headers=part).status_code == 206
    assert client.get(url(path), headers={**part, "If-Range": '"other"'}).status_code == 200


def test_what_may_change_is_asked_for_again(client: TestClient) -> None:
    for path in ("zarr.json", "record.json", "manifest/index.jsonl"):
        response = client.get(url(path))
        assert response.headers["cache-control"] == "no-cache"
        assert client.get(url(path), headers={"If-None-Match": response.headers["etag"]}).status_code == 304


def test_the_head_of_a_file_is_its_answer_without_the_bytes(client: TestClient) -> None:
    path = shard_file("layer_01/mlp_out", 0, True)
    for headers in ({}, {"Range": "bytes=5-9"}, {"Range": "bytes=5-"}):
        whole, head = client.get(url(path), headers=headers), client.head(url(path), headers=headers)
        assert head.content == b""
        assert head.status_code == whole.status_code
        assert {k: v for k, v in head.headers.items() if k != "date"} == dict(whole.headers)


RANGES = {
    "bytes=0-0": (0, 1), "bytes=0-9": (0, 10), "bytes=5-": (5, None), "bytes=-5": (-5, None),
    "bytes=0-999999999": (0, None), "bytes=-999999999": (0, None), "bytes= 3-4 ": (3, 5), "BYTES=0-1": None,
    "bytes=9-3": None, "bytes=999999999-": None, "bytes=-0": None, "bytes=-": None, "bytes=": None, "bytes": None,
    "bytes=0-1,3-4": None, "bytes=a-b": None, "bytes=0x1-2": None, "bytes=1-2-3": None, "bytes=٣-٤": None,
    "bytes=" + "9" * 40 + "-": None, "items=0-1": (0, None), "": (0, None),
}  # fmt: skip


@pytest.mark.parametrize(("header", "part"), RANGES.items(), ids=lambda value: str(value)[:30])
def test_one_range(client: TestClient, root: Path, header: str, part: tuple[int, int | None] | None) -> None:
    path = shard_file("layer_01/mlp_out", 0, True)
    data = (root / "s" / path).read_bytes()
    response = client.get(url(path), headers={b"Range": header.encode()})
    if part is None:
        assert response.status_code == 416
        assert response.headers["content-range"] == f"bytes */{len(data)}"
        assert "Range" in response.json()["error"]["message"]
        return
    expected = data[slice(*part)]
    assert response.content == expected
    assert response.headers["content-length"] == str(len(expected))
    if header.startswith("bytes"):
        first = len(data) - len(expected) if part[0] < 0 else part[0]
        assert response.status_code == 206
        assert response.headers["content-range"] == f"bytes {first}-{first + len(expected) - 1}/{len(data)}"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.one_of(st.text(), st.from_regex(r"bytes=[0-9 ,\-]{0,12}"), st.binary()))
def test_no_range_breaks_the_server(client: TestClient, root: Path, header: str | bytes) -> None:
    raw = header.encode("utf-8", "replace") if isinstance(header, str) else header
    raw = bytes(byte for byte in raw if byte not in b"\r\n\0")
    path = shard_file("layer_01/mlp_out", 1, True)
    data = (root / "s" / path).read_bytes()
    response = client.get(url(path), headers={b"Range": raw})
    assert response.status_code in (200, 206, 416)
    if response.status_code == 206:
        first, _, rest = response.headers["content-range"].removeprefix("bytes ").partition("-")
        assert response.content == data[int(first) : int(rest.partition("/")[0]) + 1]


def test_a_long_range_is_refused_and_a_long_file_comes_in_pieces(tmp_path: Path, root: Path) -> None:
    """The index of a store of very many shards: no range of it is longer than 8 MiB, but all of it can be read."""
    copy = copy_of(root / "s", tmp_path / "root")
    index = copy / "manifest" / "index.jsonl"
    lines = index.read_bytes()
    index.write_bytes(lines * (RANGE_BYTES // len(lines) + 2))  # the same commits, again and again
    data = index.read_bytes()
    service = service_of(tmp_path / "root")
    with client_of(service) as client:
        assert client.get(url("manifest/index.jsonl")).content == data
        long = client.get(url("manifest/index.jsonl"), headers={"Range": f"bytes=0-{RANGE_BYTES}"})
        assert long.status_code == 416
        assert "8,388,608" in long.json()["error"]["message"]
        most = client.get(url("manifest/index.jsonl"), headers={"Range": f"bytes=1-{RANGE_BYTES}"})
        assert most.content == data[1 : RANGE_BYTES + 1]
        rest = client.get(url("manifest/index.jsonl"), headers={"Range": "bytes=7-"})
        assert (rest.status_code, rest.content) == (206, data[7:])
    service.state.close()


def test_links_are_not_followed(tmp_path: Path, root: Path) -> None:
    copy = copy_of(root / "s", tmp_path / "root")
    (tmp_path / "outside").mkdir()
    for path in ("record.json", shard_file("layer_01/mlp_out", 0, True)):
        (copy / path).rename(tmp_path / "outside" / "file")
        (copy / path).symlink_to(tmp_path / "outside" / "file")
    (copy / "stats").rename(tmp_path / "outside" / "stats")
    (copy / "stats").symlink_to(tmp_path / "outside" / "stats")
    (tmp_path / "root" / "other").symlink_to(copy)
    service = service_of(tmp_path / "root")
    with client_of(service) as client:
        assert client.get(url("record.json")).status_code == 404
        for path in (shard_file("layer_01/mlp_out", 0, True), "stats/layer_01/mlp_out/sum/c/0/0"):
            response = client.get(url(path))
            assert (response.status_code, response.json()["error"]["code"]) == (500, "damaged")
        assert client.get("/v1/stores/other/files/zarr.json").status_code == 404
    service.state.close()


def test_damage_is_said_and_not_served(tmp_path: Path, root: Path) -> None:
    copy = copy_of(root / "s", tmp_path / "root")
    path = shard_file("layer_01/mlp_out", 0, True)
    os.truncate(copy / path, 100)
    (copy / shard_file("layer_01/mlp_out", 1, True)).unlink()
    service = service_of(tmp_path / "root")
    with client_of(service) as client:
        for shard, words in ((0, "has 100 bytes"), (1, "missing")):
            response = client.get(url(shard_file("layer_01/mlp_out", shard, True)))
            assert (response.status_code, response.json()["error"]["code"]) == (500, "damaged")
            assert words in response.json()["error"]["message"]
    service.state.close()


def test_a_store_that_is_being_written_can_be_followed(tmp_path: Path, root: Path) -> None:
    """Its logs are listed and read from where the last look ended; a shard is there once it is committed."""
    copy = copy_of(root / "s", tmp_path / "root")
    log, lines = unfinished(copy)
    log.write_text(lines[0])
    path = shard_file("layer_01/mlp_out", 1, True)
    service = service_of(tmp_path / "root")
    with client_of(service) as client:
        (first,) = client.get("/v1/stores/s/logs").json()
        assert first == {**first, "path": "manifest/rank-00000.jsonl", "size": len(lines[0]), "grows": True}
        assert client.get(url(path)).status_code == 404
        with log.open("a") as file:
            file.write(lines[1])
        (second,) = client.get("/v1/stores/s/logs").json()
        assert second["identity"] == first["identity"]
        assert client.get(url(first["path"]), headers={"Range": f"bytes={first['size']}-"}).text == lines[1]
        assert client.get(url(path)).content == (copy / path).read_bytes()
        head, *commits = client.get("/v1/stores/s/manifest").text.splitlines(keepends=True)
        assert json.loads(head) == json.loads((copy / "zarr.json").read_text())
        assert commits == lines[:2]
    service.state.close()


def test_the_manifest_is_that_of_the_folder(client: TestClient, root: Path) -> None:
    response = client.get("/v1/stores/s/manifest")
    assert response.text.splitlines(keepends=True)[1:] == (root / "s/manifest/index.jsonl").read_text().splitlines(True)
    again = client.get("/v1/stores/s/manifest", headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_manifest_is_read_once(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_of(root / "s", tmp_path / "root")
    service = service_of(tmp_path / "root")
    reads: list[str] = []
    commits = Manifest.commits

    def counted(self: Manifest, final: bool, lenient: bool = False) -> Commits:
        reads.append(self.files.name)
        return commits(self, final, lenient)

    monkeypatch.setattr(Manifest, "commits", counted)
    with client_of(service) as client:
        for _ in range(5):
            assert client.get(url(shard_file("layer_01/mlp_out", 0, True))).status_code == 200
    assert len(reads) == 1
    service.state.close()


def test_nginx_sends_the_bytes_where_it_is_asked_to(tmp_path: Path, root: Path) -> None:
    copy_of(root / "s", tmp_path / "root")
    service = service_of(tmp_path / "root", accel="nginx")
    path = shard_file("layer_01/mlp_out", 0, True)
    with client_of(service) as client:
        response = client.get(url(path), headers={"Range": "bytes=0-9"})
        assert (response.status_code, response.content) == (200, b"")
        assert response.headers["x-accel-redirect"] == ACCEL + quote(f"s/{path}")
        assert "x-accel-redirect" not in client.get(url("../secret")).headers
    service.state.close()


def test_random_paths_lead_nowhere(client: TestClient, root: Path) -> None:
    """Paths made of the parts of real ones: either a file of the store, or 404."""
    random.seed(0)
    real = [path for path in everything(root / "s") if not path.endswith(("notes", "notes.txt", ".lock"))]
    parts = sorted({part for path in real for part in path.split("/")} | {"..", ".", "", "s"})
    for _ in range(300):
        path = "/".join(random.choices(parts, k=random.randint(1, 5)))
        status, body = raw_get(client, url(quote(path)))
        assert status == (200 if path in real else 404), path
        assert status == 404 or body == (root / "s" / path).read_bytes()
