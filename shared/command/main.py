"""Running the command line, and what it prints: a result as text or JSON, an error as one message and an exit code."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

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
    except (UserError, DamagedError, Interrupted, LostError) as error:
        if isinstance(error, Interrupted):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more changes nothing now
        if isinstance(error, LostError):
            time.sleep(1)  # the launcher takes the exit code of who ended first
        if not (isinstance(error, Interrupted | LostError) and is_helper()):
            word = "stopped" if isinstance(error, Interrupted) else "error"
            typer.echo(f"{word}: {printable(str(error))}", err=True)
        if isinstance(error, Interrupted) and "RANK" not in os.environ:
            end_now(error.exit_code)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno is None:  # none of the operating system's: a fault of ours
            raise
        from shared.files.local import error_kind, in_words

        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        typer.echo(f"error: {f'{printable(where)}: ' if where else ''}{in_words(error)}", err=True)
        sys.exit(error_kind(error).exit_code)
    except MemoryError as error:
        typer.echo(f"error: there is not enough memory ({error}). Give less at once, or use a larger machine", err=True)
        sys.exit(UserError.exit_code)


def end_now(code: int) -> None:
    """Ends a process that may have been stopped in the middle of anything. Python would wait for threads first, and the
    libraries' own, which then meet what is gone already, would abort it. On disk everything is whole or absent."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
