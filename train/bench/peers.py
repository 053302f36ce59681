"""Runs training steps of SAELens and dictionary_learning for `sagsae bench train`, each in its own process.

Their requirements conflict with ours, so they are never imported here. runner.py runs under an interpreter that has the
tool, stays alive, and does one step per request, so that the steps of all tools can alternate. Rows are passed in a
safetensors file, everything else as JSON.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

from shared.errors import UserError

RUNNER: Final = Path(__file__).with_name("runner.py")
PACKAGES: Final = {"saelens": "sae-lens", "dictionary_learning": "dictionary-learning"}
QUIET: Final = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
"""Environment variables that keep the tools off the network."""

Ask = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class PeerTool:
    """A tool and the interpreter that has it."""

    name: str
    python: str
    version: str
    torch: str


@dataclass(frozen=True)
class PeerTools:
    """The tools that are measured and those that are not."""

    found: tuple[PeerTool, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    """For each tool that is not measured, the reason."""


def find_peers(pythons: Sequence[str], precision: str, device: str) -> PeerTools:
    """Finds the tools that these interpreters have. Raises UserError for an interpreter that cannot be used or has no
    tool, and when two interpreters have the same tool."""
    found: dict[str, PeerTool] = {}
    for python in pythons:
        for peer in installed(python):
            if peer.name in found:
                raise UserError(
                    f"--peer-python {python}: {PACKAGES[peer.name]} is in {found[peer.name].python} already, and only "
                    "one is measured. Give one interpreter per package"
                )
            found[peer.name] = peer
    left_out = {name: missing(package, pythons) for name, package in PACKAGES.items() if name not in found}
    if precision == "bfloat16" and device == "cpu" and "dictionary_learning" in found:
        del found["dictionary_learning"]
        left_out["dictionary_learning"] = "on a CPU it always computes in float32"
    return PeerTools(tuple(found[name] for name in PACKAGES if name in found), left_out)


def missing(package: str, pythons: Sequence[str]) -> str:
    if not pythons:
        return f"no --peer-python, the interpreter of an environment with {package}"
    return f"{package} is not installed for {' or '.join(pythons)}: {pythons[0]} -m pip install {package}"


def installed(python: str) -> list[PeerTool]:
    """Returns the tools that an interpreter has. Raises UserError when it cannot be used or has none."""
    try:
        asked = [python, str(RUNNER), "versions"]
        done = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise UserError(f"--peer-python {python}: cannot be started: {error.strerror}. Give a Python's path") from error
    try:
        versions: dict[str, str | None] = json.loads(done.stdout)
    except ValueError as error:
        raise UserError(
            f"--peer-python {python}: is not a Python that can be used: {last_line(done.stderr, done.returncode)}"
        ) from error
    packages = {name: package for name, package in PACKAGES.items() if versions[package]}
    if not packages:
        names = " ".join(PACKAGES.values())
        raise UserError(
            f"--peer-python {python}: has neither of {', '.join(PACKAGES.values())}. Install one of them: "
            f"{python} -m pip install {names}"
        )
    for also in ("torch", "safetensors"):
        if not versions[also]:
            raise UserError(f"--peer-python {python}: has no {also}. Install it: {python} -m pip install {also}")
    return [
        PeerTool(name, python, str(versions[package]), str(versions["torch"])) for name, package in packages.items()
    ]


@contextmanager
def running(peer: PeerTool, settings: dict[str, Any]) -> Iterator[Ask]:
    """Starts runner.py and yields the function that sends it a request. The function raises UserError with the last
    line of the process's stderr when the process has ended."""
    command = [peer.python, str(RUNNER), peer.name, json.dumps(settings)]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            env={**os.environ, **QUIET},
        ) as process,
    ):
        try:
            yield partial(ask, peer, process, errors)
        finally:
            process.kill()  # it has nothing to save


def ask(peer: PeerTool, process: subprocess.Popen[bytes], errors: IO[bytes], **question: int) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(question).encode() + b"\n")
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = b""
    if not answer:
        code = process.wait()
        errors.seek(0)
        said = last_line(errors.read().decode(errors="replace"), code)
        package = f"{PACKAGES[peer.name]} {peer.version}"
        raise UserError(f"--peer-python {peer.python}: the training step of {package} failed: {said}")
    found: dict[str, Any] = json.loads(answer)
    return found


def last_line(text: str, code: int) -> str:
    lines = text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"it ended with {code} and said nothing")
