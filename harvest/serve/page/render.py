"""Renders the templates, and holds the files that pages load: style, script and icon. Everything shown is escaped."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import shared

HERE: Final = Path(__file__).parent
LOOK: Final = Path(shared.__file__).parent / "look.css"
TYPES: Final = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
"""The files that a page loads, with their media types."""


@cache
def environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@cache
def static_file(name: str) -> bytes | None:
    """The bytes of a file that pages load; None for any other name."""
    if name not in TYPES:
        return None
    own = (HERE / name).read_bytes()
    return LOOK.read_bytes() + own if name == "page.css" else own


@cache
def version() -> str:
    """Changes whenever one of these files does, so that a browser keeps them until then."""
    digest = hashlib.blake2b(digest_size=6)
    for name in TYPES:
        digest.update(static_file(name) or b"")
    return digest.hexdigest()


def render(template: str, **values: Any) -> str:
    """The HTML of a template, or of one part of a page."""
    return environment().get_template(template).render(version=version(), **values)
