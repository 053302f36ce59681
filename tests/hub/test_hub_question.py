"""The question of `sagsae push` before something becomes public, on a real terminal and without one."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command import ROOT
from support.exchange import save
from support.serving.hub import Hub
from support.serving.hub import hub as hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "tester/asked"
QUESTION = re.compile(r"make the PUBLIC model tester/asked on http://\S+, which anybody can read\? \[y/N\]: $")
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """A command whose standard input, output and error are a terminal of its own."""

    def __init__(self, *words: object) -> None:
        self.ours, theirs = pty.openpty()
        command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
        become = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", become, *command], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def read(self, patience: float) -> bool:
        """Reads what is there; False at the end of the command."""
        if not select.select([self.ours], [], [], patience)[0]:
            return True
        try:
            data = os.read(self.ours, 65536)
        except OSError:  # the other side is closed
            return False
        self.shown += data.decode().replace("\r\n", "\n")
        return bool(data)

    def wait_for(self, pattern: re.Pattern[str]) -> None:
        end = time.monotonic() + 120
        while not pattern.search(self.shown):
            assert self.read(1), self.shown
            assert time.monotonic() < end, self.shown

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def end(self) -> int:
        end = time.monotonic() + 120
        while self.read(1):
            assert time.monotonic() < end, self.shown
        os.close(self.ours)
        return self.process.wait()


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    save(tmp_path / "relu-48", "relu")
    return tmp_path / "relu-48"


@pytest.mark.parametrize("typed", ["y\n", "Yes\n", "what?\ny\n"])
def test_yes_makes_it_public(hub: Hub, sae: Path, typed: str) -> None:
    terminal = Terminal("push", sae, "--repo", REPO)
    for line in typed.splitlines(keepends=True):
        terminal.wait_for(QUESTION)
        assert hub.repos == {}, "before the answer"
        terminal.shown = ""
        terminal.type(line)
    assert terminal.end() == 0, terminal.shown
    assert "(public): " in terminal.shown
    assert not hub.model(REPO).private
    assert hub.n_commits == 1


@pytest.mark.parametrize("typed", ["n\n", "\n", CTRL_D], ids=["n", "empty", "Ctrl-D"])
def test_anything_else_sends_nothing(hub: Hub, sae: Path, typed: str) -> None:
    terminal = Terminal("push", sae, "--repo", REPO)
    terminal.wait_for(QUESTION)
    terminal.shown = ""
    terminal.type(typed)
    assert terminal.end() == 2, terminal.shown
    *_, last = terminal.shown.splitlines()
    assert last == f"error: {REPO}: nothing was sent. Repeat the command with --private for a private repository"
    assert "Traceback" not in terminal.shown
    assert hub.repos == {}
    assert hub.puts == 0


def test_ctrl_c_sends_nothing(hub: Hub, sae: Path) -> None:
    terminal = Terminal("push", sae, "--repo", REPO)
    terminal.wait_for(QUESTION)
    terminal.type(CTRL_C)
    assert terminal.end() == 130, terminal.shown
    assert "stopped" in terminal.shown
    assert "Traceback" not in terminal.shown
    assert hub.repos == {}


@pytest.mark.parametrize("which", ["nothing", "stdin", "stderr"])
def test_without_a_terminal_it_does_not_ask(hub: Hub, sae: Path, which: str) -> None:
    """Neither where there is no terminal at all, nor where the question or the answer would go elsewhere."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "cli.py"), "push", str(sae), "--repo", REPO]
    done = subprocess.run(
        command, stdin=theirs if which == "stdin" else subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=theirs if which == "stderr" else subprocess.PIPE, start_new_session=True, text=True, timeout=120,
    )  # fmt: skip
    said = os.read(ours, 65536).decode() if which == "stderr" else done.stderr
    for end in (ours, theirs):
        os.close(end)
    assert done.returncode == 2
    assert said.replace("\r\n", "\n").splitlines() == [
        f"error: {REPO}: would be made public, and there is no terminal to ask on. Repeat the command with --yes, or "
        "with --private for a repository that only you can read"
    ]
    assert hub.repos == {}
