"""A dry run writes nothing and says what the harvest then does; the benchmark measures both of its halves."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command import Sagsae
from support.models import save_corpus

from harvest.bench import harvest as bench_harvest
from harvest.dry_run import trial
from harvest.run import harvest as run_harvest
from shared.config import HarvestConfig
from shared.errors import UserError
from shared.model.language_model import LanguageModel

Config = Callable[..., HarvestConfig]


@pytest.mark.parametrize("codec", ["zstd", "int8"])
def test_a_dry_run_foresees_the_store(harvest_config: Config, tmp_path: Path, codec: str) -> None:
    config = harvest_config(tmp_path / "out", codec=codec, batch_tokens=2048)
    found = trial(config)
    assert not (tmp_path / "out").exists(), "nothing is written"
    assert found.fits
    assert found.seconds is not None
    assert found.seconds > 0
    done = run_harvest(config)
    for path, hook in done.hookpoints.items():
        assert found.hookpoints[path]["d_in"] == hook["d_in"]
        assert found.hookpoints[path]["ratio"] == pytest.approx(hook["ratio"], rel=0.15)


def test_a_dry_run_of_a_whole_corpus_and_of_too_little(harvest_config: Config, tmp_path: Path) -> None:
    assert trial(harvest_config(tmp_path, tokens=None)).seconds is None
    little = str(save_corpus(tmp_path / "little.jsonl", ["a cat"]))
    with pytest.raises(UserError, match="less than one row of 16"):
        trial(harvest_config(tmp_path, corpus=little))


def test_a_dry_run_of_what_is_there(harvest_config: Config, tmp_path: Path) -> None:
    run_harvest(harvest_config(tmp_path, hooks=("mlp_out",)))
    assert trial(harvest_config(tmp_path, hooks=("mlp_out",))).seconds == 0
    with pytest.raises(UserError, match="was harvested differently"):
        trial(harvest_config(tmp_path, hooks=("attn_out",)))
    with pytest.raises(UserError, match="leaves nothing of a context of 16 tokens"):
        trial(harvest_config(tmp_path, skip_positions=16))


@pytest.mark.slow
def test_commands(sagsae: Sagsae, tmp_path: Path) -> None:
    tiny = ("--model", "tiny", "--tokens", "3000", "--context", "32", "--hook", "mlp_out")
    said = sagsae("harvest", *tiny, "--out", tmp_path / "out", "--dry-run")
    assert said.returncode == 0, said.stderr
    assert "3,000 tokens, measured on one batch" in said.stdout
    assert "GB are free" in said.stdout
    assert not (tmp_path / "out").exists()
    measured = sagsae("bench", "harvest", *tiny, "--rounds", 1, "--json", "--folder", tmp_path)
    assert measured.returncode == 0, measured.stderr
    report = json.loads(measured.stdout)
    assert 0 < report["capture_vs_forward"] < 10
    assert 0 < report["harvest_vs_limit"] < 100
    assert report["tokens"] == 3000
    assert list(tmp_path.iterdir()) == [], "the stores go again"


def test_a_batch_that_is_too_large_is_gone_when_the_next_is_tried(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a GPU would have less room for it than before. A stand-in: this model refuses more than one context."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def refuse(self: LanguageModel, tokens: torch.Tensor, last: int) -> None:
        alive.append(sum(there() is not None for there in held))
        activations = torch.zeros(100)
        held.append(weakref.ref(activations))
        if len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run_to(self, tokens, last)

    run_to = LanguageModel.run_to
    monkeypatch.setattr(LanguageModel, "run_to", refuse)
    assert trial(harvest_config(tmp_path / "out", batch_tokens=128)).tokens
    assert alive[:4] == [0, 0, 0, 0], "eight contexts, four, two, one"


def test_a_bench_that_does_not_fit_says_what_to_do(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_harvest, "cut_off", lambda *_: refuse)
    with pytest.raises(UserError, match=r"its memory is too small for 8 contexts at once .*--set batch_tokens=N"):
        bench_harvest.bench_harvest(harvest_config(tmp_path, batch_tokens=128), tmp_path, 1, lambda *_: None)
