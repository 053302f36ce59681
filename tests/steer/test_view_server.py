"""`sagsae view` answers its own page alone, whatever is sent, and its model answers what `sagsae steer` does."""

import json
import os
import shutil
import signal
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.command import Sagsae
from support.serving.loopback import Reply, ViewClient, slowed, viewing

from shared.errors import BusyError, UserError
from shared.schemas.steer import SteerConfig
from shared.schemas.view import ViewConfig
from train.steer.steer import steer
from train.view.live import LiveModel
from train.view.run import listening, page_folder, served_page
from train.view.server import WAITING, ServedPage

PROMPT = "the cat sat on"


def busiest(live: LiveModel) -> int:
    return int(live.subject.counts.firings.min(1).argmax())


# what it answers


@pytest.mark.parametrize("mode", ["clamp", "add", "ablate"])
@pytest.mark.parametrize("at", ["all", "last"])
def test_it_streams_what_steer_writes(client: ViewClient, live: LiveModel, finished: Path, mode: str, at: str) -> None:
    latent = busiest(live)
    dial: dict[str, Any] = {} if mode == "ablate" else {"dial": 40.0}
    question = {
        "latent": latent,
        "mode": mode,
        "at": at,
        "prompt": PROMPT,
        "new_tokens": 12,
        "temperature": 0.9,
        **dial,
    }
    reply = client.ask("steer", question)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/x-ndjson")
    begin, table, *rest, end = reply.lines
    values = {**question, "dial": "40"} if dial else question
    expected = steer(SteerConfig.model_validate({"run": finished, "device": "cpu", "seed": 0, **values}))
    written = zip(*(line["new"] for line in rest), strict=True)
    assert [[token for token in row if token is not None] for row in written] == [
        list(row.tokens) for row in expected.rows
    ]
    assert table["kl"] == pytest.approx(expected.rows[1].kl, rel=1e-3)
    assert {token: shares for token, *shares in table["next"]} == {
        token: pytest.approx(shares, rel=1e-3) for token, shares in expected.next_tokens.items()
    }
    assert (begin["unit"], begin["value"]) == pytest.approx((expected.unit, expected.rows[1].value))
    assert begin["changed"] == (1 if at == "last" else begin["prompt_tokens"] - 1)
    assert end["steps"] == len(rest)
    if mode != "ablate":
        assert expected.rows[0].tokens != expected.rows[1].tokens, "the comparison can fail"


def test_every_token_comes_with_its_text_once(client: ViewClient, live: LiveModel) -> None:
    lines = client.ask("steer", {"latent": busiest(live), "dial": 2, "prompt": PROMPT, "new_tokens": 24}).lines
    sent = [word for line in lines for word in line.get("words", [])]
    ids = [token for token, *_ in sent]
    assert len(ids) == len(set(ids))
    assert {token for line in lines for token in line.get("new", [])} - {None} <= set(ids)
    for token, text, special in sent:
        assert text == live.encoder.tokenizer.decode([token]) or isinstance(text, list)
        assert special == (token in live.encoder.special_ids())


def test_an_encoded_text_has_the_latents_that_the_store_has(client: ViewClient, live: LiveModel, folder: Path) -> None:
    """The strongest firings in examples.parquet, found again in the text of their contexts."""
    store, examples = live.subject.store, pq.read_table(folder / "examples.parquet").to_pandas()
    best, compared = examples[examples.group == 0].sort_values("value", key=np.abs, ascending=False), 0
    for context, some in best.groupby("context", sort=False):
        tokens = store.token_rows(check=False).take(np.array([context]))[0].tolist()
        text = live.encoder.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        found = json.loads(client.ask("encode", {"text": text, "top": 128}).body)
        if found["tokens"] != tokens:
            continue
        values = {(position, latent): value for position, latent, value in found["firings"]}
        for _, row in some.iterrows():
            assert values[row.position, row.latent] == pytest.approx(row.value, rel=0.05)
            compared += 1
        if compared >= 50:
            break
    assert compared >= 50


def test_an_encoded_text_names_the_strongest_latents_of_each_token(client: ViewClient, live: LiveModel) -> None:
    whole, few = (json.loads(client.ask("encode", {"text": PROMPT * 3, "top": top}).body) for top in (128, 2))
    assert whole["tokens"] == live.encoder.ids(PROMPT * 3)
    assert (
        whole["active"] == np.bincount([row for row, *_ in whole["firings"]], minlength=len(whole["tokens"])).tolist()
    )
    assert few["active"] == whole["active"]
    for position in range(len(whole["tokens"])):
        each = [firing for firing in whole["firings"] if firing[0] == position]
        sizes = [abs(value) for *_, value in each]
        assert sizes == sorted(sizes, reverse=True)
        assert [firing for firing in few["firings"] if firing[0] == position] == each[:2]
        assert each == [] or whole["counted"][position]
    assert {value > 0 for *_, value in whole["firings"]} == {True, False}
    assert not whole["counted"][0], "position 0 is not trained on"


