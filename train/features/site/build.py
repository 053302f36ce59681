"""Writes the page into the folder of the Parquet files."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import shared
from shared.errors import DamagedError
from shared.gate import BadData, integer
from train.features.readers.folder import TOKENS, opened
from train.features.site.cards import PER_SHARD, SHARES, SiteIndex, TokenCounts, latents_script
from train.features.site.columns import by_latents, check_rows, numbers
from train.features.site.dials import FILE as DIAL
from train.features.site.dials import DialTests, read_dials, some_of
from train.features.site.pack import smallest
from train.features.site.search import SCRIPTS, token_scripts
from train.runs.folder import read_sealed

HERE: Final = Path(__file__).parent
LOOK: Final = Path(shared.__file__).parent / "look.css"
PARTS: Final = ("data", "tokens", "marks", "overview", "index", "latent", "compare", "live", "routes")
"""Scripts of js/ that make app.js, in this order."""
PAGE: Final = "index.html"
"""Written last: where it is, the page is complete."""
FACTS: Final = ("hook_name", "d_in", "d_sae", "signed", "scale", "context", "rows", "firings", "l0", "sampled", "lens")


def write_site(folder: Path) -> Path:
    """Writes the page of the Parquet files in a folder, or writes it again. Returns index.html. Raises DamagedError
    when the files do not belong together."""
    try:
        source = SiteSource.of(folder)
        (folder / PAGE).unlink(missing_ok=True)
        source.write()
    except (BadData, FileNotFoundError, LookupError, ValueError, TypeError, pa.ArrowException) as error:
        raise DamagedError(f"{folder}: cannot be shown ({error}). Make it again with --overwrite") from error
    return folder / PAGE


def is_current(folder: Path) -> bool:
    """Whether a folder has its page, and no dial test is newer."""
    page, dial = folder / PAGE, folder / DIAL
    return page.is_file() and not (dial.is_file() and dial.stat().st_mtime_ns > page.stat().st_mtime_ns)


@dataclass(frozen=True)
class VocabularyTable:
    """tokens.parquet: the bytes of each token, None where they are not known; its rows; whether it is special."""

    text: list[bytes | None]
    rows: NDArray[np.int64]
    special: NDArray[np.bool_]


def read_tokens(folder: Path) -> VocabularyTable:
    with opened(folder / TOKENS, {"token": "int", "bytes": "bytes", "rows": "int"}) as file:
        table = file.read()
    return VocabularyTable(table["bytes"].to_pylist(), numbers(table["rows"]), numbers(table["special"]))


@dataclass(frozen=True)
class SiteSource:
    """What a page is made from."""

    folder: Path
    about: dict[str, Any]
    d_sae: int
    sides: int
    tokens: VocabularyTable
    dials: DialTests | None

    @classmethod
    def of(cls, folder: Path) -> "SiteSource":
        about, path = read_sealed(folder / "about.json"), folder / "latents.parquet"
        sides, d_sae = 2 if about["signed"] else 1, integer(about["d_sae"], "d_sae", 1)
        check_rows(path, pq.read_metadata(path).num_rows, d_sae * sides)
        return cls(folder, about, d_sae, sides, read_tokens(folder), read_dials(folder))

    def write(self) -> None:
        data = self.folder / "data"
        shutil.rmtree(data, ignore_errors=True)
        for part in ("latents", "tokens"):
            (data / part).mkdir(parents=True)
        index, used = SiteIndex(self.d_sae, self.sides), np.zeros(len(self.tokens.rows), np.bool_)
        self.write_latents(data / "latents", index, used)
        firings = index.columns["firings"].astype(np.int64)
        scripts = token_scripts(self.folder / "pairs.parquet", self.sides, firings, self.tokens.rows)
        for number, script in enumerate(scripts):
            (data / "tokens" / f"{number:02d}.js").write_bytes(script)
        listed = index.columns["tokens"]
        used[listed[listed > 0].astype(np.int64) - 1] = True
        for test in self.dials.latents.values() if self.dials else ():
            used[np.array(test["plus"] + test["minus"], np.int64)] = True
        texts, arrays = self.words(np.flatnonzero(used))
        (data / "index.js").write_bytes(index.script({"about": self.facts(), "words": texts}, arrays))
        write_page(self.folder)

    def write_latents(self, place: Path, index: SiteIndex, used: NDArray[np.bool_]) -> None:
        """Writes the scripts of all latents, and fills the index and the marks of tokens in use."""
        latents = by_latents(self.folder / "latents.parquet", self.d_sae, PER_SHARD)
        examples = by_latents(self.folder / "examples.parquet", self.d_sae, PER_SHARD)
        counts = TokenCounts(self.tokens.rows)
        for shard, (table, some) in enumerate(zip(latents, examples, strict=True)):
            first = shard * PER_SHARD
            index.take(first, table)
            about = {"shard": shard, "first": first, "dial": some_of(self.dials, first, first + PER_SHARD)}
            (place / f"{shard:05d}.js").write_bytes(latents_script(about, table, some, counts, used))

    def words(self, ids: NDArray[np.int64]) -> tuple[list[Any], dict[str, NDArray[Any]]]:
        """The text of some tokens: a string, a list with hexadecimal digits where the bytes are no whole characters,
        null where it is not known. And their ids, rows, and which are special."""
        texts = [word(self.tokens.text[token]) for token in ids]
        special = self.tokens.special[ids].astype(np.uint8)
        return texts, {"word": smallest(ids), "word_rows": smallest(self.tokens.rows[ids]), "special": special}

    def facts(self) -> Mapping[str, Any]:
        """What the page says about the autoencoder and the rows."""
        store = self.about.get("store") or {}
        return {
            **{name: self.about.get(name) for name in FACTS},
            "sae": self.about["identity"]["sae"],
            "hook": self.about["identity"]["hook"],
            "model": store.get("model"),
            "store": os.path.basename(str(store.get("path") or "").rstrip("/")),
            "sides": self.sides,
            "per_shard": PER_SHARD,
            "token_scripts": SCRIPTS,
            "shares": SHARES,
            **({} if self.dials is None else {"dial_grid": self.dials.grid, "dials": self.dials.slopes}),
        }


def write_page(folder: Path) -> None:
    """Writes the files of the page that are the same for all autoencoders."""
    for name, data in page_files().items():
        (folder / name).write_bytes(data)


def page_files() -> dict[str, bytes]:
    """The content of these files, by name; index.html last."""
    parts = [(HERE / "js" / f"{name}.js").read_text(encoding="utf-8") for name in PARTS]
    styles = [path.read_text(encoding="utf-8") for path in (LOOK, HERE / "site.css")]
    files = {"app.js": '"use strict";\n' + "\n".join(parts), "style.css": "\n".join(styles)}
    return {**{name: text.encode() for name, text in files.items()}, PAGE: (HERE / PAGE).read_bytes()}


def word(raw: bytes | None) -> Any:
    """The text of a token as the page's data hold it."""
    if raw is None:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return [raw.hex()]
