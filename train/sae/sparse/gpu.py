"""The sparse step of `train/sae/sparse/cpu.py` in a few Triton kernels.

While the step is put together, only the device knows how many gates are open. Its lists are sized for the last step's
number and some more; if that was too little, the step is put together again before any weight changes. So a GPU always
has work in its queue. A step in the circumstances of the one before is recorded as CUDA graphs, and those that follow
replay them. Rows of W_dec, of the errors and of x - b_dec are read in `now.matmul`, as the dense form's products take
them in; codes, sums and u's other uses are float32. The gradients of W_enc and W_dec are left as sums to be taken
(`UnsummedGradient`): Adam's update takes them in the same pass (`train/sae/sparse/kernels.py`).
"""

from dataclasses import dataclass, replace
from typing import Any, Final
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor

from train.sae.base import StepInputs, StepMetrics
from train.sae.gated import GatedFamily, GatedWeights
from train.sae.sparse.entries import codes_of, latent_gradients, write_entries
from train.sae.sparse.kernels import decode
from train.sae.sparse.open import (
    GPU_BLOCK,
    SPARE,
    EntryRoom,
    Gradients,
    OpenEntries,
    UnsummedGradient,
    bounds,
    on_device,
)


@dataclass(frozen=True)
class DeviceCount:
    """A number on its way from the device."""

    value: Int[Tensor, "1"]
    arrived: "torch.cuda.Event | None"

    @classmethod
    def of(cls, number: Int[Tensor, "1"]) -> "DeviceCount":
        if number.device.type != "cuda":
            return cls(number, None)
        value, arrived = number.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return cls(value, arrived)

    def read(self) -> int:
        """Waits for this number alone, not for what was asked of the device since."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return int(self.value)


def open_entries(
    family: GatedFamily,
    theta: Float[Tensor, "poles d_sae"],
    low: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_sae d_in"],
    room: int,
) -> tuple[OpenEntries, Int[Tensor, "1"]]:
    """The entries whose gate is open, or the first `room` of them, at the beginning of lists that have `room` places;
    and how many there are, on the device. `low` (x - b_dec) and `W_enc` are in the type that products are taken in."""
    batch, d_sae, device = len(low), len(W_enc), low.device
    latent, u = torch.empty(room, dtype=torch.int32, device=device), torch.empty(room, device=device)
    token = torch.full((room,), batch, dtype=torch.int16 if batch < 1 << 15 else torch.int32, device=device)
    latent_bounds = torch.zeros(d_sae + 1, dtype=torch.int64, device=device)
    block = max(1, GPU_BLOCK // batch)
    for first in range(0, d_sae, block):
        stop = min(first + block, d_sae)
        pre_activations = W_enc[first:stop] @ low.T
        write_entries(
            pre_activations,
            theta[:, first:stop],
            family.signed,
            latent_bounds[first : stop + 1],
            (latent, token, u),
            first,
        )
    count = latent_bounds[-1:].clone()
    latent_bounds.clamp_(max=room)
    ordered, by_token = torch.sort(token, stable=True)  # places without an entry come last
    return OpenEntries(latent, token, u, by_token, bounds(ordered, batch), latent_bounds), count


def kernel_gradients(
    family: GatedFamily,
    w: GatedWeights,
    x: Float[Tensor, "batch d_in"],
    now: StepInputs,
    rounded: tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, "d_sae d_in"]],
    room: EntryRoom,
) -> tuple[Gradients, StepMetrics]:
    """What `family.gradients` gives, by name, with W_enc's and W_dec's not summed yet. `rounded` are these two in
    `now.matmul`; `room` is what was found to be needed, and is changed."""
    if not room.entries:
        room.entries = SPARE + len(x) * len(w.W_enc) // 256
    centred = x - w.b_dec
    low = centred.to(now.matmul)
    while True:
        at, number = open_entries(family, w.theta, low, rounded[0], room.entries)
        count = DeviceCount.of(number)
        found = of_entries(family, w, centred, low, now, rounded[1], at)
        if room.held(count.read()):
            return found


def of_entries(
    family: GatedFamily,
    w: GatedWeights,
    centred: Float[Tensor, "batch d_in"],
    low: Float[Tensor, "batch d_in"],
    now: StepInputs,
    W_dec: Float[Tensor, "d_sae d_in"],
    at: OpenEntries,
) -> tuple[Gradients, StepMetrics]:
    """The gradients from these open entries."""
    batch = len(centred)
    (f, g), ordered, latent = codes_of(
        at.u, at.latent, at.by_token, at.latent_bounds, (w.theta, w.r, w.b), family.signed
    )
    decoded = decode(
        latent, at.by_token, ordered if family.config.aux else ordered[:1], at.token_bounds, W_dec, centred
    )
    price = on_device(now.sparsity, centred.device)
    aux = decoded.dots[1] if family.config.aux else None
    of_latents = latent_gradients(
        at.u, f, g, decoded.dots[0], aux, at.latent_bounds, w.r, len(w.theta), price, batch, family.signed
    )
    to_u, _, active = of_latents.total
    loss, (_, penalty, l0) = decoded.squares.sum(1) / batch, of_latents.total.sum(1) / batch
    gradients: Gradients = {
        "W_enc": UnsummedGradient(at.token, at.latent, at.latent_bounds, of_latents.to_u, low),
        "W_dec": UnsummedGradient(at.token, at.latent, at.latent_bounds, of_latents.to_rows, decoded.low[0]),
        "b_dec": decoded.error.sum(0) * (2 / batch) - to_u @ w.W_enc,
        "theta": of_latents.theta,
        "r": of_latents.r,
        "b": of_latents.b,
    }
    auxiliary = loss[1] if family.config.aux else torch.zeros((), device=centred.device)
    return gradients, StepMetrics(loss[0], penalty, auxiliary, l0, active > 0)


class RecordedStep:
    """A step from a batch to its gradients as two CUDA graphs: sixty orders to the GPU in two. The number of open
    entries is on its way to the host from the end of the first, while the GPU works on the second. What these give is
    written over when they are replayed."""

    def __init__(
        self,
        family: GatedFamily,
        w: GatedWeights,
        x: Float[Tensor, "batch d_in"],
        now: StepInputs,
        rounded: tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, "d_sae d_in"]],
        room: int,
    ) -> None:
        self.x, self.sparsity = torch.empty_like(x), torch.zeros((), device=x.device)
        self.count = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self.counted = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.opening, self.rest = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with recording(self.opening, next((other.opening.pool() for other in ALL_RECORDED), None)):
            centred = self.x - w.b_dec
            low = centred.to(now.matmul)
            at, number = open_entries(family, w.theta, low, rounded[0], room)
            self.count.copy_(number, non_blocking=True)
        with recording(self.rest, self.opening.pool()):
            fixed = replace(now, sparsity=self.sparsity)
            self.found = of_entries(family, w, centred, low, fixed, rounded[1], at)
        ALL_RECORDED.add(self)

    def replay(self, x: Float[Tensor, "batch d_in"], now: StepInputs) -> tuple[Gradients, StepMetrics, int]:
        """Returns gradients, metrics and the number of open entries. The first two are invalid if that exceeds the
        capacity."""
        self.x.copy_(x)
        if isinstance(now.sparsity, Tensor):
            self.sparsity.copy_(now.sparsity)
        else:
            self.sparsity.fill_(now.sparsity)
        self.opening.replay()
        self.counted.record()
        self.rest.replay()
        gradients, step = self.found
        scalars = torch.stack([step.reconstruction, step.sparsity, step.auxiliary, step.l0])
        loss, penalty, auxiliary, l0 = scalars.unbind()
        measured = StepMetrics(loss, penalty, auxiliary, l0, step.fired.clone())
        self.counted.synchronize()
        return gradients, measured, int(self.count)


ALL_RECORDED: Final = WeakSet[RecordedStep]()
"""All have their memory from one pool: they are replayed one after another, so what one has on its way is free for the
next."""


def recording(graph: torch.cuda.CUDAGraph, pool: Any) -> Any:
    """Captures a graph; threads that load windows continue meanwhile."""
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


class SparseSteps:
    """The sparse steps of one autoencoder. Where nothing has changed since the last one, they are recorded."""

    def __init__(self, family: GatedFamily, w: GatedWeights) -> None:
        self.family, self.w, self.room = family, w, EntryRoom()
        self.recorded: RecordedStep | None = None
        self.last: object = None
        """The circumstances of the last step."""

    def gradients(
        self,
        x: Float[Tensor, "batch d_in"],
        now: StepInputs,
        rounded: tuple[Float[Tensor, "d_sae d_in"], Float[Tensor, "d_sae d_in"]],
    ) -> tuple[Gradients, StepMetrics]:
        """What `kernel_gradients` gives; to be used before the next step."""
        if self.circumstances(x, now, rounded) == self.last and x.device.type == "cuda":
            if self.recorded is None:
                self.recorded = RecordedStep(self.family, self.w, x, now, rounded, self.room.entries)
            gradients, step, entries = self.recorded.replay(x, now)
            if self.room.held(entries):
                return gradients, step
        self.recorded = None
        found = kernel_gradients(self.family, self.w, x, now, rounded, self.room)
        self.last = self.circumstances(x, now, rounded)
        return found

    def circumstances(self, x: Tensor, now: StepInputs, rounded: tuple[Tensor, Tensor]) -> object:
        """What a recording takes for granted."""
        return x.shape, x.dtype, now.matmul, self.room.entries, [tensor.data_ptr() for tensor in rounded]
