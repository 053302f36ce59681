"""harvest(config): runs a corpus through a model and commits the activations to a store. The same call resumes an
interrupted harvest.

Everything that can be refused is refused before anything is written. Then rank 0 writes the tokens once, and every
process captures and commits its share of the missing shards. At the end the state becomes "final".
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from harvest.begin import begin_store, find_lender, make_folder, record_of, remove_empty_folder
from harvest.disk_space import check_space
from harvest.fill import FillResult, fill, rows_of
from harvest.plan import HarvestPlan, asked_spec, check_same, make_plan
from harvest.reuse.borrow import borrow_shards, find_donors
from harvest.reuse.key import environment_of
from harvest.reuse.match import lent_rows
from harvest.reuse.rates import remember_rate
from harvest.reuse.scan import read_environment
from harvest.team import RankWork, Team
from shared.config import HarvestConfig
from shared.device import device_name
from shared.errors import Interrupted, LostError, UserError
from shared.files.local import LocalFiles
from shared.files.locks import check_alone
from shared.files.open import open_files
from shared.model.language_model import load_weights
from shared.model.source import resolve_model, same_model
from shared.progress import say
from shared.stop import stop_requests
from shared.store.create import clean_up, finish_store, reopen_store
from shared.store.norms import sample
from shared.store.opened import Store, is_store
from shared.store.spec import DTYPES, StoreSpec

AGAIN: Final = "run the same command again"


@dataclass(frozen=True)
class HarvestSummary:
    """The result of a harvest."""

    store: str
    tokens: int
    hookpoints: dict[str, dict[str, Any]]
    seconds: float
    """Seconds of capturing and writing; loading the model is not counted."""
    tokens_per_second: float
    waiting_for_writer: float
    """Share of the time in which the model waited because the writer was behind."""
    reused: int = 0
    """Tokens whose activations were taken over from other stores."""


def harvest(config: HarvestConfig) -> HarvestSummary:
    """Harvests until the store is complete; on ranks 1 and up, until this rank's share is committed. Raises UserError
    for unusable input, Interrupted after a signal."""
    team = Team.join()
    with stop_requests() as stop_asked:

        def check_stop() -> None:
            if stop_asked():
                raise Interrupted(f"the harvest was stopped. To continue, {AGAIN}")
            team.check_launcher()

        try:
            return lead_harvest(config, team, check_stop) if team.rank == 0 else join_harvest(config, team, check_stop)
        except BaseException as error:
            if team.rank:
                team.fail()
            if isinstance(error, UserError | Interrupted | LostError) and config.overwrite and AGAIN in str(error):
                # the same command would overwrite the store once more
                raise type(error)(str(error).replace(AGAIN, f"{AGAIN} without --overwrite")) from error
            raise


def lead_harvest(config: HarvestConfig, team: Team, check_stop: Callable[[], None]) -> HarvestSummary:
    """Runs rank 0: it begins and finishes the store, takes over what other stores hold, and captures its own share of
    the shards that are left."""
    plan = make_plan(config, check_stop)
    if complete := complete_store(plan):
        team.announce(RankWork(complete.location, ()))
        team.await_others(check_stop)
        say(f"{plan.name} is complete: {complete.n_rows:,} tokens. Nothing to do (--overwrite starts again).")
        return summarise(complete, 0.0, 0, 0.0)
    device = team.device(config.device)
    record = record_of(plan, device)
    asked = spec_beforehand(plan)
    donors = find_donors(plan.files, asked, plan.config, environment_of(record)) if asked else []
    lent, linked = lent_rows(asked, donors) if asked and donors else (0, 0)
    check_space(plan, asked.n_tokens if asked else None, linked)
    make_folder(plan.files, config.overwrite)
    with plan.files.explained(), plan.files.lock():
        if isinstance(plan.files, LocalFiles):
            check_alone(plan.files.root)
        model = None if asked and all_lent(plan, asked, lent) else load_model(plan, device, check_stop)
        if config.overwrite or not is_store(plan.files):
            begin_store(plan, record, check_stop)
        store, reused = reopened(plan, check_stop)
        work = RankWork(store.location, tuple(store.missing))
        team.announce(work)
        filled = FillResult(time.monotonic(), 0.0)
        if team.shards_of_rank(work):
            filled = fill(store, config, plan.source, team, check_stop, team.shards_of_rank(work), model)
        model = None
        team.await_others(check_stop)
        finish_store(plan.files, store.spec)
    seconds = time.monotonic() - filled.started
    store = Store.open(plan.files)
    say_massive(store)
    rows = rows_of(store.spec, work.todo)
    if rows and seconds:
        remember_rate(open_files(config.out), store.spec, device_name(device), rows, rows / seconds / team.size)
    return summarise(store, seconds, rows, filled.waited, reused)


def reopened(plan: HarvestPlan, check_stop: Callable[[], None]) -> tuple[Store, int]:
    """The store that is there, made ready to be written, with the shards that other stores give; and their rows."""
    clean_up(plan.files)
    store = Store.open(plan.files)
    check_same(plan, store.spec)  # again: another harvest may have finished meanwhile
    reopen_store(store)
    donors = find_donors(plan.files, store.spec, plan.config, read_environment(plan.files))
    reused = borrow_shards(store, plan.config, donors, check_stop)
    return Store.open(plan.files), reused


def complete_store(plan: HarvestPlan) -> Store | None:
    """The store, where it is there and complete. Raises UserError where another one is there."""
    if plan.config.overwrite or not is_store(plan.files):
        return None
    store = Store.open(plan.files)
    check_same(plan, store.spec)
    return store if store.state == "final" and not store.missing else None


def all_lent(plan: HarvestPlan, spec: StoreSpec, lent: int) -> bool:
    """Whether other stores give every shard that is missing, when they have the first `lent` rows."""
    resumes = not plan.config.overwrite and is_store(plan.files)
    missing = Store.open(plan.files).missing if resumes else range(spec.n_shards)
    return all(spec.shard_range(shard)[1] <= lent for shard in missing)


def spec_beforehand(plan: HarvestPlan) -> StoreSpec | None:
    """The spec of the store that will be written; None for a whole corpus whose size no store tells."""
    if not plan.config.overwrite and is_store(plan.files):
        return Store.open(plan.files).spec
    tokens = plan.config.tokens
    if tokens is None and (lender := find_lender(plan)):
        tokens = lender.spec.n_tokens
    return asked_spec(plan, tokens) if tokens else None


def say_massive(store: Store) -> None:
    """Prints a line for each hookpoint in which a few tokens make up most of the variance."""
    for hook in store.spec.hookpoints:
        found = sample(store, hook)
        if found and found.massive.text:
            say(f"{hook}: {found.massive.text}")


def load_model(plan: HarvestPlan, device: str, check_stop: Callable[[], None]) -> Any:
    """Returns the model's weights. They are loaded before anything is tokenised, written or removed, so that their
    errors come first. On an error, a folder that was made for the store is removed."""
    check_stop()
    try:
        return load_weights(plan.source, device, plan.dtype, plan.config.attention)
    except BaseException:
        remove_empty_folder(plan.files)
        raise


def join_harvest(config: HarvestConfig, team: Team, check_stop: Callable[[], None]) -> HarvestSummary:
    """Runs ranks 1 and up: captures their shards of the store that rank 0 announced."""
    work = team.await_work(check_stop)
    todo, filled = team.shards_of_rank(work), FillResult(time.monotonic(), 0.0)
    store = Store.open(work.store)
    if todo:
        source = resolve_model(config.model, None if store.spec.model["local"] else store.spec.model["commit"])
        if not same_model(source, store.spec.model["commit"]):
            raise UserError(f"--model {config.model}: this machine has another model than rank 0's machine")
        with store.files.explained(), store.files.lock(team.rank):
            filled = fill(store, config, source, team, check_stop, todo)
    team.done()
    return summarise(store, time.monotonic() - filled.started, rows_of(store.spec, todo), filled.waited)


def summarise(store: Store, seconds: float, rows: int, waited: float, reused: int = 0) -> HarvestSummary:
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
    share = round(waited / (seconds or 1), 4)
    return HarvestSummary(store.name, store.n_rows, hookpoints, round(seconds, 2), round(rate, 1), share, reused)
