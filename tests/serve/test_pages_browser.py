"""The pages of the cache in Chromium: a request by form, live progress, a restart of the server, narrow and dark."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.command import ROOT
from support.serving.cache import WORKER, FakeHarvest, planned, spec_of
from support.serving.chromium import CHROMIUM, Watched, launched
from support.serving.live import running
from support.serving.rest import READ, TOKENS, ScriptedPlanner, copy_of, service_of

from harvest.serve.rest.endpoint import Service
from shared.store.opened import Store

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]
SIZES = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


class PagesPlanner(ScriptedPlanner):
    """Plans a fake store of as many tokens as were asked for."""

    def __init__(self) -> None:
        super().__init__(lambda request: planned(spec_of(request.tokens or 4096), **request.model_dump(mode="json")))

    async def sites(self, model: str) -> dict[str, Any]:
        width = 256 if model == "tiny" else 512
        return {"layers": 4, "hooks": [["resid_post", width], ["mlp_out", width]]}

    async def texts(self, folder: Path, contexts: int) -> dict[str, Any]:  # noqa: ARG002
        line = {"ids": [5], "text": "Once upon a time " * 40}
        return {"contexts": [{"context": n, **line} for n in range(contexts)], "note": ""}


class Tab(Watched):
    """A page of the service."""

    def open(self, path: str) -> Any:
        self.page.goto(self.url + path)
        return self.page

    def wait_for(self, text: str, inside: str = "body") -> None:
        self.page.locator(inside).get_by_text(text).first.wait_for(timeout=20_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as chromium:
        yield chromium


@pytest.fixture
def service(store: Store, tmp_path: Path) -> Iterator[Service]:
    root = tmp_path / "stores"
    copy_of(store.root, root)
    service = service_of(root, PagesPlanner(), quota=10**12)
    yield service
    service.state.close()


@pytest.fixture
def tab(browser: Any, service: Service, request: pytest.FixtureRequest) -> Iterator[Tab]:
    width, scheme = getattr(request, "param", (1280, "light"))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    with running(service) as url:
        yield Tab(context.new_page(), url)
        context.close()


@dataclass
class ByHand:
    """A worker that writes a shard when the test says so."""

    service: Service
    spec: Any
    attempt: int = 0
    job: int = 0
    rows: int = 0

    def take(self) -> "ByHand":
        taken = self.service.state.take(WORKER)
        assert taken is not None
        self.job, self.attempt = taken.job, taken.attempt
        self.store = FakeHarvest(self.service.root, taken.store, self.spec).begin()
        return self

    def shard(self, number: int) -> None:
        self.store.shard(number)
        self.rows += self.spec.shard_rows
        self.service.state.beat(self.job, self.attempt, self.rows, 900.0, f"shard {number}")

    def finish(self) -> None:
        for number in range(self.rows // self.spec.shard_rows, self.spec.n_shards):
            self.shard(number)
        self.store.finish()
        assert self.service.state.end(self.job, self.attempt, 0, "").state == "done"


def test_a_request_by_form_and_its_progress(tab: Tab, service: Service) -> None:
    """Nothing is reloaded between the request and the finished store."""
    page = tab.open("/")
    page.get_by_text("Layers of tiny").wait_for()
    page.locator("[name=tokens]").fill("8192")
    tab.wait_for("8 shards are harvested", "#plan")
    page.get_by_label("2", exact=True).check()
    page.get_by_role("button", name="Request", exact=True).click()
    page.wait_for_url("**/jobs/1")
    tab.wait_for("queued")
    page.evaluate("window.same = true")
    worker = ByHand(service, spec_of(8192)).take()
    tab.wait_for("running")
    worker.shard(0)
    tab.wait_for("1,024 of 8,192")
    assert page.get_by_label("Progress of job 1").evaluate("bar => bar.value") == 12.5
    worker.shard(1)
    tab.wait_for("2,048 of 8,192")
    tab.wait_for("900 tokens/s")
    service.state.log_path(worker.job).write_text("harvest: 25 %\n<b>no tag</b>\n")
    worker.shard(2)
    tab.wait_for("<b>no tag</b>", "[data-part=log]")
    worker.finish()
    tab.wait_for("done", "[data-part=job]")
    assert page.locator("#announcement").text_content() == "Job 1 is done."
    assert page.evaluate("window.same") is True
    assert page.locator("[data-part=job]").get_by_role("link").get_attribute("href") == f"/stores/{worker.store.name}"
    assert tab.elsewhere == []
    assert tab.complaints == []


def test_progress_goes_on_after_the_server_was_restarted(browser: Any, service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    spec = spec_of(8192)
    service.state.ask(planned(spec, model="tiny"), "somebody")
    worker = ByHand(service, spec).take()
    context = browser.new_context()
    page = context.new_page()
    with running(service, port=port) as url:
        tab = Tab(page, url)
        tab.open("/")
        page.evaluate("window.same = true")
        worker.shard(0)
        tab.wait_for("1,024 of 8,192")
    tab.wait_for("The connection is lost")
    service.state.close()
    worker.service = again = service_of(service.root, PagesPlanner(), quota=10**12)
    worker.shard(1)  # while no server is there
    with running(again, port=port):
        tab.wait_for("2,048 of 8,192")
        page.locator(".offline").wait_for(state="hidden")
        again.state.beat(worker.job, worker.attempt, 3000, 1.0, "")
        tab.wait_for("3,000 of 8,192")
        assert page.evaluate("window.same") is True
        context.close()
    again.state.close()


def test_what_a_person_does_survives_an_update(tab: Tab, service: Service) -> None:
    """The focus on a button, and a list that was folded out."""
    for seed in range(3):
        service.state.ask(planned(spec_of(seed=seed), model="tiny"), "somebody")
    service.state.cancel(3)
    page = tab.open("/")
    page.get_by_text("Ended lately").click()
    page.get_by_role("button", name="Cancel job 2").focus()
    worker = ByHand(service, spec_of(seed=0)).take()
    worker.shard(0)
    tab.wait_for("1,024 of 4,096")
    assert page.evaluate("document.activeElement.ariaLabel") == "Cancel job 2"
    assert page.locator("#recent").evaluate("each => each.open")
    page.keyboard.press("Enter")
    page.wait_for_url("**/jobs/2")
    assert service.state.job(2).state == "cancelled"


@pytest.mark.parametrize("tab", SIZES, indirect=True, ids=str)
def test_every_page_fits_and_asks_no_other_host(tab: Tab, service: Service) -> None:
    service.state.ask(planned(spec_of(8192, seed=1), model="tiny", hooks=["mlp_out"], layers=[1]), "somebody")
    service.state.pin("s", "a-rather-long-name-of-a-pin-for-the-paper")
    ByHand(service, spec_of(8192, seed=1)).take().shard(0)
    for path in ("/", "/jobs/1", "/stores/s", "/login", "/stores/none", "/?model=none"):
        page = tab.open(path)
        page.wait_for_load_state()
        wide, inner = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= inner, path
        small = page.locator("button, input, select").evaluate_all(
            "all => all.filter(e => e.checkVisibility() && e.type !== 'checkbox')"
            ".filter(e => e.getBoundingClientRect().height < 24).map(e => e.outerHTML)"
        )
        assert small == []
        assert page.evaluate("getComputedStyle(document.body).fontFamily").startswith("system-ui")
    assert tab.elsewhere == []
    assert [each for each in tab.complaints if "404" not in each] == []


def test_text_has_contrast_in_both_schemes(tab: Tab, service: Service) -> None:
    """At least 4.5 to 1 between every text and what is behind it (WCAG AA)."""
    service.state.ask(planned(spec_of(8192, seed=1), model="tiny"), "somebody")
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        for path in ("/", "/jobs/1", "/stores/s"):
            page = tab.open(path)
            assert page.evaluate(CONTRAST) == [], (scheme, path)


CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const poor = [];
  for (const e of document.querySelectorAll("main *, header *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest("svg, option, datalist")) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${e.outerHTML.slice(0, 100)}`);
  }
  return poor;
}"""


