"""Thousands of damages with matching checksums: no crash, no hang, no traceback, and nothing wrong without a word. What
a store says only once is left out; docs/explanation/threat-model.md names it."""

import json
import subprocess
import sys

import pytest
from support import hostile
from support.command import ROOT


def run(script: str, *arguments: object) -> dict[str, object]:
    """In a process of its own, which a crash would end."""
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**hostile.ENVIRONMENT})
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout)
    return found


def fuzz_stores(codec: str, seed: int, cases: int) -> None:
    """Hostile stores that were downloaded made the commands write outside, read memory, crash, hang or say nothing."""
    found = run("support/hostile.py", codec, seed, cases)
    assert found["faults"] == []
    counts = found["counts"]
    assert isinstance(counts, dict)
    assert sum(counts.values()) == cases
    assert counts["found"] > 0.75 * cases


def fuzz_buffers(codec: str, seed: int, cases: int) -> None:
    """numcodecs hands blosc a buffer without its length (issue 228): header, blocks and streams are checked here."""
    counts = run("faults/guarded.py", codec, seed, cases)
    assert counts["unwritten"] == 0
    assert counts["refused"] + counts["accepted"] == cases  # type: ignore[operator]
    assert counts["refused"] > cases / 2  # type: ignore[operator]


@pytest.mark.parametrize("codec", hostile.KINDS)
def test_a_few_damages_of_a_store(codec: str) -> None:
    fuzz_stores(codec, 0, 40)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_few_hostile_buffers(codec: str) -> None:
    fuzz_buffers(codec, 0, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("codec", hostile.KINDS)
def test_two_thousand_damages_of_stores(codec: str) -> None:
    fuzz_stores(codec, 1, 500)


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("codec", hostile.KINDS)
def test_a_hundred_thousand_damages_of_stores(codec: str, seed: int) -> None:
    fuzz_stores(codec, 100 + seed, 2_500)


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_million_hostile_buffers(codec: str) -> None:
    fuzz_buffers(codec, 100, 1_000_000)
