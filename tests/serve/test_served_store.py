"""Stores read through a service: `--store URL/v1/stores/ID`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.folders import contents
from support.serving.stub import Reply, ServiceStub, as_json, refusal, serving
from support.stores import commit, in_steps

from harvest.recode import recode
from shared.config import EvalConfig, TrainConfig
from shared.errors import BusyError, DamagedError, UserError
from shared.files import service_files
from shared.files.open import open_files
from shared.service import address, exchange
from shared.store.listing import describe_store
from shared.store.opened import Store, find_hookpoint
from shared.store.tail import watch_store
from shared.store.verify import verify
from train.data.follow import SEGMENTS
from train.evaluate import evaluate
from train.run import train as run_train

HOOK = "layer_01/mlp_out"
Config = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the user's counts, and nothing waits long."""
    for name in (address.SERVICE, address.TOKEN, address.TOKEN_FILE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAGSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(exchange, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(service_files, "PATIENCE_SECONDS", 0.5)


@pytest.fixture
def stub(store: Store) -> Iterator[ServiceStub]:
    """Serves the session's store, `s`."""
    with serving(store.root.parent) as server:
        yield server


def weights(run: Path) -> dict[str, bytes]:
    return {path: data for path, data in contents(run / "saes").items() if path.endswith(".safetensors")}


def test_a_served_store_is_the_folder(store: Store, stub: ServiceStub) -> None:
    served = Store.open(stub.store_url("s"))
    assert (served.spec, served.state, served.snapshot_id) == (store.spec, store.state, store.snapshot_id)
    np.testing.assert_array_equal(served.tokens(), store.tokens())
    assert served.statistics(HOOK).mean.tolist() == store.statistics(HOOK).mean.tolist()
    assert verify(served, full=True).lines == []
    assert describe_store(stub.store_url("s"))["hookpoints"] == describe_store(store.root)["hookpoints"]


@pytest.mark.parametrize("inside", [HOOK, "mlp_out"])
def test_a_hookpoint_is_named_in_the_url_or_beside_it(stub: ServiceStub, inside: str) -> None:
    url, hook = (f"{stub.store_url('s')}/{inside}", None) if "/" in inside else (stub.store_url("s"), inside)
    store, found = find_hookpoint(url, hook)
    assert (store.name, found) == (stub.store_url("s"), HOOK)


def test_a_store_that_is_not_there_is_one_sentence(stub: ServiceStub) -> None:
    with pytest.raises(UserError, match=r"/v1/stores/other: holds no store"):
        find_hookpoint(stub.store_url("other"), None)
    assert all(asked.path.startswith("/v1/stores/other/files/") for asked in stub.asked)


def test_training_ends_with_the_weights_of_the_folder(train_config: Config, stub: ServiceStub, tmp_path: Path) -> None:
    here = run_train(train_config())
    served = run_train(train_config(store=stub.store_url("s"), out=tmp_path / "served"))
    assert weights(here.run) == weights(served.run)
    assert served.store == stub.store_url("s")
    assert (len(stub.granted), stub.leases) == (1, {}), "leased while it was read"
    measured = [evaluate(EvalConfig(run=done.run, ce=False)).results["saes"] for done in (here, served)]
    assert [{**sae, "name": ""} for sae in measured[0]] == [{**sae, "name": ""} for sae in measured[1]]


def test_a_second_pass_comes_from_the_cache(train_config: Config, stub: ServiceStub, tmp_path: Path) -> None:
    run_train(train_config(store=stub.store_url("s")))
    asked = len(stub.asked)
    run_train(train_config(store=stub.store_url("s"), out=tmp_path / "again"))
    chunks = [one for one in stub.asked[asked:] if f"/files/{HOOK}/c/" in one.path]
    assert chunks == []


def test_recode_reads_from_a_service(store: Store, stub: ServiceStub, tmp_path: Path) -> None:
    recode(stub.store_url("s"), str(tmp_path / "lz4"), "lz4")
    assert Store.open(tmp_path / "lz4").statistics(HOOK).mean.tolist() == store.statistics(HOOK).mean.tolist()


def test_a_growing_store_is_followed_to_its_end(store: Store, growing: Path) -> None:
    with serving(growing.parent) as stub:
        harvest = in_steps(growing, store, [[0, 1], [2, 3, 4], [5, 6, 7, 8, 9]], 0.3)
        looks = list(watch_store(open_files(stub.store_url("growing")), 0.05))
        harvest.join()
    new = [look.new for look in looks if look.new]
    assert [shard for part in new for shard in part] == list(range(10))
    assert len(new) > 1, "seen as it grew"
    assert looks[-1].store.state == "final"


def test_whether_a_job_writes_a_store_is_asked(growing: Path) -> None:
    row = {"id": "growing", "key": "k", "spec_id": "i", "model": "m", "corpus": "c", "hookpoints": [HOOK], "rows": 0,
           "n_tokens": 5000, "context": 32, "codec": "zstd", "state": "writing"}  # fmt: skip
    with serving(growing.parent) as stub:
        files = open_files(stub.store_url("growing"))
        assert files.at_work() is None, "an error says nothing"
        for stores, expected in (([{**row, "job": 7}], True), ([row], False), ([], None)):
            stub.on(r"GET /v1/stores\?state=writing", as_json(200, {"stores": stores}))
            assert files.at_work() is expected


def test_only_what_is_new_of_a_log_is_read(store: Store, growing: Path) -> None:
    with serving(growing.parent) as stub:
        looks = watch_store(open_files(stub.store_url("growing")), 0.01)
        commit(growing, store, list(range(8)))
        first = next(looks)
        commit(growing, store, [8])
        second = next(looks)
        assert (len(first.store.commits), second.new) == (8, [8])
        sizes = stub.sent["/v1/stores/growing/files/manifest/rank-00000.jsonl"]
        assert sizes[-1] < sizes[0] / 4


def test_training_follows_a_harvest_and_ends_with_the_weights_of_the_folder(
    train_config: Config, store: Store, growing: Path, tmp_path: Path
) -> None:
    options = {"follow": True, "tokens": 40 * 64, "window_rows": 1024}
    with serving(growing.parent) as stub:
        harvest = in_steps(growing, store, [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]], 1.2)
        served = run_train(train_config(store=stub.store_url("growing"), **options))
        harvest.join()
    segments = (served.run / SEGMENTS).read_text()
    began, ended = (path.stat().st_mtime for path in (served.run / "config.json", growing / "zarr.json"))
    assert began + 1 < ended, "it began before the harvest ended"
    here = run_train(train_config(out=tmp_path / "here", **options))
    assert (here.run / SEGMENTS).read_text() == segments
    assert weights(here.run) == weights(served.run)


def test_a_service_that_stays_away_ends_training_with_75_and_the_same_command_continues(
    train_config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGSAE_CACHE_GB", "0")
    here = run_train(train_config(tokens=24 * 64))
    with serving(store.root.parent) as stub:
        config = train_config(store=stub.store_url("s"), out=tmp_path / "served", tokens=24 * 64)
        seen = 0

        def away(server: ServiceStub, asked: object, _: object) -> Reply:
            nonlocal seen
            seen += 1
            return refusal(503, "", "the service is being restarted") if seen > 60 else server.served(asked)  # type: ignore[arg-type]

        stub.on(rf"GET /v1/stores/s/files/{HOOK}/c/.*", away)
        with pytest.raises(BusyError, match="being restarted") as caught:
            run_train(config)
        assert caught.value.exit_code == 75
        stub.routes.clear()
        assert weights(run_train(config).run) == weights(here.run)


# Hostile services


FILE = r"GET /v1/stores/s/files/manifest/index\.jsonl"
HOSTILE: dict[str, tuple[Reply, str]] = {
    "html": (Reply(200, b"<html>", {"Content-Type": "text/html"}), r"no range of bytes \(status 200\)"),
    "all of it": (Reply(200, b"x" * (9 << 20)), "announces|no range"),
    "longer than a range": (Reply(206, b"", {"Content-Range": "bytes 0-99/100"}, 1 << 50), "announces"),
    "another range": (Reply(206, b"abc", {"Content-Range": "bytes 7-9/100"}), "others were asked for"),
    "nothing of much": (Reply(206, b"", {"Content-Range": "bytes 0-0/100"}), "others were asked for"),
    "a huge file": (Reply(206, b"a", {"Content-Range": f"bytes 0-0/{1 << 50}"}), "has 1,125,899,906,842,624 bytes"),
    "no range": (Reply(206, b"abc"), "no range of bytes"),
    "no numbers": (Reply(206, b"abc", {"Content-Range": "bytes x-y/z"}), "no range of bytes"),
    "an empty range": (Reply(416, b"", {"Content-Range": "bytes 0-0/1"}), "no range of bytes"),
    "redirect": (Reply(307, b"", {"Location": "http://127.0.0.1:1/"}), "redirect"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_wrong_answer_for_a_file_is_one_sentence(stub: ServiceStub, name: str) -> None:
    reply, words = HOSTILE[name]
    stub.on(FILE, reply)
    with pytest.raises((UserError, DamagedError), match=words):
        Store.open(stub.store_url("s"))


def test_wrong_bytes_are_found_by_their_checksum(stub: ServiceStub, store: Store) -> None:
    def flipped(server: ServiceStub, asked: object, _: object) -> Reply:
        reply = server.served(asked)  # type: ignore[arg-type]
        return reply._replace(body=bytes([reply.body[0] ^ 1]) + reply.body[1:])

    stub.on(rf"GET /v1/stores/s/files/{HOOK}/c/.*", flipped)
    assert len(verify(Store.open(stub.store_url("s")), full=False).shards) == store.spec.n_shards


def test_a_file_of_another_length_is_damage(stub: ServiceStub) -> None:
    def longer(server: ServiceStub, asked: object, _: object) -> Reply:
        reply = server.served(asked)  # type: ignore[arg-type]
        return reply._replace(headers={"Content-Range": reply.headers["Content-Range"] + "0"})

    stub.on(r"GET /v1/stores/s/files/stats/.*", longer)
    with pytest.raises(DamagedError, match=r"bytes, .* were committed"):
        Store.open(stub.store_url("s")).statistics(HOOK)


LOG = {"path": "manifest/rank-00000.jsonl", "identity": "1", "size": 3, "grows": True}


@pytest.mark.parametrize(
    ("logs", "words"),
    [
        ({}, "instead of a list"),
        ([7], "no LogFile"),
        ([{**LOG, "path": "manifest/../../secret"}], "does not stay in its folder"),
        ([{**LOG, "path": "/etc/passwd"}], "does not stay in its folder"),
        ([{**LOG, "size": -1}], r"no LogFile|list of logs"),
        ([{**LOG, "size": "x" * 9999}], "no LogFile"),
    ],
)
def test_a_wrong_list_of_logs_is_one_sentence(growing: Path, logs: object, words: str) -> None:
    with serving(growing.parent) as stub:
        stub.on("GET /v1/stores/growing/logs", as_json(200, logs))
        with pytest.raises((UserError, DamagedError), match=words):
            Store.open(stub.store_url("growing"))
        assert not any("secret" in asked.path or "passwd" in asked.path for asked in stub.asked)


# Tokens


def test_a_token_is_needed_and_named(store: Store, monkeypatch: pytest.MonkeyPatch, train_config: Config) -> None:
    with serving(store.root.parent, token="s3cret") as stub:
        with pytest.raises(UserError, match=rf"needs a token\. Set SAGSAE_SERVICE={stub.url}, and SAGSAE_TOKEN"):
            run_train(train_config(store=stub.store_url("s")))
        monkeypatch.setenv(address.TOKEN, "s3cret")
        with pytest.raises(UserError, match="needs a token"):
            Store.open(stub.store_url("s"))
        assert {asked.authorization for asked in stub.asked} == {""}, "no service is named that it belongs to"
        monkeypatch.setenv(address.SERVICE, stub.url)
        assert Store.open(stub.store_url("s")).state == "final"
        monkeypatch.setenv(address.TOKEN, "wrong")
        with pytest.raises(UserError, match=r"does not know the token in SAGSAE_TOKEN") as caught:
            Store.open(stub.store_url("s"))
        assert "wrong" not in str(caught.value).replace("missing or wrong", "")


def test_the_token_of_one_service_never_reaches_another(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(store.root.parent, token="s3cret") as mine, serving(store.root.parent) as other:
        monkeypatch.setenv(address.SERVICE, mine.url)
        monkeypatch.setenv(address.TOKEN, "s3cret")
        Store.open(other.store_url("s"))
        mine.on(FILE, Reply(302, b"", {"Location": other.store_url("s") + "/files/manifest/index.jsonl"}))
        with pytest.raises(UserError, match="redirect"):
            Store.open(mine.store_url("s"))
        assert {asked.authorization for asked in mine.asked} == {"Bearer s3cret"}
        assert {asked.authorization for asked in other.asked} == {""}
        assert not any("index" in asked.path for asked in other.asked[2:])
