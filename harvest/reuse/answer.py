"""Answers a request from a folder of stores, without a server: what is missing is made in this process."""

from pathlib import Path

from harvest.dry_run import trial
from harvest.recode import recode
from harvest.reuse.key import store_key
from harvest.reuse.match import CatalogStore, Found, find_answer, harvest_of
from harvest.reuse.plan import Planned, plan_request
from harvest.reuse.rates import known_rate
from harvest.reuse.scan import scan_stores
from harvest.reuse.words import answer_in_words, cost_in_words, rows_to_harvest
from harvest.run import harvest
from shared.config import RequestConfig
from shared.errors import UserError
from shared.files.base import join
from shared.files.open import open_files
from shared.progress import say
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
    rows = rows_to_harvest(found)
    if rows:
        rate = known_rate(open_files(config.root), planned.spec, planned.device)
        measured = "as fast as an earlier harvest here"
        if rate is None:
            harvests = [new for new in found.new if not new.recode_from]
            rate = trial(harvest_of(planned.config, harvests[0])).tokens_per_second
            measured = "measured on one batch"
        seconds = round(rows / rate, 3)
    cost = cost_in_words(found.bytes_to_write, seconds, measured)
    return RequestPlan(
        action=found.action,
        tokens=found.tokens,
        shards_to_harvest=found.shards_to_harvest,
        bytes_to_write=found.bytes_to_write,
        seconds=seconds,
        from_stores=found.donors,
        text=answer_in_words(found, {each.store: each.tokens for each in stores}, cost, config.root),
    )


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
