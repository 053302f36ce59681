"""Files in an object store and behind a web server: against moto, a real S3 server on this machine, and against a
server that misbehaves on request. A fault that passes is got over, one that stays is told; no byte is ever wrong."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import servers
from support.servers import DATA, SIZE, Server

import shared.files.client
import shared.files.connect
from shared.errors import DamagedError, UserError
from shared.files.base import Files
from shared.files.local import LocalFiles
from shared.files.open import open_files
from shared.files.remote import RemoteFiles

moto, front, s3, server, alone = (getattr(servers, n) for n in ("moto", "front", "s3", "server", "alone"))


def pieces(total: int, size: int) -> Iterator[memoryview]:
    """`total` bytes from one buffer that is used again for every piece, as a store's writer may do."""
    buffer = bytearray(size)
    for begin in range(0, total, size):
        n = min(size, total - begin)
        buffer[:n] = expected(begin, n)
        yield memoryview(buffer)[:n]


def expected(offset: int, length: int) -> bytes:
    return (np.arange(offset, offset + length, dtype=np.uint64) * 2654435761 >> 7).astype(np.uint8).tobytes()


def get(files: Files, offset: int, length: int, size: int = SIZE) -> bytes:
    return bytes(files.open("file", size).read(offset, length))


# --- S3: the verbs of Files


def test_s3_keeps_what_a_folder_keeps(s3: RemoteFiles, tmp_path: Path) -> None:
    for files in (s3, LocalFiles(tmp_path / "store")):
        files.write("zarr.json", [b"{", memoryview(b"}")])
        files.write("a/b.1/c", [b"first"])
        files.write("a/b.1/c", [b"second"])
        files.write("empty", [])
        files.write("manifest/index.json", [b"x"])
        assert files.read("zarr.json") == b"{}"
        assert files.read("a/b.1/c") == b"second"
        assert files.read("empty") == b""
        assert files.folders() == ["a", "manifest"]
        assert files.at("a").at("b.1").read("c") == b"second"
        assert files.at("a").name == f"{files.name}/a"
        assert bytes(files.open("a/b.1/c", 6).read(1, 3)) == b"eco"
        assert bytes(files.open("empty", 0).read(0, 0)) == b""
        files.remove("a/b.1/c")
        files.remove("a/b.1/c")
        with pytest.raises(FileNotFoundError):
            files.read("a/b.1/c")
        files.clear(lambda name: name in ("manifest", "zarr.json"))
        assert files.folders() == ([] if files is s3 else ["a"])  # a prefix without objects is none
        assert files.read("empty") == b""
        with pytest.raises(FileNotFoundError):
            files.read("zarr.json")


def test_s3_logs(s3: RemoteFiles) -> None:
    for shard in (17, 3, 100):
        s3.append("manifest/rank-00000.jsonl", b"line %d\n" % shard, shard)
    s3.append("manifest/rank-00001.jsonl", b"other\n", 4)
    s3.write("manifest/rank-00000.json", [b"no log"])
    logs = s3.logs("manifest", "rank-00000")
    assert logs == [f"manifest/rank-00000.{shard:08d}.jsonl" for shard in (3, 17, 100)]
    assert [s3.read(path) for path in logs] == [b"line 3\n", b"line 17\n", b"line 100\n"]
    assert len(s3.logs("manifest", "rank-")) == 4
    assert s3.logs("nowhere", "rank-") == []


def test_a_large_object_goes_up_and_comes_down_in_parts(s3: RemoteFiles, front: Server) -> None:
    size = 2 * shared.files.client.PART_BYTES + 12_345
    s3.write("file", pieces(size, 700_001))
    assert sum("partNumber" in request for request in front.requests) == 3
    front.requests.clear()
    front.faults.extend(["", "kill"])  # of the parts, one is asked for twice
    assert get(s3, 0, size, size) == expected(0, size)
    assert len(front.requests) == 4


def test_a_write_that_fails_leaves_what_was_there(s3: RemoteFiles) -> None:
    def broken(n: int) -> Iterator[bytes]:
        yield from [bytes(1 << 20)] * n
        raise RuntimeError("no more")

    s3.write("file", [b"before"])
    for n in (1, 20):
        with pytest.raises(RuntimeError, match="no more"):
            s3.write("file", broken(n))
        assert s3.read("file") == b"before"


