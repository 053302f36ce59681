"""Turns the corpus into rows of token ids in a folder; a harvest that was stopped or killed meanwhile resumes.

Every few seconds, and on a signal, a sealed file beside the rows records three things: how many parts of the corpus
were joined, which ids do not fill a chunk of rows yet, and what decides the rows. A resumed harvest reads the joined
parts without tokenising them. Its rows are those of a harvest that was never stopped.
"""

import base64
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from harvest.corpus.documents import Document, JoinedIds, refuse
from harvest.corpus.pack import PackCounts, cut, pack, shuffled, skipping
from harvest.plan import HarvestPlan, identity, token_identity
from harvest.reuse.key import TOKEN_FIELDS
from shared.errors import DamagedError, Interrupted, LostError
from shared.files.base import WHOLE_BYTES
from shared.files.local import LocalFiles, read_whole
from shared.progress import say
from shared.record import sealed_json
from shared.store.create import TokenWriter, WrittenTokens
from shared.store.spec import is_sealed

Item = TypeVar("Item")
PROGRESS: Final = "progress.json"
SECONDS_BETWEEN_SAVES: Final = 10.0
SECONDS_BETWEEN_REPORTS: Final = 30.0
PACKING: Final = 1
"""Version of the packing: raised when the same corpus is packed in another way."""


def write_rows(plan: HarvestPlan, folder: Path, counts: PackCounts, check_stop: Callable[[], None]) -> WrittenTokens:
    """Writes the rows into a local folder, after those that an earlier attempt left there. Raises Interrupted after a
    signal, with the progress saved."""
    writer = resumed_writer(plan, folder, counts) or new_writer(plan, folder)
    if not writer.rows:
        say(f"{plan.name}: tokenising")
    reporter = TokeniseProgress(plan, counts)

    def check_and_report() -> None:
        check_stop()
        reporter.report()

    place, saved = PackingPlace(counts), time.monotonic()
    try:
        for block in token_rows(plan, counts, check_and_report):
            writer.add(block)
            place = PackingPlace(counts)
            check_and_report()  # the documents may all be read by now
            complete = writer.rows + writer.filled == rows_wanted(plan)
            if not complete and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                save_progress(plan, folder, writer, place)
                saved = time.monotonic()
    except (Interrupted, LostError) as error:
        if place.calls:
            save_progress(plan, folder, writer, place)
        if isinstance(error, LostError):
            raise
        again = "repeat it, with --overwrite" if plan.config.overwrite else "run the same command again"
        raise Interrupted(f"the harvest was stopped after {place.tokens:,} tokens. To continue, {again}") from error
    return writer.close()


class TokeniseProgress:
    """Prints the progress now and then."""

    def __init__(self, plan: HarvestPlan, counts: PackCounts) -> None:
        self.plan, self.counts = plan, counts
        self.last = time.monotonic()

    def report(self) -> None:
        if time.monotonic() - self.last < SECONDS_BETWEEN_REPORTS:
            return
        self.last = time.monotonic()
        counts, wanted = self.counts, self.plan.config.tokens
        of = f" of {wanted:,}" if wanted else ""
        say(f"{self.plan.name}: {counts.read:,} documents read, {counts.tokens:,}{of} tokens")


def new_writer(plan: HarvestPlan, folder: Path) -> TokenWriter:
    shutil.rmtree(folder, ignore_errors=True)
    return TokenWriter(folder, plan.context, plan.info.vocab_size)


class PackingPlace:
    """The state of the packing at the moment when a block was yielded."""

    def __init__(self, counts: PackCounts) -> None:
        self.calls, self.tokens, self.rows = counts.calls, counts.tokens, counts.rows
        self.leftover = counts.leftover


