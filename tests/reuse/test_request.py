"""`sagsae request` answers from a folder of stores, and makes what is missing."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command import Sagsae
from support.reuse import comparable, counted_shards, no_model

import harvest.reuse.shape
from harvest.reuse import scan
from harvest.reuse.answer import answer_request, look_up, plan_answer
from harvest.reuse.key import store_key
from harvest.reuse.match import harvest_of
from harvest.reuse.rates import known_rate, rates, remember_rate
from harvest.run import harvest as run_harvest
from shared.config import HarvestConfig, RequestConfig
from shared.errors import UserError
from shared.files.local import LocalFiles
from shared.request import RATES
from shared.store.opened import Store
from shared.store.verify import verify

Ask = Callable[..., RequestConfig]
SHARD = 512


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """Makes default shards small: 8 chunks of 64 rows, 32 numbers of 2 bytes wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harvest.reuse.shape, "CHUNK_BYTES", 64 * 64)
        patch.setattr(harvest.reuse.shape, "SMALL_ROWS", SHARD)
        yield


@pytest.fixture
def ask(model_folder: Path, tmp_path: Path) -> Ask:
    def config(tokens: int | None, *hooks: str, **changes: Any) -> RequestConfig:
        values: dict[str, Any] = {
            "model": str(model_folder), "context": 16, "layers": (1,), "hooks": hooks or ("mlp_out",), "tokens": tokens,
            "root": str(tmp_path / "stores"), "device": "cpu", "batch_tokens": 128, **changes,
        }  # fmt: skip
        return RequestConfig(**values)

    return config


def folder(config: RequestConfig, hook: str = "layer_01/mlp_out") -> Path:
    return Path(str(answer_request(config).hookpoints[hook].file))


def test_from_an_empty_folder_to_every_kind_of_answer(
    ask: Ask, tmp_path: Path, harvest_config: Callable[..., HarvestConfig]
) -> None:
    assert plan_answer(ask(3000)).action == "harvest"
    assert not (tmp_path / "stores").exists(), "a plan writes nothing"
    first = folder(ask(3000))
    with no_model():
        assert plan_answer(ask(3000)).action == "ready"
        assert folder(ask(3000)) == folder(ask(2000)) == first
        covering = answer_request(ask(2000))
        assert (covering.exact, covering.tokens) == (False, 3000)
        exact = ask(2048, accept="exact")
        assert plan_answer(exact).action == "view"
        assert Store.open(folder(exact)).n_rows == 2048
        assert answer_request(exact).exact
        uneven = ask(2000, accept="exact")
        assert plan_answer(uneven).text.startswith("view of ")
        assert Store.open(folder(uneven)).n_rows == 2000
        part = ask(1000, codec="none", accept="exact")
        assert plan_answer(part).text.startswith("recode of neox-l1-mlp_out-2048-")
        assert Store.open(folder(part)).n_rows == 1000
        recoded = ask(3000, codec="lz4")
        assert plan_answer(recoded).text.startswith(f"recode of {first.name}: no model is run")
        assert Store.open(folder(recoded)).spec.codec == "lz4"
    longer = plan_answer(ask(5000))
    assert (longer.action, longer.shards_to_harvest) == ("extend", 5)
    assert longer.seconds is not None
    assert "as fast as an earlier harvest here" in longer.text
    with counted_shards() as captured:
        folder(ask(5000))
    assert captured == [5, 6, 7, 8, 9]
    other = plan_answer(ask(5000, "mlp_out", "attn_out"))
    assert (other.action, other.shards_to_harvest) == ("hookpoints", 10)
    answer = answer_request(ask(5000, "mlp_out", "attn_out"))
    assert len({place.store for place in answer.hookpoints.values()}) == 2
    fresh = run_harvest(harvest_config(tmp_path / "fresh", hooks=("mlp_out",), shard_rows=SHARD)).store
    assert comparable(folder(ask(5000))) == comparable(Path(fresh))
    for store in (tmp_path / "stores").iterdir():
        assert store.name == RATES or not verify(Store.open(store), full=True).lines


def test_a_copy_of_the_model_is_the_same_request(ask: Ask, tmp_path: Path, model_folder: Path) -> None:
    first = answer_request(ask(1000))
    copied = Path(shutil.copytree(model_folder, tmp_path / "elsewhere" / "copy"))
    with no_model():
        again = answer_request(ask(1000, model=str(copied)))
        assert (again.key, again.hookpoints, again.exact) == (first.key, first.hookpoints, True)
        dtype = Store.open(str(first.hookpoints["layer_01/mlp_out"].file)).spec.model["dtype"]
        typed = answer_request(ask(1000, "blocks.1.hook_mlp_out", layers=("mid",), dtype=dtype))
        assert typed.hookpoints == first.hookpoints, "auto is what it means on this machine"
    (copied / "corpus.jsonl").write_text('{"text": "another corpus"}\n' * 900)
    other = look_up(ask(1000, model=str(copied)))[1]
    assert other.action == "harvest"


