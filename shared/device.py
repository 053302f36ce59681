"""Where a model computes, on how many cores, in which type of number, and what becomes of the memory that it frees."""

import ctypes
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from shared.errors import UserError
from shared.launch import number

if TYPE_CHECKING:
    import torch


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""malloc.h of glibc."""


def torch_dtype(name: str) -> "torch.dtype":
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def pick_device(name: str, spread: bool = False) -> str:
    """`auto` is CUDA when there is one; `map`, where a model may be spread, stays. Raises UserError for a device this
    machine does not have."""
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


def local_processes() -> int:
    """How many processes of this run share the machine: torchrun and accelerate say so."""
    return number(os.environ, "LOCAL_WORLD_SIZE", 1, at_least=1)


def local_cores(processes: int | None = None) -> int:
    """The cores of one of so many processes on this machine. Default: of this run's."""
    return max(1, len(os.sched_getaffinity(0)) // (processes or local_processes()))


def sent(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """A tensor of the host on a device. A GPU is not waited for: ordinary memory would be copied when all that was
    asked of it before is done."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def native_dtype(device: "torch.device") -> str:
    """bfloat16 where the hardware multiplies it natively (recent GPUs; CPUs with AVX512-BF16 or AMX), else float32.
    torch keeps the question about CPUs private; where it cannot be asked, the answer is float32."""
    import torch

    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    native = device.type == "cpu" and any(question is not None and question() for question in asked)
    return "bfloat16" if native else "float32"


def reuse_memory(device: "torch.device") -> None:
    """On a CPU, from now on the process keeps the memory that it frees, for what it asks for next. A loop over batches
    otherwise has its largest tensors mapped afresh, page by page, in each of them: a tenth of a harvest's seconds
    (docs/benchmarks.md). Does nothing where the C library is not glibc."""
    if device.type != "cpu":
        return
    with suppress(OSError, AttributeError):  # no such library, or it has no mallopt
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
