"""Reads JSON values out of a text that arrives in blocks: the members of an array, or values one after another.

One value is held at a time, up to RECORD_BYTES characters of it.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from harvest.corpus.raw_bytes import RECORD_BYTES, TOO_LONG
from shared.errors import UserError

MAX_MEMBERS: Final = 1 << 24
"""Largest number of commas and brackets in one value: Python needs up to 100 bytes for each."""
SPACE: Final = re.compile(r"[ \t\n\r]*")
NEAR_THE_END: Final = 16
"""Characters before the end of the text read so far in which an error may be a cut-off number, word or escape."""


def check_members(text: str, start: int = 0) -> None:
    """Raises ValueError when a JSON text has, from `start` on, more values than may fit into memory."""
    if len(text) - start > MAX_MEMBERS and sum(text.count(one, start) for one in ",[{") > MAX_MEMBERS:
        raise ValueError(f"more than {MAX_MEMBERS >> 20} million values in one; save ids as a .npy array")


class JsonCursor:
    """A cursor in a text of which only a part is in memory."""

    def __init__(self, blocks: Iterable[str], path: str) -> None:
        self.blocks, self.path = iter(blocks), path
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    @property
    def where(self) -> str:
        """The place of the next value: `path:line`."""
        return f"{self.path}:{self.line}"

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._skip(SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]  # it also matches the empty string
            if self.at < len(self.text) or not self._more(1 << 16):
                return self.text[self.at : self.at + 1]

    def take(self, expected: str) -> str:
        """Skips the next character and returns it. Raises UserError when it is none of `expected`."""
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
                if end < len(self.text) or not self._more(1):  # a number may continue in the next block
                    self._skip(end)
                    return value

    def rest_is_empty(self) -> bool:
        return not self.peek()

    def _skip(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _more(self, at_least: int) -> bool:
        """Reads at least `at_least` more characters; returns False at the end of the text."""
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
