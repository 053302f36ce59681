"""The pages of the cache as text: markup, escapes, forms, live parts, and what they refuse."""

import asyncio
import json
import re
import shlex
import time
from collections.abc import Iterator
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from starlette.testclient import TestClient
from support.serving.cache import WORKER, FakeHarvest, planned, spec_of
from support.serving.live import running
from support.serving.markup import Markup
from support.serving.rest import ADMIN, ASK, READ, TOKENS, ScriptedPlanner, client_of, copy_of, service_of

from harvest.serve.page.form import entered, request_of, whole_number
from harvest.serve.page.plots import line_plot, reduced, scale_of, stem_plot
from harvest.serve.page.render import TYPES, static_file
from harvest.serve.page.words import ago, number, size
from harvest.serve.pages import local_target
from harvest.serve.rest.endpoint import Service
from harvest.serve.view import hookpoints_in_words, log_tail, queue_line
from shared.errors import UserError
from shared.request import Job, StoreRequest
from shared.store.listing import describe_store
from shared.store.opened import Store

EVIL = "\"'><script>owned()</script><img src=x onerror=owned()>&amp;"
FORM = {"model": "tiny", "layers": ["1"], "hooks": ["mlp_out"], "tokens": "8192"}
PAGES = ("/", "/stores/s", "/jobs/1", "/login", "/stores/none", "/?layer=x")


class PagesPlanner(ScriptedPlanner):
    """Plans a fake store, and knows a model and texts."""

    def __init__(self) -> None:
        super().__init__(lambda request: planned(spec_of(request.tokens or 4096)))
        self.note = ""

    async def sites(self, model: str) -> dict[str, Any]:  # noqa: ARG002
        return {"layers": 4, "hooks": [["resid_post", 256], ["mlp_out", 256]]}

    async def texts(self, folder: Path, contexts: int) -> dict[str, Any]:  # noqa: ARG002
        text = None if self.note else f"Once upon a time {EVIL}"
        return {"contexts": [{"context": 7, "ids": [5, 6], "text": text}], "note": self.note}


@pytest.fixture
def service(store: Store, tmp_path: Path) -> Iterator[Service]:
    """A cache with a real store of three hookpoints and a fake one that a worker has begun."""
    root = tmp_path / "stores"
    copy_of(store.root, root)
    service = service_of(root, PagesPlanner(), quota=10**12)
    yield service
    service.state.close()


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with client_of(service, follow_redirects=False) as client:
        yield client


def run_a_job(service: Service, note: str = "", evil: bool = False) -> Job:
    """Queues a job, lets a worker take it and write half of its store."""
    spec = spec_of(seed=3, model=EVIL if evil else "tiny")
    found = service.state.ask(planned(spec, model=spec.model["name"], hooks=["mlp_out"], tokens=4096), "somebody")
    taken = service.state.take(WORKER)
    assert taken is not None
    half = FakeHarvest(service.root, taken.store, spec).begin()
    half.shard(0)
    half.shard(1)
    assert service.state.beat(taken.job, taken.attempt, 2048, 1000.0, note)
    service.state.scan()
    assert found.job == taken.job
    return service.state.job(taken.job)


@pytest.mark.parametrize("address", PAGES)
def test_pages_are_well_formed_and_accessible(service: Service, client: TestClient, address: str) -> None:
    run_a_job(service)
    answer = client.get(address)
    assert answer.status_code == (404 if "none" in address else 200)
    page = Markup(answer.text)
    assert page.mistakes == []
    assert page.unlabelled() == []
    assert page.dangling() == []
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert page.all("html")[0].attributes["lang"] == "en"
    assert "viewport" in [each.attributes.get("name") for each in page.all("meta")]
    assert len(page.all("title")) == len(page.all("h1")) == len(page.all("main")) == 1
    levels = page.headings()
    assert all(after - before <= 1 for before, after in pairwise(levels)), levels
    assert "no-store" in answer.headers["cache-control"]


