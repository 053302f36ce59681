"""Real things, made small: a GPT-NeoX model with random weights, a corpus, a store harvested from them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may reach for the hub
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side, so each process computes on one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.command import ROOT, Sagsae
from support.models import CONTEXT, save_corpus, save_model, sentences
from support.stores import unfinished

from harvest.run import harvest
from shared.config import HarvestConfig, TrainConfig
from shared.saes import sae_config
from shared.store.opened import Store

HERE = {None, "", "127.0.0.1", "localhost", "::1", "0.0.0.0", socket.gethostname()}


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Nothing in the suite may connect to another machine, nor ask for its address."""
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in HERE:
            raise AssertionError(f"a connection was asked for: {address}")
        connect(self, address)

    def names_of_here(host: Any, *rest: Any, **options: Any) -> Any:
        if host not in HERE:
            raise AssertionError(f"an address was asked for: {host}")
        return getaddrinfo(host, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        patch.setattr(socket, "getaddrinfo", names_of_here)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("models") / "neox")
    save_corpus(folder / "corpus.jsonl", sentences(400))
    return folder


@pytest.fixture(scope="session")
def harvest_config(model_folder: Path) -> Callable[..., HarvestConfig]:
    """A harvest of 5,000 tokens in 10 shards of 512 rows (the last one short, in rows and in contexts)."""

    def config(out: Path, **changes: Any) -> HarvestConfig:
        values = {
            "model": str(model_folder), "context": CONTEXT, "tokens": 5000, "chunk_rows": 64, "shard_rows": 512,
            "batch_tokens": 128, "device": "cpu", "out": str(out), "name": "s", "reuse": "none", **changes,
        }  # fmt: skip
        return HarvestConfig(**values)

    return config


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, harvest_config: Callable[..., HarvestConfig]) -> Store:
    """A finished store with three hookpoints. Read only."""
    return Store.open(harvest(harvest_config(tmp_path_factory.mktemp("stores"))).store)


@pytest.fixture
def growing(store: Store, tmp_path: Path) -> Path:
    """The session's store as it was before its first commit: all its files are there, none counts."""
    copy = Path(shutil.copytree(store.root, tmp_path / "growing"))
    unfinished(copy)[0].write_text("")
    return copy


@pytest.fixture
def train_config(store: Store, tmp_path: Path) -> Callable[..., TrainConfig]:
    """20 steps of two small autoencoders on the session's store."""

    def config(**changes: Any) -> TrainConfig:
        saes = tuple(sae_config(arch=arch, d_sae=48, sparsity=0.2) for arch in ("sa-gsae", "gated"))
        values: dict[str, Any] = {
            "store": str(store.root), "hook": "mlp_out", "saes": saes, "tokens": 20 * 64, "batch": 64, "lr": 5e-3,
            "streams": 4, "window_rows": 1024, "log_every": 5, "checkpoint_every": 8, "device": "cpu",
            "heldout_tokens": 320, "out": tmp_path / "run", "keep_checkpoints": True, **changes,
        }  # fmt: skip
        return TrainConfig(**values)

    return config


@pytest.fixture(scope="session")
def sagsae() -> Sagsae:
    """`sagsae ARGUMENTS` in a process of its own. `stop` = (signal, condition) sends the signal as soon as the
    condition holds, and fails when the process ends before that."""

    def run(*arguments: object, stop: tuple[int, Callable[[], bool]] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while stop is not None and not stop[1]():
            assert process.poll() is None, f"ended before it could be stopped: {process.communicate()}"
            time.sleep(0.002)
        if stop is not None:
            process.send_signal(stop[0])
        try:
            output, errors = process.communicate()
        except BaseException:  # the test's time is up
            process.terminate()
            raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    return run