@pytest.mark.parametrize("fault", ["503", "refuse", "drop"])
def test_a_write_gets_over_faults(s3: RemoteFiles, front: Server, fault: str) -> None:
    front.faults.extend([fault, fault])
    s3.write("small", [b"1"])
    front.faults.extend([fault, fault])
    s3.append("log.jsonl", b"2", 0)
    front.faults.extend(["", "", fault, "", fault])  # some of the parts
    size = 3 * shared.files.client.PART_BYTES
    s3.write("file", pieces(size, shared.files.client.PART_BYTES))
    front.faults.extend([fault, fault])
    assert s3.read("small") == b"1"
    assert s3.read("log.00000000.jsonl") == b"2"
    assert get(s3, 0, size, size) == expected(0, size)


@pytest.mark.parametrize("size", [1, 20 << 20])
def test_a_write_says_when_it_gave_up(s3: RemoteFiles, front: Server, size: int) -> None:
    front.always = "503"
    message = (
        r"s3://.*/file: could not be written after 5 tries \(last: .*busy.*503.*\)\. .*; then run the same command"
    )
    with pytest.raises(UserError, match=message), s3.explained():
        s3.write("file", pieces(size, 1 << 20))
    assert len(front.requests) == 5
    front.always = ""
    with pytest.raises(FileNotFoundError):
        s3.read("file")


# --- reading, through faults

PASSING = ["kill", "refuse", "drop", "500", "503", "429", "short", "cut", "shift", "stall"]


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_got_over(server: Server, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(shared.files.connect, "STALL_SECONDS", 0.2)
    files = open_files(server.url + "/bucket")
    server.faults.extend([fault] * 2)
    assert get(files, 1000, 5000) == DATA[1000:6000]
    if fault not in ("short", "cut", "shift"):  # without a range the length and the body must agree
        server.faults.extend([fault] * 2)
        assert files.read("file") == DATA


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_stays_is_told(server: Server, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(shared.files.connect, "STALL_SECONDS", 0.2)
    server.always = fault
    words = {
        "kill": "broke off", "refuse": "broke off", "drop": "broke off", "stall": "took too long",
        "short": "2500 bytes came, 5000 were asked for", "cut": "Requested 1000..6000, got 1000..3500",
        "shift": "Requested 1000..6000, got 1001..6001",
    }.get(fault, fault)  # fmt: skip
    with pytest.raises(UserError, match=rf"/bucket/file: could not be read after 5 tries \(last: .*{words}"):
        get(open_files(server.url + "/bucket"), 1000, 5000)
    if fault not in ("cut", "shift"):  # there the size is asked for, too
        assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("403", r"could not be read: access was refused \(403 Forbidden, SomeCode\).* credentials"),
        ("401", r"could not be read: access was refused \(401 Unauthorized, SomeCode\)"),
        ("400", r"could not be read: the server refused the request \(400 Bad Request, SomeCode\)"),
        ("301", "another region.*AWS_REGION"),
        ("no ranges", "does not support.*byte ranges"),
    ],
)
def test_what_would_not_pass_is_not_tried_again(server: Server, fault: str, message: str) -> None:
    server.always = fault
    with pytest.raises(UserError, match=message):
        get(open_files(server.url + "/bucket"), 1000, 5000)
    assert len(server.requests) == 1


def test_a_file_of_another_length_is_damage(server: Server) -> None:
    files = open_files(server.url + "/bucket")
    for size, offset in ((SIZE + 10, 0), (SIZE - 10, 0), (SIZE + 10, SIZE - 5), (SIZE + 100, SIZE + 10)):
        opened = files.open("file", size)
        with pytest.raises(DamagedError, match=rf"/bucket/file: has {SIZE} bytes, {size} were committed. List all"):
            opened.read(offset, 10)
    with pytest.raises(DamagedError, match="/bucket/gone: is committed but missing"):
        files.open("gone", 10).read(0, 10)
    with pytest.raises(FileNotFoundError):
        files.read("gone")
    server.always = "longer"
    with pytest.raises(DamagedError, match=f"has {SIZE + 1} bytes"):
        get(files, 0, 10)


def test_an_unreachable_server_is_told_soon() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=r"after 5 tries \(last: the server cannot be reached \(Connection refused\)\)"):
        open_files(f"http://127.0.0.1:{port}").read("file")