@pytest.mark.parametrize("address", PAGES)
def test_pages_ask_nothing_of_another_host_and_keep_the_policy(
    service: Service, client: TestClient, address: str
) -> None:
    run_a_job(service)
    answer = client.get(address)
    page = Markup(answer.text)
    assert [each for each in page.addresses if re.match(r"[a-z]+:|//", each)] == []
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert [each.attributes for each in page.elements if "style" in each.attributes or each.tag == "style"] == []
    assert [each.text for each in page.all("script") if each.text.strip()] == []
    assert [name for each in page.elements for name in each.attributes if name.startswith("on")] == []


def test_the_pages_and_their_files_are_small(service: Service, client: TestClient) -> None:
    run_a_job(service)
    files = sum(len(static_file(name) or b"") for name in TYPES)
    for address in PAGES:
        assert len(client.get(address).content) + files < 100_000
    found = [each for each in Markup(client.get("/").text).addresses if each.startswith("/page/")]
    assert len(found) == 3
    for each in found:
        answer = client.get(each)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        assert "http:" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "@import" not in answer.text


def test_everything_that_others_wrote_is_escaped(service: Service, client: TestClient) -> None:
    """Names in specs, notes and last words of workers, holders of leases, texts: shown as they are, no tag obeyed."""
    job = run_a_job(service, note=EVIL, evil=True)
    (service.root / "s" / "record.json").write_text(json.dumps({"command": EVIL, "versions": {"torch": EVIL}}))
    service.state.lease("s", EVIL)
    (service.state.log_path(job.id)).write_text(f"{EVIL}\r{EVIL}\n")
    query = f"?model={EVIL}&corpus={EVIL}&hooks={EVIL}&hook={EVIL}&tokens={EVIL}"
    for address in (f"/{query}", f"/jobs/{job.id}", f"/stores/{job.store}", "/stores/s", f"/login?next={EVIL}"):
        answer = client.get(address)
        assert answer.status_code == 200, answer.text
        page = Markup(answer.text)
        assert page.mistakes == []
        assert {each.attributes.get("src", "").partition("?")[0] for each in page.all("script")} == {"/page/page.js"}
        assert page.all("img") == []
        assert "owned" in answer.text or address.startswith("/login")
    service.state.end(job.id, job.attempt, 2, EVIL)
    assert EVIL in unescape(client.get(f"/jobs/{job.id}").text)


def test_live_parts_are_escaped_and_carry_revisions(service: Service) -> None:
    job = run_a_job(service, note=EVIL, evil=True)
    with running(service) as url:
        events = Events(f"{url}/live?job={job.id}&after=0")
        revision, parts = events.next()
        assert EVIL in unescape(parts["job"])
        assert "<script>owned" not in "".join(parts.values())
        assert set(parts) == {"head", "job", "attempts", "log"}
        assert revision == service.state.changes_since(1 << 62).revision
        service.state.beat(job.id, job.attempt, 3072, 1000.0, "more")
        later, changed = events.next()
        assert later > revision
        assert "3,072 of 4,096" in changed["job"]
        assert "attempts" not in changed, "only what changed is sent"
        events.close()
        again = Events(f"{url}/live?page=home", {"Last-Event-ID": str(revision)})
        assert "3,072 of 4,096 rows" in again.next()[1]["queue"], "what was missed is sent"
        again.close()


def test_a_page_that_is_up_to_date_is_sent_nothing(service: Service) -> None:
    job = run_a_job(service)
    with running(service) as url:
        page = Markup(urlopen(url).read().decode())
        live, revision = (page.all("body")[0].attributes[f"data-{name}"] for name in ("live", "revision"))
        events = Events(f"{url}{live}&after={revision}", timeout=1.5)
        with pytest.raises(TimeoutError):
            events.next()
        events.close()
        events = Events(f"{url}{live}&after={revision}")
        service.state.end(job.id, job.attempt, 2, "no")
        assert "failed" in events.next()[1]["queue"]
        events.close()


class Events:
    """A stream of server-sent events, as a browser reads it."""

    def __init__(self, url: str, headers: dict[str, str] | None = None, timeout: float = 20) -> None:
        self.answer = urlopen(Request(url, headers=headers or {}), timeout=timeout)
        assert self.answer.headers["content-type"].startswith("text/event-stream")

    def next(self) -> tuple[int, dict[str, str]]:
        """The id and the parts of the next event."""
        number = -1
        while line := self.answer.readline().decode():
            if line.startswith("id: "):
                number = int(line.removeprefix("id: "))
            if line.startswith("data: "):
                return number, json.loads(line.removeprefix("data: "))
        raise AssertionError("the stream ended")

    def close(self) -> None:
        self.answer.close()


