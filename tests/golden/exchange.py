"""Makes exchange.json and exchange.npz: what the tools themselves compute from a fixed export of every family.

    .venv/bin/python tests/golden/exchange.py export FOLDER              in sagsae's environment
    .peers/env/bin/python tests/golden/exchange.py record FOLDER         in the tools' (make test-peers makes it)

exchange.json holds each export's description and its tensors' names, types, shapes and sums; exchange.npz f and x̂ of
six rows. tests/exchange/test_export_golden.py compares both with what the project writes and computes today.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent


def write_exports(root: Path) -> None:
    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
    from support.exchange import described, fixed_rows, write_golden

    cases = write_golden(root)
    np.save(root / "x.npy", fixed_rows().numpy())
    (root / "cases.json").write_text(json.dumps(cases))
    found = {case["key"]: described(root / case["folder"], case["tool"]) for case in cases}
    (HERE / "exchange.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def record(root: Path) -> None:
    import torch

    sys.path.insert(0, str(HERE.parent / "exchange/peers"))
    from check import READERS  # type: ignore[import-not-found]

    x = torch.from_numpy(np.load(root / "x.npy"))
    found: dict[str, Any] = {}
    with torch.no_grad():
        for case in json.loads((root / "cases.json").read_text()):
            reader, f, x_hat, _ = next(READERS[case["tool"]](root, case, x))
            found[f"{case['key']}|f"], found[f"{case['key']}|x_hat"] = f.numpy(), x_hat.numpy()
            print(case["key"], "by", reader, int((f != 0).sum()), "active")  # noqa: T201
    np.savez_compressed(HERE / "exchange.npz", **found)


if __name__ == "__main__":
    {"export": write_exports, "record": record}[sys.argv[1]](Path(sys.argv[2]).resolve())
