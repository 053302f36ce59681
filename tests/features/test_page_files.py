"""The files of the page: they hold what the Parquet files hold, have the same bytes each time, and stay small."""

import base64
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.exact.latents import HOSTILE, LatentFolder, copied, make_latents, spelled, write_dials

import train.features.site.search
from shared.errors import DamagedError
from shared.model.source import SHIPPED
from shared.schemas.features import FeaturesConfig
from train.features.run import features
from train.features.site.build import write_site
from train.features.site.words import vocabulary_bytes
from train.report import write_report
from train.runs.folder import RunFolder

KINDS = {"u1": "u1", "u2": "<u2", "u4": "<u4", "i1": "i1", "i2": "<i2", "f2": "<f2", "f4": "<f4", "f8": "<f8"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> LatentFolder:
    """Two scripts of latents; the second has 36 of them."""
    return make_latents(tmp_path_factory.mktemp("made"), d_sae=100, dead=(5,), one_sided=(6, 99))


def content_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and arrays of a script."""
    found = re.fullmatch(r'sagsae\.\w+\("([\w+/=]+)"\)\n', path.read_text())
    assert found is not None
    data = gzip.decompress(base64.b64decode(found.group(1)))
    at = 4 + int.from_bytes(data[:4], "little")
    head, arrays = json.loads(data[4:at]), {}
    for name, kind, length in head["arrays"]:
        arrays[name] = np.frombuffer(data, KINDS[kind], length, at)
        at += arrays[name].nbytes
    assert at == len(data)
    return head, arrays


def test_the_scripts_hold_every_pole(made: LatentFolder) -> None:
    poles, examples = made.table("latents"), made.table("examples")
    for number, first, last in ((0, 0, 64), (1, 64, 100)):
        head, arrays = content_of(made.path / "data" / "latents" / f"{number:05d}.js")
        assert (head["shard"], head["first"]) == (number, first)
        some = poles[(poles.latent >= first) & (poles.latent < last)]
        for name in ("firings", "mass", "energy", "max", "mean", "q50", "q95", "rule_f1"):
            assert arrays[name].tolist() == some[name].tolist(), name
        assert np.array_equal(arrays["hist"].reshape(len(some), -1), np.stack(some["hist"]))
        for kind, name in (("on", "token"), ("on", "count"), ("near", "latent"), ("cofire", "latent")):
            assert arrays[f"{kind}.{name}"].tolist() == [each[name] for row in some[kind] for each in row[:8]]
        assert arrays["rule"].tolist() == [token for row in some.rule for token in row]
        rows = examples[(examples.latent >= first) & (examples.latent < last)]
        groups = rows.groupby(["latent", "sign", "group"]).size()
        keys = [(p.latent, p.sign, group) for p in some.itertuples() for group in (1, 2, 3, 4)]
        assert arrays["drawn"].tolist() == [groups.get(key, 0) for key in keys]
        shown = rows[rows["rank"] < np.where(rows.group == 0, 10, 3)]
        assert arrays["example.value"].tolist() == shown.value.tolist()
        assert arrays["example.token"].tolist() == [token for row in shown.tokens for token in row]
        assert arrays["example.values"].tolist() == [value for row in shown["values"] for value in row]


def test_neighbouring_tokens_are_in_the_order_of_what_is_unusual(made: LatentFolder) -> None:
    poles, rows = made.table("latents"), made.table("tokens").rows
    _, arrays = content_of(made.path / "data" / "latents" / "00000.js")
    lengths = arrays["after.lengths"].tolist()
    at = 0
    for pole, length in zip(poles.itertuples(), lengths, strict=False):
        some = slice(at, at + length)
        mine = list(zip(arrays["after.token"][some].tolist(), arrays["after.count"][some].tolist(), strict=True))
        at += length
        counts = {each["token"]: each["count"] for each in pole.after}
        assert all(counts[token] == count for token, count in mine)
        gain = [n * np.log2(n / pole.firings / (max(1, rows[t]) / rows.sum())) for t, n in counts.items()]
        assert sorted(gain, reverse=True)[:8] == pytest.approx([
            n * np.log2(n / pole.firings / (max(1, rows[t]) / rows.sum())) for t, n in mine
        ])  # fmt: skip


def test_the_index_holds_every_latent(made: LatentFolder) -> None:
    head, arrays = content_of(made.path / "data" / "index.js")
    poles = made.table("latents")
    assert arrays["firings"].tolist() == poles.firings.tolist()
    assert arrays["share"] / head["about"]["shares"] == pytest.approx(poles.share_of_energy.to_numpy(), abs=1e-4)
    plus = poles[poles.sign == 1]
    assert (arrays["far"] - 1.0).tolist() == [row[0]["latent"] for row in plus.far]
    assert arrays["cosine"] / head["about"]["shares"] == pytest.approx([row[0]["cosine"] for row in plus.far], abs=1e-4)
    named = arrays["tokens"].reshape(4, -1).T.astype(int) - 1
    for row, tokens in zip(poles.itertuples(), named, strict=True):
        wanted = list(dict.fromkeys([*row.rule, *(each["token"] for each in row.on)]))[:4]
        assert [token for token in tokens if token >= 0] == wanted
    words = dict(zip(arrays["word"].tolist(), head["words"], strict=True))
    assert {token: made.table("tokens").bytes[token].decode() for token in words} == words


def test_a_search_keeps_the_pairs_that_tell_most(
    made: LatentFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.features.site.search, "PER_LATENT", 5)
    folder = copied(made, tmp_path / "few")
    write_site(folder)
    pairs = made.table("pairs").merge(made.table("latents")[["latent", "sign", "firings"]])
    rows = made.table("tokens").rows
    pairs["f1"] = 2 * pairs["count"] / (pairs.firings + rows[pairs.token].to_numpy())
    kept = 0
    least = pairs.f1.nlargest(500).min()
    for script in range(64):
        _, arrays = content_of(folder / "data" / "tokens" / f"{script:02d}.js")
        poles = iter(zip(arrays["pole"].tolist(), arrays["count"].tolist(), strict=True))
        entries = zip(*(arrays[name].tolist() for name in ("token", "lengths", "all")), strict=True)
        for token, length, total in entries:
            assert token % 64 == script
            mine = pairs[pairs.token == token]
            assert total == len(mine)
            for _ in range(length):
                pole, count = next(poles)
                row = mine[(mine.latent == pole // 2) & (mine.sign == 1 - 2 * (pole % 2))].iloc[0]
                assert count == row["count"]
                assert row.f1 >= least * (1 - 1e-6)
                kept += 1
    assert 500 <= kept < len(pairs)


def test_the_page_is_small_and_the_same_each_time(made: LatentFolder, tmp_path: Path) -> None:
    again = copied(made, tmp_path / "again")
    write_site(again)
    files = [path for path in made.path.rglob("*") if path.is_file()]
    assert {path.read_bytes() == (again / path.relative_to(made.path)).read_bytes() for path in files} == {True}
    size = sum(path.stat().st_size for path in (made.path / "data").rglob("*.js"))
    assert size <= 4500 * 100


def test_the_page_belongs_to_the_run(made: LatentFolder) -> None:
    assert RunFolder(made.run).foreign_paths() == []
    (made.path / "data" / "note.txt").touch()
    assert RunFolder(made.run).foreign_paths() == [f"features/{made.path.name}/data/note.txt"]
    (made.path / "data" / "note.txt").unlink()


def test_a_repeated_command_makes_a_page_that_is_missing_or_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_latents(tmp_path, d_sae=8, tokens=1200)
    page, dial = made.path / "index.html", made.path / "dial.json"
    page.unlink()
    assert features(FeaturesConfig(run=made.run, device="cpu")).page == page
    assert page.is_file()
    assert "is complete" in capsys.readouterr().err
    assert "dials" not in content_of(made.path / "data" / "index.js")[0]["about"]
    write_dials(made.path, (2,))
    os.utime(dial, ns=(page.stat().st_mtime_ns + 1,) * 2)
    features(FeaturesConfig(run=made.run, device="cpu"))
    assert content_of(made.path / "data" / "index.js")[0]["about"]["dials"] == {"2": [0.3, True]}
    assert RunFolder(made.run).foreign_paths() in ([], [f"features/{made.path.name}/dial.json"])


def test_files_that_do_not_belong_together_are_no_page(made: LatentFolder, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "less")
    table = pq.read_table(folder / "latents.parquet")
    pq.write_table(table.slice(0, 150), folder / "latents.parquet")
    with pytest.raises(DamagedError, match=r"latents.parquet: has 150 rows instead of 200"):
        write_site(folder)
    pq.write_table(table, folder / "latents.parquet")
    tokens = pq.read_table(folder / "tokens.parquet")
    pq.write_table(tokens.slice(0, 10), folder / "tokens.parquet")
    with pytest.raises(DamagedError, match="cannot be shown"):
        write_site(folder)
    assert not (folder / "index.html").exists(), "no half of a page"
    pq.write_table(tokens, folder / "tokens.parquet")
    (folder / "dial.json").write_text(json.dumps({"grid": [0, "x"], "latents": []}))
    with pytest.raises(DamagedError, match="grid is 'x' instead of a number"):
        write_site(folder)


def test_hostile_tokens_do_not_leave_their_script(made: LatentFolder, tmp_path: Path) -> None:
    """A script is a call with base64, whatever the tokens are."""
    folder = copied(made, tmp_path / "hostile")
    spelled(folder, HOSTILE)
    for path in (folder / "data").rglob("*.js"):
        content_of(path)
    assert content_of(folder / "data" / "index.js")[0]["words"][8] == ["e2"]


def test_the_report_links_to_the_page(tmp_path: Path) -> None:
    made = make_latents(tmp_path / "a & b", d_sae=8, tokens=1200)
    html = write_report([made.run], tmp_path / "out" / "report.html").read_text()
    link = f"../a%20%26%20b/run/features/{made.path.name}/index.html"
    assert f'<a href="{link}">{made.path.name}</a>' in html


# ------------------------------------------------------------------------------------------------ the text of tokens


def test_the_bytes_of_the_shipped_tokenizer_are_the_text() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED, local_files_only=True)
    texts = vocabulary_bytes(tokenizer, len(tokenizer) + 3)
    assert texts[-3:] == [None] * 3
    for text in ("And God said,\n\tlet – there be 光 and 😀!", "def f(x):\r\n    return x\u00a0\u200b"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(texts[n] or b"?" for n in ids).decode() == text
    assert texts[tokenizer.eos_token_id] == tokenizer.eos_token.encode()


BYTES = {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]}
TOKENIZERS = [
    (["\u2581God", "<0xE2>", "<0x0A>", "s"], BYTES, [b" God", b"\xe2", b"\n", b"s"]),
    (["god", "##ly", "[UNK]"], {"type": "WordPiece", "prefix": "##"}, [b" god", b"ly", b" [UNK]"]),
    (
        ["\u0120God", "\u010a", "\u00e2\u0122", "\u20ac"],
        {"type": "ByteLevel"},
        [b" God", b"\n", b"\xe2\x80", "\u20ac".encode()],
    ),
]


@pytest.mark.parametrize(("names", "decoder", "texts"), TOKENIZERS)
def test_other_tokenizers(names: list[str], decoder: dict[str, Any], texts: list[bytes]) -> None:
    class Backend:
        def to_str(self) -> str:
            return json.dumps({"decoder": decoder})

    class Tokenizer:
        backend_tokenizer = Backend()
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}

        def __len__(self) -> int:
            return len(names)

        def convert_ids_to_tokens(self, ids: Any) -> list[str]:
            return [names[n] for n in ids]

    assert vocabulary_bytes(Tokenizer(), len(names)) == texts