def test_a_store_that_was_begun_is_finished(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, found, _ = look_up(ask(3000))
    config = harvest_of(planned.config, found.new[0]).model_copy(update={"name": "begun"})
    monkeypatch.setattr("harvest.run.finish_store", lambda *_: (_ for _ in ()).throw(UserError("stopped")))
    with pytest.raises(UserError, match="stopped"):
        run_harvest(config)
    monkeypatch.undo()
    plan = plan_answer(ask(3000))
    assert plan.text.startswith("finishes begun: 0 new shards")
    with no_model():
        assert folder(ask(3000)).name == "begun"


def test_a_whole_corpus(ask: Ask) -> None:
    assert plan_answer(ask(None)).tokens is None
    first = answer_request(ask(None))
    assert first.tokens is not None
    with no_model():
        again = answer_request(ask(None))
        assert (again.hookpoints, again.tokens) == (first.hookpoints, first.tokens)
        assert plan_answer(ask(first.tokens)).action == "ready"
    assert plan_answer(ask(None, "attn_out")).action == "hookpoints"
    assert answer_request(ask(None, "attn_out")).tokens == first.tokens


def test_the_key_beforehand_is_the_one_of_the_store(ask: Ask) -> None:
    planned, _, _ = look_up(ask(1000, "resid_post", store_dtype="float32", codec="none", skip_positions=2, seed=3))
    made = answer_request(ask(1000, "resid_post", store_dtype="float32", codec="none", skip_positions=2, seed=3))
    store = Store.open(str(made.hookpoints["layer_01/resid_post"].file))
    assert planned.wanted.keys == (store_key(store.spec),) == (made.key,)
    assert (made.spec_id, made.snapshot_id) == (store.spec_id, store.snapshot_id)


def test_an_environment_can_be_asked_for(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    first = folder(ask(1000))
    assert folder(ask(1000, environment="same")) == first
    for module in ("harvest.begin", "harvest.reuse.plan", "harvest.run"):
        monkeypatch.setattr(f"{module}.device_name", lambda _: "another device")
    plan = plan_answer(ask(1000, environment="same"))
    assert plan.action == "harvest"


def test_wrong_requests_are_one_sentence(ask: Ask, tmp_path: Path) -> None:
    for changes, words in (
        ({"pin": "mine"}, "--pin mine: is for a server's"),
        ({"priority": "low"}, "--priority low: is for a server's"),
        ({"hooks": ("nonsense",)}, "is not a hookpoint"),
        ({"layers": (9,)}, "the model has 3 layers"),
        ({"tokens": 10**6}, "the corpus has"),
    ):
        with pytest.raises(UserError, match=words):
            answer_request(RequestConfig(**{**ask(1000).model_dump(), **changes}))
    assert not list((tmp_path / "stores").glob("*/zarr.json"))


def test_the_command(sagsae: Sagsae, tmp_path: Path, model_folder: Path) -> None:
    options = ["--model", model_folder, "--layer", 1, "--hook", "mlp_out", "--tokens", 1000, "--context", 16,
               "--device", "cpu", "--root", tmp_path / "stores"]  # fmt: skip
    planned = sagsae("request", *options, "--plan", "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert (plan["action"], plan["tokens"]) == ("harvest", 1000)
    assert "measured on one batch" in plan["text"]
    assert not list((tmp_path / "stores").glob("*/zarr.json"))
    made = sagsae("request", *options)
    assert made.returncode == 0, made.stderr
    assert Path(made.stdout.strip()).parent == (tmp_path / "stores").resolve()
    assert Store.open(made.stdout.strip()).state == "final"


# rates


def test_rates_are_of_the_same_model_and_device(store: Store, tmp_path: Path) -> None:
    files, spec = LocalFiles(tmp_path), store.spec
    assert known_rate(files, spec, "cpu") is None
    remember_rate(files, spec, "cpu", 100, 50.0)
    remember_rate(files, spec, "cpu", 1000, 70.0)
    remember_rate(files, spec, "gpu", 10_000, 900.0)
    one = spec.model_copy(update={"hookpoints": {"layer_01/mlp_out": spec.hookpoints["layer_01/mlp_out"]}})
    remember_rate(files, one, "cpu", 5000, 200.0)
    assert known_rate(files, spec, "cpu") == 70.0
    assert known_rate(files, one, "cpu") == 200.0
    assert known_rate(files, spec, "tpu") is None
    (tmp_path / RATES).write_bytes(b'{"rate": "fast"}\n\xff\n[]\n{"rate": -1, "rows": 3}\n')
    assert list(rates(files)) == []
    remember_rate(LocalFiles(tmp_path / "nowhere"), spec, "cpu", 1, 1.0)


def test_folders_on_a_slow_disk_are_read_in_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "SLOW_S", 0.0)
    names, threads = [f"s{number}" for number in range(100)], set[int]()

    def read(name: str) -> str:
        threads.add(threading.get_ident())
        time.sleep(0.001)
        return name

    assert scan.each_of(read, names) == names
    assert len(threads) > 2
    monkeypatch.setattr(scan, "SLOW_S", 1.0)
    threads.clear()
    assert scan.each_of(read, names) == names
    assert len(threads) == 1
