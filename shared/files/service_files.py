"""The files of a store that an activation cache serves (`sagsae serve`), at `URL/v1/stores/ID`. Read-only.

Unlike a plain web server, the service lists the logs of a store that is being written, so that it can be followed. Its
answers are not trusted: every length is a limit, no redirect is followed, and what is committed is checked by its
crc32. The token goes to the service that SAGSAE_SERVICE or --service names, and to no other.
"""

import os
import re
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final
from urllib.parse import quote

from shared.errors import DamagedError, UserError
from shared.files.base import Files, LogMark, most_bytes, too_large
from shared.files.cache import RangeCache
from shared.files.client import PART_BYTES, ObjectClient
from shared.files.handles import VERIFY, Buffer
from shared.files.remote import RemoteFiles
from shared.gate import BadData, passed, quoted, safe_path
from shared.refusals import UnknownError
from shared.service.address import StoreAddress, parse_store, token_for
from shared.service.client import Client
from shared.service.exchange import Exchange, ServiceAnswer

READ_SECONDS: Final = 300.0
"""Timeout of one part of a file, as long as bytes keep coming."""
PATIENCE_SECONDS: Final = 60.0
"""Seconds for which a read waits for a service that is away, such as one that is restarted."""
MOST_LOGS: Final = 1 << 20
RANGE: Final = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")


class ServiceObjects(ObjectClient):
    """The files of one store, by key: the path inside the store. Reads only."""

    def __init__(self, address: StoreAddress, exchange: Exchange) -> None:
        self.exchange = exchange
        self.where = address.service.store_url(address.store)
        self.path = f"{self.where.removeprefix(address.service.url)}/files"
        self.read_only = True

    def get(self, key: str, name: str, most: int) -> tuple[bytes, Any]:
        return self.get_from(key, name, 0, most), None

    def get_from(self, key: str, name: str, offset: int, most: int) -> bytes:
        """Returns a file from `offset` to its end, in parts. Raises FileNotFoundError; DamagedError, before the part is
        read, when the file has more than `most` bytes."""
        data = bytearray()
        while True:
            answer, first, total = self.part(key, name, offset + len(data), PART_BYTES)
            if total > most:
                raise too_large(name, total, most)
            data += answer.body
            if answer.status == 416 or first + len(answer.body) >= total:
                return bytes(data)

    def get_range(self, key: str, name: str, offset: int, length: int, check: Callable[[int], None]) -> Buffer:
        answer, _, total = self.part(key, name, offset, length)
        check(total)
        if len(answer.body) != length:
            raise DamagedError(f"{name}: {len(answer.body)} bytes came, {length} were asked for. {VERIFY}")
        return answer.body

    def part(self, key: str, name: str, offset: int, length: int) -> tuple[ServiceAnswer, int, int]:
        """Bytes from `offset` on, at most `length`: the answer, its first byte, and the length of the whole file."""
        headers = {"Accept": "*/*", "Range": f"bytes={offset}-{offset + length - 1}"}
        try:
            answer = self.exchange.ask(
                "GET", f"{self.path}/{quote(key)}", most=length, headers=headers, fine=(404, 416)
            )
        except UnknownError as error:
            raise FileNotFoundError(f"{name}: is not there") from error
        if answer.status == 404:
            raise FileNotFoundError(f"{name}: is not there")
        found = RANGE.fullmatch(answer.headers.get("content-range", ""))
        if found is None or (answer.status == 206) != (found[1] is not None):
            raise UserError(
                f"{name}: the answer has no range of bytes (status {answer.status}). Check that sagsae serve answers "
                f"at {self.exchange.address.url}"
            )
        came = len(answer.body)
        if answer.status == 206 and (not came or (int(found[1]), int(found[2]) + 1) != (offset, offset + came)):
            raise UserError(f"{name}: bytes {found[1]}-{found[2]} came, others were asked for. Check the server")
        return answer, offset, int(found[3])


class ServiceFiles(RemoteFiles):
    """The files of one store, or of a folder in it."""

    client: ServiceObjects

    @classmethod
    def connect(cls, url: str) -> "ServiceFiles":
        """The files at `URL/v1/stores/ID[/FOLDER]`; sends nothing. Raises UserError when the URL is no such place."""
        address = parse_store(url)
        if address is None:
            raise UserError(f"{quoted(url)}: is no store of a service. Expected http://HOST:PORT/v1/stores/ID")
        exchange = Exchange(address.service, token_for(address.service), READ_SECONDS, PATIENCE_SECONDS)
        return cls(ServiceObjects(address, exchange), address.inside, url.rstrip("/"), RangeCache.of_user())

    def at(self, path: str) -> Files:
        return ServiceFiles(self.client, *self.place(path), self.cache)

    def marks(self, folder: str, prefix: str) -> dict[str, LogMark]:
        """The service's list of logs, each with its present state."""
        marks: dict[str, LogMark] = {}
        with passed(self.name, "Check the service"):
            for entry in self.service().logs(self.client.where.rpartition("/")[2]):
                path = safe_path(entry.path)
                if entry.size < 0 or len(marks) > MOST_LOGS:
                    raise BadData("the service's list of logs is none")
                if path.startswith(f"{folder}/{prefix}") and path.endswith(".jsonl"):
                    marks[path] = LogMark(entry.identity, entry.size, entry.grows)
        return dict(sorted(marks.items()))

    def read_from(self, path: str, offset: int) -> bytes:
        return self.client.get_from(*self.place(path), offset, most_bytes(path))

    def folders(self) -> list[str]:
        raise UserError(f"{self.name}: its folders are not listed. Name the store itself")

    def reading(self) -> AbstractContextManager[Any]:
        """A lease: the service does not evict the store while it is read here."""
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        return self.service().lease(self.client.where.rpartition("/")[2], holder)

    def at_work(self) -> bool | None:
        """Whether a job of the service is to write the store."""
        try:
            writing = {row.id: row.job for row in self.service().stores(state="writing")}
        except UserError:
            return None
        name = self.client.where.rpartition("/")[2]
        return writing[name] is not None if name in writing else None

    def service(self) -> Client:
        return Client.over(self.client.exchange)
