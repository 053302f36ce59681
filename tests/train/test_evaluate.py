"""evaluate(): what it keeps of an earlier evaluation, what it takes from the training log, what it adds when asked."""

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.command.tables import print_peers, print_saes
from shared.config import EvalConfig, TrainConfig
from shared.saes import sae_config
from train.autoencoder import Autoencoder
from train.evaluate import evaluate
from train.measure.peers import PEERS
from train.measure.written import with_losses_of
from train.report import write_report
from train.run import train

ARCHS: tuple[dict[str, Any], ...] = (
    {"arch": "sa-gsae", "sparsity": 0.2},
    {"arch": "sa-gsae", "sparsity": 0.2, "tie": "none"},
    {"arch": "gated", "l0_target": 6.0},
    {"arch": "relu", "sparsity": 0.1},
    {"arch": "jumprelu", "sparsity": 0.02},
    {"arch": "batch-topk", "k": 6},
    {"arch": "abs-topk", "k": 6},
)


@pytest.fixture
def run(train_config: Callable[..., TrainConfig]) -> Path:
    saes = tuple(sae_config(d_sae=24, **settings) for settings in ARCHS)
    return train(train_config(saes=saes)).run


def test_a_second_look_keeps_the_losses_of_the_first(run: Path, tmp_path: Path, capsys: Any) -> None:
    """Every architecture through training, evaluation, tables and the report; then again without the model."""
    first = evaluate(EvalConfig(run=run, ce_tokens=500, device="cpu")).results
    assert all(isinstance(sae["ce_spliced"], float) for sae in first["saes"])
    again = evaluate(EvalConfig(run=run, ce=False, device="cpu", peer_conventions=True))
    written = json.loads(again.file.read_text(encoding="utf-8"))
    assert written.pop("crc32c")
    assert written == again.results
    for sae in written["saes"]:
        assert set(sae.pop("peers")) == {peer.name for peer in PEERS}
    assert written == first, "what was measured with the model stands, and the rest is as it was"

    knobs = [(sae["sparsity"], sae["l0_target"], sae["k"]) for sae in first["saes"]]
    assert knobs == [(settings.get("sparsity"), settings.get("l0_target"), settings.get("k")) for settings in ARCHS]
    print_saes("saes", first["saes"])
    print_peers("peers", again.results["saes"])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("k 6", "L0 6", "tie-none", "dictionary_learning"))
    page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"run/{sae['name']}" in page for sae in first["saes"])


def test_autoencoders_are_in_memory_one_after_another(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a run that was trained in waves do not fit together."""
    made: list[weakref.ref[Autoencoder]] = []
    load, most = Autoencoder.load, 0

    def watched(place: Path, device: str) -> Autoencoder:
        nonlocal most
        made.append(weakref.ref(sae := load(place, device)))
        gc.collect()
        most = max(most, sum(there() is not None for there in made))
        return sae

    monkeypatch.setattr(Autoencoder, "load", watched)
    evaluate(EvalConfig(run=run, ce_tokens=500, device="cpu"))
    assert len(made) == 1 + 2 * len(ARCHS)
    assert most == 2, "the last one goes when the next one is there"


def test_dead_in_training_comes_from_the_log(run: Path) -> None:
    log = run / "metrics.jsonl"
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    results = evaluate(EvalConfig(run=run, ce=False, device="cpu")).results
    for sae in results["saes"]:
        logged = last["saes"][sae["name"]]["dead_fraction"]
        assert sae["dead"]["silent"] == {"fraction": logged, "tokens": 20 * 64}
    log.write_text('{"torn', encoding="utf-8")
    unknown = evaluate(EvalConfig(run=run, ce=False, device="cpu")).results
    assert all(sae["dead"]["silent"] is None for sae in unknown["saes"])


def test_losses_follow_the_name() -> None:
    before = {"ce_clean": 3.0, "tokens": 1, "saes": [{"name": "a", "ce_spliced": 3.5, "r2": 0.1}]}
    results = {"ce_clean": None, "tokens": 2, "saes": [{"name": n, "ce_spliced": None, "r2": 0.9} for n in "ab"]}
    kept = with_losses_of(before, results)
    assert (kept["ce_clean"], kept["tokens"]) == (3.0, 2)
    assert [sae["ce_spliced"] for sae in kept["saes"]] == [3.5, None]
    assert [sae["r2"] for sae in kept["saes"]] == [0.9, 0.9]
    assert with_losses_of({}, results) == results
