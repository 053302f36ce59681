"""A stand-in for the Hugging Face hub on this machine: models and datasets, commits, large-file storage on a server of
its own, and faults on request. A test points HF_ENDPOINT at it (`at_hub`)."""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_ThisIsTheSecretOfTheTests"
PAGE = 100
"""Files on a page of a listing."""
LARGE = (".safetensors", ".pt", ".npz")


class HubRepository:
    """One repository: its commits, each with all its files."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = [(hashlib.sha1(os.urandom(8)).hexdigest(), {})]
        self.large: set[str] = set()
        """SHA-256 of what is in large-file storage."""

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)

    def commit(self, changes: dict[str, bytes], deleted: Sequence[str] = ()) -> str:
        content = {path: data for path, data in {**self.files, **changes}.items() if path not in deleted}
        digest = hashlib.sha1(self.head.encode())
        for path in sorted(content):
            digest.update(path.encode() + hashlib.sha1(content[path]).digest())
        self.commits.append((digest.hexdigest(), content))
        return self.head


class Hub(ThreadingHTTPServer):
    """The hub. `cdn` is where large files are: the token must never get there."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.cdn = ThreadingHTTPServer(("127.0.0.1", 0), StorageHandler)
        self.cdn.daemon_threads = True
        self.cdn.hub = self  # type: ignore[attr-defined]
        self.repos: dict[str, HubRepository] = {}
        """By `models/OWNER/NAME` or `datasets/OWNER/NAME`."""
        self.owners = {"tester"}
        """Users and organisations to whose repositories the token may write."""
        self.storage: dict[str, bytes] = {}
        """Large files by SHA-256, committed or not."""
        self.requests: list[str] = []
        self.puts = 0
        self.cut: Callable[[int], bool] = lambda _: False
        """Whether to break off the upload of this number (from 1)."""
        self.before_commit: Callable[[], None] = lambda: None
        self.plain = False
        """Whether it is one of the simple servers: it lists no digests, and gives each file's SHA-256 as its ETag."""
        self.answers: dict[str, Any] = {}
        """Answers that replace the hub's own, by a regular expression for the path: (status, headers, body)."""
        self.bytes_sent = 0
        self.storage_saw: list[str] = []
        """The Authorization headers that the storage was sent."""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def cdn_url(self) -> str:
        return f"http://127.0.0.1:{self.cdn.server_address[1]}"

    @property
    def n_commits(self) -> int:
        """Commits of all repositories, without the first, empty one of each."""
        return sum(len(repo.commits) - 1 for repo in self.repos.values())

    def model(self, name: str) -> HubRepository:
        return self.repos[f"models/{name}"]

    def dataset(self, name: str) -> HubRepository:
        return self.repos[f"datasets/{name}"]

    def add(self, name: str, files: dict[str, bytes]) -> HubRepository:
        """A public model of somebody's; weights are in large-file storage."""
        repo = self.repos.setdefault(f"models/{name}", HubRepository(private=False))
        for path, data in files.items():
            if path.endswith(LARGE):
                digest = hashlib.sha256(data).hexdigest()
                self.storage[digest] = data
                repo.large.add(digest)
        repo.commit(files)
        return repo

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news here."""


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer in one packet: two would wait for each other
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None: ...

    def send(
        self, status: int, body: Any = b"", headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_ranged(self, data: bytes, headers: dict[str, str]) -> int:
        """Answers with a file or the range that was asked for; returns how many bytes that is."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "HEAD" or not asked:
            self.send(200, data, headers)
            return len(data)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first > last:
            self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return 0
        self.send(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})
        return last + 1 - first


class StorageHandler(Answering):
    """Large files, on another server than the hub, as its storage is."""

    def answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        oid = urlsplit(self.path).path.rsplit("/", 1)[-1]
        hub.storage_saw.append(self.headers.get("Authorization", ""))
        hub.requests.append(f"STORAGE {self.command} {oid[:8]} {self.headers.get('Range', '')}".strip())
        if self.command == "PUT":
            self.keep(hub, oid)
        elif oid in hub.storage:
            sent = self.send_ranged(hub.storage[oid], {})
            with hub.lock:
                hub.bytes_sent += sent
        else:
            self.send(404)

    def keep(self, hub: Hub, oid: str) -> None:
        with hub.lock:
            hub.puts += 1
            number = hub.puts
        length = int(self.headers["Content-Length"])
        if hub.cut(number):
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        data = self.rfile.read(length)
        if hashlib.sha256(data).hexdigest() != oid:
            self.send(400)
            return
        hub.storage[oid] = data
        self.send(200)

    do_GET = do_PUT = do_HEAD = answer


