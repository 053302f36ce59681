"""What training takes of memory: the estimate against a process that trains, and how much there is to take."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command import ROOT
from support.variants import VARIANTS, variant

from shared.config import TrainConfig
from shared.errors import UserError
from shared.memory import free_memory, host_memory, in_words, parse_bytes
from shared.saes import ARCHITECTURES, SAEConfig, sae_config
from shared.schema import build
from shared.store.opened import Statistics
from train.fit.member import Member
from train.plan.memory import MemoryNeed, StepConditions, need_of, together
from train.ranks import Ranks
from train.runs.checkpoint import begin_checkpoint, end_checkpoint, load_tensors, newest, save_part

MEASURE = """
import gc, json, sys
sys.path.insert(0, "tests")
from types import SimpleNamespace
import numpy as np, torch
from support.variants import variant
from shared.config import TrainConfig
from shared.store.opened import Statistics
from train.fit.member import Member
from train.ranks import Ranks

torch.set_grad_enabled(False)
torch.set_num_threads(1)

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

def resident():
    gc.collect()
    return status("RssAnon")

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
    before = status("VmRSS")
    member.step_(x, 1)
    return held, status("VmHWM") - before

found = []
for name, d_in, d_sae, rows, *rest in json.loads(sys.argv[1]):
    measure(name, 16, 64, 64, *rest)  # what this form needs of the libraries is in memory then
    found.append(measure(name, d_in, d_sae, rows, *rest))
