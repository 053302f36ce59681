"""The processes of one training, and what they tell one another. The one door to accelerate."""

import atexit
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed.nn  # its functions keep the group that there is when they are defined: none yet
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
ELSEWHERE: Final = "another process of this run has ended, and says why"
PATIENCE: Final = timedelta(days=2)
"""For the others in an exchange: while one measures or saves, or waits for a harvest. One that died is seen at once by
whoever launched them."""


class Ranks:
    """Alone, every exchange gives back what it was given."""

    def __init__(self, device: torch.device) -> None:
        """Raises UserError for a kind of device that nothing here was made for, and for more processes than GPUs."""
        place = settle()
        check_device(device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # accelerate takes the current one
        before: Any = PartialState() if PartialState._shared_state else None  # what it keeps for the whole process
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
            # A thread of gloo's that is still there when Python ends aborts the process now and then.
            atexit.register(self.leave)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """All that ranks do together is done. With NCCL, leaving is an exchange too: it would wait for ever for a rank
        that failed, so only those leave that came to this end together."""
        self.wait()
        if self.count > 1 and self.device.type == "cuda":
            atexit.unregister(self.leave)
            atexit.register(self.leave)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What one rank alone may find wrong in the block ends all of them: there with what is wrong, elsewhere as
        LostError."""
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
    def attended(self) -> Iterator[None]:
        """Raises LostError when an exchange in the block fails because another rank has ended."""
        try:
            yield
        except RuntimeError as error:
            if self.count > 1 and (isinstance(error, DistError) or "gloo" in str(error)):
                raise LostError(ELSEWHERE) from error
            raise

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The sum of each over the ranks, as one exchange: every rank then makes the same update. On CPUs, in numbers
        that are powers of two, in the order of `PairwiseSum`."""
        if self.count == 1:
            return list(parts)
        flat = torch.cat([part.reshape(-1) for part in parts])
        pairs = self.device.type == "cpu" and self.count & (self.count - 1) == 0
        flat = self.sum_by_pairs(flat) if pairs else self.accelerator.reduce(flat, "sum")
        pieces = flat.split([part.numel() for part in parts])
        return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]

    def sum_by_pairs(self, flat: Tensor) -> Tensor:
        """Neighbours exchange sums, then neighbouring pairs, and so on: a + b has the same bits on both sides."""
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
        """Every rank's, one after another along the first axis, on every rank."""
        gathered: Tensor = self.accelerator.gather(tensor) if self.count > 1 else tensor
        return gathered

    def any(self, asked: bool) -> bool:
        """Whether any rank asks. Waits for the devices."""
        if self.count == 1:
            return asked
        return bool(self.accelerator.reduce(torch.tensor([float(asked)], device=self.device), "sum").item())

    def alone(self) -> "Ranks":
        """This process without the others: what it exchanges it exchanges with nobody."""
        solo = copy.copy(self)
        solo.count, solo.index = 1, 0
        return solo

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def trackers(self, folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> Accelerator:
        """Begins the experiment trackers named, each with its settings; for rank 0. `log(values, step)` of what is
        returned tells all of them. To end them, finish each of its `trackers`: its `end_training` would also end the
        process group, which is still needed."""
        made = [TRACKERS[name](**values) for name, values in settings.items()]
        accelerator = Accelerator(cpu=self.device.type == "cpu", log_with=made, project_dir=folder)
        accelerator.init_trackers("sagsae")
        return accelerator


def check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: training runs on cpu and cuda devices. Use --device cpu")
    beside = local_processes()
    if device.type == "cuda" and beside > max(1, torch.cuda.device_count()):
        raise UserError(
            f"--processes: {beside} on this machine, which has {torch.cuda.device_count()} GPUs; each takes one of its "
            "own. Start fewer, or use --device cpu"
        )


def this_device(device: torch.device) -> torch.device:
    """With its number: other threads have other current devices."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


class PairwiseSum:
    """A sum of lists of tensors: neighbours first, then neighbouring pairs, and so on, whoever holds which. It keeps
    no more than one list for every doubling."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, list[Tensor]]] = []

    def add(self, tensors: list[Tensor]) -> None:
        """The next one; it is used up."""
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
