"""Makes the standard streams fit for work: none is missing, and none that breaks ends what is being done."""

import contextlib
import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer


CLOSED_BY_ITS_READER: Final = 128 + 13
"""The exit code of a command whose reader is gone, as a shell counts it (SIGPIPE)."""
NAMES: Final = ("stdin", "stdout", "stderr")


class LastingStream(io.FileIO):
    """A standard stream whose reader may exit (`| head -1`) and whose disk may be full.

    A command writes to stdout when its work is done. Without a reader it exits with CLOSED_BY_ITS_READER and without a
    message. stderr reports progress, and the work continues without it."""

    def write(self, data: "Buffer") -> int:
        try:
            return super().write(data)
        except OSError as error:
            to_nowhere(self.fileno())  # what waits in a buffer is tried again at the end
            if self.fileno() == 2:
                return memoryview(data).nbytes
            if error.errno == errno.EPIPE:
                raise SystemExit(CLOSED_BY_ITS_READER) from None
            raise


def to_nowhere(number: int) -> None:
    """The descriptor becomes one of /dev/null."""
    handle = os.open(os.devnull, os.O_RDWR)
    if handle != number:
        os.dup2(handle, number)
        os.close(handle)


def settle_streams() -> None:
    """Makes the standard streams safe to write to. A closed one becomes /dev/null: else the next file that is opened
    would get its number, and what libraries print would be written into it. A character that the terminal's encoding
    lacks is written as an escape (λ as \\u03bb). stdout and stderr become `LastingStream`."""
    for number, name in enumerate(NAMES):
        if getattr(sys, name) is None:
            to_nowhere(number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if is_descriptor(stream, number):
                stream.flush()
                raw = io.BufferedWriter(LastingStream(number, "w", closefd=False))
                lines = stream.line_buffering or number == 2
                setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=lines))


def is_descriptor(stream: io.TextIOWrapper, number: int) -> bool:
    """Whether it is the process's own stream: not one that a program which calls us put there."""
    with contextlib.suppress(OSError, ValueError):
        return stream.fileno() == number
    return False
