"""`sagsae train --request`: what is asked, what is read, and what is left when the service is away."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command import Sagsae
from support.folders import contents
from support.serving.stub import Reply, ServiceStub, as_json, refusal, serving
from support.stores import in_steps

from shared.config import TrainConfig
from shared.errors import BusyError, UserError
from shared.service import address, exchange
from shared.service.asking import parse_request
from shared.store.opened import Store
from train.ask import answered, leased
from train.run import train as run_train
from train.runs.folder import RunFolder

HOOK = "layer_01/mlp_out"
REQUEST = ("model=tiny", "hook=mlp_out", "tokens=5000")
Config = Callable[..., TrainConfig]


@pytest.fixture
def stub(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ServiceStub]:
    """The service of the environment. It has the session's store, and answers with its URL."""
    monkeypatch.delenv(address.TOKEN, raising=False)
    monkeypatch.delenv(address.TOKEN_FILE, raising=False)
    monkeypatch.setenv("SAGSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(exchange, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(exchange, "PATIENCE_SECONDS", 0.1)
    with serving(store.root.parent) as server:
        monkeypatch.setenv(address.SERVICE, server.url)
        server.on("POST /v1/requests", ready())
        yield server


def ready(*hooks: str, file: Path | None = None, **place: Any) -> Reply:
    where = {"store": "s", "file": None if file is None else str(file), **place}
    return as_json(200, {"state": "ready", "key": "k", "hookpoints": dict.fromkeys(hooks or (HOOK,), where)})


def test_a_request_is_key_and_value_as_on_the_command_line() -> None:
    request = parse_request(
        ("model=tiny", "layer=1", "layer=2", "hooks=mlp_out,resid_post", "tokens=5000", "codec=lz4")
    )
    assert (request.layers, request.hooks, request.tokens, request.codec) == (
        (1, 2), ("mlp_out", "resid_post"), 5000, "lz4",
    )  # fmt: skip
    assert parse_request(("model=tiny",), accept="exact").accept == "exact"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (("tiny",), "--request 'tiny': expected key=value"),
        (("model=tiny", "model=gpt2"), "--request model: is given twice"),
        (("model=tiny", "token=5"), "unknown setting 'token': did you mean tokens"),
        (("model=tiny", "tokens=many"), "--request tokens: must be a whole number"),
        (("hook=mlp_out",), "model: is needed"),
    ],
)
def test_a_wrong_request_names_what_was_typed(typed: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_request(typed)


def test_the_url_answers_where_the_folder_is_not_here(stub: ServiceStub, tmp_path: Path) -> None:
    url = stub.store_url("s")
    assert answered({"request": REQUEST}, {}) == {"store": url, "hook": HOOK}
    assert stub.asked[0].body["accept"] == "exact"
    for elsewhere in (tmp_path / "gone", tmp_path):
        stub.on("POST /v1/requests", ready(file=elsewhere))
        assert answered({"request": REQUEST}, {})["store"] == url
    stub.on("POST /v1/requests", ready(url="http://127.0.0.1:1/v1/stores/s"))
    assert answered({"request": REQUEST}, {})["store"] == url, "the address that was given, whatever the service says"


def test_the_folder_answers_where_it_is_here(stub: ServiceStub, store: Store, tmp_path: Path) -> None:
    stub.on("POST /v1/requests", ready(file=store.root))
    assert answered({"request": REQUEST}, {}) == {"store": str(store.root), "hook": HOOK}
    other = Path(shutil.copytree(store.root, tmp_path / "s"))
    state = other / "zarr.json"
    state.write_text(state.read_text().replace('"seed": 0', '"seed": 1'))
    stub.on("POST /v1/requests", ready(file=other))
    assert answered({"request": REQUEST}, {})["store"] == stub.store_url("s"), "another store of this name"


def test_one_of_several_hookpoints_is_named(stub: ServiceStub) -> None:
    stub.on("POST /v1/requests", ready(HOOK, "layer_01/resid_post"))
    assert answered({"request": REQUEST, "hook": "resid_post"}, {})["hook"] == "layer_01/resid_post"
    with pytest.raises(UserError, match=r"several hookpoints\. Say which one with --hook: layer_01/mlp_out, "):
        answered({"request": REQUEST}, {})
    with pytest.raises(UserError, match=r"--hook z: the request has no such hookpoint\. It has: layer_01/mlp_out"):
        answered({"request": REQUEST, "hook": "z"}, {})


def test_a_store_and_a_request_exclude_each_other(stub: ServiceStub) -> None:
    with pytest.raises(UserError, match="--request and --store"):
        answered({"request": REQUEST, "store": "stores/s"}, {})
    assert answered({}, {"request": REQUEST, "store": "stores/s"}) == {}, "a run's own settings have both"
    assert answered({"store": "stores/t"}, {"request": REQUEST}) == {}
    assert answered({}, {"request": REQUEST})["store"] == stub.store_url("s")


JOB = {
    "id": 7, "action": "harvest", "key": "k", "store": "s", "request": {}, "asked": 1, "attempt": 1,
    "priority": "normal", "total": 5000,
}  # fmt: skip


def queued(server: ServiceStub, store: str, states: list[str]) -> None:
    """A request that a job answers, which goes through `states`."""
    left = iter(states)
    state = ""

    def job(*_: object) -> Reply:
        nonlocal state
        state = next(left, state)
        return as_json(200, {**JOB, "state": state, "store": store, "error": "no such hook"})

    def request(*_: object) -> Reply:
        done = state == "done"
        place = {HOOK: {"store": store}}
        return as_json(200, {"state": "ready" if done else "queued", "key": "k", "job": 7, "hookpoints": place})

    server.on("GET /v1/jobs/7", job)
    server.on("POST /v1/requests", request)


def test_a_job_is_waited_for(stub: ServiceStub, capsys: pytest.CaptureFixture[str]) -> None:
    queued(stub, "s", ["queued", "running", "verifying", "done"])
    assert answered({"request": REQUEST}, {})["store"] == stub.store_url("s")
    assert "job 7 is queued. To see it: sagsae jobs log 7 --follow" in capsys.readouterr().err
    queued(stub, "s", ["running", "failed"])
    with pytest.raises(UserError, match="job 7 failed: no such hook"):
        answered({"request": REQUEST}, {})


def test_a_refused_request_is_the_services_sentence(stub: ServiceStub) -> None:
    stub.on("POST /v1/requests", refusal(403, "not_allowed", "corpus '/home/me': a request names no path"))
    with pytest.raises(UserError, match="a request names no path"):
        answered({"request": REQUEST}, {})


def test_the_folder_is_leased_while_it_is_read(stub: ServiceStub, train_config: Config) -> None:
    with leased(train_config(request=REQUEST)):
        assert list(stub.leases.values()) == ["s"]
    assert stub.leases == {}
    with leased(train_config(request=REQUEST), leads=False):
        assert stub.leases == {}


def test_a_followed_request_starts_before_its_job_ends(
    train_config: Config, store: Store, growing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(growing.parent) as server:
        monkeypatch.setenv(address.SERVICE, server.url)
        queued(server, "growing", ["queued", "running"])
        found = answered({"request": REQUEST, "follow": True}, {})
        assert found == {"store": server.store_url("growing"), "hook": HOOK}
        harvest = in_steps(growing, store, [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]], 0.5)
        summary = run_train(train_config(request=REQUEST, follow=True, **found))
        harvest.join()
    assert summary.steps == 20


@pytest.mark.slow
def test_the_same_command_resumes_with_and_without_the_service(
    sagsae: Sagsae, stub: ServiceStub, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub.on("POST /v1/requests", ready(file=store.root))
    asked = [f"--request={assignment}" for assignment in REQUEST]
    command = ["train", *asked, "--arch", "sa-gsae:32", "--sparsity", "0.2", "--batch", "64", "--tokens", "640",
               "--device", "cpu", "--set", "heldout_tokens=320", "--json", "--out", str(tmp_path / "run")]  # fmt: skip
    first = sagsae(*command)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["store"] == str(store.root)
    config = RunFolder(tmp_path / "run").config()
    assert (config.store, config.request, config.hook) == (str(store.root), REQUEST, HOOK)
    assert stub.leases == {}
    assert stub.granted, "leased while it was read"
    monkeypatch.setenv(address.SERVICE, "http://127.0.0.1:1")
    again = sagsae(*command)
    assert again.returncode == 0, again.stderr
    assert "has the answer" in again.stderr
    assert "is complete" in again.stderr
    with pytest.raises(BusyError, match="cannot be reached"):
        answered({"request": (*REQUEST, "seed=3"), "out": str(tmp_path / "run")}, {})
    direct = sagsae("train", "--store", store.root, "--hook", HOOK, *command[4:-1], str(tmp_path / "direct"))
    assert direct.returncode == 0, direct.stderr
    assert contents(tmp_path / "direct" / "saes") == contents(tmp_path / "run" / "saes")
