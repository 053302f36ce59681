"""The files of a dataset on the Hugging Face hub: `hf://OWNER/NAME[@REV][/PATH]`. Read-only.

A revision is resolved to a commit when the place is opened, and everything is read at that commit: what somebody pushes
meanwhile is not seen. Ranges are read by obstore from the hub's `resolve` addresses, like those of a web server, with
the same retries, bounds and cache (docs/records/benchmarks.md compares it with huggingface_hub's file system).
"""

from typing import Final

from shared.errors import UserError
from shared.files.base import Files, LogMark
from shared.files.cache import RangeCache
from shared.files.client import ObjectClient
from shared.files.connect import hub_server
from shared.files.remote import RemoteFiles
from shared.hub.client import check_online, endpoint, headers, repo_state
from shared.hub.place import COMMIT, HubPlace, parse_place

SENT: Final = ("authorization", "user-agent")
"""Headers of huggingface_hub's that readers of files send, too."""


class HubFiles(RemoteFiles):
    """The files of one dataset at one commit, or of a folder in it."""

    @classmethod
    def connect(cls, url: str) -> "HubFiles":
        """The files at `hf://OWNER/NAME[@REV][/PATH]`; a branch or a tag is resolved to its commit by one request.
        Raises UserError when the URL is no such place or the hub has no such dataset, BusyError when it cannot be
        reached."""
        place = parse_place(url)
        if not COMMIT.fullmatch(place.revision):
            place = HubPlace(place.repo, repo_state(place.repo, place.revision).commit, place.path)
        return cls.pinned(place)

    @classmethod
    def pinned(cls, place: HubPlace) -> "HubFiles":
        """The files at a commit; sends nothing."""
        check_online(place.repo)
        sent = {key: value for key, value in headers().items() if key.lower() in SENT}
        client = ObjectClient(*hub_server(endpoint(), sent))
        prefix = f"{place.repo.files}/{place.revision}/{place.path}".rstrip("/")
        name = place.url if place.repo.kind == "dataset" else f"{place.repo}@{place.revision[:12]}"
        return cls(client, prefix, name, RangeCache.of_user())

    def at(self, path: str) -> Files:
        return HubFiles(self.client, *self.place(path), self.cache)

    def marks(self, folder: str, prefix: str) -> dict[str, LogMark]:  # noqa: ARG002 (a commit never grows)
        raise UserError(
            f"{self.name}: is an unfinished store, which cannot be read on the hub. Finish it, then push it"
        )

    def folders(self) -> list[str]:
        raise UserError(f"{self.name}: its folders are not listed. Name the store itself")

    def check_writable(self) -> None:
        raise UserError(f"{self.name}: can only be read. Write to a folder, then use sagsae push")
