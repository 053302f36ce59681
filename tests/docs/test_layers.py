"""Who may import what. An import that points the wrong way is the first step of a tangle."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "shared": {"harvest", "train", "cli", "tests"},
    "harvest": {"train", "cli", "tests"},
    "train": {"harvest", "cli", "tests"},
}
DOORS = {
    "zarr": {"harvest/corpus/arrays.py", "shared/store/foreign.py", "train/bench/store.py"},
    "obstore": {"shared/files/client.py", "shared/files/connect.py", "shared/files/object_lock.py"},
    "transformer_lens": {"shared/model/bridge.py"},
    "accelerate": {"train/ranks.py"},
    "triton": {"train/sae/sparse/kernels.py", "train/sae/sparse/entries.py", "train/sae/sparse/adam.py"},
    "typer": {"cli.py"},
    "sae_lens": {"train/bench/runner.py"},
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
