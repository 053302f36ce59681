"""Begins a store: turns the corpus into rows of token ids, once, and creates the empty arrays around them.

If a store beside the new one was made from the same corpus in the same way, its tokens are copied. You harvest another
layer of a model without tokenising again, and its rows are in the same order.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from harvest.corpus.documents import BadDocument
from harvest.corpus.pack import PackCounts
from harvest.corpus.tokenise import forget_progress, is_resumable, write_rows
from harvest.disk_space import check_space
from harvest.plan import (
    HarvestPlan,
    identity,
    lent_shape,
    make_spec,
    shape,
    spec_of,
    tell_of_small_shards,
    token_identity,
)
from harvest.reuse.key import TOKEN_FIELDS
from shared.device import device_name
from shared.errors import DamagedError, UserError
from shared.files.base import Files
from shared.files.local import LocalFiles, error_kind, touch
from shared.files.locks import HELD_FILE, LOCK_FILE
from shared.files.open import open_files
from shared.progress import say
from shared.record import provenance
from shared.store.commits import Commits
from shared.store.create import (
    BUILDING,
    WrittenTokens,
    building,
    check_replaceable,
    create_store,
    delete_old_store,
    is_ours,
    place_tokens,
    write_tokens,
)
from shared.store.opened import Store, is_store, read_state
from shared.store.spec import StoreSpec


def make_folder(files: Files, overwrite: bool) -> None:
    """Makes the store's folder. Raises UserError when it cannot be made or written to, or when something else is there;
    BusyError on a full disk; DamagedError when an unreadable store is there and `overwrite` is False."""
    if not isinstance(files, LocalFiles):
        return  # an object store has no folders
    root = files.root
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: is a file. Choose another --out or --name")
    if root.exists() and not holds_store(files, overwrite) and any(not is_ours(path.name) for path in root.iterdir()):
        raise UserError(f"{root}: exists and is not a store. Choose another --out or --name, or empty the folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
        touch(root / LOCK_FILE)
    except OSError as error:
        raise error_kind(error)(f"--out {root.parent}: cannot be written to ({error.strerror})") from error


def holds_store(files: Files, overwrite: bool) -> bool:
    try:
        return is_store(files)
    except DamagedError:
        if overwrite:
            return True
        raise


def record_of(plan: HarvestPlan, device: str) -> dict[str, Any]:
    """The record of what a harvest on this device produces."""
    return {**provenance(), "device": device_name(device), "config": plan.config.model_dump(mode="json")}


def begin_store(plan: HarvestPlan, record: dict[str, Any], check_stop: Callable[[], None]) -> None:
    """Writes the token rows, then the empty store. The old content (a store to overwrite, or an unfinished beginning)
    is removed only when nothing can be refused any longer. `check_stop` is called now and then and may raise."""
    check_replaceable(plan.files)
    with token_folder(plan.files) as folder:
        tokens, spec = lent_tokens(plan, folder) or corpus_tokens(plan, folder, check_stop)
        delete_old_store(plan.files, folder.name)
        forget_progress(folder)
        place_tokens(plan.files, tokens)
    tell_of_small_shards(plan, spec)
    create_store(plan.files, spec, tokens.files, record)


@contextmanager
def token_folder(files: Files) -> Iterator[Path]:
    """The folder in which tokens are written. In a local store it keeps what an earlier attempt left, and is kept when
    this attempt ends early, so that the next one resumes. It is removed when the corpus itself is unusable."""
    if not isinstance(files, LocalFiles):
        with building(files) as folder:
            yield folder
        return
    folder = files.root / BUILDING
    if folder.is_symlink():
        folder.unlink()
    try:
        yield folder
    except BaseException as error:
        if isinstance(error, BadDocument | TooLittle) or not is_resumable(folder):
            shutil.rmtree(folder, ignore_errors=True)
        remove_empty_folder(files)
        raise


class TooLittle(UserError):
    """The corpus has fewer tokens than were asked for."""


def remove_empty_folder(files: Files) -> None:
    """Removes the folder of a store that was never created."""
    if isinstance(files, LocalFiles) and {path.name for path in files.root.iterdir()} <= {LOCK_FILE, HELD_FILE}:
        for path in list(files.root.iterdir()):
            path.unlink()
        files.root.rmdir()


def corpus_tokens(plan: HarvestPlan, folder: Path, check_stop: Callable[[], None]) -> tuple[WrittenTokens, StoreSpec]:
    """Returns the tokens of the corpus and the new store's spec. Raises UserError when the corpus has too few
    tokens."""
    counts = PackCounts()
    tokens = write_rows(plan, folder, counts, check_stop)
    if counts.bad:
        say(f"{plan.name}: {counts.bad:,} bad documents were skipped")
    if counts.rough:
        say(f"{plan.name}: {counts.rough:,} cuts in long texts changed the ids beside them (docs/reference/corpora.md)")
    available, wanted = tokens.rows * plan.context, plan.config.tokens
    if available < (wanted or 1):
        raise TooLittle(too_little(max(available, counts.tokens), tokens.rows, plan.context, wanted))
    if wanted is None:
        check_space(plan, available)
    return tokens, make_spec(plan, counts, tokens, wanted or available)


def too_little(given: int, rows: int, context: int, wanted: int | None) -> str:
    """Returns the message for a corpus that is too short: it has `given` tokens, which fill `rows` whole rows."""
    if not rows:
        return f"the corpus has {given:,} tokens, less than one row of {context}. Lower --context, or give more text"
    return (
        f"the corpus has {given:,} tokens, which make {rows:,} rows of {context} = {rows * context:,}; {wanted or 0:,} "
        f"were asked for. Lower --tokens to {rows * context:,}, or give more text"
    )


def lent_tokens(plan: HarvestPlan, folder: Path) -> tuple[WrittenTokens, StoreSpec] | None:
    """Copies the tokens of a store beside this one that has the tokens this harvest would make, or begins with them.
    Returns None when there is none."""
    lender = find_lender(plan)
    if lender is None:
        return None
    n_tokens = plan.config.tokens or lender.spec.n_tokens
    shutil.rmtree(folder, ignore_errors=True)  # left by an earlier attempt that found no such store
    try:
        contexts = -(-n_tokens // plan.context)
        tokens = write_tokens(folder, first_contexts(lender, contexts), plan.context, plan.info.vocab_size)
    except (DamagedError, OSError) as error:
        say(f"{lender.name} has the same tokens, but they cannot be read ({error})")
        shutil.rmtree(folder, ignore_errors=True)
        return None
    say(f"{plan.name}: copied the tokens of {lender.name}")
    same_extent = lender.spec.n_tokens == n_tokens
    same_shape = lent_shape(plan, lender.spec) if same_extent else None
    if same_extent and same_shape is None:
        say(f"{plan.name}: its shards have another size, so its rows are in another order than in {lender.name}")
    # how many documents a harvest reads for fewer tokens is known only from reading them
    counts = {} if same_extent else dict.fromkeys(("documents", "empty_documents", "bad_documents"))
    corpus = {**lender.spec.corpus, **token_identity(plan), "ids_blake2b": tokens.digest}
    corpus = {key: value for key, value in corpus.items() if key not in counts}
    return tokens, spec_of(plan, corpus, n_tokens, tokens.dtype, *(same_shape or shape(plan, n_tokens)))


def first_contexts(store: Store, contexts: int) -> Iterator[NDArray[Any]]:
    """Yields the first contexts of a store, chunk by chunk, after all were checked. Raises DamagedError."""
    for block in store.token_rows().blocks():
        yield block[:contexts]
        contexts -= len(block)
        if contexts <= 0:
            return


def find_lender(plan: HarvestPlan) -> Store | None:
    """The store beside this one whose tokens begin with those of this harvest: one with no more tokens where there is
    one, else the smallest."""
    beside = open_files(plan.config.out)
    if isinstance(beside, LocalFiles) and not beside.root.is_dir():
        return None
    wanted, found = {key: identity(plan)[key] for key in TOKEN_FIELDS}, list[Store]()
    for name in beside.folders():
        files = beside.at(name)
        try:
            if files.name == plan.name or not is_store(files):
                continue
            spec, state = read_state(files)
        except (UserError, DamagedError, OSError):  # an unreadable neighbour has no tokens to copy
            continue
        if {key: getattr(spec, key) for key in TOKEN_FIELDS} == wanted and begins_with_tokens(spec, plan):
            found.append(Store(files, spec, state, Commits.from_mapping({})))
    return min(found, key=lambda store: store.spec.n_tokens, default=None)


def begins_with_tokens(spec: StoreSpec, plan: HarvestPlan) -> bool:
    """Whether a store of the same tokenizer holds enough tokens of the same corpus: all of it, or as many."""
    asked = token_identity(plan)
    whole = asked.pop("whole")
    if {key: spec.corpus.get(key) for key in asked} != asked:
        return False
    return spec.corpus.get("whole") is True if whole else spec.n_tokens >= (plan.config.tokens or 0)
