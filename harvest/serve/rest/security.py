"""Who is calling, and whether the call may come from there.

Three checks come before any endpoint. The Host header must name this server: otherwise a page of another site, whose
name was made to point here (DNS rebinding), could read answers. The Origin header of a browser must be the server's own
where something changes. And where there are tokens, one of them must be given.
"""

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harvest.serve.rest.endpoint import BODY_BYTES, CALLER, Caller, HttpError, Level, TokenBook, too_large
from harvest.serve.rest.errors import error_answer
from shared.errors import UserError

COOKIE: Final = "sagsae_token"
"""The cookie in which a browser keeps the token: out of reach of scripts, and never sent from another site."""
SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")
SHORTEST: Final = 16
TOKEN: Final = re.compile(rf"[!-~]{{{SHORTEST},512}}")
TOKEN_FILE_BYTES: Final = 1 << 16
MAKE_ONE: Final = "Make one with: openssl rand -hex 32"
HEADERS: Final = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
"""Headers of every answer: a page loads nothing from elsewhere and is shown in no frame."""


@dataclass(frozen=True)
class Tokens:
    """The tokens that open the server, as digests: equal ones are found in the same time as others."""

    digests: tuple[tuple[bytes, Level], ...]

    @classmethod
    def of(cls, tokens: Iterable[tuple[str, Level]]) -> "Tokens":
        return cls(tuple((digest(token), level) for token, level in tokens))

    def find(self, token: str) -> Caller | None:
        """The caller that a token stands for. It compares with every token, whichever is right."""
        given = digest(token)
        found = [(known, level) for known, level in self.digests if hmac.compare_digest(known, given)]
        return Caller(f"{found[0][1].name.lower()}-{found[0][0].hex()[:8]}", found[0][1]) if found else None


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def read_tokens(file: Path) -> list[tuple[str, Level]]:
    """The tokens of a file: lines `read:TOKEN`, `ask:TOKEN` or `admin:TOKEN`, or one token alone, which is admin's.
    Raises UserError when other users may read the file, or when a line is none of these."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"--token-file {file}: cannot be read ({error.strerror}). {MAKE_ONE}") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > TOKEN_FILE_BYTES:
            raise UserError(f"--token-file {file}: must be a small text file with a token. {MAKE_ONE}")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise UserError(f"--token-file {file}: other users may read it (mode {mode:04o}). Run: chmod 600 {file}")
        text = os.read(handle, TOKEN_FILE_BYTES).decode("utf-8", "replace")
    finally:
        os.close(handle)
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise UserError(f"--token-file {file}: holds no token. {MAKE_ONE}")
    return [token_of(line, len(lines) == 1, file) for line in lines]


def token_of(line: str, alone: bool, file: Path) -> tuple[str, Level]:
    """The token of one line. A message never repeats it."""
    name, colon, token = line.partition(":")
    levels = {level.name.lower(): level for level in Level if level is not Level.OPEN}
    if not (colon and name in levels):
        name, token = ("admin", line) if alone else ("", "")
    if not name:
        raise UserError(
            f"--token-file {file}: of several tokens, each needs its level: read:, ask: or admin: before it"
        )
    if not TOKEN.fullmatch(token):
        raise UserError(
            f"--token-file {file}: a token must have {SHORTEST} to 512 printable characters without spaces. {MAKE_ONE}"
        )
    return token, levels[name]


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Guard:
    """The ASGI application that lets a request through to `app`, with its Caller, or refuses it."""

    app: ASGIApp
    tokens: TokenBook | None
    """None: no token is needed, because only programs on this machine reach the server."""
    hosts: frozenset[str]
    """Names of the server beside addresses of this machine."""
    any_address: bool
    """Whether the Host header may be any IP address: the server listens beyond this machine."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            scope[CALLER] = self.admit(scope, Headers(scope=scope))
        except HttpError as error:
            await error_answer(error)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def admit(self, scope: Scope, headers: Headers) -> Caller:
        """The caller of a request. Raises HttpError: 400 or 421 for a wrong Host, 403 for another site's page, 413
        for a body that is too long, 401 for a wrong token."""
        self.check_host(headers.getlist("host"))
        check_origin(scope["method"], headers)
        length = headers.get("content-length", "0")
        if len(length) > 18 or int(length) > BODY_BYTES:
            raise too_large(BODY_BYTES)
        client = scope.get("client")
        here = client is not None and is_loopback(client[0]) and not was_forwarded(headers)
        if self.tokens is None:
            return Caller("local", Level.ADMIN, here)
        given = given_token(headers)
        if given is None:
            return Caller("", Level.OPEN, here)
        found = self.tokens.find(given)
        if found is None:
            raise unauthorized("the token is not one of this server's")
        return Caller(found.name, found.level, here)

    def check_host(self, given: list[str]) -> None:
        if len(given) != 1:
            raise HttpError(400, "host", "a request has one Host header, which names the server")
        try:
            name = urlsplit(f"//{given[0]}").hostname or ""
        except ValueError:
            name = ""
        if name in self.hosts or is_loopback(name) or (self.any_address and is_address(name)):
            return
        raise HttpError(
            421, "host", f"Host {given[0][:100]!r}: is no name of this server. Start it with --allow-host NAME for each"
        )


def check_origin(method: str, headers: Headers) -> None:
    """Raises HttpError where a page of another site sends something that changes the state."""
    if method in SAFE_METHODS:
        return
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    own = origin is None or origin.partition("://")[2] == headers.get("host")
    if not own or site not in ("none", "same-origin"):
        raise HttpError(
            403, "origin", "a page of another site must not change anything here. Use the server's own page"
        )


def was_forwarded(headers: Headers) -> bool:
    """Whether a proxy passed the request on: it then only seems to come from this machine."""
    return any(name in headers for name in ("forwarded", "x-forwarded-for", "x-real-ip", "via"))


def is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def given_token(headers: Headers) -> str | None:
    """The token of a request, from its header or its cookie; None where it has none."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return token.strip()
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return None


def unauthorized(what: str) -> HttpError:
    message = f"{what}. Set SAGSAE_TOKEN, or SAGSAE_TOKEN_FILE, to the one that the server's owner gave you"
    return HttpError(401, "unauthorized", message, {"WWW-Authenticate": 'Bearer realm="sagsae"'})


def check_level(caller: Caller, needed: Level) -> None:
    """Raises HttpError: 401 without a token, 403 with one of a lower level."""
    if caller.level >= needed:
        return
    if caller.level is Level.OPEN:
        raise unauthorized("this server needs a token")
    have, need = caller.level.name.lower(), needed.name.lower()
    raise HttpError(403, "forbidden", f"this needs a token of level {need}; yours is of level {have}. Ask for another")
