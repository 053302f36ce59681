"""A run's checkpoints: everything that a later process needs to go on as if nothing had happened."""

from collections.abc import Sequence
from pathlib import Path

from shared.errors import UserError
from shared.progress import say
from train.autoencoder import Autoencoder
from train.checkpoint import BUILDING, begin_checkpoint, end_checkpoint, load_checkpoint, save_part
from train.job import Job
from train.member import Member
from train.order import Position
from train.ranks import Ranks
from train.stream import BatchStream

VERSION = 2


def checkpoint(
    job: Job, members: Sequence[Member], stream: BatchStream, done: int, seconds: float, ranks: Ranks, sweep: bool
) -> None:
    """After `done` steps, and `seconds` of training. In a sweep each rank has autoencoders of its own."""
    folder, parts = job.folder.checkpoints, ranks.count if sweep else 1
    mine = {v: [at.epoch, at.window, at.offset] for v, at in stream.positions().items()}
    if ranks.leads:
        begin_checkpoint(folder)
    positions = {v: at for part in ranks.gather(mine) for v, at in part.items()}
    if ranks.index < parts:
        save_part(folder, ranks.index, {key: value for member in members for key, value in member.state().items()})
        for member in (member for member in members if member.diverged is None):
            save_as_it_is(job, member, done, folder / BUILDING / "saes" / member.config.name)
    ranks.wait()
    if ranks.leads:
        places = [positions[v] for v in sorted(positions)]
        state = {"version": VERSION, "step": done, "seconds": seconds, "positions": places, "parts": parts}
        end_checkpoint(folder, done, state)
    ranks.wait()


def save_as_it_is(job: Job, member: Member, done: int, folder: Path) -> None:
    """The autoencoder after `done` steps, with its normalisation folded in: `train.sae.load` takes the folder."""
    spec = job.store.spec
    about = {
        "model": spec.model,
        "hook_name": spec.hookpoints[job.hook].name,
        "context": spec.context,
        "bos_id": spec.bos_id,
        "lambda": float(member.sparsity.now(done)),
    }
    Autoencoder.of(member.config, member.weights, job.statistics.scale).save(folder, about)


def restore(job: Job, members: Sequence[Member]) -> tuple[int, float, list[Position]]:
    """(step, seconds, positions) of the newest checkpoint, loaded into the members; the beginning without one."""
    found = load_checkpoint(job.folder.checkpoints)
    if found is None:
        job.folder.cut_metrics(0)
        return 0, 0.0, [Position()] * job.streams
    tensors, state = found
    if state["version"] != VERSION:
        raise UserError(
            f"{job.folder.path}: its checkpoint is of version {state['version']}; this sagsae reads {VERSION}. "
            "Finish the run with the sagsae that began it, or start afresh with --overwrite"
        )
    for member in members:
        member.load_(tensors)
    job.folder.cut_metrics(state["step"])
    say(f"{job.folder.path}: going on after step {state['step']}")
    return state["step"], state["seconds"], [Position(*at) for at in state["positions"]]
