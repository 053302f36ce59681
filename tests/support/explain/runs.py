"""A run with features, whose tokens are words."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.schemas.features import ExplainConfig, FeaturesConfig
from support.exact.runs import VOCABULARY, AllLatents, all_latents, make_run, make_sae, make_store
from support.explain.words import make_tokenizer
from train.explain.run import ExplainSummary, explain
from train.features.run import features


@dataclass(frozen=True)
class NamedRun:
    run: Path
    truth: AllLatents
    features: Path

    @property
    def two_sided(self) -> list[int]:
        """Latents that fire often on both sides."""
        f = self.truth.f
        return [int(latent) for latent in np.flatnonzero(np.minimum((f > 0).sum(0), (f < 0).sum(0)) >= 100)]

    @property
    def pair(self) -> tuple[int, ...]:
        """Two of them."""
        return tuple(self.two_sided[:2])

    @property
    def other(self) -> tuple[int, ...]:
        """A third one."""
        return tuple(self.two_sided[2:3])

    def explain(self, **settings: Any) -> ExplainSummary:
        known = {"run": self.run, "yes": True, "timeout": 20.0}
        return explain(ExplainConfig(**{**known, **settings}))


def make_named_run(root: Path, tokens: int = 12_000, arch: str = "sa-gsae", d_sae: int = 16) -> NamedRun:
    digest = make_tokenizer(root / "made", VOCABULARY)
    model = {"name": str(root / "made"), "commit": "0" * 32, "local": True, "dtype": "float32", "attention": "sdpa"}
    store = make_store(root / "store", tokens, context=96, model=model, tokenizer={"blake2b": digest})
    sae = make_sae(arch, d_sae)
    run = make_run(root / "run", store, [sae])
    done = features(FeaturesConfig(run=run, device="cpu", drawn=32))
    return NamedRun(run, all_latents(store, sae), done.folder)
