"""Boxes that are namespaces: each has a network (and a host name) of its own, joined to the first by a cable."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

COUNT = iter(range(1, 1000))


def why_not() -> str:
    """Why no network namespace can be made here; empty where one can."""
    if shutil.which("ip") is None:
        return "needs ip (apt-get install iproute2)"
    name = f"sagsae-try-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"needs the right to make network namespaces: {done.stderr.strip()}"
    ip("netns", "del", name)
    return ""


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stderr)


class Box:
    """A network namespace. The first box has the address 10.77.N.1 for box N, which has 10.77.N.2."""

    def __init__(self, name: str, server: str = "127.0.0.1") -> None:
        self.name, self.server = name, server
        """`server` is the first box's address as this one sees it."""

    def command(self, *words: str) -> list[str]:
        """A command that runs inside, with a host name of its own; it becomes the command, so its id is the same."""
        renamed = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", renamed, self.name, *words]


@contextmanager
def boxes(count: int) -> Iterator[list[Box]]:
    """A server's box and `count` others, which reach the server but not one another."""
    start = next(COUNT)
    names = [f"sagsae-{os.getpid()}-{start}-{n}" for n in range(count + 1)]
    made: list[str] = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        for n, name in enumerate(names[1:], 1):
            ip(
                "link",
                "add",
                f"sg{start}a{n}",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                name,
            )
            for box, device, address in ((names[0], f"sg{start}a{n}", 1), (name, "eth0", 2)):
                ip("-n", box, "addr", "add", f"10.77.{n}.{address}/24", "dev", device)
                ip("-n", box, "link", "set", device, "up")
        yield [Box(names[0]), *(Box(name, f"10.77.{n}.1") for n, name in enumerate(names[1:], 1))]
    finally:
        for name in made:
            ip("netns", "del", name)
