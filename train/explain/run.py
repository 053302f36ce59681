"""`sagsae explain`: asks a language model behind an endpoint what the poles of latents fire on, and tests its answers.

Nothing is sent without --endpoint, and nothing before the cost is said and agreed to. Every answer is appended to
explain.jsonl at once; the same command asks only what is missing there.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from shared.errors import BusyError, Interrupted, UserError
from shared.files.local import explained
from shared.files.locks import folder_lock
from shared.gate import BadData
from shared.progress import progress, say
from shared.schemas.features import ExplainConfig
from shared.stop import stop_requests
from train.explain.calls import CallLog
from train.explain.endpoint import ChatEndpoint, key_in
from train.explain.interview import EXPLAINED, FAILED, LatentMaterial, PoleOutcome, interview
from train.explain.material import choose_latents, materials
from train.explain.prompts import ANSWER_TOKENS, VERSION, Question
from train.explain.results import PARQUET, Row, means, write_results
from train.features.readers.folder import CALLS, FeatureFolder, open_features
from train.features.readers.texts import TokenTexts, token_texts

LETTERS: Final = 4
"""Letters of a token, for the estimate."""
LONG_EXPLANATION: Final = "x" * 130
"""Stands for an explanation that is not written yet, in the estimate."""
FAILED_IN_A_ROW: Final = 5
"""Latents that may fail one after the other before the command ends."""
LOOK_SECONDS: Final = 0.5
Confirm = Callable[[str], bool]


@dataclass
class CallBudget:
    """What the missing calls take, estimated."""

    calls: int = 0
    answered: int = 0
    """Calls whose answer is in the log."""
    poles: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def sentence(self, name: str, latents: int) -> str:
        left = (
            f"{self.calls:,} calls, about {self.prompt_tokens:,} tokens to send and {self.answer_tokens:,} to receive"
        )
        known = f" ({self.answered:,} calls are answered already)" if self.answered else ""
        return f"explain {name}: {self.poles:,} poles of {latents:,} latents, {left}{known}"


@dataclass(frozen=True)
class ExplainSummary:
    """What a call wrote."""

    file: Path
    poles: int
    """Poles in the file."""
    explained: int
    failed: int
    """Poles of this call that failed."""
    calls: int
    """Calls that this command made and got an answer to."""
    prompt_tokens: int
    answer_tokens: int
    means: Row


@dataclass
class Interviewer:
    """Answers questions from the log, else from the endpoint."""

    config: ExplainConfig
    log: CallLog
    endpoint: ChatEndpoint
    calls: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    guard: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, question: Question) -> str | list[bool]:
        body = body_of(question, self.config)
        if (known := logged(self.log, question, body)) is not None:
            return known
        value, answer = self.endpoint.ask(body, question.read)
        self.log.add(question, body, answer)
        with self.guard:
            self.calls += 1
            self.prompt_tokens += answer.prompt_tokens
            self.answer_tokens += answer.answer_tokens
        return value


def explain(config: ExplainConfig, confirm: Confirm | None = None) -> ExplainSummary:
    """Explains poles and tests the explanations. `confirm` is asked before anything is sent. Raises UserError when
    nothing may be sent or the endpoint refuses everything, BusyError when it is away, Interrupted after a signal; what
    was answered is kept."""
    folder = open_features(config.run, config.sae)
    texts = token_texts(folder.path)
    latents = choose_latents(folder, config.only, config.latents, config.seed)
    with explained(folder.path), folder_lock(folder.path):
        log = CallLog(folder.path / CALLS)
        budget = estimate(folder, latents, config, log, texts)
        say(budget.sentence(folder.name, len(latents)))
        if config.endpoint is None:
            raise UserError("nothing was sent. To make these calls, add --endpoint URL and --model NAME")
        if budget.calls:
            check_agreed(config, confirm)
        with closing(ChatEndpoint(config.endpoint, key_in(config.key_variable), config.timeout)) as endpoint:
            return conduct(folder, latents, Interviewer(config, log, endpoint), texts, budget)


def check_agreed(config: ExplainConfig, confirm: Confirm | None) -> None:
    """Raises UserError unless the calls are agreed to."""
    if config.yes:
        return
    if confirm is None:
        raise UserError("nothing was sent. Agree to these calls with --yes")
    if not confirm(f"Send them to {config.endpoint}?"):
        raise UserError("nothing was sent")


def body_of(question: Question, config: ExplainConfig) -> dict[str, Any]:
    return question.body(config.model or "", config.temperature, config.answer_tokens)


def logged(log: CallLog, question: Question, body: dict[str, Any]) -> str | list[bool] | None:
    """The answer in the log; None without a usable one."""
    known = log.get(body)
    try:
        return None if known is None else question.read(known.text)
    except BadData:
        return None


def estimate(
    folder: FeatureFolder, latents: Sequence[int], config: ExplainConfig, log: CallLog, texts: TokenTexts
) -> CallBudget:
    """Goes through all questions, and sends none."""
    budget = CallBudget()

    def count(question: Question) -> str | list[bool]:
        known = logged(log, question, body_of(question, config))
        if question.kind == "explain":
            budget.poles += 1
        if known is not None:
            budget.answered += 1
            return known
        budget.calls += 1
        budget.prompt_tokens += -(-len(question.system + question.user) // LETTERS)
        budget.answer_tokens += ANSWER_TOKENS[question.kind]
        return [False] * question.n if question.n else LONG_EXPLANATION

    for material in materials(folder, latents):
        interview(material, count, texts.text, config.windows)
    return budget


def conduct(
    folder: FeatureFolder, latents: Sequence[int], asks: Interviewer, texts: TokenTexts, budget: CallBudget
) -> ExplainSummary:
    """Asks about all latents, several at the same time, and writes the results, also when it is stopped; none
    where every pole failed."""
    outcomes: list[PoleOutcome] = []
    ending: Exception | None = None
    try:
        for found in interviews(materials(folder, latents), asks, texts, budget):
            outcomes += found
    except (UserError, Interrupted) as error:
        ending = error
    states = [outcome.state for outcome in outcomes]
    useless = FAILED in states and EXPLAINED not in states
    if useless and ending is None:
        ending = BusyError(
            f"{asks.endpoint.url}: no pole was explained, the first one because of {failure(outcomes)}. "
            "The same command asks again"
        )
    rows: list[Row] = []
    if outcomes and not useless:
        rows = write_results(folder.path, outcomes, identity_of(folder, asks.config), cost_of(asks))
    if ending is not None:
        raise ending
    scores = means(rows)
    return ExplainSummary(
        folder.path / PARQUET, len(rows), scores["explained"], states.count(FAILED), asks.calls, asks.prompt_tokens,
        asks.answer_tokens, scores,
    )  # fmt: skip


def interviews(
    all_materials: Iterator[LatentMaterial], asks: Interviewer, texts: TokenTexts, budget: CallBudget
) -> Iterator[list[PoleOutcome]]:
    """Yields what came of each latent as it is done. Raises UserError when no other call can succeed, BusyError after
    FAILED_IN_A_ROW latents that failed, Interrupted after a signal; calls under way are waited for."""
    at_once, in_a_row = asks.config.at_once, 0
    running: set[Future[list[PoleOutcome]]] = set()
    many = asks.config.windows
    with (
        stop_requests() as stop_asked,
        progress("explain", budget.calls, "calls") as advance,
        ThreadPoolExecutor(at_once) as pool,
    ):
        try:
            shown = 0
            while True:
                for material in islice(all_materials, at_once - len(running)):
                    running.add(pool.submit(interview, material, asks.ask, texts.text, many))
                if not running:
                    return
                done, running = wait(running, LOOK_SECONDS, FIRST_COMPLETED)
                for future in done:
                    found = future.result()
                    in_a_row = in_a_row + 1 if any(each.state == FAILED for each in found) else 0
                    yield found
                    if in_a_row >= FAILED_IN_A_ROW:
                        raise BusyError(f"{asks.endpoint.url}: {in_a_row} latents failed, the last one because of "
                                        f"{failure(found)}. The same command asks what is missing")  # fmt: skip
                advance(asks.calls - shown, f"{asks.prompt_tokens + asks.answer_tokens:,} tokens")
                shown = asks.calls
                if stop_asked():
                    raise Interrupted("stopped; answers are kept. To continue, run the same command again")
        finally:
            asks.endpoint.stopped.set()


def failure(outcomes: Sequence[PoleOutcome]) -> str:
    return next(outcome.why for outcome in outcomes if outcome.state == FAILED)


def identity_of(folder: FeatureFolder, config: ExplainConfig) -> dict[str, Any]:
    """What decides the explanations, as far as this program does."""
    return {
        "features": folder.about["identity"],
        "model": config.model,
        "temperature": config.temperature,
        "windows": config.windows,
        "questions": VERSION,
    }


def cost_of(asks: Interviewer) -> dict[str, Any]:
    return {
        "endpoint": asks.endpoint.url,
        "calls": asks.calls,
        "prompt_tokens": asks.prompt_tokens,
        "answer_tokens": asks.answer_tokens,
    }
