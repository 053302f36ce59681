"""The page of `sagsae features` in Chromium, by double click (file://) and from a web server."""

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.exact.latents import HOSTILE, LatentFolder, copied, make_latents, spelled, write_dials
from support.serving.chromium import CHROMIUM, CONTRAST, PHONE, SMALL, Look, launched, looked_at

from train.features.site.build import write_site

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> LatentFolder:
    """Latent 5 never fires, latent 6 never below zero; latents 2 and 3 were tested as dials."""
    found = make_latents(tmp_path_factory.mktemp("signed"), dead=(5,), one_sided=(6,))
    write_dials(found.path, (2, 3))
    write_site(found.path)
    return found


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory: pytest.TempPathFactory) -> LatentFolder:
    return make_latents(tmp_path_factory.mktemp("unsigned"), "relu", dead=(5,))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def served(signed: LatentFolder) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(signed.path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def look(browser: Any, signed: LatentFolder) -> Iterator[Look]:
    found = looked_at(browser, signed.path.as_uri())
    yield found
    found.page.context.close()


@pytest.fixture
def phone(browser: Any, signed: LatentFolder) -> Iterator[Look]:
    found = looked_at(browser, signed.path.as_uri(), PHONE)
    yield found
    found.page.context.close()


VIEWS = ["#/", "#/?token=1", "#/?word=the", "#/?least=100000", "#/latent/3", "#/latent/5", "#/latent/6?show=plus",
         "#/compare/1/2", "#/latent/999", "#/nowhere"]  # fmt: skip


@pytest.mark.parametrize("place", ["file", "http"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), PHONE], ids=str)
def test_every_view_fits_and_can_be_read(
    browser: Any, signed: LatentFolder, served: str, place: str, scheme: str, size: tuple[int, int]
) -> None:
    """No sideways scrolling, no request to elsewhere, nothing in the console, text of at least 4.5 to 1."""
    look = looked_at(browser, signed.path.as_uri() if place == "file" else served, size, scheme)
    for route in VIEWS:
        page = look.open(route)
        wide, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner, route
        assert page.evaluate(CONTRAST) == [], route
        if size == PHONE:
            assert page.evaluate(SMALL) == [], route
    assert look.elsewhere == []
    assert look.complaints == []
    look.page.context.close()


def test_the_table_shows_what_the_files_say(look: Look, signed: LatentFolder) -> None:
    poles = signed.table("latents")
    firings, energy = (poles.groupby("latent")[name].sum() for name in ("firings", "energy"))
    weaker = poles.groupby("latent").energy.min() / energy
    order = weaker[firings >= 20].sort_values(ascending=False, kind="stable")
    page = look.open("#/")
    page.get_by_role("heading", name=f"{len(order)} of 64 latents").wait_for()
    rows = page.locator(".row").evaluate_all("rows => rows.map(r => [...r.children].map(c => c.innerText))")
    assert len(rows) < 40
    for row, (latent, share) in zip(rows, order.items(), strict=False):
        assert (row[0], row[1]) == (str(latent), f"{firings[latent]:,}")
        assert row[7] == f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"
    page.goto(look.url + "/index.html#/?both=1&least=300&sort=firings&dir=up")
    kept = firings[(firings >= 300) & (weaker >= 0.1)].sort_values(kind="stable")
    page.get_by_role("heading", name=f"{len(kept)} of 64 latents").wait_for()
    first = page.locator(".row .c-latent").first.inner_text()
    assert firings[int(first)] == kept.iloc[0]


def test_a_search_by_token_finds_every_pole(look: Look, signed: LatentFolder) -> None:
    pairs = signed.table("pairs")
    token = int(pairs.token.mode()[0])
    some = pairs[pairs.token == token].groupby("latent")["count"].sum()
    page = look.open(f"#/?token={token}&least=0")
    shown = page.locator(".row").evaluate_all(
        "rows => rows.map(r => [r.children[0], r.children[1]].map(c => c.innerText))"
    )
    assert shown
    for latent, text in shown:
        assert text.startswith(f"{some[int(latent)]:,} "), "firings of both poles on the token"
    counts = [some[int(latent)] for latent, _ in shown]
    assert counts == sorted(counts, reverse=True)
    page.get_by_text(f"{len(pairs[pairs.token == token])} poles with at least 3 firings").wait_for()


TEXTS = "all => all.map(e => e.textContent)"
EXAMPLES = "all => all.map(e => [...e.children, e.querySelector('.peak')].map(part => part.textContent))"


def number_in(text: str) -> float:
    return float(text.replace("−", "-").replace("+", "").replace(",", ""))