# who may ask


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil.example:{port}", ""]
)
def test_a_foreign_host_is_refused(client: ViewClient, host: str) -> None:
    name = host.format(port=client.server.server_port)
    for method, path in (("GET", "/"), ("GET", "/api/about"), ("POST", "/api/steer"), ("GET", "/data/index.js")):
        reply = client.send(method, path, b"{}" if method == "POST" else None, {**client.own, "Host": name})
        assert reply.status == 403
        assert "is no name of this server" in reply.sentence


def test_two_hosts_or_none_are_refused(client: ViewClient) -> None:
    own = f"Host: 127.0.0.1:{client.server.server_port}\r\n"
    assert raw(client, "GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 403")
    assert raw(client, f"GET / HTTP/1.0\r\n{own}Host: evil.example\r\n\r\n").startswith(b"HTTP/1.0 403")
    assert raw(client, f"GET / HTTP/1.0\r\n{own}\r\n").startswith(b"HTTP/1.0 200")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 403),
        ({"Authorization": "Bearer "}, 403),
        ({"Authorization": "Bearer \xe9"}, 403),
        ({"Authorization": "Basic {key}"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_only_its_own_page_with_the_key_may_ask(client: ViewClient, headers: dict[str, str], status: int) -> None:
    body = json.dumps({"text": PROMPT}).encode()
    own = {**client.own, "Origin": f"http://127.0.0.1:{client.server.server_port}", "Sec-Fetch-Site": "same-origin"}
    assert client.send("POST", "/api/encode", body, own).status == 200
    changed = {name: value.format(key=client.server.key) for name, value in headers.items()}
    reply = client.send("POST", "/api/encode", body, {**own, **changed})
    assert reply.status == status
    assert client.server.key not in reply.sentence


def test_no_answer_is_for_another_origin(client: ViewClient) -> None:
    replies = [
        client.get("/", Origin="http://evil.example"),
        client.get("/api/about"),
        client.ask("encode", {"text": "a"}),
    ]
    replies += [client.send("OPTIONS", "/api/steer", None, {"Origin": "http://evil.example"})]
    assert [reply.status for reply in replies] == [200, 200, 200, 501]
    for reply in replies:
        assert not [name for name in reply.headers if name.startswith("access-control")]
        assert "connect-src 'self'" in reply.headers["content-security-policy"]
    assert client.server.key.encode() not in replies[0].body + replies[1].body


# what is sent


QUESTION = {"latent": 1, "dial": 1.0, "prompt": PROMPT, "new_tokens": 2}
WRONG: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "NaN": b'{"latent": NaN}',
    "a member twice": b'{"latent": 1, "latent": 2, "prompt": "a"}',
    "too deep": b'{"latent":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "thousands of digits": b'{"latent": ' + b"9" * 5000 + b', "prompt": "a"}',
    **{
        f"{name} {str(value)[:12]}": json.dumps({**QUESTION, name: value}).encode()
        for name, value in [
            ("latent", -1), ("latent", 48), ("latent", 1 << 60), ("latent", 1.5), ("latent", "x"), ("latent", None),
            ("dial", 1e300), ("dial", 101), ("dial", "x"), ("mode", "melt"), ("at", "5"), ("at", "../x"),
            ("new_tokens", 0), ("new_tokens", 257), ("new_tokens", 63), ("temperature", -1), ("seed", -1),
            ("prompt", ""), ("prompt", "a" * 20_001), ("prompt", "cat " * 600), ("prompt", 5), ("prompt", ["a"]),
            ("prompt", "\ud800"), ("run", "/etc"), ("contexts", 5),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_question_that_is_none_gets_one_sentence(client: ViewClient, name: str) -> None:
    reply = client.send("POST", "/api/steer", WRONG[name], client.own)
    assert reply.status == 400
    assert 10 < len(reply.sentence) < 600
    assert "\n" not in reply.sentence
    assert "Traceback" not in reply.sentence


def test_an_ablation_has_no_dial(client: ViewClient) -> None:
    assert client.ask("steer", {**QUESTION, "latent": 1, "mode": "ablate", "dial": 5.0}).status == 200


@pytest.mark.parametrize("text", ["", "a" * 20_001, "cat " * 600])
def test_a_text_that_cannot_be_encoded_gets_one_sentence(client: ViewClient, text: str) -> None:
    reply = client.ask("encode", {"text": text})
    assert reply.status == 400
    assert "\n" not in reply.sentence


def test_a_huge_body_is_refused_unread(client: ViewClient) -> None:
    head = "POST /api/steer HTTP/1.0\r\n" + "".join(
        f"{name}: {value}\r\n"
        for name, value in {**client.own, "Host": f"localhost:{client.server.server_port}"}.items()
    )
    assert raw(client, f"{head}Content-Length: 99999999999999999999\r\n\r\n").startswith(b"HTTP/1.0 413")
    assert raw(client, f"{head}Content-Length: -1\r\n\r\n").startswith(b"HTTP/1.0 411")
    assert raw(client, f"{head}\r\n").startswith(b"HTTP/1.0 411")
    assert raw(client, f"{head}Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n").startswith(b"HTTP/1.0 411")
    reply = client.send("POST", "/api/steer", b" " * 900_000, client.own)
    assert reply.status == 413
    assert raw(client, "GET /" + "a" * 70_000 + " HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 414")


@pytest.mark.parametrize(
    "path",
    [
        "/about.json",
        "/latents.parquet",
        "/../about.json",
        "/data/../about.json",
        "/data/latents/../../about.json",
        "/%2e%2e/about.json",
        "//etc/passwd",
        "/data/latents/%2e%2e/x.js",
        "/data/latents/00000.js/",
        "/data/latents/99999.js",
        "/data/index.js%00",
        "/data",
        "/api",
    ],
)
def test_nothing_but_the_page_is_served(client: ViewClient, path: str) -> None:
    assert client.get(path).status == 404
    assert client.send("POST", path, b"{}", client.own).status == 404


def test_the_page_is_served(client: ViewClient, folder: Path) -> None:
    assert client.get("/").body == client.get("/index.html?key=x").body == (folder / "index.html").read_bytes()
    for name in ("app.js", "style.css", "data/index.js", "data/latents/00000.js", "data/tokens/00.js"):
        assert client.get(f"/{name}").body == (folder / name).read_bytes()


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "page"))
    (tmp_path / "secret").write_text("x")
    (copy / "data" / "index.js").unlink()
    (copy / "data" / "index.js").symlink_to(tmp_path / "secret")
    os.mkfifo(copy / "data" / "latents" / "00009.js")
    with viewing(copy, None, "none") as client:
        assert client.get("/data/index.js").status == 404
        assert client.get("/data/latents/00009.js").status == 404


# many at once, and those who go away


def test_twenty_questions_are_answered_or_refused(folder: Path, live: LiveModel) -> None:
    with slowed(live.model, 0.02) as passes, viewing(folder, live) as client, ThreadPoolExecutor(20) as pool:

        def one(number: int) -> Reply:
            return client.ask("steer", {**QUESTION, "latent": busiest(live), "prompt": f"{PROMPT} {number}"})

        with client.server.queue.lock:  # the model is at work
            asked = [pool.submit(one, number) for number in range(20)]
            refused = [future.result() for future in islice(as_completed(asked), 20 - 1 - WAITING)]
            assert {reply.status for reply in refused} == {503}
            assert {reply.sentence for reply in refused} == {
                f"{WAITING} questions wait already. Ask again in a few seconds"
            }
            assert client.get("/").status == 200
        answered = [reply for reply in (future.result() for future in asked) if reply.status == 200]
        assert len(answered) == 1 + WAITING
        assert all(reply.lines[-1]["steps"] == 2 for reply in answered)
        assert np.diff(passes).min() >= 0.02, "never two passes at once"
        assert client.ask("steer", QUESTION).status == 200


def asking(client: ViewClient, question: dict[str, Any]) -> socket.socket:
    """A connection that has sent a question, and breaks when it is closed."""
    body = json.dumps(question)
    head = {**client.own, "Host": f"127.0.0.1:{client.server.server_port}", "Content-Length": str(len(body))}
    words = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    connection = socket.create_connection(("127.0.0.1", client.server.server_port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.sendall(f"POST /api/steer HTTP/1.0\r\n{words}\r\n{body}".encode())
    return connection


def test_a_question_that_was_given_up_stops_between_tokens(folder: Path, live: LiveModel) -> None:
    with slowed(live.model, 0.1) as passes, viewing(folder, live) as client:
        question = {**QUESTION, "latent": busiest(live), "new_tokens": 50}
        with asking(client, question) as connection, connection.makefile("rb") as reader:
            while reader.readline().strip():
                pass
            assert [json.loads(reader.readline()) for _ in range(4)]
        assert at_rest(passes) < 50
        assert client.ask("steer", QUESTION).status == 200


def at_rest(passes: list[float]) -> int:
    """The number of passes, once there have been no more for a second."""
    made = -1
    while made != len(passes):
        made = len(passes)
        time.sleep(1)
    return made


def test_a_waiting_question_that_was_given_up_leaves_the_queue(folder: Path, live: LiveModel) -> None:
    with viewing(folder, live) as client:
        places = client.server.queue.places
        with client.server.queue.lock:
            waiting = [asking(client, QUESTION) for _ in range(1 + WAITING)]
            while places.acquire(blocking=False):  # until all of them wait
                places.release()
                time.sleep(0.05)
            for each in waiting:
                each.close()
            assert all(places.acquire(timeout=20) for _ in waiting)
            places.release(len(waiting))
        assert client.ask("steer", QUESTION).status == 200


def test_the_end_of_the_server_ends_an_answer(folder: Path, live: LiveModel) -> None:
    with slowed(live.model, 0.1) as passes, ThreadPoolExecutor(1) as pool:
        with viewing(folder, live) as client:
            asked = pool.submit(client.ask, "steer", {**QUESTION, "latent": busiest(live), "new_tokens": 50})
            while not passes:
                time.sleep(0.01)
        assert "steps" not in asked.result(20).lines[-1]
    assert len(passes) < 50


# without a model, and how it begins


def test_without_the_model_the_page_still_works(finished: Path, folder: Path, tmp_path: Path) -> None:
    for config, words in (
        (ViewConfig(run=finished, model=str(tmp_path / "nowhere")), "nowhere"),
        (ViewConfig(run=finished, store=str(tmp_path / "gone")), "gone"),
        (ViewConfig(run=finished, no_model=True), "--no-model"),
    ):
        page = served_page(config, folder)
        assert page.live is None
        assert words in page.missing
        assert "\n" not in page.missing
        with viewing(page.folder, None, page.missing) as client:
            assert client.get("/").status == client.get("/data/index.js").status == 200
            about = json.loads(client.get("/api/about").body)
            assert (about["live"], about["missing"]) == (False, page.missing)
            reply = client.ask("steer", QUESTION)
            assert (reply.status, reply.sentence) == (404, page.missing)


def test_a_page_alone_says_that_its_run_is_missing(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "page"))
    config = ViewConfig(run=copy)
    assert page_folder(config) == copy
    assert "is not inside its run" in served_page(config, copy).missing
    with pytest.raises(UserError, match="is the page of page"):
        page_folder(ViewConfig(run=copy, sae="other"))


def test_which_page_is_meant(run: Path, folder: Path) -> None:
    assert page_folder(ViewConfig(run=run / "features" / folder.name)).name == folder.name
    shutil.copytree(run / "features" / folder.name, run / "features" / "another")
    with pytest.raises(UserError, match=r"of 2 autoencoders. Choose with --sae:\n  another\n"):
        page_folder(ViewConfig(run=run))
    assert page_folder(ViewConfig(run=run, sae="another")).name == "another"
    for name in ("../..", "nothing"):
        with pytest.raises(UserError, match="holds no features of"):
            page_folder(ViewConfig(run=run, sae=name))
    shutil.rmtree(run / "features")
    with pytest.raises(UserError, match="sagsae features "):
        page_folder(ViewConfig(run=run))


def test_a_taken_port_is_a_passing_failure(folder: Path) -> None:
    page = ServedPage(folder, None, "")
    with listening(page, 0) as server, pytest.raises(BusyError, match="cannot be listened on"):
        listening(page, server.server_port)


def test_the_command_serves_until_it_is_stopped(sagsae: Sagsae, finished: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    def answers() -> bool:
        with socket.socket() as trial:
            return trial.connect_ex(("127.0.0.1", port)) == 0

    done = sagsae("view", finished, "--port", port, "--no-model", "--json", stop=(signal.SIGINT, answers))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["url"].startswith(f"http://127.0.0.1:{port}/?key=")
    assert document["live"] is False


def raw(client: ViewClient, text: str) -> bytes:
    """What comes back for these bytes."""
    with socket.create_connection(("127.0.0.1", client.server.server_port), timeout=20) as connection:
        connection.sendall(text.encode())
        connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
        return b"".join(parts)
