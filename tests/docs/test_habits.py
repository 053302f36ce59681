"""What CONTRIBUTING.md, the Makefile, CITATION.cff, constraints.txt and the workflow promise to one another."""

import re
import subprocess
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from support.command import ROOT


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    about: dict[str, Any] = tomllib.loads(read("pyproject.toml"))["project"]
    return about


def explained() -> set[str]:
    """Targets that `make help` prints."""
    text = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[0] for line in text.splitlines()}


def test_make_help_explains_every_target() -> None:
    declared = re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)
    assert declared is not None
    assert explained() == set(declared.group(1).split())


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_every_make_command_that_a_page_names_exists(page: str) -> None:
    named = {word for line in re.findall(r"`make ([^`]+)`|^make (.+)", read(page), re.MULTILINE) for word in line}
    assert {word.split()[0] for word in named if word} - explained() == set()


def test_the_constraints_name_a_version_of_every_dependency_that_its_range_allows() -> None:
    pins = dict(line.split("==") for line in read("constraints.txt").splitlines() if not line.startswith("#"))
    versions = {canonical(name): version for name, version in pins.items()}
    extras = [line for lines in project()["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, [*project()["dependencies"], *extras]):
        version = versions[canonical(requirement.name)]
        assert requirement.specifier.contains(version), (requirement, version)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_citation_is_of_this_version_and_names_no_person() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert (citation["title"], citation["version"]) == (project()["name"], project()["version"])
    assert citation["license"] == project()["license"]
    assert citation["message"]
    assert citation["authors"] == [{"name": "The sagsae authors"}]


def test_the_workflow_runs_what_anybody_can_run_on_every_python_that_is_allowed() -> None:
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    assert jobs["test"]["steps"][-1]["run"] == "bash .ci/run"
    assert jobs["nightly"]["steps"][-1]["run"] == "bash .ci/run --deep"
    allowed = SpecifierSet(project()["requires-python"])
    assert all(version in allowed for version in jobs["test"]["strategy"]["matrix"]["python"])


def test_the_hooks_are_the_checks_of_make() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert entries == [f".venv/bin/{tool}" for tool in ("ruff check", "ruff format --check", "mypy")]


def test_the_gpu_commands_name_every_file_with_a_gpu_test() -> None:
    """Collecting all files a second time would take longer than the tests of a machine without a GPU."""
    marked = [
        path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]
    for text in (read("Makefile"), read("tests/gpu/run.py")):
        named = [ROOT / word for word in re.findall(r"\btests/gpu(?=[\s\"])|\btests/\w+/test_\w+\.py", text)]
        assert [
            path for path in marked if path not in named and path.parent not in named and path.name != "test_habits.py"
        ] == []