def test_without_javascript_everything_is_there(browser: Any, service: Service) -> None:
    service.state.ask(planned(spec_of(seed=1), model="tiny"), "somebody")
    context = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 900})
    page = context.new_page()
    with running(service) as url:
        page.goto(url)
        assert page.get_by_role("row").count() >= 3
        page.locator("[name=tokens]").fill("4096")
        page.get_by_role("button", name="Plan only").click()
        page.get_by_text("4 shards are harvested").wait_for()
        assert page.locator("[name=tokens]").input_value() == "4096"
        page.get_by_role("button", name="Request", exact=True).click()
        page.wait_for_url("**/jobs/2")
        page.get_by_text("queued").first.wait_for()
        page.goto(f"{url}/stores/s")
        page.get_by_text("Once upon a time").first.wait_for()
        assert page.locator("svg.plot").count() == 2
        assert not page.locator(".copy").count()
        page.goto(f"{url}/?model=pythia-14m")
        page.get_by_role("button", name="Show the layers and hooks of this model").click()
        page.get_by_text("Layers of pythia-14m").wait_for()
    context.close()


def test_signing_in(browser: Any, service: Service) -> None:
    context = browser.new_context()
    page = context.new_page()
    with running(service, TOKENS) as url:
        page.goto(f"{url}/stores/s")
        page.get_by_label("Token").fill("nonsense-nonsense")
        page.get_by_role("button", name="Sign in").click()
        page.get_by_text("is not one of this server’s").wait_for()
        page.get_by_label("Token").fill(READ)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/stores/s")
        assert page.evaluate("document.cookie") == ""
        assert not page.get_by_role("button", name="Verify").count()
    context.close()


