"""Folders of `sagsae features` with a page, made from small stores whose tokens are chosen by a test."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from shared.schemas.features import FeaturesConfig
from support.exact.runs import VOCABULARY, make_run, make_sae, make_store
from train.features.run import features
from train.features.site.build import write_page, write_site
from train.features.site.cards import PER_SHARD, SHARES, SiteIndex
from train.features.site.pack import smallest
from train.features.site.search import SCRIPTS
from train.features.site.words import Vocabulary
from train.runs.folder import write_sealed

PLAIN = [f" {word}".encode() for word in "the of and to in he that was it his is with as had you".split()]
HOSTILE = {
    0: b"<script>window.owned=1</script>",
    1: b"<img src=x onerror=window.owned=1>",
    2: b"\n",
    3: b"\t",
    4: "\u200b".encode(),
    5: "\u00a0".encode(),
    6: "\u202egnp".encode(),
    7: b"<|endoftext|>",
    8: "\u2014".encode()[:1],
    9: "\u2014".encode()[1:],
    10: "\U0001f600".encode()[:3],
    11: "\U0001f600".encode()[3:],
    12: "\u05e9\u05dc\u05d5\u05dd".encode(),
    13: b'"; window.owned=1; "</script>',
    14: b"\r\n",
    15: b"\x00\x1b[31m",
    16: b"\xff",
    17: "\u2028".encode(),
    18: "\u00e9t\u00e9".encode(),
}
"""Bytes of tokens that must neither run nor vanish."""


@dataclass(frozen=True)
class LatentFolder:
    """RUN/features/NAME."""

    path: Path
    run: Path

    def table(self, name: str) -> Any:
        return pq.read_table(self.path / f"{name}.parquet").to_pandas()


def make_latents(
    folder: Path,
    arch: str = "sa-gsae",
    d_sae: int = 64,
    tokens: int = 12_000,
    dead: Sequence[int] = (),
    one_sided: Sequence[int] = (),
) -> LatentFolder:
    """A run, and the features of its only autoencoder. Its tokens are words. `dead`: latents
    that never fire. `one_sided`: those that never fire below zero."""
    store = make_store(folder / "store", tokens)
    sae = make_sae(arch, d_sae)
    for latent in dead:
        sae.weights.named()["theta" if sae.signed else "b_enc"][..., latent] = 1e4 if sae.signed else -1e4
    if sae.signed:
        sae.weights.named()["theta"][1, list(one_sided)] = 1e4
    run = make_run(folder / "run", store, [sae])
    done = features(FeaturesConfig(run=run, device="cpu"))
    spelled(done.folder, {})
    return LatentFolder(done.folder, run)


def spelled(folder: Path, texts: Mapping[int, bytes] | None) -> None:
    """Gives the tokens of a result their text (None: none is known), and makes its page again."""
    rows = pq.read_table(folder / "tokens.parquet")["rows"].to_numpy()
    words: list[bytes | None] = [None] * VOCABULARY
    if texts is not None:
        words = [texts.get(n, PLAIN[n % len(PLAIN)] + b"xyz"[: n // len(PLAIN)]) for n in range(VOCABULARY)]
    Vocabulary(words, {7, 11}).write(folder / "tokens.parquet", np.asarray(rows))
    write_site(folder)


def copied(folder: LatentFolder, target: Path) -> Path:
    return Path(shutil.copytree(folder.path, target))


GRID = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


def write_dials(folder: Path, latents: Sequence[int]) -> None:
    """Writes a dial.json in which the first latent passes and the others do not."""
    rng, tests = np.random.default_rng(0), []
    for n, latent in enumerate(latents):
        slope = 0.02 if n else 0.3
        tests.append({
            "latent": latent, "unit": 1.5, "clean": 0.1, "slope": slope, "interval": [slope - 0.01, slope + 0.01],
            "y": [0.1 + slope * value for value in GRID], "kl": [value**2 / 100 for value in GRID],
            "controls": rng.normal(0, 0.05, 40).tolist(), "plus": [1, 2, 3], "minus": [4, 5],
            "p": 0.6 if n else 0.01, "passes": n == 0,
        })  # fmt: skip
    write_sealed(folder / "dial.json", {"grid": list(GRID), "latents": tests})


def wide_index(folder: Path, d_sae: int) -> Path:
    """A page of many latents whose index is drawn at random; its other data are missing."""
    rng, index = np.random.default_rng(0), SiteIndex(d_sae, 2)
    index.columns["firings"][:] = np.exp(rng.uniform(0, 15, 2 * d_sae))
    plus = rng.beta(0.4, 0.4, d_sae)
    index.columns["share"][:] = np.rint(SHARES * np.stack([plus, 1 - plus], axis=1)).reshape(-1)
    index.columns["f1"][:] = SHARES * rng.beta(1, 6, 2 * d_sae)
    index.columns["tokens"][:] = rng.zipf(1.2, (2 * d_sae, 4)).clip(1, 50_000)
    index.columns["far"][:] = rng.permutation(d_sae) + 1
    index.columns["cosine"][:] = -SHARES * rng.beta(2, 8, d_sae)
    texts = [f" word{token}" for token in range(50_000)]
    texts[1] = " the"
    ids = np.arange(50_000)
    special = np.zeros(len(ids), np.uint8)
    words = {"word": smallest(ids), "word_rows": smallest(1_000_000 // (1 + ids)), "special": special}
    about = {
        "sae": "wide", "hook": "layer_00/mlp_out", "model": "made", "store": "made", "d_sae": d_sae, "sides": 2,
        "rows": 10**7, "l0": 64.0, "scale": 1.0, "lens": None, "per_shard": PER_SHARD, "token_scripts": SCRIPTS,
        "shares": SHARES,
    }  # fmt: skip
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "index.js").write_bytes(index.script({"about": about, "words": texts}, words))
    write_page(folder)
    return folder
