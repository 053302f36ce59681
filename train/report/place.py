"""Checks where a report may be written: to a new file or over a report; over another file only with --overwrite."""

import os
import stat
from pathlib import Path
from typing import Final

from shared.errors import UserError
from shared.gate import quoted
from shared.request import RATES
from train.runs.owner import owner_of

MARK: Final = b'<meta name="generator" content="sagsae report'
"""A tag in the first 1,024 bytes of every report."""
NAME_ANOTHER: Final = "Name another file"
DEMO: Final = {"stores", "stores/tiny", "run", "report.html", f"stores/{RATES}"}
"""All that `sagsae demo` puts into its folder."""


def check_place(out: Path, overwrite: bool) -> None:
    """Raises UserError when `out` must not be written: a folder, a link, a special file, a file that is not a report
    (unless `overwrite`), or a file without an .html ending inside a run, a store or an autoencoder's folder."""
    try:
        found = os.lstat(out)
    except (FileNotFoundError, NotADirectoryError):
        found = None
    except OSError as error:
        raise UserError(f"--out {out}: cannot be accessed ({error.strerror}). {NAME_ANOTHER}") from error
    except ValueError as error:  # a NUL
        raise UserError(f"--out {quoted(str(out))}: is no name of a file ({error}). {NAME_ANOTHER}") from error
    if found and stat.S_ISLNK(found.st_mode):
        raise UserError(f"--out {out}: is a link. Name the file itself, or remove the link")
    if found and stat.S_ISDIR(found.st_mode):
        raise UserError(f"--out {out}: is a folder; name a file in it, such as {out / 'report.html'}")
    if found and not stat.S_ISREG(found.st_mode):
        raise UserError(f"--out {out}: is not an ordinary file. {NAME_ANOTHER}")
    ours = not found or is_report(out)
    owner = owner_of(out)
    if owner and not (ours and out.suffix.lower() in (".html", ".htm")):
        raise UserError(f"--out {out}: is in {owner}; only a page (.html) may be written there. {NAME_ANOTHER}")
    if not ours and not overwrite:
        raise UserError(f"--out {out}: exists and is not a report. {NAME_ANOTHER}, or replace it with --overwrite")


def check_demo(out: Path) -> None:
    """Raises UserError where `sagsae demo` is not to write: in anything but a new, an empty or a demo's folder."""
    try:
        here = [path.relative_to(out).as_posix() for folder in (out, out / "stores") for path in names_in(folder)]
    except NotADirectoryError as error:
        raise UserError(f"--out {error.filename}: is no folder. Name another --out") from error
    others = sorted(set(here) - DEMO)
    if others:
        raise UserError(f"--out {out}: exists and is not a demo's: {quoted(others[0])} is in it. Choose another --out")
    owner = owner_of(out / "report.html")
    if owner:
        raise UserError(f"--out {out}: is in {owner}. Choose another --out")
    check_place(out / "report.html", overwrite=False)


def names_in(folder: Path) -> list[Path]:
    """What is in a folder; nothing when there is no folder."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def is_report(path: Path) -> bool:
    """Whether the file is a report, or empty."""
    try:
        with path.open("rb") as file:
            begin = file.read(1024)
    except OSError as error:
        raise UserError(f"--out {path}: cannot be read ({error.strerror}). {NAME_ANOTHER}") from error
    return not begin or MARK in begin


def write_page(out: Path, html: str) -> None:
    """Writes the page atomically. Raises OSError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name[:200]}.{os.getpid()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(html)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
