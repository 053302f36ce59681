"""Running the command line, and what it prints: a result as text or JSON, an error as one message and an exit code."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer

from shared.command.parent import end_with_parent
from shared.command.streams import settle_streams
from shared.launch import is_helper, wait_briefly


def show(document: Any, as_json: bool, text: Callable[[], object]) -> None:
    """Prints what a command returned: a document of JSON, or the text for people."""
    if as_json:
        from shared.record import to_json

        typer.echo(to_json(document, default=str))
    else:
        text()


def agrees(question: str) -> bool:
    """Asks on the terminal. An input that ends (Ctrl-D), or that is not there, is a no."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        typer.echo(err=True)
        return False


def run_app(app: Callable[[], object]) -> None:
    """Runs the command line: every error that a person can mend becomes one message and its exit code."""
    from shared.device import heed_quota
    from shared.errors import DamagedError, Interrupted, LostError, UserError
    from shared.gate import printable

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signal module's signature)
        raise Interrupted("stopped. To continue, run the same command again")

    settle_streams()
    end_with_parent()
    signal.signal(signal.SIGINT, stop)  # what works on something has a gentler way: shared/stop.py
    wait_briefly()
    heed_quota()
    try:
        app()
    except (UserError, DamagedError) as error:
        fail(printable(str(error)), error.exit_code)
    except LostError as error:
        time.sleep(1)  # the launcher takes the exit code of who ended first
        if is_helper():
            sys.exit(error.exit_code)
        fail(printable(str(error)), error.exit_code)
    except Interrupted as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more changes nothing now
        if not is_helper():
            typer.echo(f"stopped: {printable(str(error))}", err=True)
        if "RANK" not in os.environ:
            end_now(error.exit_code)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno is None:  # none of the operating system's: a fault of ours
            raise
        from shared.files.local import error_kind, in_words

        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        fail(f"{f'{printable(where)}: ' if where else ''}{in_words(error)}", error_kind(error).exit_code)
    except MemoryError as error:
        fail(f"there is not enough memory ({error}). Give less at once, or use a larger machine", UserError.exit_code)


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with one message. torchrun gets it, too: its summary is the last that a person reads."""
    typer.echo(f"error: {message}", err=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": message, "errorCode": code, "extraInfo": about}}))
    sys.exit(code)


def end_now(code: int) -> None:
    """Ends a process that may have been stopped in the middle of anything. Python would wait for threads first, and the
    libraries' own, which then meet what is gone already, would abort it. On disk everything is whole or absent."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
