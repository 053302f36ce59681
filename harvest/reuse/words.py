"""How a request is answered, in words: the same for a folder of stores and for a service."""

from collections.abc import Mapping, Sequence

from harvest.reuse.match import Found, NewStore
from shared.files.base import join
from shared.progress import duration, gigabytes


def rows_to_harvest(found: Found) -> int | None:
    """Rows that the model must be run for, in all stores that are made; None for a whole corpus that was never read."""
    rows = 0
    for new in found.new:
        if new.shards_to_harvest is None or new.shard_rows is None or found.tokens is None:
            return None
        rows += min(new.shards_to_harvest * new.shard_rows, found.tokens)
    return rows


def cost_in_words(size: int | None, seconds: float | None, measured: str = "") -> str:
    """`about 31 GB to write, 9 min 20 s (as fast as an earlier harvest here)`."""
    parts = ["all of the corpus, whose size is unknown" if size is None else f"about {gigabytes(size)} to write"]
    if seconds:
        parts.append(f"{duration(seconds)}{f' ({measured})' if measured else ''}")
    return ", ".join(parts)


def answer_in_words(
    found: Found, tokens: Mapping[str, int], cost: str, root: str = "", evicts: Sequence[str] = ()
) -> str:
    """How a request is answered, in one line. `tokens` are those of the stores that are there, by name; `root` is put
    before the names of stores that are ready, and `evicts` are the stores that would be deleted."""
    if found.ready:
        more = "" if found.exact else ", which hold more tokens and begin with these"
        names = sorted(set(found.places.values()))
        sizes = {name: tokens.get(name, found.tokens or 0) for name in names}
        places = (f"{join(root, name) if root else name} ({size:,} tokens)" for name, size in sizes.items())
        return f"ready: {', '.join(places)}{more}"
    donors = ", ".join(found.donors)
    lines = [new_in_words(new, donors, tokens) for new in found.new]
    gone = f"; {', '.join(evicts)} would be deleted" if evicts else ""
    return f"{'; '.join(lines)}; {cost}{gone}"


def new_in_words(new: NewStore, donors: str, there: Mapping[str, int]) -> str:
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
