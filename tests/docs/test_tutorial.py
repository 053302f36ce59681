"""docs/tutorial.md and the README's example, block by block as a reader types them, against the outputs they show."""

import re
from pathlib import Path

import pytest
from support.command import ROOT
from support.pages import PageBlock, blocks_of, column, commands_of, run_block, shape

TUTORIAL = ROOT / "docs" / "tutorial.md"
README = ROOT / "README.md"


def contexts(output: str) -> list[str]:
    """The texts of examples, without the latent's value in front."""
    return [line.split("  ", 1)[1] for line in output.splitlines() if "[[" in line]


def check(block: PageBlock, printed: str) -> None:
    """What a reader sees is what the page shows, as far as it does not depend on the machine."""
    assert block.output is not None
    if "[[" in block.output:
        there, here = contexts(printed), contexts(block.output)
        assert all(re.fullmatch(r"[+-]\d+\.\d\d  .*\[\[.*\]\].*", line) for line in printed.splitlines())
        assert len(there) == len(here)
        assert len({*there} & {*here}) >= len(here) / 2, f"other contexts than the page shows:\n{printed}"
        return
    assert shape(printed) == shape(block.output)
    if "R²" in block.output:
        assert column(printed, "R²") == pytest.approx(column(block.output, "R²"), abs=0.03)
        assert column(printed, "L0") == pytest.approx(column(block.output, "L0"), rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_block_of_the_tutorial_and_the_readme(tmp_path: Path) -> None:
    for block in blocks_of(TUTORIAL):
        printed = run_block(block, tmp_path)
        if block.output is not None:
            check(block, printed)
    assert (tmp_path / "runs/first.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    (example,) = [block for block in blocks_of(README) if block.language == "python"]
    check(example, run_block(example, tmp_path))


def test_the_readmes_session_is_the_tutorials() -> None:
    """So it need not be run a second time."""
    session = re.findall(r"^```console\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (text,) = session
    shown = [line for line in text.replace("\\\n", " ").splitlines() if line not in ("", "…") and line[0] != "$"]
    outputs = "\n".join(block.output or "" for block in blocks_of(TUTORIAL)).splitlines()
    assert shown
    assert [line for line in shown if line not in outputs] == []
    asked = [
        line.removeprefix("$ sagsae ").split() for line in text.replace("\\\n", " ").splitlines() if line[:1] == "$"
    ]
    assert asked
    assert [words for words in asked if words not in commands_of(TUTORIAL)] == []


def test_what_is_compared_can_differ() -> None:
    table = "arch  R²    L0\ngated  0.60  12.0\n"
    assert shape("harvest a/b: 3 of 4 tokens (75%), 3 s left\n a  1,234 b 5.6e-3\n") == ["a # b #"]
    assert column(table, "R²") == [0.6]
    assert column(table, "L0") == [12.0]
    with pytest.raises(AssertionError):
        check(PageBlock("sh", "", table), table.replace("0.60", "0.70"))
    with pytest.raises(AssertionError):
        check(PageBlock("sh", "", table), table.replace("gated", "relu"))
    with pytest.raises(AssertionError):
        check(PageBlock("python", "", "+1.00  a[[b]]c\n"), "+1.00  x[[y]]z\n")
