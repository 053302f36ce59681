"""Who may import what. An import that points the wrong way is the first step of a tangle."""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "shared": {"harvest", "train", "cli", "tests"},
    "harvest": {"train", "cli", "tests"},
    "train": {"harvest", "cli", "tests"},
}
ROUTES = "endpoint errors events files health jobs requests security stores workers".split()
SERVER = {"harvest/serve/app.py", "harvest/serve/pages.py", *(f"harvest/serve/rest/{name}.py" for name in ROUTES)}
DOORS = {
    "starlette": SERVER,
    "anyio": SERVER,
    "uvicorn": {"harvest/serve/app.py"},
    "sqlite3": {f"harvest/serve/{name}.py" for name in ("attempts", "catalog", "database", "jobs")},
    "zarr": {"harvest/corpus/arrays.py", "shared/store/foreign.py", "train/bench/store.py"},
    "obstore": {"shared/files/client.py", "shared/files/connect.py", "shared/files/object_lock.py"},
    "transformer_lens": {"shared/model/bridge.py"},
    "accelerate": {"train/ranks.py"},
    "triton": {"train/sae/sparse/kernels.py", "train/sae/sparse/entries.py", "train/sae/sparse/adam.py"},
    "typer": {
        "cli.py",
        "shared/command/commands.py",
        "shared/command/main.py",
        "shared/command/options.py",
        "shared/command/parameters.py",
        "train/exchange/commands.py",
        "train/features/commands.py",
        "train/steer/commands.py",
        "train/view/commands.py",
    },
    "sae_lens": {"train/bench/runner.py", "train/exchange/writers/sagsae_bijumprelu.py"},
    "dictionary_learning": {"train/bench/runner.py"},
    "wandb": {"train/runs/trackers.py"},
    "tensorboard": set(),  # through accelerate
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written from the top, not relative"
            found.add((node.module or "").split(".")[0])
    return found


def modules_used(path: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names} & known
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= names & known or {node.module} & known
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def circle(uses: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one found; none: an empty list."""
    done: set[str] = set()

    def walk(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        for used in sorted(uses[name]):
            if found := walk(used, [*above, name]):
                return found
        done.add(name)
        return []

    return next((found for name in uses if (found := walk(name, []))), [])


def test_no_module_is_in_a_circle_of_imports() -> None:
    names = {module_name(path): path for path in product()}
    uses = {name: modules_used(path, set(names)) - {name} for name, path in names.items()}
    assert circle(uses) == []


def test_a_circle_is_found_wherever_it_is() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_folder_holds_more_than_fifteen_modules() -> None:
    folders = {path.parent for path in [*product(), *(ROOT / "tests").rglob("*.py")]}
    crowded = {folder: len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) for folder in folders}
    assert {folder.relative_to(ROOT).as_posix(): count for folder, count in crowded.items() if count > 15} == {}


def test_no_class_name_stands_twice() -> None:
    names = Counter(
        node.name
        for path in product()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_no_test_imports_another_test() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (test_\w+|conftest)\b", text, re.MULTILINE), path


def product() -> list[Path]:
    return [ROOT / "cli.py", *(path for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py")))]


@pytest.mark.parametrize("path", product(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_downwards(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    used = imports(path)
    assert not used & FORBIDDEN.get(name.split("/")[0], set())
    for library, allowed in DOORS.items():
        assert library not in used or name in allowed, f"{library} is imported outside {allowed}"


def test_what_runs_in_another_environment_needs_nothing_of_this_one() -> None:
    used = imports(ROOT / "train/bench/runner.py") - set(sys.stdlib_module_names)
    assert used == {"torch", "safetensors", "sae_lens", "dictionary_learning"}


def test_order_and_mathematics_know_no_ranks() -> None:
    assert not imports(ROOT / "train/data/order.py") & {"torch", "accelerate"}
    for path in (ROOT / "train" / "sae").rglob("*.py"):
        allowed = {"torch", "jaxtyping", "shared", "train", "triton"}
        standard = {"abc", "collections", "dataclasses", "functools", "importlib", "math", "os", "pathlib", "typing",
                    "weakref"}  # fmt: skip
        assert imports(path) - allowed <= standard
        lines = [line.split()[1] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("from ")]
        ours = {name for name in lines if name.split(".")[0] in ("shared", "train")}
        assert all(name == "shared.saes" or name.startswith("train.sae") for name in ours), path
