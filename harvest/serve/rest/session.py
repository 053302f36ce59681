"""A browser's way to show its token: a cookie that no script can read, and that no other site's page sends along."""

from typing import Any, Final
from urllib.parse import parse_qs

from starlette.responses import RedirectResponse, Response

from harvest.serve.rest.endpoint import Endpoint, HttpError, Level, RestCall, no_content, parse_body, read_body
from harvest.serve.rest.security import COOKIE, unauthorized
from shared.schema import Frozen

FORM: Final = "application/x-www-form-urlencoded"
SECONDS: Final = 30 * 24 * 3600
"""Seconds for which a browser keeps the token."""


class SessionBody(Frozen):
    """The token that a person typed."""

    token: str


async def open_session(call: RestCall) -> Response:
    """POST /session"""
    data = await read_body(call.request)
    is_form = call.request.headers.get("content-type", "").partition(";")[0].strip().lower() == FORM
    token = form_token(data) if is_form else token_in(parse_body(data, SessionBody))
    if call.service.tokens is None:
        raise HttpError(409, "no_tokens", "this server needs no token: it answers programs on its machine alone")
    if call.service.tokens.find(token) is None:
        raise unauthorized("the token is not one of this server's")
    response = RedirectResponse("/", 303) if is_form else no_content()
    secure = call.request.url.scheme == "https"
    response.set_cookie(COOKIE, token, SECONDS, path="/", secure=secure, httponly=True, samesite="strict")
    return response


async def close_session(call: RestCall) -> Response:
    """DELETE /session"""
    del call
    response = no_content()
    response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return response


def token_in(body: Any) -> str:
    assert isinstance(body, SessionBody)
    return body.token.strip()


def form_token(data: bytes) -> str:
    """The field `token` of a form."""
    try:
        return parse_qs(data.decode(), max_num_fields=10).get("token", [""])[0].strip()
    except ValueError as error:
        raise HttpError(400, "not_json", "the form cannot be read. Send the field token") from error


ENDPOINTS: Final = (
    Endpoint(
        "POST", "/session", open_session, Level.OPEN,
        "Keep a token in a cookie, for a browser. The body is JSON, {token}, or a form.",
        answers={204: None, 303: None}, errors=(400, 401, 409, 413, 422),
    ),
    Endpoint("DELETE", "/session", close_session, Level.OPEN, "Delete the cookie.", answers={204: None}),
)  # fmt: skip
