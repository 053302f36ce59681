"""Writes the messages of each question, and reads the answer to it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from shared.gate import BadData, parse_json, printable
from train.explain.windows import AskedWindow, TextWindow

VERSION: Final = 1
"""Raised when the questions change, so that results of different questions are not mixed."""
AT_ONCE: Final = 5
"""Windows of one call."""
EXPLANATION: Final = 400
"""Characters of an explanation, at most."""
LIST_BYTES: Final = 4096
Kind = Literal["explain", "detection", "fuzz", "poles"]
ROLE: Final = (
    "You study the features inside a language model. A feature fires on some tokens of a text and is silent on all "
    "others."
)
TASKS: Final[Mapping[Kind, str]] = {
    "explain": (
        "Each numbered text below is a JSON string. The feature fires on the tokens between << and >>, most strongly "
        "where the number in brackets is 10. Say in one sentence of at most 25 words when it fires: name the tokens, "
        "their meaning or their role in the text. Answer with that sentence alone."
    ),
    "detection": (
        "An explanation says when the feature fires. Each numbered text below is a JSON string. Does the feature fire "
        "anywhere in it? Answer with a JSON list of {n} numbers alone: 1 for yes, 0 for no."
    ),
    "fuzz": (
        "An explanation says when the feature fires. In each numbered text below, a JSON string, one token stands "
        "between << and >>. Does the feature fire on that token? Answer with a JSON list of {n} numbers alone: 1 for "
        "yes, 0 for no."
    ),
    "poles": (
        "The feature has two poles, each with an explanation. In each numbered text below, a JSON string, one pole "
        "fires on the token between << and >>. Which one? Answer with a JSON list of {n} numbers alone: 1 for pole A, "
        "0 for pole B."
    ),
}
ANSWER_TOKENS: Final[Mapping[Kind, int]] = {"explain": 35, "detection": 15, "fuzz": 15, "poles": 15}
"""Tokens of a usual answer, for the estimate."""
Text = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Question:
    """One call: what it is about, and its two messages."""

    kind: Kind
    latent: int
    sign: int
    part: int
    """Its number among the calls of its kind."""
    system: str
    user: str
    n: int
    """Answers that are expected; 0 for a sentence."""

    def body(self, model: str, temperature: float, answer_tokens: int) -> dict[str, Any]:
        """The body of the request."""
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]
        return {"model": model, "messages": messages, "temperature": temperature, "max_tokens": answer_tokens}

    def read(self, answer: str) -> "str | list[bool]":
        """Reads an answer. Raises BadData when it is none."""
        return read_list(answer, self.n) if self.n else read_sentence(answer)


def explain_question(latent: int, sign: int, windows: Sequence[TextWindow], text: Text) -> Question:
    strongest = max(window.strength for window in windows)
    lines = []
    for number, window in enumerate(windows, 1):
        strength = max(1, round(10 * window.strength / strongest)) if strongest else 1
        lines.append(f"{number}. ({strength}) {marked_text(window, text)}")
    return Question("explain", latent, sign, 0, f"{ROLE} {TASKS['explain']}", "\n".join(lines), 0)


def windows_questions(
    kind: Kind, latent: int, sign: int, explanation: str, tests: Sequence[AskedWindow], text: Text
) -> list[Question]:
    """One question for every AT_ONCE windows. `explanation`: the lines that stand before the windows."""
    found = []
    for part, begin in enumerate(range(0, len(tests), AT_ONCE)):
        some = tests[begin : begin + AT_ONCE]
        lines = [f"{number}. {marked_text(each.window, text)}" for number, each in enumerate(some, 1)]
        system = f"{ROLE} {TASKS[kind].format(n=len(some))}"
        found.append(Question(kind, latent, sign, part, system, "\n".join([explanation, *lines]), len(some)))
    return found


def about_one(explanation: str) -> str:
    return f"Explanation: {explanation}"


def about_both(above: str, below: str) -> str:
    return f"Pole A: {above}\nPole B: {below}"


def marked_text(window: TextWindow, text: Text) -> str:
    """The window as a JSON string, on one line, with << and >> around each run of marked tokens."""
    parts, at = [], 0
    while at < len(window.tokens):
        end, marked = at, at in window.marked
        while end < len(window.tokens) and (end in window.marked) == marked:
            end += 1
        words = text(window.tokens[at:end])
        parts.append(f"<<{words}>>" if marked else words)
        at = end
    return json.dumps("".join(parts), ensure_ascii=False)


def spoken_part(answer: str) -> str:
    """An answer without the reasoning before it."""
    return answer.rpartition("</think>")[2].strip()


def read_sentence(answer: str) -> str:
    """Raises BadData when nothing is said."""
    found = printable(" ".join(spoken_part(answer).split()))
    if not found or found.startswith("<think>"):
        raise BadData("holds no explanation. A model that reasons first needs a larger --answer-tokens")
    return found if len(found) <= EXPLANATION else f"{found[: EXPLANATION - 1]}…"


def read_list(answer: str, n: int) -> list[bool]:
    """The last list in an answer. Raises BadData unless it holds n numbers, each 0 or 1."""
    lists = re.findall(r"\[[^\[\]]{0,1000}\]", spoken_part(answer))
    if not lists:
        raise BadData("holds no list")
    found = parse_json(lists[-1], LIST_BYTES)
    if len(found) != n or any(type(one) not in (int, bool) or one not in (0, 1) for one in found):
        raise BadData(f"holds a list of {len(found)} values instead of {n} numbers, each 0 or 1")
    return [bool(one) for one in found]
