"""harvest(config): a model and a corpus to a committed store. Resumes by itself: the same call goes on where it was.

Everything that can be refused is refused before anything is written. Then: tokens, once; every shard that is not
committed yet: capture, hand to the writer; at the end the state becomes "final".
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harvest.capture import capture_shard, make_buffers
from harvest.pack import Counts, pack, shuffled
from harvest.plan import Plan, check_room, check_same, make_plan, make_spec
from harvest.writer import ShardWriter, rows_that_count
from shared.config import HarvestConfig
from shared.create import (
    building,
    clean_up,
    clear_store,
    create_store,
    finish_store,
    is_ours,
    place_tokens,
    write_tokens,
)
from shared.errors import Interrupted, UserError
from shared.files import LOCK_FILE, Files, LocalFiles
from shared.model import LanguageModel
from shared.progress import progress, say
from shared.record import provenance
from shared.spec import DTYPES, StoreSpec
from shared.stop import stop_requests
from shared.store import STATE_FILE, Store, is_store, write_state


@dataclass(frozen=True)
class Summary:
    """What a harvest did."""

    store: str
    tokens: int
    hookpoints: dict[str, dict[str, Any]]
    seconds: float
    tokens_per_second: float
    waiting_for_writer: float
    """Share of the time that the model stood still because the writer was behind."""


def harvest(config: HarvestConfig) -> Summary:
    """Harvests until the store is complete. Raises UserError for unusable input, Interrupted after a signal."""
    plan = make_plan(config)
    if is_store(plan.files) and not config.overwrite:
        store = Store.open(plan.files)
        check_same(plan, store.spec)
        if is_complete(store):
            say(f"{plan.name} is complete: {store.n_rows:,} tokens. Nothing to do (--overwrite starts afresh).")
            return summarise(store, 0.0, 0, 0.0)
    check_room(plan, config.tokens)
    make_folder(plan.files)
    with plan.files.explained(), plan.files.lock():
        if config.overwrite or not is_store(plan.files):
            begin(plan)
        clean_up(plan.files)
        store = Store.open(plan.files)
        check_same(plan, store.spec)  # again: another harvest may have finished meanwhile
        return fill(plan, store.spec, store)


def is_complete(store: Store) -> bool:
    return store.state == "final" and not store.missing


def make_folder(files: Files) -> None:
    """Raises UserError when the folder cannot be made or written to, or when something else is there."""
    if not isinstance(files, LocalFiles):
        return  # an object store has no folders
    root = files.root
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: is a file. Choose another --out or --name")
    if root.exists() and not is_store(files) and any(not is_ours(path.name) for path in root.iterdir()):
        raise UserError(f"{root}: exists and is not a store. Choose another --out or --name, or empty the folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / LOCK_FILE).touch()
    except OSError as error:
        raise UserError(f"--out {root.parent}: cannot be written to ({error.strerror})") from error


def begin(plan: Plan) -> None:
    """Writes the token rows, then the empty store. What was there before, a store to overwrite or an unfinished
    beginning, goes only when nothing can be refused any more."""
    counts = Counts()
    say(f"{plan.name}: tokenising")
    with building(plan.files) as folder:
        try:
            tokens = write_tokens(folder, token_rows(plan, counts), plan.context, plan.info.vocab_size)
            available, wanted = tokens.rows * plan.context, plan.config.tokens
            if available < (wanted or 1):
                asked = f", {wanted:,} were asked for" if wanted else f", less than one row of {plan.context}"
                given = max(available, counts.tokens)
                raise UserError(
                    f"the corpus gives {given:,} tokens{asked}. Lower --tokens or --context, or give more text"
                )
            if wanted is None:
                check_room(plan, available)
            spec = make_spec(plan, counts, tokens, wanted or available)
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)
            leave_nothing(plan.files)
            raise
        plan.files.remove(STATE_FILE)
        clear_store(plan.files, keep=(LOCK_FILE, folder.name))
        place_tokens(plan.files, tokens)
    record = {**provenance(), "config": plan.config.model_dump(mode="json")}
    create_store(plan.files, spec, tokens.files, record)


def leave_nothing(files: Files) -> None:
    """A folder that was made for a store that did not come to be goes again."""
    if isinstance(files, LocalFiles) and [path.name for path in files.root.iterdir()] == [LOCK_FILE]:
        (files.root / LOCK_FILE).unlink()
        files.root.rmdir()


def token_rows(plan: Plan, counts: Counts) -> Iterator[NDArray[Any]]:
    """Blocks of packed rows: all that the corpus gives, or just enough for the tokens asked for."""
    documents = plan.corpus.documents()
    if plan.config.shuffle_documents:
        documents = shuffled(documents, plan.config.seed)
    blocks = pack(
        documents,
        plan.tokenizer,
        context=plan.context,
        eos_id=plan.tokenizer.eos_token_id,
        bos_id=plan.bos_id,
        counts=counts,
    )
    if plan.config.tokens is None:
        return blocks
    wanted = -(-plan.config.tokens // plan.context)
    return (np.stack(rows) for rows in batches((row for block in blocks for row in block), wanted))


def batches(rows: Iterator[Any], wanted: int) -> Iterator[list[Any]]:
    limited = islice(rows, wanted)
    while some := list(islice(limited, 1024)):
        yield some


def fill(plan: Plan, spec: StoreSpec, store: Store) -> Summary:
    """Captures and commits every missing shard, then marks the store final."""
    if store.state == "final":  # it lost commits: while it is filled up, they are in more than the index
        write_state(plan.files, spec, "writing")
    todo = store.missing
    model = LanguageModel(plan.source, plan.device, plan.dtype, plan.config.attention)
    model.check_hooks([hook.name for hook in spec.hookpoints.values()])
    tokens = store.tokens()
    keep = rows_that_count(tokens, spec.special_ids)
    buffers = [make_buffers(spec, model.device) for _ in range(2)]
    rows_to_do = sum(spec.shard_range(shard)[1] - spec.shard_range(shard)[0] for shard in todo)
    batch = max(1, plan.config.batch_tokens // spec.context)
    started, waited = time.monotonic(), 0.0
    with (
        stop_requests() as stop_asked,
        closing(ShardWriter(plan.files, spec, keep)) as writer,
        progress(f"harvest {plan.name}", rows_to_do, "tokens") as advance,
    ):

        def after_batch(rows: int) -> None:
            advance(rows, f"waiting for the writer {waited / (time.monotonic() - started):.0%}")
            if stop_asked():
                raise Interrupted(f"{plan.name}: stopped. To continue, run the same command again")

        for turn, shard in enumerate(todo):
            rows = capture_shard(model, spec, tokens, keep, shard, buffers[turn % 2], batch, after_batch)
            before = time.monotonic()
            writer.submit(shard, rows)
            waited += time.monotonic() - before
        writer.wait()
    finish_store(plan.files, spec)
    return summarise(Store.open(plan.files), time.monotonic() - started, rows_to_do, waited)


def summarise(store: Store, seconds: float, rows: int, waited: float) -> Summary:
    itemsize = DTYPES[store.spec.dtype][0].itemsize
    hookpoints = {}
    for path, hook in store.spec.hookpoints.items():
        stored = store.stored_bytes(path)
        hookpoints[path] = {
            "d_in": hook.d_in,
            "bytes": stored,
            "ratio": round(store.n_rows * hook.d_in * itemsize / max(1, stored), 3),
        }
    rate = rows / seconds if seconds else 0.0
    return Summary(
        store.name, store.n_rows, hookpoints, round(seconds, 2), round(rate, 1), round(waited / (seconds or 1), 4)
    )
