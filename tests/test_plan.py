"""What training takes of memory: the estimate against a process that trains, and how much there is to take."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from variants import VARIANTS, variant

from train.memory import Circumstances, need_of

MEASURE = """
import gc, json, sys
sys.path.insert(0, "tests")
from types import SimpleNamespace
import numpy as np, torch
from variants import variant
from shared.config import TrainConfig
from shared.store import Statistics
from train.member import Member
from train.ranks import Ranks

torch.set_grad_enabled(False)
torch.set_num_threads(1)

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

def resident():
    gc.collect()
    return status("VmRSS")

def measure(name, d_in, d_sae, rows, dtype, step, count):
    sae = variant(name, d_sae)
    run = TrainConfig(store="s", saes=(sae,), batch=rows, streams=1, step=step)
    ranks = Ranks.__new__(Ranks)  # one of several, whose mean is its own part
    ranks.count, ranks.index, ranks.device = count, 0, torch.device("cpu")
    ranks.accelerator = SimpleNamespace(reduce=lambda tensor, how: tensor.clone())
    x = torch.randn(rows, d_in) / d_in**0.5
    before = resident()
    statistics = Statistics(2, np.zeros(d_in), np.full(d_in, 1 / d_in))
    member = Member(sae, run, 100, getattr(torch, dtype), statistics, ranks)
    member.step_(x, 0)
    held = resident() - before
    if "topk" in name:
        member.silent.fill_(10**9)  # the auxiliary term is taken
    open("/proc/self/clear_refs", "w").write("5")
    before = resident()
    member.step_(x, 1)
    return held, status("VmHWM") - before

warm = [measure("gated", 16, 64, 64, dtype, "dense", 1) for dtype in ("float32", "bfloat16")]
print(json.dumps([measure(*case) for case in json.loads(sys.argv[1])]))
"""
WIDE, DEEP = (16, 8192, 512), (256, 4096, 32)
"""(d_in, d_sae, rows): where activations are most of it, and where matrices of weights are."""


def measured(cases: list[tuple[Any, ...]]) -> list[list[int]]:
    """(bytes held between steps, bytes that a step takes on top) in a process whose freed memory goes back at once."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(cases)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[list[int]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much a process has had")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [WIDE, DEEP], ids=["wide", "deep"])
def test_the_estimate_is_what_a_step_takes(dtype: str, shape: tuple[int, int, int]) -> None:
    cases = [(name, *shape, dtype, "dense", 1) for name in VARIANTS]
    cases += [(name, *shape, dtype, "sparse", 1) for name in ("sa-gsae", "untied", "gated")]
    cases += [(name, *shape, dtype, "dense", 2) for name in ("sa-gsae", "relu")]
    for case, (held, peak) in zip(cases, measured(cases), strict=True):
        name, d_in, d_sae, rows, _, step, count = case
        about = Circumstances(d_in, rows, dtype == "bfloat16", step == "sparse", count > 1)
        need = need_of(variant(name, d_sae), about)
        assert 0.95 < need.step / peak < 1.3, case
        if shape is DEEP:
            assert 0.9 < (need.weights + need.moments) / held < 1.1, case
