"""The processes (ranks) of one training run and their exchanges. Only this module imports accelerate."""

import atexit
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed.nn  # import it before a process group exists: its functions bind the group at import
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import TensorBoardTracker, WandBTracker
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from torch.distributed import DistError, P2POp, batch_isend_irecv, irecv, isend

from shared.device import local_processes
from shared.errors import DamagedError, LostError, UserError
from shared.launch import meeting, settle

T = TypeVar("T")
TRACKERS: Final = {"tensorboard": TensorBoardTracker, "wandb": WandBTracker}
ELSEWHERE: Final = "another process of this run has ended; its own message says why"
PATIENCE: Final = timedelta(days=2)
"""How long an exchange waits for the other ranks, which may be measuring, saving, or waiting for a harvest. The
launcher notices at once when a rank dies."""


class Ranks:
    """The ranks of one run. In a run of one process, every exchange returns its input."""

    def __init__(self, device: torch.device) -> None:
        """Joins the process group. Raises UserError for a device other than cpu and cuda, and for more processes than
        GPUs."""
        place = settle()
        check_device(device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # accelerate uses the current device
        before: Any = PartialState() if PartialState._shared_state else None  # accelerate's state is global
        if before is not None and before.num_processes == 1 and before.device.type != device.type:
            AcceleratorState._reset_state(reset_partial_state=True)
        patient = [InitProcessGroupKwargs(timeout=PATIENCE)]
        with meeting(place):
            self.accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=patient)
        self.count, self.index = self.accelerator.num_processes, self.accelerator.process_index
        self.device = this_device(self.accelerator.device)
        self.leads: bool = self.accelerator.is_main_process
        self.leave = self.accelerator.state.destroy_process_group
        if self.count > 1 and self.device.type == "cpu":
            # A gloo thread that still runs when Python exits sometimes aborts the process.
            atexit.register(self.leave)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Waits for all ranks and leaves the process group at exit. With NCCL, leaving is an exchange that would wait
        forever for a failed rank, so it is only registered here, once all ranks have succeeded."""
        self.wait()
        if self.count > 1 and self.device.type == "cuda":
            atexit.unregister(self.leave)
            atexit.register(self.leave)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Ends all ranks when the block raises UserError or DamagedError on one. That rank raises its own error, the
        others raise LostError."""
        mine: BaseException | None = None
        try:
            yield
        except (UserError, DamagedError) as error:
            mine = error
        failed = any(self.gather(mine is not None))
        if mine is not None:
            raise mine
        if failed:
            raise LostError(ELSEWHERE)

    @contextmanager
    def raising_lost_error(self) -> Iterator[None]:
        """Raises LostError when an exchange in the block fails because another rank has ended."""
        try:
            yield
        except RuntimeError as error:
            if self.count > 1 and (isinstance(error, DistError) or "gloo" in str(error)):
                raise LostError(ELSEWHERE) from error
            raise

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sum of each tensor over the ranks, in one exchange, with the same bits on every rank. On CPUs,
        if the number of ranks is a power of two, the order of additions is that of `PairwiseSum`."""
        if self.count == 1:
            return list(parts)
        flat = torch.cat([part.reshape(-1) for part in parts])
        pairs = self.device.type == "cpu" and self.count & (self.count - 1) == 0
        flat = self.sum_by_pairs(flat) if pairs else self.accelerator.reduce(flat, "sum")
        pieces = flat.split([part.numel() for part in parts])
        return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]

    def sum_by_pairs(self, flat: Tensor) -> Tensor:
        """Adds neighbouring ranks, then neighbouring pairs of ranks, and so on. Both sides compute the same a + b."""
        distance = 1
        while distance < self.count:
            theirs, other = torch.empty_like(flat), self.index ^ distance
            exchange = [P2POp(isend, flat, other), P2POp(irecv, theirs, other)]
            for work in batch_isend_irecv(exchange):
                work.wait()
            flat += theirs
            distance *= 2
        return flat

    def all(self, tensor: Tensor) -> Tensor:
        """Returns every rank's tensor, concatenated along the first axis, on every rank."""
        gathered: Tensor = self.accelerator.gather(tensor) if self.count > 1 else tensor
        return gathered

    def any(self, asked: bool) -> bool:
        """Whether `asked` is true on any rank. Waits for the devices."""
        if self.count == 1:
            return asked
        return bool(self.accelerator.reduce(torch.tensor([float(asked)], device=self.device), "sum").item())

    def alone(self) -> "Ranks":
        """Returns a copy that acts as the only rank."""
        solo = copy.copy(self)
        solo.count, solo.index = 1, 0
        return solo

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks in order, on every rank."""
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def trackers(self, folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> Accelerator:
        """Starts the experiment trackers named in `settings`, each with its own settings; only for rank 0.
        `log(values, step)` of the returned object logs to all of them. To end them, call `finish` of each of its
        `trackers`: `end_training` would also end the process group, which is still needed."""
        trackers = [TRACKERS[name](**values) for name, values in settings.items()]
        accelerator = Accelerator(cpu=self.device.type == "cpu", log_with=trackers, project_dir=folder)
        accelerator.init_trackers("sagsae")
        return accelerator


def check_device(device: torch.device) -> None:
    """Raises UserError for another device than cpu or cuda, and for more processes than GPUs."""
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: training runs on cpu and cuda devices. Use --device cpu")
    beside = local_processes()
    if device.type == "cuda" and beside > max(1, torch.cuda.device_count()):
        raise UserError(
            f"--processes: {beside} on this machine, which has {torch.cuda.device_count()} GPUs; each needs its "
            "own. Start fewer, or use --device cpu"
        )


def this_device(device: torch.device) -> torch.device:
    """Returns the device with its index, because other threads may have another current device."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


class PairwiseSum:
    """Sums lists of tensors in a fixed order: neighbours first, then neighbouring pairs, and so on, however the lists
    are distributed over ranks. It holds at most log2(n) + 1 lists."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, list[Tensor]]] = []

    def add(self, tensors: list[Tensor]) -> None:
        """Adds the next list, whose tensors may be overwritten."""
        size = 1
        while self.waiting and self.waiting[-1][0] == size:
            tensors = added(self.waiting.pop()[1], tensors)
            size *= 2
        self.waiting.append((size, tensors))

    def total(self) -> list[Tensor]:
        while len(self.waiting) > 1:
            (size, later), (_, earlier) = self.waiting.pop(), self.waiting.pop()
            self.waiting.append((size, added(earlier, later)))
        return self.waiting[0][1]


def added(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    return [a.add_(b) for a, b in zip(one, other, strict=True)]