class HubHandler(Answering):
    server: Hub

    def answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        for pattern, (status, headers, body) in hub.answers.items():
            if re.search(pattern, f"{self.command} {path}"):
                self.send(status, body, headers)
                return
        sent = self.headers.get("Authorization", "")
        self.signed_in = sent == f"Bearer {TOKEN}"
        if sent and not self.signed_in:
            self.send(
                401,
                {"error": "Invalid credentials"},
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
            return
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                method(self, **{key: value for key, value in found.groupdict().items() if value is not None})
                return
        self.send(404, {"error": "no such page"})

    do_GET = do_POST = do_HEAD = answer

    # who may what

    def repo(self, kind: str, name: str, write: bool = False) -> HubRepository | None:
        """The repository that is asked about; None when an answer was sent already."""
        found = self.server.repos.get(f"{kind}/{name}")
        if found is None or (found.private and not self.signed_in):
            if self.signed_in:
                self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            else:
                self.send(401, {"error": "Invalid username or password."})
            return None
        if write and not (self.signed_in and name.split("/")[0] in self.server.owners):
            self.send(403 if self.signed_in else 401, {"error": "Forbidden"}, {"X-Error-Message": "You may not write"})
            return None
        return found

    def revision(self, kind: str, name: str, revision: str) -> tuple[HubRepository, str, dict[str, bytes]] | None:
        repo = self.repo(kind, name)
        if repo is None:
            return None
        found = repo.at(revision)
        if found is None:
            self.send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, *found

    # reading

    def whoami(self) -> None:
        if self.signed_in:
            self.send(200, {"type": "user", "name": "tester", "orgs": []})
        else:
            self.send(401, {"error": "Invalid username or password."})

    def info(self, kind: str, name: str, revision: str | None = None) -> None:
        if found := self.revision(kind, name, revision or "main"):
            repo, commit, _ = found
            self.send(200, {"id": name, "sha": commit, "private": repo.private, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, kind: str, name: str, revision: str, folder: str = "") -> None:
        if not (found := self.revision(kind, name, revision)):
            return
        repo, commit, files = found
        paths = [path for path in sorted(files) if not folder or path.startswith(f"{folder}/")]
        if folder and not paths:
            self.send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return
        first = int(self.query.get("cursor", ["0"])[0])
        place = f"{self.server.url}/api/{kind}/{name}/tree/{commit}" + (f"/{folder}" if folder else "")
        more = {"Link": f'<{place}?recursive=true&cursor={first + PAGE}>; rel="next"'} if paths[first + PAGE :] else {}
        entries = [listed(repo, path, files[path]) for path in paths[first : first + PAGE]]
        if self.server.plain:
            entries = [{**each, "oid": "0" * 40, "lfs": None} for each in entries]
        self.send(200, entries, more)

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        if found := self.revision(kind, name, revision):
            repo, _, files = found
            paths = parse_qs(self.content.decode()).get("paths", [])
            if self.server.plain:
                self.send(200, {})
                return
            self.send(200, [listed(repo, path, files[path]) for path in paths if path in files])

    def resolve(self, name: str, revision: str, path: str, kind: str = "models") -> None:
        if not (found := self.revision(kind, name, revision)):
            return
        repo, commit, files = found
        if path not in files:
            self.send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        data = files[path]
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{git_blob(data)}"'}
        if self.server.plain:
            self.send(200, data, {"ETag": f'"{digest}"'})
        elif digest in repo.large:
            place = f"{self.server.cdn_url}/storage/{digest}"
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "Location": place}
            self.send(302, b"", headers | linked)
        else:
            sent = self.send_ranged(data, headers)
            with self.server.lock:
                self.server.bytes_sent += sent

    # writing

    def create(self) -> None:
        about = json.loads(self.content)
        owner = about.get("organization") or "tester"
        key = f"{about.get('type', 'model')}s/{owner}/{about['name']}"
        if not self.signed_in or owner not in self.server.owners:
            self.send(403 if self.signed_in else 401, {"error": f"You may not create a repository of {owner}"})
            return
        there = key in self.server.repos
        private = bool(about.get("private")) or about.get("visibility") == "private"
        self.server.repos.setdefault(key, HubRepository(private))
        self.send(409 if there else 200, {"url": f"{self.server.url}/{owner}/{about['name']}", "id": key})

    def yaml(self) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, kind: str, name: str) -> None:
        if self.repo(kind, name, write=True):
            files = json.loads(self.content)["files"]
            self.send(200, {"files": [upload_mode(each) for each in files]})

    def batch(self, name: str, kind: str = "models") -> None:
        if not self.repo(kind, name, write=True):
            return
        objects = []
        for each in json.loads(self.content)["objects"]:
            place = {"href": f"{self.server.cdn_url}/storage/{each['oid']}"}
            new = each["oid"] not in self.server.storage
            objects.append({**each, **({"actions": {"upload": place}} if new else {})})
        self.send(200, {"transfer": "basic", "objects": objects})

    def commit(self, kind: str, name: str) -> None:
        self.server.before_commit()
        repo = self.repo(kind, name, write=True)
        if repo is None:
            return
        lines = [json.loads(line) for line in self.content.splitlines()]
        if lines[0]["value"].get("parentCommit", repo.head) != repo.head:
            self.send(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        changes: dict[str, bytes] = {}
        deleted = [line["value"]["path"] for line in lines[1:] if line["key"] == "deletedFile"]
        if not repo.files.keys() >= set(deleted):
            self.send(400, {"error": "a file to delete is missing"})
            return
        for value in (line["value"] for line in lines[1:] if line["key"] != "deletedFile"):
            large = "oid" in value
            if large and value["oid"] not in self.server.storage:
                self.send(400, {"error": "a large file is missing"})
                return
            changes[value["path"]] = self.server.storage[value["oid"]] if large else base64.b64decode(value["content"])
            repo.large |= {value["oid"]} if large else set()
        commit = repo.commit(changes, deleted)
        self.send(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})


