"""A short soak; the long one is a command: python tests/serve/soak.py --minutes 30."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.command import ROOT


@pytest.mark.slow
@pytest.mark.deep
@pytest.mark.timeout(1800)
def test_two_minutes_of_kills(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/serve/soak.py"), "--minutes", "2", "--every", "15"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