def test_pages_of_latents_equal_the_files(look: Look, signed: LatentFolder) -> None:
    """Fifty latents drawn at random, both poles: counts, the strongest values and their tokens, read from the DOM."""
    poles, examples = signed.table("latents"), signed.table("examples")
    texts = signed.table("tokens").bytes.map(bytes.decode)
    look.open("#/")
    for latent in np.random.default_rng(0).choice(64, 50, replace=False).tolist():
        page = look.go(f"#/latent/{latent}", f"Latent {latent}")
        for _, pole in poles[poles.latent == latent].iterrows():
            section = page.locator(f".pole.{'plus' if pole.sign > 0 else 'minus'}")
            said = section.locator("header .note").inner_text()
            if not pole.firings:
                assert "never fires" in said
                continue
            assert said.startswith(f"{pole.firings:,} firing")
            best = examples[(examples.latent == latent) & (examples.sign == pole.sign) & (examples.group == 0)]
            best = best.sort_values("rank")[:10]
            shown = section.locator(".examples ol").first.locator("li").evaluate_all(EXAMPLES)
            assert len(shown) == len(best)
            for (value, text, peak), (_, row) in zip(shown, best.iterrows(), strict=True):
                assert number_in(value) == pytest.approx(row.value, rel=5e-3)
                assert text == "".join(texts[row.tokens])
                assert peak == texts[row.tokens[row.position - row.start]]
            on = section.locator(".lists section").first.locator("li")
            titles = on.locator("b").evaluate_all("all => all.map(e => e.title)")
            assert titles == [f"{n['count']:,} firing{'s' * (n['count'] != 1)} on it" for n in pole.on[:8]]
            assert on.locator(".tok").evaluate_all(TEXTS) == [texts[n["token"]] for n in pole.on[:8]]
            assert section.locator(".rule .tok").evaluate_all(TEXTS) == [texts[n] for n in pole.rule]
    assert look.complaints == []


def test_hostile_tokens_are_seen_and_run_nothing(browser: Any, signed: LatentFolder, tmp_path: Path) -> None:
    folder = copied(signed, tmp_path / "hostile")
    spelled(folder, HOSTILE)
    look = looked_at(browser, folder.as_uri())
    examples = signed.table("examples")
    for latent in (0, 1, 2):
        page = look.open(f"#/latent/{latent}")
        best = examples[(examples.latent == latent) & (examples.group == 0) & (examples["rank"] < 10)]
        for sign, side in ((1, "plus"), (-1, "minus")):
            rows = best[best.sign == sign].sort_values("rank")
            shown = page.locator(f".pole.{side} .examples ol").first.locator(".window").evaluate_all(TEXTS)
            for text, tokens in zip(shown, rows.tokens, strict=True):
                raw = b"".join(HOSTILE.get(int(t), signed_text(signed, int(t))) for t in tokens)
                assert text == raw.decode("utf-8", "ignore"), "also characters that tokens cut"
    signs = set(page.locator("i.sign").evaluate_all("all => all.map(e => e.dataset.sign)"))
    assert {"⏎", "⇥", "∅", "⍽", "␍", "⟨U+202E⟩", "⟨U+0000⟩", "⟨U+2028⟩", "⟨80 94⟩", "⟨f0 9f 98⟩", "⟨ff⟩"} <= signs
    widths = page.locator("i.sign").evaluate_all("all => all.map(e => e.getBoundingClientRect().width)")
    assert min(widths) >= 2
    for route in (
        "#/?least=0",
        "#/compare/0/1",
        "#/?token=0",
        "#/?word=%3Cscript%3E",
        "#/%3Cimg src=x onerror=owned=1%3E",
    ):
        look.open(route)
    assert page.evaluate("window.owned") is None
    assert look.complaints == []
    look.page.context.close()


def signed_text(folder: LatentFolder, token: int) -> bytes:
    found: bytes = folder.table("tokens").bytes[token]
    return found


def test_a_copy_is_the_text(browser: Any, signed: LatentFolder, tmp_path: Path) -> None:
    """What the clipboard gets of contexts with a tab, a zero-width space and a character that two tokens share."""
    folder = copied(signed, tmp_path / "copy")
    dash = "\u2014".encode()
    texts = {0: dash[:1], 1: dash[1:], 2: b"a\tb", 3: "\u200bc".encode()}
    spelled(folder, texts)
    examples, joined = signed.table("examples"), 0
    look = looked_at(browser, folder.as_uri())
    for latent in range(4):
        page = look.open(f"#/latent/{latent}")
        rows = examples[(examples.latent == latent) & (examples.sign == 1) & (examples.group == 0)].sort_values("rank")
        windows = page.locator(".pole.plus .examples ol").first.locator(".window").all()
        for window, tokens in zip(windows, rows.tokens[:10], strict=True):
            raw = b"".join(texts.get(int(token), signed_text(signed, int(token))) for token in tokens)
            copy = window.evaluate("e => { getSelection().selectAllChildren(e); return getSelection().toString(); }")
            assert copy.strip() == raw.decode("utf-8", "ignore").strip()
            joined += "\u2014" in copy
    assert joined > 10
    look.page.context.close()