def key_of(plan: HarvestPlan) -> str:
    """A hash of everything that decides the rows, except how many are wanted."""
    asked = {key: value for key, value in token_identity(plan).items() if key != "whole"}
    made = {key: identity(plan)[key] for key in TOKEN_FIELDS}
    text = json.dumps({"packing": PACKING, **made, **asked}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def save_progress(plan: HarvestPlan, folder: Path, writer: TokenWriter, place: PackingPlace) -> None:
    state = {
        "key": key_of(plan),
        "calls": place.calls,
        "tokens": place.tokens,
        "rows": place.rows,
        "leftover": as_text(place.leftover),
        "held": as_text(writer.held),
        "files": writer.files,
    }
    LocalFiles(folder).write(PROGRESS, [sealed_json(state)])


def as_text(ids: NDArray[Any]) -> str:
    return base64.b64encode(ids.astype("<u4").tobytes()).decode()


def from_text(text: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), "<u4")


def resumed_writer(plan: HarvestPlan, folder: Path, counts: PackCounts) -> TokenWriter | None:
    """A writer with the rows that an earlier attempt left, with `counts` set to their place. None where there are none,
    or where they belong to another corpus or other settings."""
    try:
        data = read_whole(folder / PROGRESS, WHOLE_BYTES)
    except FileNotFoundError:
        return None
    writer = TokenWriter(folder, plan.context, plan.info.vocab_size)
    try:
        state = json.loads(data)
        if not isinstance(state, dict) or not is_sealed(state):
            raise ValueError("its checksum does not match")
        if state["key"] != key_of(plan):
            say(f"{plan.name}: an unfinished harvest of another corpus, or with other settings, is discarded")
            return None
        writer.reopen({path: tuple(sizes) for path, sizes in state["files"].items()}, rows_of(state["held"], plan))
        calls, tokens, rows, leftover = state["calls"], state["tokens"], state["rows"], from_text(state["leftover"])
    except (DamagedError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        say(f"{plan.name}: the tokens of an earlier attempt cannot be read ({error}); tokenising them again")
        return None
    if writer.rows + writer.filled != rows or rows >= (rows_wanted(plan) or rows + 1):
        return None
    counts.calls, counts.tokens, counts.rows, counts.leftover = calls, tokens, rows, leftover.astype(np.int64)
    say(f"{plan.name}: tokenising resumes after {tokens:,} tokens; the corpus before them is read, not tokenised")
    return writer


def rows_of(text: str, plan: HarvestPlan) -> NDArray[Any]:
    return from_text(text).reshape(-1, plan.context)


def is_resumable(folder: Path) -> bool:
    return (folder / PROGRESS).is_file()


def forget_progress(folder: Path) -> None:
    """Removes the progress file once the rows are complete: only their chunks remain in the folder."""
    (folder / PROGRESS).unlink(missing_ok=True)


def rows_wanted(plan: HarvestPlan) -> int | None:
    return None if plan.config.tokens is None else -(-plan.config.tokens // plan.context)


def token_rows(plan: HarvestPlan, counts: PackCounts, check_stop: Callable[[], None]) -> Iterator[NDArray[Any]]:
    """Yields blocks of packed rows, after those in `counts`: the whole corpus, or just enough for the tokens asked
    for."""
    wanted, given = rows_wanted(plan), counts.rows
    for block in packed_rows(plan, counts, check_stop):
        left = len(block) if wanted is None else wanted - given
        given += len(block)
        yield block[:left]
        if wanted is not None and given >= wanted:
            return


def packed_rows(plan: HarvestPlan, counts: PackCounts, check_stop: Callable[[], None]) -> Iterator[NDArray[Any]]:
    if isinstance(plan.corpus, JoinedIds):
        blocks = islice(checked(plan.corpus.blocks(), check_stop), counts.calls, None)
        return cut(blocks, plan.context, plan.bos_id, counts)
    on_bad = skipping(counts) if plan.config.on_bad_document == "skip" else refuse
    documents = counted(plan.corpus.documents(on_bad, check_stop), counts)
    return pack(
        shuffled(documents, plan.config.seed) if plan.shuffles else documents,
        plan.tokenizer,
        context=plan.context,
        eos_id=plan.tokenizer.end,
        bos_id=plan.bos_id,
        counts=counts,
        vocab_size=plan.info.vocab_size,
    )


def counted(documents: Iterator[Document], counts: PackCounts) -> Iterator[Document]:
    for document in documents:
        counts.read += 1
        yield document


def checked(items: Iterator[Item], check_stop: Callable[[], None]) -> Iterator[Item]:
    for item in items:
        check_stop()
        yield item
