"""JSON values out of a text that is read in blocks: the members of an array, or values one after another.

One value is held at a time, up to RECORD_BYTES characters of it.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from harvest.corpus.raw_bytes import RECORD_BYTES, TOO_LONG
from shared.errors import UserError

MOST_MEMBERS: Final = 1 << 24
"""Commas and brackets in one value: Python needs up to 100 bytes for each."""
SPACE: Final = re.compile(r"[ \t\n\r]*")
NEAR_THE_END: Final = 16
"""An error this close to the end of what was read may be one of reading: half of a number, a word or an escape."""


def check_members(text: str, start: int = 0) -> None:
    """Raises ValueError when a JSON text has more values in it from `start` on than memory may suffice for."""
    if len(text) - start > MOST_MEMBERS and sum(text.count(one, start) for one in ",[{") > MOST_MEMBERS:
        raise ValueError(f"more than {MOST_MEMBERS >> 20} million values in one; save ids as a .npy array")


class JsonCursor:
    """A cursor in a text of which only a part is there."""

    def __init__(self, blocks: Iterable[str], path: str) -> None:
        self.blocks, self.path = iter(blocks), path
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    @property
    def where(self) -> str:
        """The place of what comes next."""
        return f"{self.path}:{self.line}"

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._skip(SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.text) or not self._more(1 << 16):
                return self.text[self.at : self.at + 1]

    def take(self, expected: str) -> str:
        """Goes past the next character, which has to be one of those expected. Raises UserError."""
        found = self.peek()
        if not found or found not in expected:
            wanted = " or ".join(repr(one) for one in expected)
            raise UserError(
                f"{self.where}: is not JSON ({found or 'the end of the file'!r} where {wanted} is expected)"
            )
        self._skip(self.at + 1)
        return found

    def value(self) -> Any:
        """The next value. Raises UserError when there is none."""
        self.peek()
        decoder = json.JSONDecoder()
        while True:
            try:
                check_members(self.text, self.at)
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                whole = not error.msg.startswith("Unterminated") and error.pos < len(self.text) - NEAR_THE_END
                if whole or not self._more(len(self.text) - self.at):
                    raise UserError(f"{self.where}: is not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.where}: is not JSON that can be read ({error})") from error
            else:
                if end < len(self.text) or not self._more(1):  # a number may go on
                    self._skip(end)
                    return value

    def rest_is_empty(self) -> bool:
        return not self.peek()

    def _skip(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _more(self, at_least: int) -> bool:
        """Reads on, so many characters or more; False at the end of the text."""
        parts, size = [self.text[self.at :]], 0
        if len(parts[0]) > RECORD_BYTES:
            raise UserError(f"{self.where}: {TOO_LONG}")
        while size < max(1, at_least) and not self.ended:
            block = next(self.blocks, None)
            self.ended = block is None
            parts.append(block or "")
            size += len(parts[-1])
        self.text, self.at = "".join(parts), 0
        return size > 0


def members(values: JsonCursor) -> Iterator[tuple[str, Any]]:
    """The members of the array that comes next, each with its place."""
    values.take("[")
    if values.peek() == "]":
        values.take("]")
        return
    while True:
        values.peek()
        where = values.where
        yield where, values.value()
        if values.take(",]") == "]":
            return
