"""The how-to pages: what a CPU can run is run, and every other command is checked against the program's own options."""

import functools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from support.command import ROOT, Sagsae
from support.pages import blocks_of, commands_of

import cli
from harvest.corpus import readers
from harvest.corpus.documents import DocumentField
from shared.errors import UserError
from shared.store.opened import Store

DOCS = ROOT / "docs"
OTHERS = {"docker.md"}
"""Pages with a test of their own."""
PAGES = [
    README := ROOT / "README.md",
    *(path for path in sorted(DOCS.rglob("*.md")) if path.name not in OTHERS and path.parent.name != "contributing"),
]


def parse(words: list[str]) -> None:
    """Raises what the command line says of an option or a command that does not exist. Runs nothing."""
    command: Any = typer.main.get_command(cli.app)
    while getattr(command, "commands", None):
        assert words, "ends before it names a command"
        name, *words = words
        assert name in command.commands, f"{name}: is no command"
        command = command.commands[name]
    command.make_context("sagsae", list(words), resilient_parsing=False)


def all_commands() -> list[tuple[str, list[str]]]:
    return [(path.relative_to(ROOT).as_posix(), words) for path in PAGES for words in commands_of(path) if words]


def test_commands_are_found() -> None:
    """The test below would pass without any."""
    assert len(all_commands()) > 30
    assert {page for page, _ in all_commands()} >= {"README.md", "docs/how-to/slurm.md", "docs/how-to/gpu-box.md"}


@pytest.mark.parametrize(("page", "words"), all_commands(), ids=lambda value: " ".join(value)[:60])
def test_every_command_of_every_page_exists(page: str, words: list[str]) -> None:
    assert page
    parse([word for word in words if word not in ("…", "RUN...")])


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["train", "--store", "stores/tiny", "--no-such-option", "1"])
    with pytest.raises(AssertionError, match="is no command"):
        parse(["trian"])


def leaves(command: Any, name: str = "sagsae") -> dict[str, Any]:
    """The commands that can be run, by their full names."""
    inside = getattr(command, "commands", None) or {}
    if not inside:
        return {name: command}
    return {path: leaf for word, each in inside.items() for path, leaf in leaves(each, f"{name} {word}").items()}


def test_every_command_takes_json() -> None:
    """As the README says."""
    without = {
        name
        for name, leaf in leaves(typer.main.get_command(cli.app)).items()
        if not any("--json" in parameter.opts for parameter in leaf.params)
    }
    assert without <= {"sagsae reference"}, without


def test_scripts_are_shell() -> None:
    """What only a cluster can run is at least a script that a shell can read."""
    found = 0
    for page in PAGES:
        for block in re.findall(
            r"^```(?:sh|bash)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
            assert done.returncode == 0, f"{page}: {block}\n{done.stderr}"
            found += 1
    assert found > 20


def test_a_corpus_kind_as_its_page_adds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's code, run inside harvest/corpus/readers.py."""
    code = [block.code for block in blocks_of(DOCS / "how-to/add-a-corpus-kind.md")]
    plain = dict(readers.PLAIN)
    scope = {**vars(readers), "re": re, "PLAIN": plain}
    for block in code:
        exec(compile(block, "page", "exec"), scope)
    packed = {kind + more: reader for kind, reader in plain.items() for more in ("", ".gz", ".zst")}
    monkeypatch.setattr(readers, "READERS", {**readers.READERS, **packed})
    file = tmp_path / "film.srt"
    file.write_text(
        "\ufeff1\n00:00:01,000 --> 00:00:02,500\nGood morning.\n\n2\n00:01:00,000 --> 00:01:01,000\nWho is it?\n"
    )
    corpus = readers.files_corpus(tmp_path, DocumentField("text", 100))
    assert list(corpus.documents()) == ["Good morning.\nWho is it?"]
    file.write_bytes(b"1\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"film\.srt:2: is not UTF-8"):
        list(readers.files_corpus(tmp_path, DocumentField("text", 100)).documents())
    skipped: list[Exception] = []
    assert list(readers.files_corpus(tmp_path, DocumentField("text", 100)).documents(skipped.append)) == []
    assert len(skipped) == 1


def test_the_manifest_of_kubernetes_is_yaml_whose_commands_exist() -> None:
    """No cluster runs it here; its volumes have the names that its containers mount."""
    page = (DOCS / "how-to/kubernetes.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    documents = list(yaml.safe_load_all(text))
    assert [one["kind"] for one in documents] == ["PersistentVolumeClaim", "Deployment", "Service", "Deployment"]
    commands = []
    for pod in (one["spec"]["template"]["spec"] for one in documents if one["kind"] == "Deployment"):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            commands += [container["args"]] if "args" in container else []
    assert [words[0] for words in commands] == ["serve", "work"]
    for words in commands:
        parse(words)


@pytest.mark.slow
def test_training_while_harvesting_as_its_page_does(
    tmp_path: Path, sagsae: Sagsae, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's commands, one after another: a store that is complete already is one segment."""
    monkeypatch.chdir(tmp_path)
    commands = commands_of(DOCS / "how-to/train-while-harvesting.md")
    assert [words[0] for words in commands] == ["harvest", "train", "store"]
    for words in commands:
        done = sagsae(*words)
        assert done.returncode == 0, done.stderr
    assert Store.open(tmp_path / "stores/tiny").n_rows == 100_000
    assert (tmp_path / "runs/following/evaluation.json").exists()
    assert (tmp_path / "runs/following/segments.jsonl").read_text(encoding="utf-8").count("\n") >= 1


# ---- links; tests/docs/test_style.py reads the prose

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and code hosts make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target}: leads nowhere"
        if anchor:
            assert anchor in anchors(path), f"{target}: {path.name} has no such heading"


def test_pages_named_in_the_text_exist() -> None:
    """`docs/…` in a docstring, a comment or a message names a page that is there."""
    files = [
        *(ROOT / "docker").iterdir(),
        ROOT / "CHANGELOG.md",
        ROOT / "pyproject.toml",
        ROOT / "Makefile",
        ROOT / "cli.py",
    ]
    files += [path for wing in ("shared", "harvest", "train", "tests") for path in (ROOT / wing).rglob("*.py")]
    named = {(name, path) for path in files for name in re.findall(r"\bdocs/[\w/-]+\.(?:md|svg|png)", path.read_text())}
    assert named
    assert sorted(f"{path.relative_to(ROOT)}: {name}" for name, path in named if not (ROOT / name).exists()) == []