def test_a_server_that_does_not_answer_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = (
        shared.files.connect.TRIES * shared.files.connect.CONNECT_SECONDS
        + 0.2 * (2 ** (shared.files.connect.TRIES - 1) - 1) * 1.5
    )
    assert limit < 13  # the pauses are 0.2 s, 0.4 s, …, longer or shorter by at most a half
    monkeypatch.setattr(shared.files.connect, "CONNECT_SECONDS", 0.1)
    with closing(socket.socket()) as deaf:  # a full queue: further connections get no answer at all
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(deaf.getsockname())
        files = open_files(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(UserError, match=r"after 5 tries .*cannot be reached.*Check the address"):
            files.read("file")
        assert time.monotonic() - started < 3
        for one in waiting:
            one.close()


def test_many_threads_read_right_bytes_through_faults(server: Server) -> None:
    opened = open_files(server.url + "/bucket").open("file", SIZE)
    assert server.requests == []  # opening costs none
    server.of_each = ("kill", "503", "short")
    offsets = np.random.default_rng(2).integers(0, SIZE - 4096, 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        for offset, data in zip(offsets, pool.map(lambda at: bytes(opened.read(at, 4096)), offsets), strict=True):
            assert data == DATA[offset : offset + 4096]


# --- where from, and who asks


def test_http_is_for_reading_finished_stores(server: Server) -> None:
    server.objects = {"/a%20b/c.d/zarr.json": b"{}", "/a%20b/file": DATA}
    files = open_files(server.url + "/a%20b/")
    assert files.at("c.d").read("zarr.json") == b"{}"
    assert get(files, 7, 5) == DATA[7:12]
    for change in (
        lambda: files.write("x", [b""]), lambda: files.append("x.jsonl", b"", 0), lambda: files.remove("x"),
        files.lock, lambda: files.clear(lambda _: True),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"a%20b: can only be read\. Write to"):
            change()
    with pytest.raises(UserError, match="an unfinished store cannot be read over http"):
        files.logs("manifest", "rank-")
    with pytest.raises(UserError, match="cannot be listed over http"):
        files.folders()


def test_google_storage(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", server.url)
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    files = open_files("gs://bucket")
    server.faults.append("503")
    assert files.read("file") == DATA
    assert get(files, 3, 4) == DATA[3:7]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "ftp:// is not known. Expected a folder, s3://"),
        ("s3:///x", "names no bucket. Expected s3://BUCKET/PATH"),
        ("gs://", "names no bucket"),
        ("https:///x", "names no server. Expected https://SERVER/PATH"),
        ("https://me:secret@host/x", r"^https://host: .*Credentials come from"),
        ("https://host/x?key=secret", "^https://host: "),
        ("http://[host/x", "is not a URL"),
    ],
)
def test_urls_that_cannot_be(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_files(url)


def test_an_endpoint_that_is_no_url_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL=localhost:9000: expected http://HOST:PORT"):
        open_files("s3://bucket")


@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_is_told() -> None:
    files = open_files("s3://no-such-bucket-here/x")
    for use in (
        lambda: files.read("x"), lambda: get(files, 0, 5), lambda: files.write("x", [b"1"]), files.folders,
        lambda: files.write("x", pieces(20 << 20, 1 << 20)), lambda: files.append("x.jsonl", b"", 0),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"there is no such bucket \(404.*Create it, or correct its name"):
            use()


def test_credentials_come_from_the_profile_when_the_environment_has_none(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"s3://bucket: no credentials were found.*AWS_SKIP_SIGNATURE=true for a public"
    ):
        open_files("s3://bucket")
    (tmp_path / "aws_credentials").write_text("[mine]\naws_access_key_id = FROMFILE\naws_secret_access_key = s\n")
    (tmp_path / "aws_config").write_text(f"[profile mine]\nregion = eu-north-1\nendpoint_url = {server.url}\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert open_files("s3://bucket").read("file") == DATA
    assert re.search("Credential=FROMFILE/[0-9]+/eu-north-1/s3", server.authorization)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "FROMENV")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-south-1")
    assert open_files("s3://bucket").read("file") == DATA
    assert re.search("Credential=FROMENV/[0-9]+/eu-south-1/s3", server.authorization)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    assert open_files("s3://bucket").read("file") == DATA
    assert server.authorization == ""
    monkeypatch.setenv("AWS_PROFILE", "another")
    with pytest.raises(UserError, match=r"AWS_PROFILE.*another"):
        open_files("s3://bucket")


# --- the lock


def test_one_writer_at_a_time(s3: RemoteFiles) -> None:
    with s3.lock():
        with pytest.raises(UserError) as caught, s3.lock():
            pass
        for part in (
            f"{s3.name}: process {os.getpid()} on {socket.gethostname()}",
            f"delete the object {s3.name}/.lock",
        ):
            assert part in str(caught.value)
        with s3.at("other").lock():
            pass
    with s3.lock():
        pass
    with pytest.raises(FileNotFoundError):
        s3.read(".lock")


@pytest.mark.parametrize(
    ("change", "taken"),
    [({}, True), ({"host": "elsewhere"}, False), ({"processes": "pid:[1]"}, False), ({"pid": 1}, False)],
)
def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over(
    s3: RemoteFiles, change: dict[str, Any], taken: bool
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    with s3.lock():
        held = json.loads(s3.read(".lock"))
    s3.write(".lock", [json.dumps(held | {"pid": dead.pid} | change).encode()])
    if taken:
        with s3.lock():
            assert json.loads(s3.read(".lock"))["pid"] == os.getpid()
    else:
        with pytest.raises(UserError, match="is writing here"), s3.lock():
            pass
        assert json.loads(s3.read(".lock")) == held | {"pid": dead.pid} | change


def test_a_lock_whose_answer_was_lost_is_held(s3: RemoteFiles, front: Server) -> None:
    front.faults.append("drop")
    with s3.lock():
        assert json.loads(s3.read(".lock"))["pid"] == os.getpid()


def test_of_many_that_find_a_dead_lock_one_gets_it(s3: RemoteFiles) -> None:
    with s3.lock():
        held = json.loads(s3.read(".lock"))
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    s3.write(".lock", [json.dumps(held | {"pid": dead.pid}).encode()])
    done = threading.Barrier(6)

    def take(_: int) -> bool:
        try:
            with s3.lock():
                done.wait(20)
                return True
        except UserError:
            done.wait(20)
            return False

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(take, range(6))) == 1


def test_a_lock_that_another_has_by_now_is_left_alone(s3: RemoteFiles) -> None:
    with s3.lock():
        s3.write(".lock", [b'{"pid": 1, "host": "elsewhere"}'])
    assert s3.read(".lock") == b'{"pid": 1, "host": "elsewhere"}'


# --- the cache


def test_a_range_is_fetched_once(server: Server) -> None:
    def read(size: int = SIZE, crc: int | None = 5, path: str = "file") -> bytes:
        return bytes(RemoteFiles.connect(server.url + "/bucket").open(path, size, crc).read(10, 20))

    assert read() == read() == DATA[10:30]
    assert len(server.requests) == 1
    server.objects["/bucket/other"] = DATA[::-1]
    assert read(crc=6) == DATA[10:30]
    assert read(path="other") == DATA[::-1][10:30]
    assert len(server.requests) == 3  # another content, another file
    assert read(crc=None) == read(crc=None) == DATA[10:30]
    assert len(server.requests) == 5  # a content that has no name is not kept
    with pytest.raises(DamagedError, match="committed"):
        read(size=SIZE + 1)


def test_a_wrong_copy_is_dropped_when_told_and_a_torn_one_at_once(server: Server, tmp_path: Path) -> None:
    opened = open_files(server.url + "/bucket").open("file", SIZE, 5)
    assert opened.read(10, 20) == DATA[10:30]
    (copy,) = (tmp_path / "cache").glob("*.range")
    for torn in (DATA[10:25], b"", DATA[10:31]):
        copy.write_bytes(torn)
        assert opened.read(10, 20) == DATA[10:30]
    assert len(server.requests) == 4
    copy.write_bytes(bytes(20))
    assert opened.read(10, 20) == bytes(20)  # the caller has the checksum
    assert opened.forget(10, 20)
    assert opened.read(10, 20) == DATA[10:30]
    assert len(server.requests) == 5


def test_a_folder_that_cannot_be_written_means_no_cache(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "cache", Path("/dev/full")):
        monkeypatch.setenv("SAGSAE_CACHE", str(folder))
        opened = open_files(server.url + "/bucket").open("file", SIZE, 5)
        assert opened.read(10, 20) == opened.read(10, 20) == DATA[10:30]
        assert capsys.readouterr().err.count("cannot cache fetched data") == 1
