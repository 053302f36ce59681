"""Where the activation cache is, and the token that it is shown.

The token of SAGSAE_TOKEN or SAGSAE_TOKEN_FILE is sent to one origin only: that of --service or SAGSAE_SERVICE.
"""

import os
import re
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from shared.errors import UserError
from shared.files.base import SERVED, is_served
from shared.gate import quoted

SERVICE, TOKEN, TOKEN_FILE = "SAGSAE_SERVICE", "SAGSAE_TOKEN", "SAGSAE_TOKEN_FILE"
TOKEN_BYTES: Final = 512
TOKEN_SIGNS: Final = re.compile(rf"[\x21-\x7e]{{1,{TOKEN_BYTES}}}")
STORE_ID: Final = re.compile(r"[\w.-]{1,255}", re.ASCII)


class ServiceAddress(NamedTuple):
    """A server, and the path below which it answers, which a reverse proxy may add."""

    secure: bool
    host: str
    port: int
    base: str = ""

    @property
    def origin(self) -> str:
        """Scheme, host and port: `http://127.0.0.1:8642`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = 443 if self.secure else 80
        return f"http{'s' * self.secure}://{host}" + (f":{self.port}" if self.port != usual else "")

    @property
    def url(self) -> str:
        return self.origin + self.base

    def store_url(self, store: str) -> str:
        """The URL at which a store is read."""
        return f"{self.url}{SERVED}{quote(store, safe='')}"


class StoreAddress(NamedTuple):
    """The parts of `URL/v1/stores/ID/HOOKPOINT`."""

    service: ServiceAddress
    store: str
    inside: str
    """The path inside the store; mostly empty."""


def parse_service(url: str, name: str = "--service") -> ServiceAddress:
    """The address that a URL names. Raises UserError, which calls the URL `name`."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as error:
        raise UserError(f"{name}: {quoted(url)} is not a URL ({error})") from error
    if "@" in parts.netloc:
        raise UserError(
            f"{name}: a URL here has no user and no password. Put the token into {TOKEN} or in a file that "
            f"{TOKEN_FILE} names"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(f"{name}: {quoted(url)} is no address of a service. Expected http://HOST:PORT or https://HOST")
    if not re.fullmatch(r"[\w.:%-]{1,255}", parts.hostname, re.ASCII) or not re.fullmatch(r"[\w./~-]*", parts.path):
        raise UserError(f"{name}: {quoted(url)} is no address of a service. Expected http://HOST:PORT or https://HOST")
    secure = parts.scheme == "https"
    return ServiceAddress(secure, parts.hostname, port or (443 if secure else 80), parts.path.rstrip("/"))


def parse_store(location: str) -> StoreAddress | None:
    """The parts of a location when it is a store of a service; None for any other place."""
    if not is_served(location):
        return None
    head, _, tail = location.partition(SERVED)
    store, _, inside = unquote(tail).strip("/").partition("/")
    if not STORE_ID.fullmatch(store) or store in (".", ".."):
        return None
    return StoreAddress(parse_service(head, "--store"), store, inside)


def configured_service() -> ServiceAddress | None:
    """The address in SAGSAE_SERVICE; None without one."""
    url = os.environ.get(SERVICE, "").strip()
    return parse_service(url, SERVICE) if url else None


def token_for(address: ServiceAddress) -> str | None:
    """The token for a server: that of the environment when SAGSAE_SERVICE names the same origin; None for any other
    origin, and without a token. Raises UserError when the token is no token."""
    service = configured_service()
    return environment_token() if service is not None and service.origin == address.origin else None


def environment_token() -> str | None:
    """The token in SAGSAE_TOKEN, or in the file that SAGSAE_TOKEN_FILE names; None without one. Raises UserError when
    it cannot be one. No message repeats it."""
    token, name = os.environ.get(TOKEN, "").strip(), TOKEN
    if not token and (file := os.environ.get(TOKEN_FILE, "").strip()):
        token, name = token_in(Path(file).expanduser()), f"{TOKEN_FILE}={file}"
    return checked_token(token, name) if token else None


def checked_token(token: str, name: str) -> str:
    """The token. Raises UserError when it has characters that no header can carry; the message does not repeat it."""
    if not TOKEN_SIGNS.fullmatch(token):
        raise UserError(f"{name}: expected one token of at most {TOKEN_BYTES} letters, digits and signs, no spaces")
    return token


def token_in(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(TOKEN_BYTES + 64)
    except OSError as error:
        raise UserError(f"{TOKEN_FILE}={file}: cannot be read ({error.strerror}). Write the token into it") from error
    text = data.decode("utf-8", errors="replace").strip()
    if not text:
        raise UserError(f"{TOKEN_FILE}={file}: is empty. Write the token into it")
    return text