@contextmanager
def served(root: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`sagsae serve` with its own worker, killed at the end."""
    command = [sys.executable, str(ROOT / "cli.py"), "serve", "--root", str(root), "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_for_port(port)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_port(port: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_harvest_through_a_killed_server(browser: Any, tmp_path: Path) -> None:
    """`sagsae serve` alone: a request by form, its progress, kill -9 of the server, and the finished store; the job's
    page is never reloaded."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = browser.new_context()
    context.set_default_timeout(180_000)
    page = context.new_page()
    tab = Tab(page, f"http://127.0.0.1:{port}")
    with served(tmp_path / "stores", port):
        tab.open("/")
        page.get_by_text("Layers of tiny").wait_for()
        page.get_by_label("1", exact=True).check()
        page.get_by_label("mid", exact=True).uncheck()
        page.locator("[name=tokens]").fill("600k")
        page.locator("#plan").get_by_text("Nothing of it is here yet").wait_for()
        page.get_by_role("button", name="Request", exact=True).click()
        page.wait_for_url("**/jobs/1")
        page.evaluate("window.same = true")
        bar = page.get_by_label("Progress of job 1")
        while bar.evaluate("bar => bar.value") < 5:  # the test's own limit of time ends this
            page.wait_for_timeout(100)
    page.get_by_text("The connection is lost").wait_for()
    assert bar.evaluate("bar => bar.value") < 100
    with served(tmp_path / "stores", port):
        page.locator("[data-part=job] .badge.done").wait_for()
        assert bar.evaluate("bar => bar.value") == 100
        assert page.evaluate("window.same") is True
        assert page.locator("[data-part=attempts] tbody tr").count() >= 1
        assert page.locator("[data-part=log]").text_content().count("\n") > 3
        page.locator("[data-part=job]").get_by_role("link").click()
        page.wait_for_url("**/stores/*")
        page.locator(".texts").wait_for()
        assert page.locator("svg.plot").count() == 2
        page.get_by_role("button", name="Verify every file").click()
        page.get_by_text("Every file is as it was written").wait_for()
    assert tab.elsewhere == []
    context.close()
