"""Answers a request from a folder of stores, without a server: what is missing is made in this process."""

from collections.abc import Sequence
from pathlib import Path

from harvest.dry_run import trial
from harvest.recode import recode
from harvest.reuse.key import store_key
from harvest.reuse.match import CatalogStore, Found, NewStore, find_answer, harvest_of
from harvest.reuse.plan import Planned, plan_request
from harvest.reuse.rates import known_rate
from harvest.reuse.scan import scan_stores
from harvest.run import harvest
from shared.config import RequestConfig
from shared.errors import UserError
from shared.files.base import join
from shared.files.open import open_files
from shared.progress import duration, gigabytes, say
from shared.request import CacheAnswer, Place, RequestPlan
from shared.store.opened import Store

Answered = tuple[Planned, Found, list[CatalogStore]]


def look_up(config: RequestConfig) -> Answered:
    """What is asked for, how it is answered, and the stores that are there. Raises UserError for a wrong request."""
    if config.pin is not None or config.priority != "normal":
        option = f"--pin {config.pin}" if config.pin is not None else f"--priority {config.priority}"
        raise UserError(f"{option}: is for a server's queue and pins. Leave it out for a folder of stores")
    planned = plan_request(config, config.root, config.device, config.batch_tokens)
    stores = scan_stores(config.root)
    return planned, find_answer(planned.wanted, stores), stores


def plan_answer(config: RequestConfig) -> RequestPlan:
    """What answering takes, before anything is done. Where no harvest of this model was measured in the folder, one
    batch is measured now."""
    planned, found, stores = look_up(config)
    seconds, measured = None, ""
    rows = rows_to_harvest(found, planned)
    if rows:
        rate = known_rate(open_files(config.root), planned.spec, planned.device)
        measured = "as fast as an earlier harvest here"
        if rate is None:
            harvests = [new for new in found.new if not new.recode_from]
            rate = trial(harvest_of(planned.config, harvests[0])).tokens_per_second
            measured = "measured on one batch"
        seconds = round(rows / rate, 3)
    return RequestPlan(
        action=found.action,
        tokens=found.tokens,
        shards_to_harvest=found.shards_to_harvest,
        bytes_to_write=found.bytes_to_write,
        seconds=seconds,
        from_stores=found.donors,
        text=in_words(config.root, found, stores, cost_in_words(found.bytes_to_write, seconds, measured)),
    )


def rows_to_harvest(found: Found, planned: Planned) -> int:
    """Rows that the model must be run for, in all stores that are made; 0 where that is unknown."""
    rows = 0
    for new in found.new:
        if new.shards_to_harvest and new.shard_rows and planned.wanted.tokens:
            rows += min(new.shards_to_harvest * new.shard_rows, planned.wanted.tokens)
    return rows


def cost_in_words(size: int | None, seconds: float | None, measured: str) -> str:
    """`31 GB, 9 min (as fast as an earlier harvest here)`."""
    parts = ["all of the corpus, whose size is unknown" if size is None else f"about {gigabytes(size)} to write"]
    if seconds is not None:
        parts.append(f"{duration(seconds)} ({measured})")
    return ", ".join(parts)


def in_words(root: str, found: Found, stores: Sequence[CatalogStore], cost: str) -> str:
    """How a request is answered, in one line for each store that is made."""
    if found.ready:
        there = {each.store: each.tokens for each in stores}
        names = sorted(set(found.places.values()))
        more = "" if found.exact else ", which hold more tokens and begin with these"
        places = ", ".join(f"{join(root, name)} ({there[name]:,} tokens)" for name in names)
        return f"ready: {places}{more}"
    donors = ", ".join(found.donors)
    lines = [line_of(new, donors, {each.store for each in stores}) for new in found.new]
    return f"{'; '.join(lines)}; {cost}"


def line_of(new: NewStore, donors: str, there: set[str]) -> str:
    """One store to make: `extends pythia-1b-…: 61 new shards`."""
    hooks, shards = ", ".join(new.hookpoints), new.shards_to_harvest
    harvested = "all shards" if shards is None else f"{shards:,} new shards"
    if new.store in there:
        return f"finishes {new.store}: {harvested}"
    if new.action == "view":
        return f"view of {donors}: no model is run"
    if new.action == "recode":
        return f"recode of {new.recode_from or donors}: no model is run"
    if new.action == "extend":
        return f"extends {donors}: {harvested}"
    if new.action == "hookpoints":
        return f"hookpoints {hooks} beside {donors}: {harvested}"
    return f"harvest of {hooks}: {harvested}"


def answer_request(config: RequestConfig) -> CacheAnswer:
    """Answers a request; makes what is missing first. Raises UserError for a wrong request, and whatever a harvest or a
    recode raises."""
    planned, found, _ = look_up(config)
    for new in found.new:
        if new.recode_from:
            source, target = (join(config.root, name) for name in (new.recode_from, new.store))
            say(f"{target}: {new.recode_from} is rewritten with codec {planned.wanted.codec}")
            recode(source, target, planned.wanted.codec)
        else:
            harvest(harvest_of(planned.config, new))
    stores = scan_stores(config.root) if found.new else None
    if stores is not None:
        found = find_answer(planned.wanted, stores)
    if not found.ready:
        raise UserError(
            f"--root {config.root}: the stores that were made do not answer the request ({found.action} is left). Look "
            "at them with: sagsae store ls"
        )
    return ready_answer(config, planned, found)


def ready_answer(config: RequestConfig, planned: Planned, found: Found) -> CacheAnswer:
    """The answer that the stores of a folder give."""
    files = open_files(config.root)
    places = {
        hook: Place(store=name, file=str(Path(join(config.root, name)).resolve()))
        for hook, name in found.places.items()
    }
    names = set(found.places.values())
    one = Store.open(files.at(names.pop())) if len(names) == 1 else None
    return CacheAnswer(
        state="ready",
        key=planned.wanted.keys[0] if one is None else store_key(one.spec),
        hookpoints=places,
        exact=found.exact,
        tokens=found.tokens,
        spec_id=one.spec_id if one else None,
        snapshot_id=one.snapshot_id if one else None,
    )
