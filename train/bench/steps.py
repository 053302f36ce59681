"""Times training steps for `sagsae bench train`: several forms of ours, their matrix products alone, other tools'."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from shared.bench.options import TrainBenchOptions
from shared.config import TrainConfig
from shared.device import reuse_memory
from shared.errors import UserError
from shared.saes import SAEConfig, sae_config
from shared.store.opened import Store
from train.bench.peers import Ask, PeerTools, running
from train.data.order import split
from train.data.rows import HookRows
from train.fit.member import Member
from train.measure.metrics import read_heldout
from train.ranks import Ranks
from train.sae.base import StepInputs
from train.sae.gated import pre_activations

Advance = Callable[[int, str], None]
KINDS = ("sparse", "dense", "compiled", "autograd", "products")
"""Our steps (`compiled` is the dense step under torch.compile), and `products`, the dense step's matrix products
alone."""


@dataclass(frozen=True)
class StepBenchPlan:
    """The settings of `sagsae bench train`."""

    widths: Sequence[int]
    batch: int
    l0: int
    precision: str
    rounds: int
    together: int
    """Number of autoencoders that are trained in one pass."""
    tokens: int
    """Training tokens per autoencoder."""
    device: str
    peers: PeerTools
    compiled: bool
    """Whether to measure the compiled step too."""
    run_rounds: int
    """Rounds of whole runs: all autoencoders in one pass, then one after the other."""

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if kind != "compiled" or self.compiled]

    @property
    def runs(self) -> int:
        steps = len(self.kinds) + len(self.peers.found)
        return (self.rounds + 1) * len(self.widths) * steps + 2 * self.run_rounds

    @property
    def matmul(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


def make_plan(options: TrainBenchOptions, device: str, peers: PeerTools) -> StepBenchPlan:
    """The plan that a command line asks for."""
    return StepBenchPlan(
        options.widths,
        options.batch,
        options.l0,
        options.precision,
        options.rounds,
        together=8,
        tokens=200_000,
        device=device,
        peers=peers,
        compiled=device != "cpu" if options.compiled is None else options.compiled,
        run_rounds=options.rounds // 2 + 1 if options.runs is None else options.runs,
    )


def step_seconds(
    store: Store, hook: str, folder: Path, plan: StepBenchPlan, advance: Advance
) -> dict[int, dict[str, list[float]]]:
    """Returns the seconds of one step per round, by width and kind. The kinds alternate, and a first round does not
    count."""
    device = Ranks(torch.device(plan.device)).device
    reuse_memory(device)  # as training does
    x = rows(store, hook, plan.batch) / store.statistics(hook).scale
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"x": x}, folder / "rows.safetensors")
    settings = {
        "rows": str(folder / "rows.safetensors"),
        "l0": plan.l0,
        "precision": plan.precision,
        "device": plan.device,
        "threads": torch.get_num_threads(),
    }
    found: dict[int, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        peers = {peer.name: stack.enter_context(running(peer, settings)) for peer in plan.peers.found}
        for width in plan.widths:
            for ask in peers.values():
                ask(d_sae=width)
            runs = our_steps(store, hook, width, x.to(device), plan)
            runs |= {name: partial(peer_step, ask) for name, ask in peers.items()}
            found[width] = alternate(runs, width, plan.rounds, advance)
    return found


def alternate(
    runs: dict[str, Callable[[int], float]], width: int, rounds: int, advance: Advance
) -> dict[str, list[float]]:
    """Runs each kind once per round, in alternating order, and returns the seconds; the first round does not count."""
    found: dict[str, list[float]] = {kind: [] for kind in runs}
    for number in range(rounds + 1):
        for kind in list(runs) if number % 2 else list(runs)[::-1]:
            gc.collect()
            seconds = runs[kind](number)
            if number:
                found[kind].append(seconds)
            advance(1, f"{kind}, d_sae {width}")
    return found


def peer_step(ask: Ask, number: int) -> float:
    return float(ask(step=number)["seconds"])


def our_steps(
    store: Store, hook: str, width: int, x: Float[Tensor, "batch d_in"], plan: StepBenchPlan
) -> dict[str, Callable[[int], float]]:
    """Returns, for each kind, a function that does one step on x (scaled to unit variance) and returns its seconds."""
    sae = sae_config(arch="sa-gsae", d_sae=width, sparsity=0.1)
    members = {kind: make_member(store, hook, sae, kind, plan) for kind in plan.kinds if kind != "products"}
    some = x[:: -(-len(x) // 512)]  # about 512 rows: how many gates open differs from row to row
    u = pre_activations(members["dense"].weights, some).abs().flatten()
    theta = u.kthvalue(max(1, len(some) * (width - plan.l0))).values
    for member in members.values():
        member.weights.theta.fill_(theta)  # type: ignore[attr-defined]
    work: dict[str, Callable[[], object]] = {
        **{kind: partial(member.step_, x, 0) for kind, member in members.items()},
        "autograd": partial(autograd_step, members["autograd"], x),
        "products": products(x, width, plan.matmul),
    }
    return {kind: partial(timed, work[kind], x.device) for kind in plan.kinds}


def timed(work: Callable[[], object], device: torch.device, number: int) -> float:  # noqa: ARG001 (alternate passes it)
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def products(x: Float[Tensor, "batch d_in"], d_sae: int, matmul: torch.dtype) -> Callable[[], None]:
    """Returns a function that does only the seven matrix products of the dense step (docs/method.md, gradients), on
    random numbers of the same shapes and type."""
    low = x.to(matmul)
    W_enc, W_dec = (torch.randn(d_sae, x.shape[1], device=x.device).to(matmul) for _ in range(2))
    f = torch.randn(len(x), d_sae, device=x.device).to(matmul)

    def work() -> None:
        low @ W_enc.T
        for _ in range(2):
            f @ W_dec  # the reconstruction from the code, and that from the gates alone
            low @ W_dec.T  # the gradient of the code
            f.T @ low  # the gradients of W_dec and of W_enc

    return work


def make_member(store: Store, hook: str, sae: SAEConfig, kind: str, plan: StepBenchPlan) -> Member:
    step = "sparse" if kind == "sparse" else "dense"
    config = TrainConfig(
        store=store.location,
        hook=hook,
        saes=(sae,),
        batch=plan.batch,
        streams=1,
        step=step,
        lr=1e-12,
        precision=plan.precision,
        device=plan.device,
        compile=kind == "compiled",
    )
    return Member(sae, config, 1000, plan.matmul, store.statistics(hook), Ranks(torch.device(plan.device)))


def autograd_step(member: Member, x: Float[Tensor, "batch d_in"]) -> None:
    """Does the same step with PyTorch's own backward pass of the loss."""
    weights = {name: tensor.detach().requires_grad_() for name, tensor in member.weights.named().items()}
    with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=member.matmul == torch.bfloat16):
        loss = member.family.loss(type(member.weights)(**weights), x, StepInputs(0.1, member.matmul))
    grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    found = dict(zip(weights, grads, strict=True))
    member.optimizer.step_({name: found[name] for name in member.weights.trained()}, 1e-12)
    member.family.constrain_(member.weights)


def rows(store: Store, hook: str, count: int) -> Float[Tensor, "count d_in"]:
    """Returns the first `count` training rows in float32. Raises UserError when the store holds fewer."""
    config = TrainConfig(store=store.location, hook=hook, saes=(sae_config(arch="relu", d_sae=1),))
    found = read_heldout(HookRows.of(store, hook), split(store.spec, store.tokens(), config).train)[:count]
    if len(found) < count:
        raise UserError(f"{store.name}: holds {len(found):,} rows that count, fewer than a batch of {count:,}")
    return found.float()