KIND, NAME = r"(?P<kind>models|datasets)", r"(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", HubHandler.whoami),
    (r"POST /api/repos/create", HubHandler.create),
    (r"POST /api/validate-yaml", HubHandler.yaml),
    (rf"GET /api/{KIND}/{NAME}", HubHandler.info),
    (rf"GET /api/{KIND}/{NAME}/revision/{REVISION}", HubHandler.info),
    (rf"GET /api/{KIND}/{NAME}/tree/{REVISION}(/(?P<folder>.+))?", HubHandler.tree),
    (rf"POST /api/{KIND}/{NAME}/paths-info/{REVISION}", HubHandler.paths_info),
    (rf"POST /api/{KIND}/{NAME}/preupload/main", HubHandler.preupload),
    (rf"POST /api/{KIND}/{NAME}/commit/main", HubHandler.commit),
    (rf"POST (/(?P<kind>datasets))?/{NAME}\.git/info/lfs/objects/batch", HubHandler.batch),
    (rf"(GET|HEAD) (/(?P<kind>datasets))?/{NAME}/resolve/{REVISION}/(?P<path>.+)", HubHandler.resolve),
]


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def listed(repo: HubRepository, path: str, data: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    digest = hashlib.sha256(data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
    if digest in repo.large:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()
        entry |= {"oid": git_blob(pointer), "lfs": {"oid": digest, "size": len(data), "pointerSize": len(pointer)}}
    return entry


def upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    """How the hub wants a file: text below 10 MB into the commit, everything else into large-file storage."""
    sample = base64.b64decode(file["sample"])
    large = file["path"].endswith(LARGE) or file["size"] > 10_000_000 or b"\0" in sample
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in (hub, hub.cdn)]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in (hub, hub.cdn):
            server.shutdown()
        for thread in threads:
            thread.join()
        for server in (hub, hub.cdn):
            server.server_close()


def at_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Makes this process, and those that it starts, use a stand-in with the token of the tests."""
    import huggingface_hub.constants
    import huggingface_hub.utils

    for name, value in {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
        "HF_HOME": str(home / "hf"), "SAGSAE_CACHE": str(home / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "hf" / "token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub without repositories, which this process uses."""
    with running_hub() as running:
        at_hub(running, monkeypatch, tmp_path)
        yield running
