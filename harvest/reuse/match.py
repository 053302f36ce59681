"""Which stores answer a request, and what making the rest takes. Pure: it reads no file and imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal

from harvest.reuse.key import rows_key, store_folder, store_key, token_key
from harvest.reuse.shape import FEW_TOKENS, SHARD_BYTES
from shared.config import HarvestConfig
from shared.request import Accept, Action
from shared.store.shard import CODECS, CodecName
from shared.store.spec import DTYPES, HookSpec, StoreSpec

ROW_BYTES: Final = 8
"""Bytes per token of the tokens and of where each row came from."""
NORM_BYTES: Final = 4


@dataclass(frozen=True)
class CatalogStore:
    """One store in the folder of all stores."""

    store: str
    """The name of its folder."""
    spec: StoreSpec
    key: str
    rows: int
    """Rows that are committed."""
    state: Literal["writing", "final"]
    environment: str
    bytes: int | None
    """Bytes of its shards; None where its manifest was not read."""
    folder: str
    """Its place, for programs on this machine."""

    @property
    def tokens(self) -> int:
        """Rows that it has, or will have."""
        return self.spec.n_tokens

    @property
    def whole(self) -> bool:
        """Whether it holds all of its corpus."""
        return self.spec.corpus.get("whole") is True

    @cached_property
    def rows_key(self) -> str:
        return rows_key(self.spec)

    @cached_property
    def token_key(self) -> str:
        return token_key(self.spec)

    @property
    def complete(self) -> bool:
        return self.state == "final" and self.rows == self.tokens


@dataclass(frozen=True)
class Shape:
    """The shape that a store would have, with the keys that follow from it."""

    key: str
    recode_keys: tuple[str, ...]
    """Keys of the same rows in other codecs, from which the wanted codec can be made."""
    chunk_rows: int
    shard_rows: int


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, once the model and the corpus are known. It can be kept as JSON."""

    label: str
    """The model's name, for folder names."""
    shapes: tuple[Shape, ...]
    """One, or two for a whole corpus: its size, which decides the shape, is only known after reading it."""
    rows_key: str
    token_key: str
    hookpoints: Mapping[str, HookSpec]
    tokens: int | None
    """None: the whole corpus."""
    context: int
    accept: Accept
    environment: str | None
    """The environment that a store must have been written in; None: any."""
    codec: CodecName
    dtype: str

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(shape.key for shape in self.shapes)

    def as_json(self) -> dict[str, Any]:
        shapes = [{**vars(shape), "recode_keys": list(shape.recode_keys)} for shape in self.shapes]
        hooks = {path: hook.model_dump() for path, hook in self.hookpoints.items()}
        return {**vars(self), "shapes": shapes, "hookpoints": hooks}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Wanted":
        """Reads what `as_json` gave."""
        shapes = tuple(Shape(**{**shape, "recode_keys": tuple(shape["recode_keys"])}) for shape in value["shapes"])
        hooks = {path: HookSpec.model_validate(hook) for path, hook in value["hookpoints"].items()}
        return cls(**{**value, "shapes": shapes, "hookpoints": hooks})


@dataclass(frozen=True)
class NewStore:
    """A store that must be made, or finished, to answer a request."""

    store: str
    """The name of its folder."""
    hookpoints: Mapping[str, HookSpec]
    chunk_rows: int
    shard_rows: int | None
    """None for a whole corpus that was never read."""
    shards_to_harvest: int | None
    """Shards that the model must be run for; None for a whole corpus that was never read."""
    shards: int | None
    """All of its shards."""
    bytes_to_write: int | None
    action: Action
    recode_from: str | None = None
    """The finished store to rewrite with another codec; None: it is harvested."""


@dataclass(frozen=True)
class Found:
    """How a request is answered."""

    action: Action
    """What takes longest of all that must be done."""
    places: dict[str, str]
    """Hookpoint path -> the store that has it, or will have it."""
    exact: bool
    """Whether the stores hold just the tokens that were asked for."""
    tokens: int | None
    """Rows that every hookpoint's store has, or will have."""
    donors: tuple[str, ...]
    """Stores that give tokens, shards or rows."""
    shards_to_harvest: int | None
    bytes_to_write: int | None
    new: tuple[NewStore, ...] = ()
    """The stores to make; none: the answer is ready."""

    @property
    def ready(self) -> bool:
        return not self.new


