"""How places on the Hugging Face hub are written: `OWNER/NAME`, and `hf://OWNER/NAME[@REV][/PATH]` for a dataset."""

import re
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import quote, unquote

from shared.errors import UserError
from shared.gate import BadData, quoted, safe_path

SCHEME: Final = "hf://"
DATASETS: Final = "datasets/"
PART: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
REVISION: Final = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class HubRepo:
    """One repository."""

    name: str
    """OWNER/NAME."""
    kind: Kind

    @property
    def api(self) -> str:
        """Where questions about it are sent, below the endpoint."""
        return f"/api/{self.kind}s/{self.name}"

    @property
    def files(self) -> str:
        """Where its files are, below the endpoint."""
        return f"{DATASETS if self.kind == 'dataset' else ''}{self.name}/resolve"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class HubPlace:
    """A folder of a dataset at one revision."""

    repo: HubRepo
    revision: str
    """A branch, a tag or a commit."""
    path: str
    """The folder inside; empty for the whole repository."""

    @property
    def url(self) -> str:
        return f"{SCHEME}{self.repo}@{quote(self.revision, safe='')}" + (f"/{self.path}" if self.path else "")


def is_hub(location: object) -> bool:
    """Whether a location is on the hub: `hf://…`."""
    return str(location).startswith(SCHEME)


def repo_named(name: str, kind: Kind, said: str = "") -> HubRepo:
    """Returns the repository OWNER/NAME. Raises UserError, which begins with `said`, for another form."""
    parts = name.split("/")
    if len(parts) != 2 or not all(map(is_part, parts)) or parts[1].endswith(".git"):
        raise UserError(
            f"{said or quoted(name)}: is no repository of the Hugging Face hub. Expected OWNER/NAME, of letters, "
            "digits, dots, - and _"
        )
    return HubRepo(name, kind)


def is_part(text: str) -> bool:
    return PART.fullmatch(text) is not None and "--" not in text and ".." not in text


def parse_place(url: str) -> HubPlace:
    """Returns the place that `hf://OWNER/NAME[@REV][/PATH]` names, `hf://datasets/OWNER/NAME` too; REV is `main` where
    it is left out, and a slash in it is written %2F. Raises UserError for another form."""
    text = url.removeprefix(SCHEME).rstrip("/").removeprefix(DATASETS)
    owner, _, rest = text.partition("/")
    named, _, path = rest.partition("/")
    name, at, revision = named.partition("@")
    repo = repo_named(f"{owner}/{name}", "dataset", f"{quoted(url)} (hf://OWNER/NAME[@REV][/PATH])")
    try:
        return HubPlace(repo, checked_revision(unquote(revision) if at else "main"), safe_path(path) if path else "")
    except BadData as error:
        raise UserError(f"{quoted(url)}: {error}. Expected hf://OWNER/NAME[@REV][/PATH]") from error


def checked_revision(revision: str) -> str:
    """Returns a branch, a tag or a commit unchanged. Raises UserError for a text that can be none."""
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise UserError(f"revision {quoted(revision)}: is no branch, tag or commit")
    return revision


def parent_on_hub(url: str) -> str | None:
    """The folder that contains a place on the hub; None for a whole repository."""
    place = parse_place(url)
    return url.rstrip("/").rpartition("/")[0] if place.path else None
