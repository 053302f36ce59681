"""Real things, made small: a GPT-NeoX model with random weights, a corpus, a store harvested from them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may reach for the hub
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side, so each process computes on one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

import shared.files
from harvest.run import harvest
from shared.config import HarvestConfig, TrainConfig
from shared.saes import sae_config
from shared.store import Store

WORDS = "the a cat dog king sat saw said on in of and mat house 12 café naïve if then else return while".split()
CONTEXT = 16
ROOT = Path(__file__).parent.parent
END = "<|endoftext|>"
HERE = {None, "", "127.0.0.1", "localhost", "::1", "0.0.0.0", socket.gethostname()}


def sentences(n: int, seed: int = 0) -> list[str]:
    """Documents of 5 to 60 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(n)]


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(50), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)
    fast.save_pretrained(folder)


def save_decoder(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
    """Any language model with random weights, norms and biases too, as Hugging Face saves one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # these begin as all ones or all zeros, which would hide a norm left out
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def save_model(folder: Path, **changes: Any) -> Path:
    """A GPT-NeoX model (d_model 32, 3 layers) and its tokenizer."""
    settings: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3,
        "bos_token_id": 0, "eos_token_id": 0, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(**settings)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_wide_model(folder: Path) -> Path:
    """Two layers of the shape of Pythia-1b (100 million weights, bfloat16, a small vocabulary) and a tokenizer."""
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=2048, num_hidden_layers=2, num_attention_heads=8, intermediate_size=8192,
        max_position_embeddings=2048, initializer_range=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    save_decoder(folder, config, torch.bfloat16)
    save_tokenizer(folder)
    return folder


def save_corpus(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


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
            "batch_tokens": 128, "device": "cpu", "out": str(out), "name": "s", **changes,
        }  # fmt: skip
        return HarvestConfig(**values)

    return config


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, harvest_config: Callable[..., HarvestConfig]) -> Store:
    """A finished store with three hookpoints. Read only."""
    return Store.open(harvest(harvest_config(tmp_path_factory.mktemp("stores"))).store)


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


def before_each_file(patch: pytest.MonkeyPatch, check: Callable[[Path], None]) -> None:
    """`check` is called with the path of every file that is about to be written, and may raise."""
    real = shared.files.written_together

    @contextmanager
    def checked() -> Iterator[Callable[..., None]]:
        with real() as write:

            def write_checked(path: Path, pieces: Any) -> None:
                check(path)
                write(path, pieces)

            yield write_checked

    patch.setattr(shared.files, "written_together", checked)


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a store or a run that must not depend on when or how often it was interrupted."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in ("record.json", ".lock"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes a file of JSON that carries a checksum, and leaves the checksum out, as older files do."""
    value = json.loads(path.read_text())
    value.pop("crc32c", None)
    path.write_text(json.dumps(change(value)))


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda value: {key: item for key, item in value.items() if key not in names}


def unfinished_run(run: Path) -> None:
    """As if it had been killed before it was marked finished."""
    rewrite(run / "record.json", without("finished"))


class Sagsae(Protocol):
    def __call__(
        self, *arguments: str | Path, stop: tuple[int, Callable[[], bool]] | None = None
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def sagsae() -> Sagsae:
    """`sagsae ARGUMENTS` in a process of its own. `stop` = (signal, condition) sends the signal as soon as the
    condition holds, and fails when the process ends before that."""

    def run(
        *arguments: str | Path, stop: tuple[int, Callable[[], bool]] | None = None
    ) -> subprocess.CompletedProcess[str]:
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
