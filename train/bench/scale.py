"""The reading half of `sagsae bench scale`: operations on stores of growing size, each run in a fresh process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from shared.config import TrainConfig
from shared.saes import sae_config
from shared.store.listing import describe_store
from shared.store.opened import Store
from shared.store.verify import verify
from train.data.loader import Loader
from train.data.order import StreamPosition, share
from train.data.stream import BatchStream
from train.plan.job import make_job

BATCH: Final = 16
HELDOUT: Final = 4096
"""Enough held-out tokens that contexts of several shards are drawn, because the store's last shard is not committed."""
WINDOW_ROWS: Final = 16_384
"""Small, so that memory that does not depend on the store's size does not hide memory that does."""


def start_training(place: str) -> Any:
    """Does everything that `sagsae train` does up to and including its first batch."""
    sae = sae_config(arch="gated", d_sae=16, sparsity=0.1)
    config = TrainConfig(
        store=place,
        saes=(sae,),
        batch=BATCH,
        window_rows=WINDOW_ROWS,
        heldout_tokens=HELDOUT,
        device="cpu",
        out=Path(place).parent / "run",
    )
    job = make_job(config, torch.device("cpu"))
    shares = share(config.batch, job.streams, 0, 1)
    loader = Loader(job.passes, [stream for stream, _, _ in shares], config.verify, torch.device("cpu"))
    stream = BatchStream(loader, shares, config.batch // job.streams, [StreamPosition()] * job.streams)
    try:
        return job, stream, stream.next_batch()
    finally:
        stream.close()


READING: Final[dict[str, Callable[[str], Any]]] = {
    "open": Store.open,
    "info": describe_store,
    "verify": lambda place: verify(Store.open(place, lenient=True), full=False),
    "train": start_training,
}
"""The operations, by their names in the table. `train` is the start of a training run."""
