"""Opens the files at a location: a local folder or a URL."""

import os
from pathlib import Path

from shared.files.base import Files, is_remote
from shared.files.local import LocalFiles


def open_files(location: str | Path) -> Files:
    """The files in a folder (with `~` expanded) or at a URL (s3://, gs://, http://, https://)."""
    if not is_remote(location):
        return LocalFiles(Path(os.path.expanduser(location)))
    from shared.files.remote import RemoteFiles

    return RemoteFiles.connect(str(location))
