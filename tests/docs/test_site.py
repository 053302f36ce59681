"""The documentation site: every page is in its menu, it builds without a warning, and it asks no other machine."""

import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from support.command import ROOT

TOOLS = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")
BUILDS = all(importlib.util.find_spec(tool) for tool in TOOLS)
needs_tools = pytest.mark.skipif(not BUILDS, reason="needs the packages of the docs extra")


def menu(entries: Any) -> set[str]:
    """The pages that a menu names, at any depth."""
    if isinstance(entries, str):
        return {entries}
    inside = entries.values() if isinstance(entries, dict) else entries
    return set().union(*(menu(entry) for entry in inside))


def test_every_page_is_in_the_menu() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert menu(settings["nav"]) == pages
    assert settings["theme"]["font"] is False


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning (a link that leads nowhere, a name without a docstring) is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
)


@needs_tools
def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert [path.name for path in pages if LOADED.search(path.read_text(encoding="utf-8"))] == []
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", styles)


def test_loading_from_elsewhere_is_noticed() -> None:
    assert LOADED.search('<link rel="stylesheet" href="https://fonts.example/css">')
    assert LOADED.search("<script async src=//cdn.example/x.js>")
    assert not LOADED.search('<a href="https://arxiv.org/abs/1">')


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@needs_tools
@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_pages_fit_a_telephone_and_a_desk(site: Path, address: str) -> None:
    """No request leaves the machine, no page scrolls sideways, no script fails; in light and dark."""
    from playwright.sync_api import sync_playwright

    asked: set[str] = set()
    failed: list[str] = []
    with (
        sync_playwright() as player,
        player.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"]) as browser,
    ):
        looks: tuple[tuple[Literal["light", "dark"], int], ...] = (("light", 1280), ("dark", 390))
        for scheme, width in looks:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("request", lambda request: asked.add(request.url))
            page.on("pageerror", lambda error: failed.append(str(error)))
            for path in sorted(site.rglob("*.html")):
                page.goto(address + path.relative_to(site).as_posix())
                assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{path.name} at {width}"
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert failed == []
