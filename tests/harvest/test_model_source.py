"""Which model a name means, and what is said when there is none or it cannot be had."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.command import ROOT

from shared.errors import UserError
from shared.model.language_model import LanguageModel
from shared.model.source import SHIPPED, read_config, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_names(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model("tiny").location == str(SHIPPED)
    with pytest.raises(UserError, match=r"--model pithia-1b: is not an alias.*Did you mean pythia-1b\?"):
        resolve_model("pithia-1b")
    with pytest.raises(UserError, match="no such folder"):
        resolve_model("./nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="revisions belong to Hugging Face"):
        resolve_model(str(model_folder), "main")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "gpt2")
    assert resolve_model("gpt2").local, "a folder wins over an alias"
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        resolve_model("gpt2")


def test_the_commit_of_a_folder_follows_its_weights(model_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    assert resolve_model(str(copy)).commit == resolve_model(str(model_folder)).commit
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert resolve_model(str(copy)).commit != resolve_model(str(model_folder)).commit


def test_broken_weights_are_an_error_for_people(model_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="weights cannot be loaded"):
        LanguageModel(resolve_model(str(copy)), "cpu", "float32")
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match="configuration cannot be loaded"):
        read_config(resolve_model(str(copy)))


def test_pickled_weights_are_never_read(model_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_folder, tmp_path / "copy"))
    torch.save({}, copy / "pytorch_model.bin")
    source = resolve_model(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="weights cannot be loaded"):
        LanguageModel(source, "cpu", "float32")
    with pytest.raises(UserError, match=r"holds no weights \(\*\.safetensors\)\. Pickled ones .* are never read"):
        resolve_model(str(copy))


ASK = """
import socket, sys, time
if sys.argv[1] == "no-dns":
    def refuse(*_address, **_options):
        raise socket.gaierror(-2, "Name or service not known")
    socket.getaddrinfo = refuse
import huggingface_hub, torch, transformers
from shared.errors import UserError
from shared.model.language_model import LanguageModel
from shared.model.source import read_config, resolve_model
from shared.model.tokenizer import load_tokenizer
for name in sys.argv[2:]:
    started = time.monotonic()
    try:
        source = resolve_model(name)
        read_config(source)
        load_tokenizer(source)
        waited = time.monotonic() - started
        LanguageModel(source, "cpu", "float32")
        print(f"{waited:.2f}", source.commit)
    except UserError as error:
        print(f"{time.monotonic() - started:.2f}", error)
"""


@contextmanager
def server_that_never_answers() -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)  # the kernel accepts
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("trouble", ["no-dns", "no-answer"])
def test_a_hub_out_of_reach_fails_fast_and_says_what_to_do(trouble: str, model_folder: Path, tmp_path: Path) -> None:
    """What is in the cache is used; what is not is an error that says so, within 5 seconds."""
    for name, files in (("whole", None), ("part", "model.safetensors")):
        repo = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(model_folder, repo / "snapshots" / COMMIT)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT)
        if files:
            (repo / "snapshots" / COMMIT / files).unlink()
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    names = ["EleutherAI/pythia-1b", "owner/whole", "owner/part"]
    with server_that_never_answers() as address:
        environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "ignore", "-c", ASK, trouble, *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    absent, whole, part = (line.split(" ", 1) for line in done.stdout.splitlines())
    assert all(float(seconds) < 5 for seconds, _ in (absent, whole, part))
    assert "cannot be reached" in absent[1]
    assert "Check the network, or give a folder" in absent[1]
    assert whole[1] == COMMIT
    assert "its weights cannot be loaded" in part[1]
    assert "Hugging Face cannot be reached, and the local cache lacks it: check the network" in part[1]
