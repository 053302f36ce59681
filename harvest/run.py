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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harvest.capture import capture_shard, make_buffers
from harvest.pack import Counts, pack, shuffled
from harvest.plan import Plan, check_room, check_same, make_plan, make_spec
from harvest.writer import ShardWriter
from shared.config import HarvestConfig
from shared.errors import Interrupted, UserError
from shared.manifest import LOCK_FILE, clean_up, explained, writer_lock
from shared.model import LanguageModel
from shared.progress import progress, say
from shared.record import provenance, write_json
from shared.stop import stop_requests
from shared.store import (
    BUILDING,
    DTYPES,
    STATE_FILE,
    Store,
    StoreSpec,
    clear_folder,
    create_store,
    is_ours,
    is_store,
    place_tokens,
    stored_bytes,
    write_state,
    write_tokens,
)


@dataclass(frozen=True)
class Summary:
    """What a harvest did."""

    store: Path
    tokens: int
    hookpoints: dict[str, dict[str, Any]]
    seconds: float
    tokens_per_second: float
    waiting_for_writer: float
    """Share of the time that the model stood still because the writer was behind."""


def harvest(config: HarvestConfig) -> Summary:
    """Harvests until the store is complete. Raises UserError for unusable input, Interrupted after a signal."""
    plan = make_plan(config)
    if is_store(plan.root) and not config.overwrite:
        store = Store.open(plan.root)
        check_same(plan, store.spec)
        if is_complete(store):
            say(f"{plan.root} is complete: {store.n_rows:,} tokens. Nothing to do (--overwrite starts afresh).")
            return summarise(store, 0.0, 0, 0.0)
    check_room(plan, config.tokens)
    make_folder(plan.root)
    with writer_lock(plan.root), explained(plan.root):
        if config.overwrite or not is_store(plan.root):
            begin(plan)
        clean_up(plan.root)
        store = Store.open(plan.root)
        check_same(plan, store.spec)  # again: another harvest may have finished meanwhile
        return fill(plan, store.spec, store)


def is_complete(store: Store) -> bool:
    return store.state == "final" and not store.missing


def make_folder(root: Path) -> None:
    """Raises UserError when the folder cannot be made or written to, or when something else is there."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: is a file. Choose another --out or --name")
    if root.exists() and not is_store(root) and any(not is_ours(path.name) for path in root.iterdir()):
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
    say(f"{plan.root}: tokenising")
    try:
        rows, digest = write_tokens(plan.root, token_rows(plan, counts), plan.context, plan.info.vocab_size)
        available, wanted = rows * plan.context, plan.config.tokens
        if available < (wanted or 1):
            asked = f", {wanted:,} were asked for" if wanted else f", less than one row of {plan.context}"
            raise UserError(
                f"the corpus gives {max(available, counts.tokens):,} tokens{asked}. Lower --tokens or --context, or "
                "give more text"
            )
        if wanted is None:
            check_room(plan, available)
        spec = make_spec(plan, counts, digest, wanted or available)
    except UserError:
        shutil.rmtree(plan.root / BUILDING, ignore_errors=True)
        if [path.name for path in plan.root.iterdir()] == [LOCK_FILE]:
            (plan.root / LOCK_FILE).unlink()
            plan.root.rmdir()
        raise
    (plan.root / STATE_FILE).unlink(missing_ok=True)
    clear_folder(plan.root, keep=(LOCK_FILE, BUILDING))
    place_tokens(plan.root)
    create_store(plan.root, spec)
    write_json(plan.root / "record.json", {**provenance(), "config": plan.config.model_dump(mode="json")})


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
    todo = store.missing
    model = LanguageModel(plan.source, plan.device, plan.dtype)
    model.check_hooks([hook.name for hook in spec.hookpoints.values()])
    tokens = store.tokens()
    buffers = [make_buffers(spec, model.device) for _ in range(2)]
    rows_to_do = sum(spec.shard_range(shard)[1] - spec.shard_range(shard)[0] for shard in todo)
    batch = max(1, plan.config.batch_tokens // spec.context)
    started, waited = time.monotonic(), 0.0
    with (
        stop_requests() as stop_asked,
        closing(ShardWriter(plan.root, spec, tokens)) as writer,
        progress(f"harvest {plan.root.name}", rows_to_do, "tokens") as advance,
    ):

        def after_batch(rows: int) -> None:
            advance(rows, f"waiting for the writer {waited / (time.monotonic() - started):.0%}")
            if stop_asked():
                raise Interrupted(f"{plan.root}: stopped. To continue, run the same command again")

        for turn, shard in enumerate(todo):
            rows = capture_shard(model, spec, tokens, shard, buffers[turn % 2], batch, after_batch)
            before = time.monotonic()
            writer.submit(shard, rows)
            waited += time.monotonic() - before
        writer.wait()
    write_state(plan.root, spec, "final")
    return summarise(Store.open(plan.root), time.monotonic() - started, rows_to_do, waited)


def summarise(store: Store, seconds: float, rows: int, waited: float) -> Summary:
    itemsize = DTYPES[store.spec.dtype][0].itemsize
    hookpoints = {}
    for path, hook in store.spec.hookpoints.items():
        stored = stored_bytes(store, path)
        hookpoints[path] = {
            "d_in": hook.d_in,
            "bytes": stored,
            "ratio": round(store.n_rows * hook.d_in * itemsize / max(1, stored), 3),
        }
    rate = rows / seconds if seconds else 0.0
    return Summary(
        store.root, store.n_rows, hookpoints, round(seconds, 2), round(rate, 1), round(waited / (seconds or 1), 4)
    )