def test_addresses_bring_everything_back(look: Look) -> None:
    page = look.open("#/?both=1&least=50&sort=firings&dir=up")
    count = page.locator("h1").inner_text()
    page.locator("[name=both]").uncheck()
    page.wait_for_url("**/*least=50*sort=firings&dir=up")
    assert "both" not in page.url
    page.locator(".row .c-latent a").first.click()
    page.get_by_role("heading", name=re.compile(r"^Latent \d+$")).wait_for()
    latent = page.locator("h1").inner_text()
    page.reload()
    page.get_by_role("heading", name=latent, exact=True).wait_for()
    page.go_back()
    page.wait_for_url("**/*?least=50*sort=firings&dir=up")
    page.locator(".grid").wait_for()
    page.go_back()
    page.wait_for_url("**/*both=1*")
    page.locator(".grid").wait_for()
    assert page.locator("h1").inner_text() == count
    assert page.locator("[name=both]").is_checked()
    assert page.locator("[name=least]").input_value() == "50"
    assert page.locator("[aria-sort=ascending]").inner_text().startswith("Firings")
    page.go_forward()
    page.go_forward()
    page.get_by_role("heading", name=latent, exact=True).wait_for()
    assert look.complaints == []


def test_what_is_not_there_is_said(browser: Any, signed: LatentFolder, tmp_path: Path) -> None:
    folder = copied(signed, tmp_path / "part")
    script = folder / "data" / "latents" / "00000.js"
    look = looked_at(browser, folder.as_uri())
    look.open("#/latent/99999999").get_by_text("There is no latent 99999999. They are numbered 0 to 63.").wait_for()
    look.open("#/latent/-1").get_by_text("There is no page at #/latent/-1.").wait_for()
    whole = script.read_bytes()
    script.write_bytes(whole[: len(whole) // 2] + b'")')
    look.open("#/latent/1").get_by_text("data/latents/00000.js is damaged.").wait_for()
    script.unlink()
    look.open("#/latent/1").get_by_text("data/latents/00000.js is missing.").wait_for()
    shutil.rmtree(folder / "data" / "tokens")
    look.open("#/?token=3").get_by_text("data/tokens/03.js is missing.").wait_for()
    (folder / "data" / "index.js").unlink()
    look.open("#/").get_by_text("data/index.js is missing.").wait_for()
    assert [each for each in look.complaints if "ERR_FILE_NOT_FOUND" not in each] == []
    look.page.context.close()


def test_the_keyboard_alone_is_enough(look: Look) -> None:
    page = look.open("#/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("j")
    page.keyboard.press("j")
    second = page.evaluate("document.activeElement.closest('.row').dataset.latent")
    assert page.locator(".row").nth(1).get_attribute("data-latent") == second
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=f"Latent {second}", exact=True).wait_for()
    assert page.evaluate("document.activeElement.tagName") == "H1"
    page.keyboard.press("j")
    page.wait_for_function("before => document.querySelector('h1').innerText !== before", arg=f"Latent {second}")
    page.keyboard.press("k")
    page.get_by_role("heading", name=f"Latent {second}", exact=True).wait_for()
    page.keyboard.press("t")
    page.locator(".grid").wait_for()
    page.keyboard.press("/")
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Latent 7", exact=True).wait_for()
    page.keyboard.press("/")
    page.keyboard.type("the")
    page.keyboard.press("Enter")
    page.wait_for_url("**/*word=the")
    assert look.complaints == []


def test_a_phone_shows_one_pole_soon(phone: Look) -> None:
    page = phone.open("#/latent/2?show=plus")
    page.locator(".pole.minus").wait_for(state="hidden")
    assert (
        page.locator(".pole.plus .text").first.evaluate("e => e.getBoundingClientRect().top + scrollY")
        <= 2.5 * PHONE[1]
    )
    page.get_by_role("button", name="− pole").click()
    page.locator(".pole.plus").wait_for(state="hidden")
    assert page.url.endswith("#/latent/2?show=minus")
    page.reload()
    page.locator(".pole.minus").wait_for()
    page.locator(".pole.plus").wait_for(state="hidden")
    page = phone.open("#/?least=0")
    cards = page.locator(".row")
    assert cards.first.evaluate("e => e.getBoundingClientRect().width") > 300
    seen = cards.first.get_attribute("data-latent")
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait_for_function("seen => !document.querySelector(`[data-latent='${seen}']`)", arg=seen)


def test_latents_with_one_pole_or_none(look: Look, browser: Any, unsigned: LatentFolder) -> None:
    look.open("#/latent/5").get_by_text("It never fires on these").wait_for()
    page = look.open("#/latent/6")
    page.get_by_text("only its + pole fires").wait_for()
    page.locator(".pole.minus").get_by_text("never fires").wait_for()
    other = looked_at(browser, unsigned.path.as_uri())
    page = other.open("#/")
    page.get_by_text("a latent has one pole").wait_for()
    assert page.locator("[name=both], .minus").count() == 0
    assert page.locator("[role=columnheader]").all_inner_texts() == [
        "Latent",
        "Firings",
        "Tokens",
        "F1",
        "Most opposite",
    ]
    page = other.open("#/latent/3")
    assert page.locator(".pole").count() == 1
    assert page.locator(".tabs").count() == 0
    other.open("#/compare/1/2")
    other.open("#/latent/5").get_by_text("It never fires on these").wait_for()
    assert [*look.complaints, *other.complaints] == []
    other.page.context.close()


def test_tokens_without_text_are_numbers(browser: Any, signed: LatentFolder, tmp_path: Path) -> None:
    folder = copied(signed, tmp_path / "numbers")
    spelled(folder, None)
    look = looked_at(browser, folder.as_uri())
    page = look.open("#/latent/0")
    assert page.locator(".pole.plus .tok").first.inner_text().startswith("#")
    assert look.complaints == []
    look.page.context.close()


def test_a_dial_is_shown_where_it_was_tested(look: Look) -> None:
    page = look.open("#/latent/2")
    page.locator("#dial").get_by_text("The dial holds").wait_for()
    assert page.locator("#dial svg .ray").count() == 40
    look.open("#/latent/3").locator("#dial").get_by_text("The dial does not hold").wait_for()
    look.open("#/latent/4").locator("#dial").get_by_text("sagsae dial RUN").wait_for()
    page = look.open("#/?dial=1")
    assert sorted(page.locator(".row .c-dial").all_inner_texts()) == ["0.02", "0.30 ✓"]
    assert look.complaints == []


def test_opposite_latents_face_each_other(look: Look, signed: LatentFolder) -> None:
    poles = signed.table("latents")
    plus = poles[(poles.sign == 1) & (poles.firings > 0)]
    row = plus.iloc[0]
    other = int(row.far[0]["latent"])
    page = look.open(f"#/compare/{row.latent}/{other}")
    page.get_by_text("Cosine of their directions: −").wait_for()
    heads = page.locator(".compare .pole header h2").all_inner_texts()
    assert heads == [f"− pole of {row.latent}", f"+ pole of {other}", f"+ pole of {row.latent}", f"− pole of {other}"]


def test_many_latents_need_few_nodes(browser: Any, tmp_path: Path, record_property: Any) -> None:
    """65,536 latents: the index has at most 4.5 MB, the DOM at most 1,500 nodes. Times are printed, not judged."""
    from support.exact.latents import wide_index

    folder = wide_index(tmp_path / "wide", 65_536)
    assert (folder / "data" / "index.js").stat().st_size <= 4.5e6
    look = looked_at(browser, folder.as_uri())
    started = time.perf_counter()
    page = look.open("#/")
    times = {"load": time.perf_counter() - started}
    assert page.evaluate("document.querySelectorAll('*').length") <= 1500
    for name, query in {"sort": "", "filter": "&both=1", "word": "&word=the"}.items():
        times[name] = page.evaluate(TIMED, f"#/?sort=firings{query}") / 1000
    page.locator(".grid").evaluate("e => { e.scrollTop = e.scrollHeight }")
    count = page.locator(".grid").get_attribute("aria-rowcount")
    page.locator(f".row[aria-rowindex='{count}']").wait_for()
    assert page.evaluate("document.querySelectorAll('*').length") <= 1500
    record_property("seconds", json.dumps(times))
    print("seconds", {name: round(value, 2) for name, value in times.items()})  # noqa: T201
    assert look.complaints == []
    look.page.context.close()


TIMED = """async route => {
  const started = performance.now(), before = document.querySelector(".grid");
  location.hash = route;
  while (document.querySelector(".grid") === before) await new Promise(resolve => setTimeout(resolve));
  return performance.now() - started;
}"""
