"""The memory that a process can still take, on the host and on a GPU."""

import ctypes
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

UNITS: Final = {
    "": 1,
    **{f"{p}B": 1000**n for n, p in enumerate(("", "K", "M", "G", "T"))},
    **{f"{p}iB": 1024**n for n, p in enumerate("KMGT", start=1)},
}
NO_LIMIT: Final = 1 << 60
"""Control groups of version 1 report a number above this where there is no limit."""


def parse_bytes(text: str) -> int:
    """`2GB` is 2,000,000,000, `1.5 GiB` is 1,610,612,736. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if not found or found[2].lower() not in units:
        raise ValueError(f"{text!r} is no number of bytes; expected such as 2GB, 512MiB or 2000000000")
    return int(float(found[1]) * units[found[2].lower()])


def in_words(size: int) -> str:
    """A size with three digits, in units of 1000."""
    power = min(4, (len(str(size)) - 1) // 3)
    return f"{float(f'{size / 1000**power:.3g}'):,g} {('', 'K', 'M', 'G', 'T')[power]}B"


def free_memory(device: "torch.device") -> int | None:
    """Bytes that this process can still take, including what torch and the C library keep of earlier work; None where
    that is not known."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return host_memory()


def host_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The memory that Linux calls available, limited by what the control groups of this process leave (containers,
    batch systems). None where Linux reports none."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return max(0, min([available, *group_memories_left(proc, groups)]))


def group_memories_left(proc: Path, groups: Path) -> Iterator[int]:
    """The memory that each control group of this process, and each group above it, leaves: its limit less what is used.
    Pages of files do not count as used, because they are released when memory is short."""
    for folder, new in group_folders(proc, groups, "memory"):
        names = ("memory.max", "memory.current") if new else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        left = group_memory_left(folder, *names)
        if left is not None:
            yield left


def group_folders(proc: Path, groups: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The folder of each control group of this process, and of each group above it, that can limit `controller`; and
    whether it is of version 2."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = groups / controllers if controllers else groups
        if controllers and not top.is_dir():
            top = groups / controller  # cpu,cpuacct has one link per name
        here = top / path.lstrip("/")
        for folder in (here, *here.parents):
            yield folder, not controllers
            if folder == top:
                break


def group_memory_left(folder: Path, limit_file: str, used_file: str) -> int | None:
    """The memory that one group leaves; None where there is no limit, or where the group cannot be seen from here."""
    try:
        limit, used = (folder / limit_file).read_text().strip(), int((folder / used_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdigit() or int(limit) >= NO_LIMIT:
        return None
    prefix = "total_" if "total_inactive_file" in stat else ""
    return int(limit) - used + sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
