"""Reads a page as a strict reader would: every tag closed where it was opened, every reference there."""

import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "img", "hr"}
DRAWN = {"rect", "line", "circle", "path", "polyline"}
"""SVG elements that close themselves."""
FIELDS = ("input", "select", "textarea")
ADDRESSES = ("href", "src", "action", "formaction", "srcset", "poster", "data")


@dataclass
class Element:
    """A tag with what matters of it."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: tuple[str, ...] = ()
    """The tags around it."""


@dataclass
class Markup(HTMLParser):
    """The elements of a page, and its mistakes."""

    source: str
    elements: list[Element] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.source)
        self.close()
        self.mistakes += [f"<{each.tag}> is never closed" for each in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        repeated = [name for name, count in Counter(name for name, _ in attrs).items() if count > 1]
        self.mistakes += [f"<{tag}> has {name} twice" for name in repeated]
        around = tuple(each.tag for each in self.open)
        element = Element(tag, {name: value or "" for name, value in attrs}, inside=around)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()
        if tag not in DRAWN:
            self.mistakes.append(f"<{tag}/> closes itself")

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1].tag == tag:
            self.open.pop()
        else:
            self.mistakes.append(f"</{tag}> closes <{self.open[-1].tag if self.open else 'nothing'}>")

    def handle_data(self, data: str) -> None:
        for each in self.open:
            each.text += data

    def all(self, tag: str) -> list[Element]:
        return [each for each in self.elements if each.tag == tag]

    @property
    def addresses(self) -> list[str]:
        return [each.attributes[name] for each in self.elements for name in ADDRESSES if name in each.attributes]

    @property
    def ids(self) -> Counter[str]:
        return Counter(each.attributes["id"] for each in self.elements if "id" in each.attributes)

    def unlabelled(self) -> list[str]:
        """Fields and buttons that no words name."""
        named = {each.attributes.get("for") for each in self.all("label")}
        found = []
        for each in self.elements:
            about = each.attributes
            labelled = "label" in each.inside or about.get("id") in named or "aria-label" in about
            if each.tag in FIELDS and about.get("type") != "hidden" and not labelled:
                found.append(f"{each.tag} {about}")
            if each.tag in ("button", "a", "summary") and not (each.text.strip() or about.get("aria-label")):
                found.append(f"{each.tag} {about}")
            if each.tag in ("progress", "meter") and not about.get("aria-label"):
                found.append(f"{each.tag} {about}")
        return found

    def headings(self) -> list[int]:
        return [int(each.tag[1]) for each in self.elements if re.fullmatch("h[1-6]", each.tag)]

    def dangling(self) -> list[str]:
        """References to ids that are not there."""
        names = ("aria-labelledby", "aria-describedby", "for", "list")
        asked = {each.attributes[name] for each in self.elements for name in names if name in each.attributes}
        asked |= {address[1:] for address in self.addresses if address.startswith("#")}
        return sorted(asked - self.ids.keys())
