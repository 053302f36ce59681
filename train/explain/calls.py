"""explain.jsonl: one line per answered call. A call that is in it is never made again."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Final

from shared.errors import DamagedError
from shared.files.base import WHOLE_BYTES
from shared.files.local import append_line, read_whole
from shared.gate import BadData, integer, members, parse_json, text
from shared.record import to_json
from train.explain.endpoint import ANSWER_CHARACTERS, CallAnswer
from train.explain.prompts import Question

LINE_BYTES: Final = 8 * ANSWER_CHARACTERS
NEEDED: Final = ("key", "latent", "sign", "kind", "part", "answer", "prompt_tokens", "answer_tokens")


class CallLog:
    """The answers that were paid for, by a digest of what was sent. Any thread may add to it."""

    def __init__(self, file: Path) -> None:
        """Reads the file, where there is one. A torn last line does not count. Raises DamagedError for another one that
        is no call."""
        self.file, self.guard = file, Lock()
        self.answers: dict[str, CallAnswer] = {}
        try:
            data = read_whole(file, WHOLE_BYTES)
        except FileNotFoundError:
            return
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                key, answer = call_in(line)
            except BadData as error:
                raise DamagedError(
                    f"{file}: line {number} {error}. Delete this line; its call is made again"
                ) from error
            self.answers[key] = answer

    def get(self, body: Mapping[str, Any]) -> CallAnswer | None:
        return self.answers.get(key_of(body))

    def add(self, question: Question, body: Mapping[str, Any], answer: CallAnswer) -> None:
        """Appends a line, durable when this returns."""
        key = key_of(body)
        values = (key, question.latent, question.sign, question.kind, question.part, answer.text, answer.prompt_tokens,
                  answer.answer_tokens)  # fmt: skip
        line = to_json(dict(zip(NEEDED, values, strict=True))).encode() + b"\n"
        with self.guard:
            append_line(self.file, line)
            self.answers[key] = answer


def key_of(body: Mapping[str, Any]) -> str:
    """A digest of everything that is sent but the key."""
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def call_in(line: bytes) -> tuple[str, CallAnswer]:
    """Reads a line. Raises BadData."""
    found = members(parse_json(line, LINE_BYTES), NEEDED, None)
    answer = found["answer"]
    if not isinstance(answer, str) or len(answer) > ANSWER_CHARACTERS:
        raise BadData("holds no answer")
    counts = (integer(found[name], name) for name in ("prompt_tokens", "answer_tokens"))
    return text(found["key"], "key", 64), CallAnswer(answer, *counts)
