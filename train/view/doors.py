"""Who may ask: the Host header must be this server's (DNS rebinding), a question must come from its own page, with its
key. Nothing allows another origin to read an answer (CORS)."""

import hmac
from email.message import Message
from typing import Final

SELF: Final = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
HEADERS: Final = {
    "Content-Security-Policy": f"{SELF}base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every answer: a page loads nothing from elsewhere, whatever its folder holds, and is shown in no frame."""
BODY_BYTES: Final = 1 << 17
"""Bytes of a question, at most."""


class Refusal(Exception):
    """A request that is not answered: a status, and one sentence."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status, self.words = status, words


def check_host(headers: Message, port: int) -> None:
    """Raises Refusal 403 where the Host header is not this server's."""
    given = headers.get_all("host", [])
    if given not in ([f"127.0.0.1:{port}"], [f"localhost:{port}"]):
        name = given[0][:100] if given else ""
        raise Refusal(403, f"Host {name!r} is no name of this server. Open the address that sagsae view printed")


def check_question(headers: Message, key: str) -> int:
    """Returns the length of a question's body. Raises Refusal: 403 for another site's page or a wrong key, 411 and 413
    for the length, 415 for a body that is no JSON."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if (origin is not None and origin != f"http://{headers['host']}") or site not in ("none", "same-origin"):
        raise Refusal(403, "a page of another site must not ask this server")
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode()):
        raise Refusal(403, "the key is missing or not this server's. Open the address that sagsae view printed")
    if headers.get_content_type() != "application/json":
        raise Refusal(415, "a question is JSON: send Content-Type: application/json")
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not (length.isascii() and length.isdecimal()):
        raise Refusal(411, "a question has a Content-Length")
    if len(length) > 9 or int(length) > BODY_BYTES:
        raise Refusal(413, f"a question has at most {BODY_BYTES:,} bytes")
    return int(length)