def test_a_request_by_form_queues_one_job_and_shows_it(service: Service, client: TestClient) -> None:
    first = client.post("/request", data=FORM)
    assert first.status_code == 303
    assert first.headers["location"] == client.post("/request", data=FORM).headers["location"]
    page = client.get(first.headers["location"]).text
    assert "queued" in page
    assert "8,192" in page
    job = service.state.queue()[0]
    assert (job.asked, len(service.state.queue())) == (2, 1)
    assert client.post(f"/jobs/{job.id}/cancel").headers["location"] == f"/jobs/{job.id}"
    assert service.state.job(job.id).state == "cancelled"
    client.post(f"/jobs/{job.id}/retry")
    assert service.state.job(job.id).state == "queued"


def test_a_request_that_a_store_answers_goes_to_the_store(service: Service, client: TestClient) -> None:
    spec = spec_of(8192)
    FakeHarvest(service.root, "there", spec).whole()
    service.state.scan()
    answer = client.post("/request", data=FORM)
    assert answer.headers["location"] == "/stores/there?hook=layer_01%2Fmlp_out"
    assert service.state.queue() == []


def test_the_plan_is_said_before_anything_is_queued(service: Service, client: TestClient) -> None:
    part = client.post("/plan?part=plan", data=FORM)
    assert "Harvest" in part.text
    assert Markup(part.text).mistakes == []
    whole = client.post("/plan", data=FORM).text
    assert part.text.strip() in whole
    page = Markup(whole)
    chosen = {(e.attributes["name"], e.attributes["value"]) for e in page.all("input") if "checked" in e.attributes}
    assert chosen == {("layers", "1"), ("hooks", "mlp_out")}, "what was entered stays"
    assert service.state.queue() == []


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"tokens": "many"}, 422, "no whole number"),
        ({"layers": "eight"}, 422, "must be a layer number"),
        ({"model": "/etc/passwd"}, 403, "names no path"),
        ({"corpus": "../notes"}, 403, "names no path"),
        ({"codec": "gzip"}, 422, "must be zstd"),
        ({"pin": "a b"}, 422, "Pin: "),
        ({"revision": "x" * 5000}, 422, "4,096 characters"),
    ],
)
def test_a_wrong_field_is_named_and_the_form_kept(
    service: Service, client: TestClient, change: dict[str, str], status: int, words: str
) -> None:
    for address in ("/request", "/plan", "/plan?part=plan"):
        answer = client.post(address, data={**FORM, **change})
        assert answer.status_code == status
        assert words in unescape(answer.text)
        assert Markup(answer.text).mistakes == []
        if address == "/request" and status == 403:
            assert 'value="8192"' in answer.text
    assert service.state.queue() == []


def test_what_is_no_form_of_ours_is_refused(client: TestClient) -> None:
    assert client.post("/request", json=FORM).status_code == 415
    assert client.post("/request", data={f"a{n}": "1" for n in range(500)}).status_code == 422
    assert client.post("/request", data={"model": "x" * 70_000}).status_code == 413
    assert client.post("/request", data=FORM, headers={"Origin": "http://elsewhere.example"}).status_code == 403
    assert client.get("/page/../pages.py").status_code == 404
    assert client.get("/page/base.html").status_code == 404