SLOWEST_LAST: Final[tuple[Action, ...]] = ("ready", "view", "recode", "extend", "hookpoints", "harvest")


def find_answer(wanted: Wanted, stores: Iterable[CatalogStore]) -> Found:
    """Decides which of the `stores` answer, and which must be made. What is wanted of a store that exists is never made
    again; a store of the same extent that is being written is finished rather than begun a second time."""
    there = sorted(stores, key=lambda each: each.store)
    usable = [each for each in there if wanted.environment in (None, each.environment)]
    size, shape = extent(wanted, there)
    alike = [each for each in usable if each.key == shape.key or (size is None and each.key in wanted.keys)]
    places = {hook: best.store for hook in wanted.hookpoints if (best := holder(wanted, hook, usable))}
    new: list[NewStore] = []
    left = [hook for hook in wanted.hookpoints if hook not in places]
    for step in (unfinished, views, recodes, remade, harvests):
        made = step(Situation(wanted, size, shape, alike, usable, bool(places)), left)
        new += made
        places |= {hook: one.store for one in made for hook in one.hookpoints if hook in left}
        left = [hook for hook in left if hook not in places]
    by_name = {each.store: each for each in there}
    extents = {by_name[name].tokens if name in by_name else size for name in places.values()}
    exact = extents <= {size}
    lenders = donors_of(wanted, size, there, usable, new)
    return Found(
        max((one.action for one in new), key=SLOWEST_LAST.index, default="ready"),
        dict(sorted(places.items())),
        exact,
        size if exact else min(n for n in extents if n is not None),
        tuple(lenders),
        total(one.shards_to_harvest for one in new),
        total(one.bytes_to_write for one in new),
        tuple(new),
    )


