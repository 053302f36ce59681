"""A short soak, and how the state grows. The long soak is a command: python tests/serve/soak.py --minutes 30."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import ROOT, Sagsae


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.timeout(1800)
def test_two_minutes_of_kills(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/serve/soak.py"), "--minutes", "2", "--every", "15"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bench_catalog(sagsae: Sagsae, tmp_path: Path) -> None:
    done = sagsae("bench", "catalog", "--quick", "--folder", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["stores"] for row in found["table"]] == [10, 100]
    assert all(row["stores_ms"] > 0 and row["database_MB"] > 0 for row in found["table"])
    assert not list(tmp_path.iterdir())
