"""With a local model nothing asks for the network: not the harvest, not training, evaluation or the report."""

import socket
from pathlib import Path

import pytest

from harvest.run import harvest as run_harvest
from shared.config import EvalConfig, HarvestConfig, TrainConfig
from shared.saes import sae_config
from train.evaluate import evaluate
from train.report import write_report
from train.run import train as run_train


def test_no_socket_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object, **_options: object) -> None:
        raise AssertionError(f"a connection was asked for: {address}")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    cpu = {"device": "cpu"}
    harvested = run_harvest(
        HarvestConfig(model="tiny", tokens=4000, context=64, hooks=("mlp_out",), out=tmp_path, **cpu)
    )
    sae = sae_config(arch="sa-gsae", d_sae=16, sparsity=0.2)
    trained = run_train(TrainConfig(store=harvested.store, saes=(sae,), batch=64, out=tmp_path / "run", **cpu))
    assert evaluate(EvalConfig(run=trained.run, **cpu)).results["ce_tokens"]
    assert write_report([trained.run], tmp_path / "report.html").exists()
