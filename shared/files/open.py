"""Opens the files at a location: a local folder or a URL."""

import os
from pathlib import Path

from shared.files.base import Files, is_remote, is_served
from shared.files.local import LocalFiles
from shared.hub.place import is_hub


def open_files(location: str | Path) -> Files:
    """The files in a folder (with `~` expanded), at a URL (s3://, gs://, http://, https://), of a store that an
    activation cache serves (`http://HOST:PORT/v1/stores/ID`), or of a dataset on the Hugging Face hub
    (`hf://OWNER/NAME`)."""
    if not is_remote(location):
        return LocalFiles(Path(os.path.expanduser(location)))
    url = str(location)
    if is_served(url):
        from shared.files.service_files import ServiceFiles

        return ServiceFiles.connect(url)
    if is_hub(url):
        from shared.files.hub_files import HubFiles

        return HubFiles.connect(url)
    from shared.files.remote import RemoteFiles

    return RemoteFiles.connect(url)