@dataclass(frozen=True)
class Situation:
    """What a request meets: its size and shape, and the stores that are there."""

    wanted: Wanted
    size: int | None
    """Rows of the answer; None for a whole corpus that was never read."""
    shape: Shape
    alike: Sequence[CatalogStore]
    """Stores with the wanted key."""
    usable: Sequence[CatalogStore]
    """Stores of any key."""
    partly: bool
    """Whether a store answers for some of the hookpoints."""

    @property
    def shards(self) -> int | None:
        return None if self.size is None else -(-self.size // self.shape.shard_rows)

    def same_extent(self, store: CatalogStore) -> bool:
        return store.whole if self.wanted.tokens is None else store.tokens == self.size

    def holds(self, store: CatalogStore, hook: str) -> bool:
        return store.spec.hookpoints.get(hook) == self.wanted.hookpoints[hook]

    def bytes_of(self, hooks: Mapping[str, HookSpec], rows: int | None) -> int | None:
        return None if rows is None else disk_bytes(hooks, rows, self.wanted.dtype, self.wanted.codec)

    def new_store(
        self, hooks: Mapping[str, HookSpec], action: Action, shards: int | None, size: int | None
    ) -> NewStore:
        """A store for these hookpoints, of which the model makes `shards` and whose new files have `size` bytes."""
        rows = None if self.size is None else self.shape.shard_rows
        name = store_folder(self.wanted.label, list(hooks), self.wanted.tokens, self.wanted.keys[-1])
        return NewStore(name, hooks, self.shape.chunk_rows, rows, shards, self.shards, size, action)


def disk_bytes(hooks: Mapping[str, HookSpec], rows: int, dtype: str, codec: CodecName) -> int:
    """Bytes of rows of these hookpoints on disk, by the codec's usual ratio."""
    itemsize = DTYPES[dtype][0].itemsize
    ratio = CODECS[codec].expected_ratio(dtype, itemsize)
    return int(rows * (ROW_BYTES + sum(hook.d_in * itemsize / ratio + NORM_BYTES for hook in hooks.values())))


def harvest_of(config: HarvestConfig, new: NewStore) -> HarvestConfig:
    """The harvest that makes a store, out of the one of all that is wanted."""
    names = tuple(hook.name for hook in new.hookpoints.values())
    shape = {"chunk_rows": new.chunk_rows, "shard_rows": new.shard_rows}
    return config.model_copy(update={"name": new.store, "layers": ("mid",), "hooks": names, **shape})


def extent(wanted: Wanted, there: Sequence[CatalogStore]) -> tuple[int | None, Shape]:
    """The size of the answer and its shape. The size of a whole corpus is known from any store with all its tokens."""
    size = wanted.tokens
    if size is None:
        known = [s.tokens for s in there if s.whole and s.token_key == wanted.token_key]
        size = known[0] if known else None
    return size, wanted.shapes[0 if size is not None and size < FEW_TOKENS else -1]


def holder(wanted: Wanted, hook: str, usable: Sequence[CatalogStore]) -> CatalogStore | None:
    """The finished store that answers for a hookpoint: one of just these tokens, or else the smallest with more. Where
    more will do, the shape does not matter either."""
    found = []
    for store in usable:
        alike, covering = store.key in wanted.keys, wanted.accept == "covering"
        same = store.whole if wanted.tokens is None else store.tokens == wanted.tokens
        more = covering and wanted.tokens is not None and store.tokens > wanted.tokens
        if not store.complete or not (same or more) or store.spec.hookpoints.get(hook) != wanted.hookpoints[hook]:
            continue
        if alike or (covering and store.spec.codec == wanted.codec and store.rows_key == wanted.rows_key):
            answered = len(wanted.hookpoints.keys() & store.spec.hookpoints.keys())
            found.append(((not same, not alike, store.tokens, -answered, store.store), store))
    return min(found, key=lambda each: each[0])[1] if found else None


def unfinished(now: Situation, left: Sequence[str]) -> list[NewStore]:
    """Stores of this extent that were begun."""
    found: list[NewStore] = []
    for store in now.alike:
        done = {hook for one in found for hook in one.hookpoints}
        if store.complete or not now.same_extent(store):
            continue
        if not any(now.holds(store, hook) for hook in left if hook not in done):
            continue
        spec = store.spec
        missing = -(-(store.tokens - store.rows) // spec.shard_rows)
        size = now.bytes_of(spec.hookpoints, store.tokens - store.rows)
        action: Action = "extend" if store.rows else "harvest"
        shape = (spec.chunk_rows, spec.shard_rows)
        found.append(NewStore(store.store, spec.hookpoints, *shape, missing, spec.n_shards, size, action))
    return found


def views(now: Situation, left: Sequence[str]) -> list[NewStore]:
    """Stores that are linked together from others, without the model."""
    if now.size is None:
        return []
    hooks = [hook for hook in left if lent_shards(now, hook) == now.shards]
    rest = now.size % now.shape.shard_rows
    linked = any(s.complete and s.tokens == now.size for hook in hooks for s in now.alike if now.holds(s, hook))
    rows = 0 if linked else rest
    return [now.new_store(group, "view", 0, now.bytes_of(group, rows)) for group in in_groups(now, hooks)]


def recodes(now: Situation, left: Sequence[str]) -> list[NewStore]:
    """Stores that are rewritten from one with another codec."""
    found: list[NewStore] = []
    wanted = set(left)
    for store in now.usable:
        fits = store.key in now.shape.recode_keys and store.complete and now.same_extent(store)
        hooks = store.spec.hookpoints
        if fits and any(hook in wanted and now.holds(store, hook) for hook in hooks):
            made = now.new_store(hooks, "recode", 0, now.bytes_of(hooks, store.tokens))
            found.append(replace(made, recode_from=store.store))
            wanted -= hooks.keys()
    return found


def remade(now: Situation, left: Sequence[str]) -> list[NewStore]:
    """Stores that are made from the rows of others, which have another codec or another shape."""
    if now.size is None:
        return []
    hooks = [hook for hook in left if lent_shards(now, hook, remake=True) == now.shards]
    return [now.new_store(group, "recode", 0, now.bytes_of(group, now.size)) for group in in_groups(now, hooks)]


def harvests(now: Situation, left: Sequence[str]) -> list[NewStore]:
    """Stores that the model must be run for, at least for some of their shards."""
    lent = min((lent_shards(now, hook, remake=True) for hook in left), default=0)
    beside = now.partly or any(now.same_extent(store) for store in now.alike)
    action: Action = "extend" if lent else "hookpoints" if beside else "harvest"
    shards = None if now.shards is None else now.shards - lent
    linked = min((lent_shards(now, hook) for hook in left), default=0)
    rows = None if now.size is None else now.size - linked * now.shape.shard_rows
    return [now.new_store(group, action, shards, now.bytes_of(group, rows)) for group in in_groups(now, left)]


def lent_shards(now: Situation, hook: str, *, remake: bool = False) -> int:
    """How many of the first shards other stores hold already, or `remake`, have the rows for."""
    about, shape, size = now.wanted.hookpoints[hook], now.shape, now.size
    given = [shards_of(store, hook, about, size, shape.shard_rows) for store in now.alike]
    if remake:
        others = [store for store in now.usable if store not in now.alike and store.rows_key == now.wanted.rows_key]
        given += [shards_from(store, hook, about, size, shape.shard_rows) for store in others]
    return max(given, default=0)


def shards_of(store: CatalogStore, hook: str, about: HookSpec, size: int | None, shard_rows: int) -> int:
    """How many of the first shards of a store of `size` rows another store of the same key can give."""
    if store.spec.hookpoints.get(hook) != about:
        return 0
    size = store.tokens if size is None else size
    same = store.complete and store.tokens == size
    whole = -(-size // shard_rows) if same else min(store.rows, size) // shard_rows
    return max(whole, shards_from(store, hook, about, size, shard_rows))


def shards_from(store: CatalogStore, hook: str, about: HookSpec, size: int | None, shard_rows: int) -> int:
    """How many of the first shards of a store of `size` rows can be made from the rows of another store."""
    if store.spec.quantised or store.spec.hookpoints.get(hook) != about:
        return 0
    size = store.tokens if size is None else size
    return -(-size // shard_rows) if store.rows >= size else store.rows // shard_rows


def lent_rows(spec: StoreSpec, donors: Sequence[CatalogStore]) -> tuple[int, int]:
    """Rows of a store that others can give, and how many of them are linked: an estimate, because it trusts their order
    of commits."""
    key, size, rows = store_key(spec), spec.n_tokens, spec.shard_rows
    given, linked = [], []
    for hook, about in spec.hookpoints.items():
        links = [shards_of(donor, hook, about, size, rows) for donor in donors if donor.key == key]
        made = [shards_from(donor, hook, about, size, rows) for donor in donors]
        linked.append(max(links, default=0))
        given.append(max(links + made, default=0))
    return min(size, min(given) * rows), min(size, min(linked) * rows)


def in_groups(now: Situation, hooks: Sequence[str]) -> list[dict[str, HookSpec]]:
    """The hookpoints in groups, each for one store, whose shards fit into memory."""
    itemsize, groups, room = DTYPES[now.wanted.dtype][0].itemsize, list[dict[str, HookSpec]](), 0
    for hook in hooks:
        size = now.wanted.hookpoints[hook].d_in * itemsize * now.shape.shard_rows
        if not groups or size > room:
            groups.append({})
            room = SHARD_BYTES
        groups[-1][hook] = now.wanted.hookpoints[hook]
        room -= size
    return groups


def donors_of(
    wanted: Wanted,
    size: int | None,
    there: Sequence[CatalogStore],
    usable: Sequence[CatalogStore],
    new: Sequence[NewStore],
) -> list[str]:
    """The stores that give something to those that are made: shards, rows, or else their tokens."""
    made = {one.store for one in new}
    others = [store for store in usable if store.store not in made]
    found = {one.recode_from for one in new if one.recode_from}
    for one in new:
        for hook, about in one.hookpoints.items() if not one.recode_from else ():
            lent = {
                store.store: (shards_of if store.key in wanted.keys else shards_from)(
                    store, hook, about, size, one.shard_rows or store.spec.shard_rows
                )
                for store in others
                if store.key in wanted.keys or store.rows_key == wanted.rows_key
            }
            most = max(lent.values(), default=0)
            able = [name for name, shards in lent.items() if shards == most > 0]
            found |= set() if found & set(able) else set(able[:1])
    if new and not found:
        enough = [s for s in there if s.token_key == wanted.token_key and lends_tokens(wanted, size, s)]
        found |= {s.store for s in enough[:1] if s.store not in made}
    return sorted(found)


def lends_tokens(wanted: Wanted, size: int | None, store: CatalogStore) -> bool:
    """Whether a store has all tokens that the answer needs."""
    return store.whole if wanted.tokens is None else size is not None and store.tokens >= size


def total(numbers: Iterable[int | None]) -> int | None:
    """The sum; None where one of them is unknown."""
    found = list(numbers)
    return None if None in found else sum(number or 0 for number in found)
