"""Whatever a server does: it is asked again at most three times, then the pole has failed and the rest continues. What
was answered is never asked again."""

import json
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest
from support.command import Sagsae
from support.explain.endpoint import (
    Act,
    Body,
    EndpointHandler,
    completion,
    half,
    hang_up,
    kind_of,
    raw,
    served,
    status,
)
from support.explain.runs import NamedRun, make_named_run
from support.explain.words import windows_in

from shared.errors import BusyError, DamagedError, UserError
from shared.schema import build
from shared.schemas.features import ExplainConfig, FeaturesConfig
from train.explain import endpoint as client
from train.explain import run as product
from train.explain.run import explain
from train.features.run import features
from train.runs.folder import RunFolder

KEY = "sk-secret-4711"
REQUEST = {
    "type": "object",
    "properties": {
        "model": {"const": "m"},
        "messages": {
            "type": "array", "minItems": 2, "maxItems": 2,
            "prefixItems": [
                {"properties": {"role": {"const": "system"}}}, {"properties": {"role": {"const": "user"}}}
            ],
            "items": {
                "type": "object", "required": ["role", "content"], "additionalProperties": False,
                "properties": {
                    "role": {"type": "string"}, "content": {"type": "string", "minLength": 20, "maxLength": 8000}
                },
            },
        },
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "max_tokens": {"type": "integer", "minimum": 16},
    },
    "required": ["model", "messages", "temperature", "max_tokens"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> NamedRun:
    return make_named_run(tmp_path_factory.mktemp("failures"), 6_000, d_sae=8)


@pytest.fixture
def named(made: NamedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedRun:
    """A copy of the run. Pauses are short."""
    monkeypatch.setattr(client, "PAUSE_SECONDS", 0.01)
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    return NamedRun(run, made.truth, run / "features" / made.features.name)


def good(body: Body) -> str:
    return "it fires on words" if kind_of(body) == "explain" else str([1] * len(windows_in(body)))


def rows(named: NamedRun) -> dict[tuple[int, int], dict[str, Any]]:
    found = pq.read_table(named.features / "explanations.parquet").to_pylist()
    return {(row["latent"], row["sign"]): row for row in found}


def silent(handler: EndpointHandler) -> None:
    time.sleep(1.5)
    handler.close_connection = True


def dripping(handler: EndpointHandler) -> None:
    """Sends a byte now and then, for longer than the timeout."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.close_connection = True
    with suppress(OSError):  # the client has gone
        for _ in range(12):
            time.sleep(0.2)
            handler.wfile.write(b" ")
            handler.wfile.flush()


FAILURES: dict[str, tuple[Act, str]] = {
    "429": (status(429, Retry_After="0"), "it answers 429 (not now)"),
    "500": (status(500), "it answers 500 (not now)"),
    "a closed connection": (hang_up, "cannot be reached, or broke off"),
    "half a JSON": (raw(completion("[1]")[:40]), "the answer is not JSON"),
    "half an answer": (half, "cannot be reached, or broke off"),
    "no list": (raw(completion("I would say yes")), "the answer holds no list"),
    "a list of another length": (raw(completion("[1, 0]")), "holds a list of 2 values instead of 5 numbers"),
    "a list of texts": (raw(completion('["a", "b", "c", "d", "e"]')), "instead of 5 numbers, each 0 or 1"),
    "no choices": (raw(b'{"choices": []}'), "the answer has choices []"),
    "no content": (raw(b'{"choices": [{"message": {"content": null}}]}'), "has the content None instead of a text"),
    "a huge answer": (raw(b'{"x": "' + b"y" * (2 << 20) + b'"}'), "at most 1,048,576 are read"),
    "silence": (silent, "cannot be reached, or broke off"),
    "drops": (dripping, "cannot be reached, or broke off"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_pole_fails_after_three_repetitions_and_the_rest_continues(case: str, named: NamedRun) -> None:
    act, words = FAILURES[case]

    def answer(body: Body) -> str | Act:
        return (
            act
            if kind_of(body) == "detection" and "number 1" in body["messages"][1]["content"]
            else good_or_first(body)
        )

    first: list[Body] = []

    def good_or_first(body: Body) -> str:
        if kind_of(body) == "explain":
            first.append(body)
            return f"number {len(first)}"
        return good(body)

    with served(answer) as server:
        seconds = 1.0 if case in ("silence", "drops") else 20.0
        done = named.explain(endpoint=server.url, model="m", only=named.pair, at_once=1, timeout=seconds)
        asked = Counter(json.dumps(body) for body in server.bodies)
    assert sorted(asked.values())[-2:] == [1, 4], "one call was repeated three times, all others were made once"
    found, (a, b) = rows(named), named.pair
    assert (done.failed, done.explained, done.poles) == (1, 3, 4)
    assert found[a, 1]["state"] == "failed"
    assert found[a, 1]["explanation"] == "number 1", "what was answered is kept"
    assert found[a, 1]["why"].startswith("detection: 4 tries failed, the last one because ")
    assert words in found[a, 1]["why"]
    assert [found[key]["state"] for key in ((a, -1), (b, 1), (b, -1))] == ["explained"] * 3
    with served(good) as server:
        again = named.explain(endpoint=server.url, model="m", only=named.pair)
        assert len(server.bodies) == again.calls < len(asked), "only what is missing is asked"
    assert (again.failed, again.explained) == (0, 4)
    assert rows(named)[a, 1]["explanation"] == "number 1"


def test_one_failure_is_made_good(named: NamedRun) -> None:
    acts: list[Act] = [status(429, Retry_After="1"), status(503), hang_up]
    times: list[float] = []

    def answer(body: Body) -> str | Act:
        times.append(time.monotonic())
        return acts.pop(0) if acts else good(body)

    with served(answer) as server:
        done = named.explain(endpoint=server.url, model="m", only=named.pair[:1], at_once=1)
    assert (done.failed, done.explained) == (0, 2)
    assert times[1] - times[0] >= 1.0, "Retry-After is heeded"


def test_requests_fit_their_schema(named: NamedRun) -> None:
    with served(good) as server:
        named.explain(endpoint=f"{server.url}/v1", model="m", latents=3)
        assert len(server.bodies) > 50
        for body in server.bodies:
            jsonschema.validate(body, REQUEST)
        assert set(server.paths) == {"/v1/chat/completions"}
        assert all("authorization" not in headers for headers in server.headers)


def test_the_cost_said_beforehand_is_what_is_made(named: NamedRun, capsys: pytest.CaptureFixture[str]) -> None:
    with served(good) as server:
        done = named.explain(endpoint=server.url, model="m", latents=3)
        said = capsys.readouterr().err
        assert f"{len(server.bodies)} calls, about " in said
        letters = sum(len(message["content"]) for body in server.bodies for message in body["messages"])
        about = int(said.split("about ")[1].split(" ")[0].replace(",", ""))
        assert 0.8 * letters / 4 < about < 1.2 * letters / 4 + len(server.bodies) * 30
    assert done.calls == len(server.bodies)
    assert done.prompt_tokens == 100 * done.calls


def test_without_an_endpoint_nothing_is_sent(
    named: NamedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", none)
    monkeypatch.setattr(socket, "getaddrinfo", none)
    with pytest.raises(UserError, match=r"nothing was sent. To make these calls, add --endpoint URL"):
        named.explain()
    assert " calls, about " in capsys.readouterr().err
    assert not (named.features / "explain.jsonl").exists()
    assert not (named.features / "explanations.parquet").exists()


def test_nothing_is_sent_before_it_is_agreed_to(named: NamedRun) -> None:
    with served(good) as server:
        asked: list[str] = []

        def refuse(question: str) -> bool:
            asked.append(question)
            return False

        config = ExplainConfig(run=named.run, endpoint=server.url, model="m", only=named.pair[:1])
        with pytest.raises(UserError, match="nothing was sent"):
            explain(config, refuse)
        with pytest.raises(UserError, match=r"nothing was sent. Agree to these calls with --yes"):
            explain(config)
        assert asked == [f"Send them to {server.url}?"]
        assert server.bodies == []
        assert explain(config, lambda _: True).calls == len(server.bodies) > 0
        before = len(server.bodies)
        assert explain(config).calls == 0, "nothing is left to ask, so nothing needs a yes"
        assert len(server.bodies) == before


def test_the_key_goes_to_the_endpoint_alone(
    named: NamedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAGSAE_EXPLAIN_KEY", KEY)
    with served(good) as other, served(good) as server:
        server.answer = lambda _: status(307, Location=f"{other.url}/v1/chat/completions")
        with pytest.raises(UserError, match=r"answers with a redirect \(307\), which is not followed"):
            named.explain(endpoint=server.url, model="m", only=named.pair[:1], at_once=1)
        assert len(server.bodies) == 1, "no other call would succeed"
        assert (other.paths, other.headers) == ([], [])
        server.answer = good
        named.explain(endpoint=server.url, model="m", only=named.pair[:1])
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        told = f'{{"error": {{"message": "wrong key {KEY}"}}}}'.encode()
        server.answer = lambda _: lambda handler: handler.send(401, told)
        with pytest.raises(UserError, match=r"does not let you in \(401\) \(wrong key …\). Check the key") as error:
            named.explain(endpoint=server.url, model="m", only=named.pair[1:])
        assert KEY not in str(error.value)
    assert KEY not in capsys.readouterr().err
    assert not any(KEY.encode() in path.read_bytes() for path in named.run.rglob("*") if path.is_file())
    with pytest.raises(UserError, match="the key would travel unencrypted"):
        named.explain(endpoint="http://example.org", model="m", only=named.other)
    monkeypatch.setenv("SAGSAE_EXPLAIN_KEY", "two words")
    with pytest.raises(UserError, match="SAGSAE_EXPLAIN_KEY: expected one key") as error:
        named.explain(endpoint="https://example.org", model="m", only=named.other)
    assert "two words" not in str(error.value)


def test_a_server_that_is_away_ends_the_command(named: NamedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "FAILED_IN_A_ROW", 2)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(BusyError, match=r"2 latents failed, the last one because of explain: 4 tries failed"):
            named.explain(endpoint=url, model="m", latents=8, at_once=1)
    assert not (named.features / "explanations.parquet").exists()


def test_explanations_outlive_a_call_that_explains_nothing(named: NamedRun) -> None:
    with served(good) as server:
        named.explain(endpoint=server.url, model="m", only=named.pair[:1])
        before = rows(named)
        server.answer = lambda _: status(500)
        with pytest.raises(BusyError, match=r"no pole was explained, the first one because of explain: 4 tries failed"):
            named.explain(endpoint=server.url, model="other", only=named.pair[:1])
    assert rows(named) == before


def test_a_torn_last_line_is_asked_again_and_a_damaged_one_is_named(named: NamedRun) -> None:
    with served(good) as server:
        named.explain(endpoint=server.url, model="m", only=named.pair[:1], at_once=1)
        calls, log = len(server.bodies), named.features / "explain.jsonl"
        whole = log.read_bytes()
        assert whole.count(b"\n") == calls
        log.write_bytes(whole[:-20])
        assert named.explain(endpoint=server.url, model="m", only=named.pair[:1]).calls == 1
        assert len(server.bodies) == calls + 1
        assert sorted(log.read_bytes().splitlines()) == sorted(whole.splitlines())
        lines = whole.splitlines(keepends=True)
        log.write_bytes(b"".join([lines[0], b"{}\n", *lines[2:]]))
        with pytest.raises(DamagedError, match=r"explain.jsonl: line 2 lacks .*Delete this line"):
            named.explain(endpoint=server.url, model="m", only=named.pair[:1])
        assert len(server.bodies) == calls + 1


@pytest.mark.slow
def test_interrupted_and_repeated_no_call_is_made_twice(named: NamedRun, sagsae: Sagsae) -> None:
    slow = threading.Event()

    def answer(body: Body) -> str:
        if not slow.is_set():
            time.sleep(0.02)
        return good(body)

    with served(answer) as server:
        words = ["explain", named.run, "--endpoint", server.url, "--model", "m",
                 "--latents", "6", "--at-once", "2"]  # fmt: skip
        ended = sagsae(*words, "--yes", stop=(signal.SIGINT, lambda: len(server.bodies) >= 20))
        assert ended.returncode == 130, ended.stderr
        assert "answers are kept. To continue, run the same command again" in ended.stderr
        first = len(server.bodies)
        killed = sagsae(*words, "--yes", stop=(signal.SIGKILL, lambda: len(server.bodies) >= first + 20))
        assert killed.returncode == -signal.SIGKILL
        slow.set()
        done = sagsae(*words, "--yes", "--json")
        assert done.returncode == 0, done.stderr
        made = Counter(json.dumps(body) for body in server.bodies)
        assert sum(count - 1 for count in made.values()) <= 2, "only what was under way when it was killed"
        total = len(server.bodies)
        again = sagsae(*words, "--json")
        assert (again.returncode, len(server.bodies)) == (0, total)
    assert json.loads(done.stdout)["means"] == json.loads(again.stdout)["means"]
    assert json.loads(again.stdout)["calls"] == 0
    assert len(rows(named)) == 12


def test_results_of_several_calls_stand_together_and_of_another_model_do_not(
    named: NamedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(good) as server:
        named.explain(endpoint=server.url, model="m", only=named.pair[:1])
        named.explain(endpoint=server.url, model="m", only=named.pair[1:])
        assert sorted({latent for latent, _ in rows(named)}) == list(named.pair)
        about = json.loads((named.features / "explanations.json").read_text())
        assert about["identity"]["model"] == "m"
        named.explain(endpoint=server.url, model="other", only=named.other)
        assert {latent for latent, _ in rows(named)} == set(named.other)
        assert "had explanations of another model" in capsys.readouterr().err
        before = len(server.bodies)
        assert named.explain(endpoint=server.url, model="m", only=named.pair).calls == 0
        assert len(server.bodies) == before
        assert sorted({latent for latent, _ in rows(named)}) == list(named.pair)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such latent": ({"only": (8,)}, "--only 8: this autoencoder has latents 0 to 7"),
    "no such autoencoder": ({"sae": "x"}, "--sae x: .* has no such autoencoder"),
    "no URL": ({"endpoint": "host", "model": "m"}, "--endpoint: 'host' is no address"),
    "a password": ({"endpoint": "http://a:b@host", "model": "m"}, "a URL here has no user and no password"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_asked(case: str, named: NamedRun) -> None:
    changes, message = WRONG[case]
    with pytest.raises(UserError, match=message) as error:
        named.explain(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"endpoint": "http://h"}, "model: which model"), ({"only": (1,), "latents": 3}, "latents: --only names")],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(ExplainConfig, {"run": "r", **values})


def test_features_stay_complete_beside_explanations(named: NamedRun) -> None:
    """`sagsae features` and `train --overwrite` know the new files as a run's own."""
    with served(good) as server:
        named.explain(endpoint=server.url, model="m", only=named.pair[:1])
        calls = len(server.bodies)
        assert features(FeaturesConfig(run=named.run, device="cpu", drawn=32)).complete
        assert RunFolder(named.run).foreign_paths() == []
        assert (named.features / "explanations.parquet").exists()
        assert not features(FeaturesConfig(run=named.run, device="cpu", drawn=32, overwrite=True)).complete
        assert not (named.features / "explanations.parquet").exists()
        assert named.explain(endpoint=server.url, model="m", only=named.pair[:1]).calls == 0
        assert len(server.bodies) == calls, "answers that were paid for outlive --overwrite"


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda folder: cut_file(folder / "examples.parquet"), "examples.parquet: cannot be read as Parquet"),
    "gone": (lambda folder: (folder / "latents.parquet").unlink(), "latents.parquet: is missing"),
    "other columns": (
        lambda folder: shutil.copy(folder / "pairs.parquet", folder / "examples.parquet"),
        "examples.parquet: has no column group",
    ),
    "no numbers": (lambda folder: (folder / "about.json").write_text("{}"), "about.json: lacks context"),
}


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_features(case: str, named: NamedRun) -> None:
    change, message = DAMAGE[case]
    change(named.features)
    with pytest.raises(DamagedError, match=message):
        named.explain()
