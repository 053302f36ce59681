"""Errors as HTTP answers: the command line's own sentence, with a status and a code for programs."""

import sys
import traceback
from collections.abc import Mapping
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from harvest.serve.rest.endpoint import HttpError, answer, wrong_fields
from shared.errors import BusyError, DamagedError, Interrupted, LostError, UserError
from shared.files.local import in_words
from shared.gate import printable
from shared.refusals import RefusedError

RETRY_S: Final = "5"
"""Seconds after which a client may try again what can succeed later."""


def error_answer(error: BaseException) -> Response:
    """The answer to a request that raised an error: `{"error": {"code", "message", "fields"?, …}}`."""
    status, code, headers = status_of(error)
    body: dict[str, Any] = {"code": code, "message": words_of(error)}
    if fields := wrong_fields(error):
        body["fields"] = fields
    if isinstance(error, RefusedError):
        body |= error.fields()
    return answer({"error": body}, status, headers)


def status_of(error: BaseException) -> tuple[int, str, Mapping[str, str]]:
    """Status, code and headers."""
    match error:
        case HttpError():
            return error.status, error.code, error.headers
        case RefusedError():
            later = {"Retry-After": RETRY_S} if error.status in (429, 507) else {}
            return error.status, error.code, later
        case BusyError() | LostError() | Interrupted() | TimeoutError():
            return 503, "busy", {"Retry-After": RETRY_S}
        case UserError():
            return 422, "invalid", {}
        case DamagedError():
            return 500, "damaged", {}
        case OSError():
            return 503, "disk", {"Retry-After": RETRY_S}
        case MemoryError():
            return 503, "memory", {"Retry-After": RETRY_S}
    return 500, "internal", {}


def words_of(error: BaseException) -> str:
    """The sentence for a person. A fault of ours says where its traceback is, and nothing of the machine."""
    if isinstance(error, UserError | DamagedError | LostError | Interrupted):
        return printable(str(error))
    if isinstance(error, OSError) and error.errno is not None:
        return f"the server's disk: {in_words(error)}"
    if isinstance(error, MemoryError):
        return "the server has too little memory for this. Ask for less at once"
    return "the server met a fault of its own. Its log has the traceback: please report it"


async def answer_error(request: Request, error: Exception) -> Response:
    """Starlette's handler of every error that an endpoint raises."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)
    if status_of(error)[1] == "internal":
        print(f"error: {request.method} {printable(request.url.path)[:200]}", file=sys.stderr)  # noqa: T201
        traceback.print_exception(error, file=sys.stderr)
    return error_answer(error)
