"""Chromium that looks at pages: what they ask for, complain about, and whether people can read and touch them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PHONE = (390, 844)


@dataclass
class Watched:
    """A page, and what it did that it should not have done."""

    page: Any
    url: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))

    @property
    def elsewhere(self) -> list[str]:
        """Addresses of other hosts that it asked for."""
        return [url for url in self.requests if not url.startswith(self.url)]


class Look(Watched):
    """The page of the latents."""

    @property
    def elsewhere(self) -> list[str]:
        return [url for url in super().elsewhere if not url.startswith(("about:", "data:"))]

    def open(self, route: str) -> Any:
        """Opens an address as a new visitor."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.url}/index.html{route}")
        self.page.locator("#main h1").wait_for()
        return self.page

    def go(self, route: str, heading: str) -> Any:
        """Follows a link on the page."""
        self.page.evaluate("hash => { location.hash = hash }", route)
        self.page.get_by_role("heading", name=heading, exact=True).wait_for()
        return self.page


@contextmanager
def launched() -> Iterator[Any]:
    """A browser of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def looked_at(browser: Any, url: str, size: tuple[int, int] = (1280, 900), scheme: str = "light") -> Look:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    return Look(context.new_page(), url)


CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number).concat(1).slice(0, 4);
  const over = (a, b) => a.slice(0, 3).map((v, n) => v * a[3] + b[n] * (1 - a[3])).concat(1);
  const behind = e => { const c = e ? rgb(getComputedStyle(e).backgroundColor) : [255, 255, 255, 1];
    return c[3] === 1 ? c : over(c, behind(e.parentElement)); };
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const poor = [];
  const check = (e, colour, what) => {
    const ground = behind(e), [a, b] = [light(over(rgb(colour), ground)), light(ground)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${what} ${e.outerHTML.slice(0, 120)}`);
  };
  for (const e of document.querySelectorAll("body *")) {
    if (!e.checkVisibility() || e.closest("svg, option, .off, .hidden")) continue;
    if (e.dataset.sign) check(e, getComputedStyle(e, "::before").color, "sign");
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (own) check(e, getComputedStyle(e).color, "text");
  }
  for (const e of document.querySelectorAll("svg text")) check(e.closest("svg"), getComputedStyle(e).fill, "drawing");
  return poor;
}"""
SMALL = """() => [...document.querySelectorAll("main :is(a:not(.tok), button, [type=number], select), header input")]
  .filter(e => e.checkVisibility()).map(e => [e, e.getBoundingClientRect()])
  .filter(([e, box]) => box.height < 40 && !e.closest("p, .window")).map(([e]) => e.outerHTML.slice(0, 120))"""
