"""All questions about one latent, in the order in which they are asked: an explanation of each pole, tests of it, and
which of the two poles a firing belongs to.

`asked` is the only place where an answer comes from: a log, an endpoint, or an estimate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from train.explain import prompts, scores, windows
from train.explain.endpoint import CallFailed
from train.explain.prompts import Question
from train.explain.scores import BalancedScore
from train.explain.windows import AskedWindow, PoleExamples
from train.features.readers.folder import WrittenExample

EXPLAINED: Final = "explained"
FAILED: Final = "failed"
TOO_FEW: Final = "too few"
Asked = Callable[[Question], "str | list[bool]"]


@dataclass(frozen=True)
class LatentMaterial:
    """What the questions about one latent are made from."""

    latent: int
    poles: Sequence[PoleExamples]
    """The pole above zero, then the one below, where latents carry a sign."""
    own: Sequence[WrittenExample]
    others: Sequence[WrittenExample]
    """Examples of other latents."""
    rows: int
    """Rows that were counted."""

    @property
    def shown(self) -> set[int]:
        """The contexts that either pole is explained from."""
        return {each.context for examples in self.poles for each in examples.shown}


@dataclass
class PoleOutcome:
    """What came of one pole."""

    latent: int
    sign: int
    state: str
    """explained, failed, or too few."""
    why: str = ""
    """Why there is no explanation or not every score."""
    explanation: str | None = None
    scores: dict[str, BalancedScore] = field(default_factory=dict)
    """By test: detection, fuzz, poles."""


def interview(material: LatentMaterial, asked: Asked, text: prompts.Text, many: int) -> list[PoleOutcome]:
    """Asks everything about one latent. `many`: windows per test. A call that fails ends the questions about its
    pole."""
    outcomes = [one_pole(material, examples, asked, text, many) for examples in material.poles]
    if len(outcomes) == 2 and all(outcome.state == EXPLAINED for outcome in outcomes):
        try:
            which_pole(material, outcomes, asked, text, many)
        except CallFailed as error:
            for outcome in outcomes:
                outcome.state, outcome.why = FAILED, f"poles: {error}"
    return outcomes


def one_pole(
    material: LatentMaterial, examples: PoleExamples, asked: Asked, text: prompts.Text, many: int
) -> PoleOutcome:
    latent, sign, rule = material.latent, examples.pole.sign, examples.pole.rule
    if why := examples.lacking:
        return PoleOutcome(latent, sign, TOO_FEW, why)
    outcome, kind = PoleOutcome(latent, sign, EXPLAINED), "explain"
    try:
        found = asked(prompts.explain_question(latent, sign, windows.explained_windows(examples), text))
        assert isinstance(found, str)
        outcome.explanation = found
        about = prompts.about_one(found)
        kind = "detection"
        tests = windows.detection_windows(examples, material.own, material.shown, material.others, material.rows, many)
        answers = answers_to(prompts.windows_questions("detection", latent, sign, about, tests, text), asked)
        keep(outcome, kind, tests, answers, scores.rule_detects(rule, tests))
        kind = "fuzz"
        tests = windows.fuzz_windows(examples, many)
        answers = answers_to(prompts.windows_questions("fuzz", latent, sign, about, tests, text), asked)
        keep(outcome, kind, tests, answers, scores.rule_at_mark(rule, tests))
    except CallFailed as error:
        outcome.state, outcome.why = FAILED, f"{kind}: {error}"
    return outcome


def which_pole(
    material: LatentMaterial, outcomes: Sequence[PoleOutcome], asked: Asked, text: prompts.Text, many: int
) -> None:
    """Asks which pole some firings belong to, and gives both poles the score."""
    above, below = material.poles
    about = prompts.about_both(*(outcome.explanation or "" for outcome in outcomes))
    tests = windows.pole_windows(above, below, many)
    answers = answers_to(prompts.windows_questions("poles", material.latent, 1, about, tests, text), asked)
    rule = scores.rule_tells_poles(above.pole.rule, below.pole.rule, tests)
    for outcome in outcomes:
        keep(outcome, "poles", tests, answers, rule)


def answers_to(questions: Sequence[Question], asked: Asked) -> list[bool]:
    found: list[bool] = []
    for question in questions:
        answer = asked(question)
        assert isinstance(answer, list)
        found += answer
    return found


def keep(
    outcome: PoleOutcome, test: str, tests: Sequence[AskedWindow], answers: Sequence[bool], rule: Sequence[float]
) -> None:
    found = scores.score(tests, answers, rule)
    if found is not None:
        outcome.scores[test] = found
    elif not outcome.why:
        outcome.why = f"{test}: no windows of both kinds"
