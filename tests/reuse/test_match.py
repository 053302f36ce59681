"""find_answer chooses the stores that docs/explanation/cache.md says; each row of its table is a test here."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import harvest.reuse.match
from harvest.reuse.key import rows_key, token_key
from harvest.reuse.match import CatalogStore, Found, Shape, Wanted, find_answer, harvest_of
from shared.config import HarvestConfig
from shared.store.spec import HookSpec, StoreSpec

SHARD = 512
HOOKS = {f"layer_01/{name}": HookSpec(name=f"blocks.1.hook_{name}", d_in=8) for name in ("mlp_out", "attn_out", "z")}
MLP, ATTN, Z = HOOKS


def spec(tokens: int, hooks: tuple[str, ...] = (MLP,), **changes: Any) -> StoreSpec:
    corpus = {"source": "x", "shuffled": True, "whole": False, "ids_blake2b": "0" * 32}
    about: dict[str, Any] = {
        "model": {"name": "m"}, "tokenizer": {}, "corpus": corpus | changes.pop("corpus", {}), "context": 16,
        "bos_id": None, "special_ids": (), "n_tokens": tokens, "token_dtype": "uint16",
        "hookpoints": {hook: HOOKS[hook] for hook in hooks}, "dtype": "bfloat16", "codec": "zstd", "chunk_rows": 64,
        "shard_rows": SHARD, "seed": 0, **changes,
    }  # fmt: skip
    return StoreSpec.model_validate(about)


def stored(name: str, tokens: int, *hooks: str, rows: int | None = None, key: str = "K", env: str = "e",
           **changes: Any) -> CatalogStore:  # fmt: skip
    state = "final" if rows is None else "writing"
    made = spec(tokens, hooks or (MLP,), **changes)
    return CatalogStore(name, made, key, tokens if rows is None else rows, state, env, None, f"/stores/{name}")  # type: ignore[arg-type]


def wanted(tokens: int | None, *hooks: str, **changes: Any) -> Wanted:
    shape = Shape("K", ("R",), 64, SHARD)
    values: dict[str, Any] = {
        "label": "m", "shapes": (shape,) if tokens else (shape, Shape("L", (), 64, 8 * SHARD)),
        "rows_key": rows_key(spec(1)), "token_key": token_key(spec(1)),
        "hookpoints": {hook: HOOKS[hook] for hook in hooks or (MLP,)},
        "tokens": tokens,
        "context": 16, "accept": "exact", "environment": None, "codec": "zstd", "dtype": "bfloat16",
        **changes,
    }  # fmt: skip
    return Wanted(**values)


def told(found: Found) -> tuple[Any, ...]:
    return found.action, found.exact, found.tokens, found.shards_to_harvest, found.donors


@pytest.mark.parametrize(
    ("there", "ask", "answer"),
    [
        ([], wanted(5000), ("harvest", True, 5000, 10, ())),
        ([stored("a", 5000)], wanted(5000), ("ready", True, 5000, 0, ())),
        ([stored("a", 5000, key="other", seed=1)], wanted(5000), ("harvest", True, 5000, 10, ())),
        ([stored("a", 5000, key="other", shard_rows=1024)], wanted(5000), ("recode", True, 5000, 0, ("a",))),
        ([stored("a", 2000, key="other", shard_rows=1024)], wanted(5000), ("extend", True, 5000, 7, ("a",))),
        ([stored("a", 9000, key="other", shard_rows=1024)], wanted(5000, accept="covering"),
         ("ready", False, 9000, 0, ())),
        ([stored("a", 5000, key="other", codec="int8")], wanted(5000), ("harvest", True, 5000, 10, ("a",))),
        ([stored("a", 5000, MLP, ATTN)], wanted(5000, ATTN), ("ready", True, 5000, 0, ())),
        ([stored("a", 5000, MLP), stored("b", 5000, ATTN)], wanted(5000, MLP, ATTN), ("ready", True, 5000, 0, ())),
        ([stored("a", 9000)], wanted(5000, accept="covering"), ("ready", False, 9000, 0, ())),
        ([stored("a", 9000), stored("b", 6000)], wanted(5000, accept="covering"), ("ready", False, 6000, 0, ())),
        ([stored("a", 9000)], wanted(5000), ("view", True, 5000, 0, ("a",))),
        ([stored("a", 9000, codec="int8")], wanted(5000, codec="int8"), ("extend", True, 5000, 1, ("a",))),
        ([stored("a", 9000, codec="int8")], wanted(5120, codec="int8"), ("view", True, 5120, 0, ("a",))),
        ([stored("a", 5000)], wanted(9000), ("extend", True, 9000, 9, ("a",))),
        ([stored("a", 5000)], wanted(9000, accept="covering"), ("extend", True, 9000, 9, ("a",))),
        ([stored("a", 9000, rows=2048)], wanted(5000), ("extend", True, 5000, 6, ("a",))),
        ([stored("a", 5000, rows=2048)], wanted(5000), ("extend", True, 5000, 6, ())),
        ([stored("a", 5000)], wanted(5000, ATTN), ("hookpoints", True, 5000, 10, ("a",))),
        ([stored("a", 5000)], wanted(5000, MLP, ATTN), ("hookpoints", True, 5000, 10, ("a",))),
        ([stored("a", 5000, key="R", codec="lz4")], wanted(5000), ("recode", True, 5000, 0, ("a",))),
        ([stored("a", 5000, key="R", codec="lz4")], wanted(4000), ("recode", True, 4000, 0, ("a",))),
        ([stored("a", 5000)], wanted(5000, environment="f"), ("harvest", True, 5000, 10, ("a",))),
        ([], wanted(None), ("harvest", True, None, None, ())),
        ([stored("a", 5000)], wanted(None), ("extend", True, None, None, ("a",))),
        ([stored("a", 5000, corpus={"whole": True})], wanted(None), ("ready", True, 5000, 0, ())),
        ([stored("a", 5000, corpus={"whole": True})], wanted(None, ATTN), ("hookpoints", True, 5000, 10, ("a",))),
    ],
)  # fmt: skip
def test_the_table(there: list[CatalogStore], ask: Wanted, answer: tuple[Any, ...]) -> None:
    found = find_answer(ask, there)
    assert told(found) == answer


def test_of_several_hookpoints_only_the_missing_are_made() -> None:
    there = [stored("a", 5000, MLP), stored("b", 9000, ATTN)]
    found = find_answer(wanted(5000, MLP, ATTN, Z), there)
    assert found.places[MLP] == "a"
    assert [(tuple(new.hookpoints), new.action, new.shards_to_harvest) for new in found.new] == [
        ((ATTN,), "view", 0),
        ((Z,), "hookpoints", 10),
    ]
    assert found.action == "hookpoints"
    assert set(found.places) == {MLP, ATTN, Z}


def test_an_unfinished_store_is_finished_with_all_its_hookpoints() -> None:
    (new,) = find_answer(wanted(5000, ATTN), [stored("a", 5000, MLP, ATTN, rows=512)]).new
    assert (new.store, tuple(new.hookpoints), new.shards_to_harvest) == ("a", (MLP, ATTN), 9)
    config = harvest_of(HarvestConfig(model="tiny", tokens=5000), new)
    assert (config.name, config.hooks, config.chunk_rows, config.shard_rows) == (
        "a", ("blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"), 64, SHARD,
    )  # fmt: skip


def test_many_hookpoints_are_split_so_that_shards_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harvest.reuse.match, "SHARD_BYTES", 2 * 8 * 2 * SHARD)
    found = find_answer(wanted(5000, MLP, ATTN, Z), [])
    assert [tuple(new.hookpoints) for new in found.new] == [(MLP, ATTN), (Z,)]
    assert len({new.store for new in found.new}) == 2
    assert found.shards_to_harvest == 20


CATALOG = st.lists(
    st.builds(
        lambda number, tokens, hooks, rows, key, env, codec: stored(
            f"s{number}", tokens, *sorted(hooks), rows=None if rows is None else min(rows * SHARD, tokens), key=key,
            env=env, codec=codec,
        ),
        st.integers(0, 99), st.integers(1, 6000), st.sets(st.sampled_from(sorted(HOOKS)), min_size=1),
        st.none() | st.integers(0, 9), st.sampled_from(["K", "R", "X"]), st.sampled_from("ef"), st.just("zstd"),
    ),
    max_size=8, unique_by=lambda each: each.store,
)  # fmt: skip


@given(
    CATALOG, st.integers(1, 6000), st.sets(st.sampled_from(sorted(HOOKS)), min_size=1),
    st.sampled_from(["exact", "covering"]), st.sampled_from([None, "e"]), st.randoms(),
)  # fmt: skip
def test_what_holds_of_every_answer(
    there: list[CatalogStore], tokens: int, hooks: set[str], accept: str, environment: str | None, chance: Any
) -> None:
    ask = wanted(tokens, *sorted(hooks), accept=accept, environment=environment)
    found = find_answer(ask, there)
    names = {each.store: each for each in there}
    assert set(found.places) == hooks
    assert set(found.donors) <= names.keys()
    assert len({new.store for new in found.new}) == len(found.new)
    for hook, place in found.places.items():
        if place in {new.store for new in found.new}:
            continue
        store = names[place]
        assert store.complete
        assert store.key == "K" or accept == "covering"
        assert hook in store.spec.hookpoints
        assert environment in (None, store.environment)
        assert store.tokens == tokens or (accept == "covering" and store.tokens > tokens)
    assert found.ready == (found.action == "ready") == (not found.new)
    assert 0 <= (found.shards_to_harvest or 0) <= len(hooks) * -(-tokens // SHARD) + 10 * len(there)
    shuffled = list(there)
    chance.shuffle(shuffled)
    assert find_answer(ask, shuffled) == found
    assert find_answer(Wanted.from_json(json.loads(json.dumps(ask.as_json()))), there) == found
    made = [stored(new.store, tokens, *new.hookpoints, env=environment or "e") for new in found.new]
    again = find_answer(ask, [each for each in there if each.store not in {m.store for m in made}] + made)
    assert again.ready, "what was made answers the request"