def test_pins_and_checks_of_a_store(service: Service, client: TestClient) -> None:
    assert client.post("/stores/s/pins", data={"pin": "paper"}).headers["location"] == "/stores/s#keep"
    assert service.state.store("s").pins == ("paper",)
    assert "Unpin paper" in client.get("/stores/s").text
    client.post("/stores/s/pins/paper/remove")
    assert service.state.store("s").pins == ()
    assert client.post("/stores/none/verify").status_code == 404
    assert "Every file is as it was written" in checked(client)
    shard = next((service.root / "s" / "layer_01" / "mlp_out").rglob("c/0/*"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    text = checked(client)
    assert "1 damaged file" in text
    assert "mlp_out" in text


def checked(client: TestClient) -> str:
    """The page of the store after a check."""
    assert client.post("/stores/s/verify").status_code == 303
    end = time.monotonic() + 20
    while "being read" in (text := client.get("/stores/s").text):
        assert time.monotonic() < end
        time.sleep(0.05)
    return text[text.index('data-part="check"') :]


def test_the_page_of_a_store_says_what_the_command_line_says(service: Service, client: TestClient) -> None:
    text = unescape(client.get("/stores/s?hook=layer_01/resid_post").text)
    about = describe_store(service.root / "s")
    row = next(each for each in about["hookpoints"] if each["hook"] == "resid_post")
    for value in (row["scale"], row["norm_of_mean"], row["mean_square"], row["norms"]["quantiles"][0.5]):
        assert f">{number(value)}<" in text
    assert "sagsae train --store http://127.0.0.1:8642/v1/stores/s --hook layer_01/resid_post" in text
    assert f"--store {service.root / 's'}" in text
    assert "Once upon a time" in text
    assert service.state.store("s").key in text
    assert len(Markup(text).all("polyline")) == 1
    planner = service.planner
    assert isinstance(planner, PagesPlanner)


def test_the_commands_on_the_page_work(service: Service, client: TestClient, sagsae: Any, tmp_path: Path) -> None:
    page = Markup(client.get("/stores/s").text)
    code = [each.text for each in page.all("code") if each.text.startswith("sagsae train")]
    assert len(code) == 2
    words = shlex.split(code[1])[1:]
    small = ("--tokens", 64, "--batch", 32, "--heldout-tokens", 64, "--device", "cpu", "--out", tmp_path / "run")
    done = sagsae(*words, *small)
    assert done.returncode == 0, done.stderr
    python = next(each.text for each in page.all("code") if each.text.startswith("from"))
    compile(python, "snippet", "exec")
    here = python.replace("http://127.0.0.1:8642/v1/stores/s", str(service.root / "s"))
    exec(here, {})


def test_filters_are_in_the_address(service: Service, client: TestClient) -> None:
    for n in range(60):
        FakeHarvest(service.root, f"more-{n:02d}", spec_of(1024, seed=n + 10, model=f"m{n % 2}")).whole()
    service.state.scan()
    first = Markup(client.get("/?model=m1&sort=id&layer=1&state=final").text)
    assert shown(first) == [f"more-{n:02d}" for n in range(1, 60, 2)]
    every = Markup(client.get("/?sort=id").text)
    assert len(shown(every)) == 50
    link = next(each.attributes["href"] for each in every.all("a") if each.attributes.get("rel") == "next")
    assert len(shown(Markup(client.get(link.partition("#")[0]).text))) == 11
    assert "No store matches" in client.get("/?hook=none").text
    assert "The filter was left out" in client.get("/?layer=-1").text


def shown(page: Markup) -> list[str]:
    """Ids of the stores in the catalog."""
    found = [each for each in page.all("a") if each.attributes.get("href", "").startswith("/stores/")]
    return [each.text for each in found if "th" in each.inside]


def test_tokens_and_the_cookie(service: Service) -> None:
    with client_of(service, TOKENS, follow_redirects=False) as client:
        away = client.get("/jobs/1?x=1")
        assert (away.status_code, away.headers["location"]) == (303, "/login?next=%2Fjobs%2F1%3Fx%3D1")
        assert client.get("/page/page.css").status_code == 200
        assert client.post("/request", data=FORM).status_code == 401
        wrong = client.post("/login", data={"token": "wrong-wrong-wrong", "next": "/"})
        assert wrong.status_code == 401
        assert "set-cookie" not in wrong.headers
        right = client.post("/login", data={"token": READ, "next": "//elsewhere.example/"})
        assert right.headers["location"] == "/"
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(right.headers["set-cookie"].split("; "))
        text = client.get("/").text
        assert "Your token may read" in text
        assert client.post("/request", data=FORM).status_code == 403
        client.post("/login", data={"token": ASK, "next": "/"})
        assert client.post("/request", data=FORM).status_code == 303
        client.cookies.set("sagsae_token", "of-an-earlier-server")
        assert client.get("/").status_code == 303, "an old cookie may be replaced"
        assert READ not in text
        assert ADMIN not in text


@pytest.mark.parametrize("target", ["//a.b", "/\\a.b", "http://a.b", "", "/ok\nSet-Cookie: a=b", "javascript:x"])
def test_signing_in_leads_nowhere_else(target: str) -> None:
    assert local_target(target) == "/"
    assert local_target("/stores/s?hook=layer_01/mlp_out") == "/stores/s?hook=layer_01/mlp_out"


def test_a_page_waits_for_no_planner(service: Service, client: TestClient) -> None:
    """Texts and layers that take long are said to come; the part brings them."""

    class Slow(PagesPlanner):
        async def texts(self, folder: Path, contexts: int) -> dict[str, Any]:
            await asyncio.sleep(2)
            return await super().texts(folder, contexts)

    service.planner = Slow()
    began = time.monotonic()
    assert "are being decoded" in client.get("/stores/s").text
    assert time.monotonic() - began < 1.9
    assert "Once upon a time" in client.get("/stores/s?part=texts").text
    assert "Once upon a time" in client.get("/stores/s").text


# ------------------------------------------------------------------------------------------------ words and plots


@pytest.mark.parametrize(
    ("text", "value"),
    [("20M", 20_000_000), ("1.5M", 1_500_000), ("20,000", 20_000), ("250k", 250_000), ("7", 7), ("2B", 2 * 10**9)],
)
def test_numbers_as_people_write_them(text: str, value: int) -> None:
    assert whole_number("tokens", text) == value


@pytest.mark.parametrize("text", ["1.5", "-1", "1e6", "M", "", "0x10", "1.2345k", "9" * 30, "²"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(UserError, match="Tokens: "):
        whole_number("tokens", text)


def test_the_form_says_what_a_request_says() -> None:
    values = entered({"model": ["tiny"], "layers": ["1, 2", "mid"], "hooks": ["mlp_out", ""], "refresh": ["true"]})
    asked = request_of(values)
    assert asked == StoreRequest(model="tiny", layers=(1, 2, "mid"), hooks=("mlp_out",), refresh=True)
    assert entered({"out": ["/tmp"], "name": ["x"]}) == {}


def test_words() -> None:
    assert [size(n) for n in (0, 999, 1000, 62_340_000_000)] == ["0\xa0B", "999\xa0B", "1.00\xa0kB", "62.3\xa0GB"]
    assert ago(0.0, 5.0) == "–"
    assert ago(100.0, 100.0 + 7200) == "2\xa0h ago"
    assert hookpoints_in_words(("layer_00/mlp_out", "layer_01/mlp_out", "layer_05/attn.hook_z")) == (
        "0–1, 5",
        "mlp_out, attn.hook_z",
    )
    assert log_tail("a\nb 1 %\rb 2 %\nc\n", 2) == "b 2 %\nc"


def test_a_job_of_unknown_length_has_no_bar() -> None:
    job = Job(
        id=1, state="running", action="harvest", key="k", store="s", request={"model": "m"}, asked=1, attempt=1,
        priority="normal", rows=5, rows_per_s=2.0,
    )  # fmt: skip
    line = queue_line(job, None, 0.0)
    assert (line.percent, line.rows, line.left, line.speed) == (None, "5", "–", "2 tokens/s")


def test_plots_stay_inside_and_small() -> None:
    rough = [float("nan"), 0.0, 1e-300, 1e300, *map(float, range(100_000))]
    for drawing in (line_plot(rough, [0], EVIL), stem_plot(rough, 6.0, [3], EVIL), line_plot([], [], "empty"),
                    line_plot([2.0], [0], "one"), stem_plot([0.0] * 8, 6.0, [], "flat")):  # fmt: skip
        page = Markup(str(drawing))
        assert page.mistakes == []
        assert len(drawing) < 12_000
        places = [float(n) for n in re.findall(r'(?:c[xy]|y[12])="(-?[\d.]+)%"', drawing)]
        assert all(0 <= place <= 100 for place in places)
        assert not re.search(r"nan|inf", str(drawing).replace(EVIL, ""), re.IGNORECASE)
    assert len(reduced(rough)) <= 256
    assert scale_of([1.0, 100.0]).log
    assert not scale_of([1.0, 2.0]).log
