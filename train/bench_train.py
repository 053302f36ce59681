"""`sagsae bench train`: a step from the open gates alone, a step with every latent and one by autograd; many
autoencoders in one pass over a store against as many runs; how long training waits for data.

Steps are whole ones, optimiser included, on rows of a real store. Thresholds are set so that the asked number of
latents is active, and the learning rate is next to nothing, so that it stays so.
"""

import gc
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shared.bench import machine
from shared.config import TrainConfig
from shared.errors import UserError
from shared.saes import SAEConfig, sae_config
from shared.store import Store, find_hookpoint
from train.member import Member
from train.metrics import read_heldout
from train.order import split
from train.ranks import Ranks
from train.rows import Rows
from train.sae.base import Now
from train.sae.gated import pre_activations

Advance = Callable[[int, str], None]
KINDS = ("sparse", "dense", "autograd")


@dataclass(frozen=True)
class Report:
    """Ratios of seconds, and what they were made of."""

    ratios: dict[str, float | None]
    raw: dict[str, Any]
    table: list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    widths: Sequence[int]
    batch: int
    l0: int
    precision: str
    rounds: int
    together: int
    """Autoencoders in the one pass."""
    tokens: int
    """Training tokens of each of them."""

    @property
    def runs(self) -> int:
        return (self.rounds + 1) * len(self.widths) * len(KINDS) + 2 * (self.rounds // 2 + 1)


def bench_train(place: str, hook: str, folder: Path, plan: Plan, command: Sequence[str], advance: Advance) -> Report:
    """On the store at `place`; `command` is what starts sagsae, for the whole runs. Raises UserError when the store
    holds fewer rows than a batch."""
    store, hook = find_hookpoint(place, hook)
    steps = {width: step_seconds(store, hook, width, plan, advance) for width in plan.widths}
    rounds = [
        whole_runs(place, hook, folder / str(number), plan, command, advance) for number in range(plan.rounds // 2 + 1)
    ]
    ratios: dict[str, float | None] = {}
    for width, found in steps.items():
        ratios[f"sparse_vs_dense_{width}"] = against(found, "dense", "sparse")
        ratios[f"dense_vs_autograd_{width}"] = against(found, "autograd", "dense")
    ratios["one_pass_vs_separate"] = round(median(one / apart for one, apart, _ in rounds), 3)
    ratios["data_wait_share"] = round(median(waiting for _, _, waiting in rounds), 4)
    table = [
        {"what": f"step, {kind}, d_sae {width}", "ms": round(1000 * median(seconds), 1),
         "lowest": round(1000 * min(seconds), 1), "highest": round(1000 * max(seconds), 1)}
        for width, found in steps.items() for kind, seconds in found.items()
    ]  # fmt: skip
    d_in = store.spec.hookpoints[hook].d_in
    about = {"machine": machine(), "threads": torch.get_num_threads(), "d_in": d_in, "batch": plan.batch, "l0": plan.l0,
             "precision": plan.precision, "one_pass_s": [round(r[0], 2) for r in rounds],
             "separate_s": [round(r[1], 2) for r in rounds]}  # fmt: skip
    return Report(ratios, {**about, "figures": table}, table)


def against(found: dict[str, list[float]], one: str, other: str) -> float:
    """How many times as long `one` takes, median over the rounds."""
    return round(median(a / b for a, b in zip(found[one], found[other], strict=True)), 3)


def step_seconds(store: Store, hook: str, width: int, plan: Plan, advance: Advance) -> dict[str, list[float]]:
    """Seconds of one step, round by round, after a round that does not count; the kinds take turns."""
    sae = sae_config(arch="sa-gsae", d_sae=width, sparsity=0.1)
    members = {kind: make_member(store, hook, sae, kind, plan) for kind in KINDS}
    x = rows(store, hook, plan.batch) / store.statistics(hook).scale
    u = pre_activations(members["dense"].weights, x[:64]).abs().flatten()
    theta = u.kthvalue(max(1, 64 * (width - plan.l0))).values
    for member in members.values():
        member.weights.theta.fill_(theta)  # type: ignore[attr-defined]
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(plan.rounds + 1):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            gc.collect()
            started = time.perf_counter()
            by_autograd(members[kind], x) if kind == "autograd" else members[kind].step_(x, 0)
            if number:
                found[kind].append(time.perf_counter() - started)
            advance(1, f"{kind}, d_sae {width}")
    return found


def make_member(store: Store, hook: str, sae: SAEConfig, kind: str, plan: Plan) -> Member:
    step = "sparse" if kind == "sparse" else "dense"
    config = TrainConfig(
        store=store.location, hook=hook, saes=(sae,), batch=plan.batch, streams=1, step=step, lr=1e-12,
        precision=plan.precision, device="cpu",
    )  # fmt: skip
    matmul = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
    return Member(sae, config, 1000, matmul, store.statistics(hook), Ranks(torch.device("cpu")))


def by_autograd(member: Member, x: Float[Tensor, "batch d_in"]) -> None:
    """The same step from the loss as it is written, with PyTorch's own backward pass."""
    weights = {name: tensor.detach().requires_grad_() for name, tensor in member.weights.named().items()}
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=member.matmul == torch.bfloat16):
        loss = member.family.loss(type(member.weights)(**weights), x, Now(0.1, member.matmul))
    grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    found = dict(zip(weights, grads, strict=True))
    member.optimizer.step_({name: found[name] for name in member.weights.trained()}, 1e-12)
    member.family.constrain_(member.weights)


def rows(store: Store, hook: str, count: int) -> Float[Tensor, "count d_in"]:
    config = TrainConfig(store=store.location, hook=hook, saes=(sae_config(arch="relu", d_sae=1),))
    found = read_heldout(Rows.of(store, hook), split(store.spec, store.tokens(), config).train)[:count]
    if len(found) < count:
        raise UserError(f"{store.name}: holds {len(found):,} rows that count, fewer than a batch of {count:,}")
    return found.float()


def whole_runs(
    place: str, hook: str, folder: Path, plan: Plan, command: Sequence[str], advance: Advance
) -> tuple[float, float, float]:
    """Seconds of one run with all autoencoders, of as many runs with one each, as a user starts them; and the share of
    the first that was spent waiting for data."""
    sparsities = [round(0.1 * 1.2**i, 4) for i in range(plan.together)]
    one, waiting = timed(place, hook, folder / "together", sparsities, plan, command)
    advance(1, "one pass")
    apart = sum(timed(place, hook, folder / str(s), [s], plan, command)[0] for s in sparsities)
    advance(1, "separate runs")
    return one, apart, waiting


def timed(
    place: str, hook: str, out: Path, sparsities: Sequence[float], plan: Plan, command: Sequence[str]
) -> tuple[float, float]:
    options = [part for value in sparsities for part in ("--sparsity", str(value))]
    asked = [*command, "train", "--store", place, "--hook", hook, "--arch", "sa-gsae", "--d-sae", "1024", *options,
             "--tokens", str(plan.tokens), "--batch", str(plan.batch), "--set", f"precision={plan.precision}",
             "--device", "cpu", "--json", "--out", str(out)]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(asked)} ended with {done.returncode}: {done.stderr.strip()}")
    return time.perf_counter() - started, float(json.loads(done.stdout)["waiting_for_data"])
