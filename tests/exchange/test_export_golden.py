"""Exports against what the tools said of the same ones (golden/exchange.py asked them): a change that breaks a format
is noticed without the tools."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.command import ROOT
from support.exchange import GOLDEN, SAYS, described, fixed, fixed_rows, signed, write_golden

GOLDEN_FILES = ROOT / "tests/golden"
MOST = 1e-6 * float(fixed_rows().abs().max())


@pytest.fixture(scope="module")
def recorded() -> dict[str, NDArray[Any]]:
    return dict(np.load(GOLDEN_FILES / "exchange.npz", allow_pickle=False))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("golden")
    return root, write_golden(root)


@pytest.mark.parametrize("number", range(len(GOLDEN)), ids=lambda number: " ".join(map(str, GOLDEN[number])))
def test_the_files_and_the_function_are_as_the_tools_saw_them(
    written: tuple[Path, list[dict[str, Any]]], recorded: dict[str, NDArray[Any]], number: int
) -> None:
    root, case = written[0], written[1][number]
    expected = json.loads((GOLDEN_FILES / "exchange.json").read_text(encoding="utf-8"))[case["key"]]
    found = described(root / case["folder"], case["tool"])
    assert found["description"] == expected["description"]
    assert list(found["tensors"]) == list(expected["tensors"])
    for name, (dtype, shape, along, length) in expected["tensors"].items():
        assert found["tensors"][name][:2] == [dtype, shape], name
        assert found["tensors"][name][2:] == pytest.approx([along, length], abs=2e-3), name

    sae, x = fixed(case["name"]), fixed_rows()
    f, x_hat = (recorded[f"{case['key']}|{part}"].astype(np.float64) for part in ("f", "x_hat"))
    assert f.shape == (len(x), case["width"])
    scaled = case["tool"] == "dictionary-learning" and "free" in case["name"]
    norms = sae.weights.W_dec.norm(dim=1).double().numpy() if scaled else 1.0
    ours = sae.encode(x)
    assert 20 < np.count_nonzero(f) < 0.7 * f.size
    assert np.abs(signed(f, case["d_sae"]) - ours.double().numpy() * norms).max() <= MOST
    assert np.abs(x_hat - sae.decode(ours).double().numpy()).max() <= max(MOST, 1e-6 * np.abs(x_hat).max())
    folder = root / case["folder"] / ("layers.2" if case["tool"] == "sparsify" else "")
    their_f, their_x_hat = SAYS[case["tool"]](folder, x.double().numpy())
    assert np.abs(f - their_f).max() <= MOST, "the test's own mathematics are not the tool's"
    assert np.abs(x_hat - their_x_hat).max() <= max(MOST, 1e-6 * np.abs(x_hat).max())


def test_every_export_was_recorded(recorded: dict[str, NDArray[Any]]) -> None:
    assert len(recorded) == 2 * len(GOLDEN)
    sizes = [(GOLDEN_FILES / name).stat().st_size for name in ("exchange.npz", "exchange.json")]
    assert sum(sizes) < 200_000
