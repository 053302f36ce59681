"""Files of a folder by inode: bytes that several names share count once."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Inode(NamedTuple):
    """A file on a disk, whatever its names."""

    device: int
    number: int


class FileSize(NamedTuple):
    inode: Inode
    bytes: int
    links: int


def walk(folder: Path) -> Iterator[FileSize]:
    """Every file of a folder. Links are not followed; what disappears meanwhile is left out."""
    waiting = [str(folder)]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                    continue
                with suppress(OSError):
                    about = entry.stat(follow_symlinks=False)
                    yield FileSize(Inode(about.st_dev, about.st_ino), about.st_size, about.st_nlink)


def set_free(folder: Path, links: Counter[Inode]) -> int:
    """Bytes that become free when a store goes; takes it out of `links`."""
    size = 0
    for file in walk(folder):
        links[file.inode] -= 1
        size += file.bytes if links[file.inode] <= 0 else 0
    return size