print(json.dumps(found))
"""
SHAPES = {
    "float32": {"wide": (16, 4096, 512), "deep": (512, 4096, 32)},
    "bfloat16": {"wide": (16, 4096, 256), "deep": (128, 4096, 16)},
}
"""(d_in, d_sae, rows): where activations are most of it, and where matrices of weights are. On a CPU without bfloat16
products of that type take long."""
DEEP = [pytest.mark.slow, pytest.mark.deep]
FAMILIES = ["sa-gsae", "untied", "gated", "gated, free decoder", "relu", "jumprelu", "batch-topk", "abs-topk"]


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
@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        pytest.param("float32", "wide", marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=DEEP)
            for case in (("float32", "deep"), ("bfloat16", "wide"), ("bfloat16", "deep"))
        ),
    ],
)
def test_the_estimate_is_what_a_step_takes(dtype: str, form: str) -> None:
    shape = SHAPES[dtype][form]
    cases: list[tuple[Any, ...]] = [
        (name, *shape, dtype, "dense", 1) for name in (VARIANTS if dtype == "float32" else FAMILIES)
    ]
    if dtype == "float32":
        cases += [(name, *shape, dtype, "sparse", 1) for name in ("sa-gsae", "untied", "gated")]
        cases += [(name, *shape, dtype, "dense", 3) for name in ("sa-gsae", "relu")]
    for case, (held, peak) in zip(cases, measured(cases), strict=True):
        name, d_in, d_sae, rows, _, step, count = case
        about = StepConditions(d_in, rows, dtype == "bfloat16", step == "sparse", count > 1)
        need = need_of(variant(name, d_sae), about)
        assert 0.9 < need.step / peak < 1.3, case
        if form == "deep" and dtype == "float32":
            assert 0.85 < (need.weights + need.moments) / held < 1.15, case


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("matmul", [torch.float32, torch.bfloat16])
def test_the_estimate_on_cuda(matmul: torch.dtype) -> None:
    device, (d_in, d_sae, rows) = torch.device("cuda"), (512, 16_384, 4096)
    x = torch.randn(rows, d_in, device=device) / d_in**0.5
    for name in VARIANTS:
        sae = variant(name, d_sae)
        run = TrainConfig(store="s", saes=(sae,), batch=rows, device="cuda")
        statistics = Statistics(2, np.zeros(d_in), np.full(d_in, 1 / d_in))
        member = Member(sae, run, 100, matmul, statistics, Ranks(device))
        with torch.no_grad():
            member.step_(x, 0)
            if "topk" in name:
                member.silent.fill_(10**9)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            member.step_(x, 1)
        peak = torch.cuda.max_memory_allocated() - before
        need = need_of(sae, StepConditions(d_in, rows, matmul != torch.float32, on_cpu=False))
        assert 0.8 < need.step / peak < 1.6, name


def test_every_architecture_is_known() -> None:
    at = StepConditions(16, 64)
    for arch in ARCHITECTURES:
        need = need_of(sae_config(arch=arch, d_sae=48), at)
        assert min(need.weights, need.moments, need.gradients, need.activations) > 0
        assert need.moments == 2 * need.gradients
    with pytest.raises(TypeError, match="no architecture is known"):
        need_of(SAEConfig(arch="another", d_sae=48), at)


def test_an_unmeasured_architecture_takes_more_than_any_measured_one() -> None:
    """A new architecture trains before anybody has measured it."""
    for name, rounded in product(VARIANTS, (False, True)):
        config = variant(name)
        measured, cautious = config.step_memory(rounded), SAEConfig.step_memory(config, rounded)
        assert measured.codes < cautious.codes, name
        assert measured.matrices < cautious.matrices, name


def test_what_kernels_keep_from_step_to_step() -> None:
    """On a GPU, of gated architectures with unit decoder rows: copies in bfloat16, and where a step is recorded."""
    rows, matrix = 4 * 64 * 16, 4 * 48 * 16
    for name, parts, rounded in [("sa-gsae", 1, True), ("gated", 1, False), ("sa-gsae", 4, True), ("relu", 1, True)]:
        at = StepConditions(16, 64, rounded, on_cpu=False, parts=parts)
        without, found = need_of(variant(name, 48), at), need_of(variant(name, 48), replace(at, kernels=True))
        gated, recorded = name != "relu", name != "relu" and parts == 1
        assert found.weights - without.weights == gated * rounded * matrix + recorded * 4 * rows, name
        assert found.recorded == recorded * (2 if rounded else 4) * 48 * 64, name
        assert found.total - without.total == found.weights - without.weights + found.recorded
    assert str(found) == str(without), "nothing is said of what is not there"
    assert need_of(variant("gated, free decoder", 48), replace(at, kernels=True)).recorded == 0


def test_what_is_there_at_the_same_time() -> None:
    """Weights and moments of all, the largest step, one reader."""
    needs = [MemoryNeed(10, 20, 10, 100), MemoryNeed(30, 60, 30, 40, 0, 5), MemoryNeed(1, 2, 1, 3, 0, 4)]
    assert together(needs, 7) == MemoryNeed(41, 82, 10, 100, 7, 5)
    assert together(needs, 7).total == 245
    assert str(MemoryNeed(10, 2000)) == "weights 10 B, moments 2 KB, gradients 0 B, activations 0 B, reader 0 B"


def test_how_much_memory_may_be_taken() -> None:
    sizes = {"2GB": 2 * 10**9, "1.5 GiB": 1_610_612_736, "512mib": 512 << 20, "3e": None, "12": 12, "-1": None}
    for text, size in sizes.items():
        if size is None:
            with pytest.raises(ValueError, match="is no number of bytes"):
                parse_bytes(text)
        else:
            assert parse_bytes(text) == size
    assert [in_words(n) for n in (0, 999, 1000, 999_999, 12_345_678, 10**16)] == [
        "0 B", "999 B", "1 KB", "1,000 KB", "12.3 MB", "10,000 TB",
    ]  # fmt: skip
    values = {"store": "s", "saes": [{"arch": "relu", "d_sae": 4}]}
    assert build(TrainConfig, values).memory == "auto"
    assert build(TrainConfig, {**values, "memory": "2GB"}).memory == 2 * 10**9
    for wrong in ("much", "-1", 0, "0"):
        with pytest.raises(UserError, match="memory: "):
            build(TrainConfig, {**values, "memory": wrong})


def test_memory_of_the_host(tmp_path: Path) -> None:
    """What Linux calls available, less where a control group above this process leaves less."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    assert host_memory(proc, groups) is None, "no such file"
    (proc / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable: 1000 kB\n")
    assert host_memory(proc, groups) == 1000 * 1024
    inside = groups / "job" / "step"
    inside.mkdir(parents=True)
    stat = "anon 1\ninactive_file 1000\nactive_file 500"
    for folder, limit, used in ((inside, "max", 10), (inside.parent, "300000", 200_000)):
        for name, text in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
            (folder / name).write_text(f"{text}\n")
    (proc / "self" / "cgroup").write_text("0::/job/step\n")
    assert host_memory(proc, groups) == 300_000 - 200_000 + 1500, "files' pages are given up"
    old = groups / "memory" / "box"
    old.mkdir(parents=True)
    total = "inactive_file 7\ntotal_inactive_file 30\ntotal_active_file 20"
    named = (("memory.limit_in_bytes", 5000), ("memory.usage_in_bytes", 4000), ("memory.stat", total))
    for name, text in named:
        (old / name).write_text(f"{text}\n")
    (proc / "self" / "cgroup").write_text("4:memory:/box\n3:cpu:/other\n0::/\n")
    assert host_memory(proc, groups) == 1050
    (old / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert host_memory(proc, groups) == 1000 * 1024, "no limit"
    assert free_memory(torch.device("meta")) is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux says how much is available")
def test_memory_of_this_host() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert 0 < free < 1 << 50


def test_a_checkpoint_is_written_piece_by_piece(tmp_path: Path) -> None:
    """As safetensors reads it; no more than one tensor in memory twice."""
    tensors = {
        "a/flag": torch.tensor(True), "b": torch.arange(5, dtype=torch.uint8), "c": torch.randn(3, 4).T,
        "d": torch.tensor(-1), "none": torch.empty(0, 7), "scalar": torch.tensor(0.5),
    }  # fmt: skip
    begin_checkpoint(tmp_path)
    save_part(tmp_path, 0, tensors)
    end_checkpoint(tmp_path, 12, {"step": 12})
    found = newest(tmp_path)
    assert found is not None
    assert found[1] == {"step": 12}
    loaded = load_tensors(found[0], 1)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
