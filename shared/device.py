"""Device, cores and number type of a computation, and what happens to freed memory."""

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import UserError
from shared.launch import number
from shared.memory import group_folders

if TYPE_CHECKING:
    import torch


THREADS, HEEDED = "OMP_NUM_THREADS", "SAGSAE_CORES"
"""SAGSAE_CORES records that `heed_quota` set OMP_NUM_THREADS."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Constants of glibc's malloc.h."""


def torch_dtype(name: str) -> "torch.dtype":
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def pick_device(name: str, spread: bool = False) -> str:
    """The device that a name means. `auto` is CUDA when there is one; `map` stays where a model may be spread. Raises
    UserError for a device this machine does not have."""
    import torch

    if name == "map" and spread:
        return name
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda", "mps", "xpu")
    except RuntimeError:
        known = False
    if not known:
        raise UserError(f"--device {name}: is not a device. Use auto, cpu, cuda, cuda:1, … mps or xpu")
    count = torch.cuda.device_count() if device.type == "cuda" else torch.get_device_module(device).device_count()
    if (device.index or 0) >= count:
        raise UserError(f"--device {name}: this machine has {count} {device.type} devices. Use --device cpu, or auto")
    return name


def device_name(device: str) -> str:
    """The kind of a device, as a store records it: the name of a GPU's model, else `cpu`, `mps` or `xpu`."""
    import torch

    found = pick_device("auto") if device == "map" else device
    return torch.cuda.get_device_name(found) if found.startswith("cuda") else found.split(":")[0]


def local_processes() -> int:
    """The number of processes of this run on this machine, as torchrun and accelerate set it."""
    return number(os.environ, "LOCAL_WORLD_SIZE", 1, at_least=1)


def local_cores(processes: int | None = None) -> int:
    """The cores of one of `processes` processes on this machine; by default of this run's processes."""
    return max(1, usable_cores() // (processes or local_processes()))


def usable_cores(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may run on, limited by the time that its control groups allow (containers, batch
    systems): a quota of 1.5 counts as 2."""
    return max(1, min([len(os.sched_getaffinity(0)), *(math.ceil(quota) for quota in quotas(proc, groups))]))


def quotas(proc: Path, groups: Path) -> Iterator[float]:
    """The quota of each control group that has one, in cores."""
    for folder, new in group_folders(proc, groups, "cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if new:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if float(quota) > 0:  # version 2 writes "max" for no limit, version 1 writes -1
                yield float(quota) / float(period)


def heed_quota() -> None:
    """Called before torch is imported: limits torch's threads to the cores that the quota allows. A value set by the
    user stays."""
    if THREADS not in os.environ and usable_cores() < len(os.sched_getaffinity(0)):
        os.environ[THREADS] = os.environ[HEEDED] = str(usable_cores())


def share_cores(processes: int) -> None:
    """Divides the cores among the processes that this one starts. A value set by the user stays."""
    if os.environ.get(THREADS) == os.environ.pop(HEEDED, None):
        os.environ[THREADS] = str(local_cores(processes))


def sent(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Copies a host tensor to a device. On a GPU it does not synchronise: from pageable memory, the copy would wait for
    all queued work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def native_dtype(device: "torch.device") -> str:
    """bfloat16 where the hardware multiplies it natively (recent GPUs; CPUs with AVX512-BF16 or AMX), else float32.
    torch keeps the CPU query private; where it is missing, the answer is float32."""
    import torch

    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    native = device.type == "cpu" and any(question is not None and question() for question in asked)
    return "bfloat16" if native else "float32"


def reuse_memory(device: "torch.device") -> None:
    """On a CPU, makes the process keep the memory that it frees, for later allocations. Otherwise a loop over batches
    maps its largest tensors again, page by page, in every batch: a tenth of a harvest's seconds
    (docs/records/benchmarks.md). Does nothing where the C library is not glibc."""
    if device.type != "cpu":
        return
    with suppress(OSError, AttributeError):  # no such library, or it has no mallopt
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
