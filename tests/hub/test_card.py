"""The code on the card of a pushed autoencoder, run where sagsae cannot be imported."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exchange import BASE, GATES, check_equal, rows, save
from support.serving.hub import Hub
from support.serving.hub import hub as hub

from shared.schemas.exchange import PushConfig
from train.autoencoder import Autoencoder
from train.hub.push import push

# huggingface_hub itself makes requests in a form that its HTTP library deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
FAMILIES = (*BASE, "signed-topk")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"fold_b_dec": folded}) for name in FAMILIES for folded in (False, True)),
    *((name, {"form": "jumprelu"}) for name in (*GATES, "relu")),
]
OURS = ("sagsae", "shared", "harvest", "train", "cli", "serve")
RUN = """
import importlib.util, json, sys
sys.path.append(sys.argv[1])
import torch
assert not [name for name in json.loads(sys.argv[2]) if importlib.util.find_spec(name)]
for place, code in json.loads(sys.stdin.read()).items():
    names = {}
    exec(code, names)
    with torch.no_grad():
        f = names["encode"](torch.load(place + "/x.pt"))
        torch.save((f, names["decode"](f)), place + "/said.pt")
"""
"""`-S` leaves out the files by which an editable install is found; packages come from the folder that is named."""


def code_of(page: str) -> str:
    """The block of a card that needs nothing but torch, safetensors and huggingface_hub."""
    code: str = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def encode" in block)
    assert len(code.splitlines()) <= 10
    used = set(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE))
    assert used == {"torch", "huggingface_hub", "safetensors"}
    return code


def run_without_sagsae(codes: dict[Path, str], place: Path) -> None:
    packages = str(Path(torch.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, packages, json.dumps(OURS)],
        input=json.dumps({str(folder): code for folder, code in codes.items()}),
        capture_output=True, text=True, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_code_on_the_card_computes_the_same_without_sagsae(hub: Hub, tmp_path: Path) -> None:
    x, codes = rows(256), {}
    saes: dict[Path, Autoencoder] = {}
    for number, (name, how) in enumerate(CASES):
        place = tmp_path / f"{number}"
        saes[place] = save(place / "sae", name)
        torch.save(x, place / "x.pt")
        repo = f"tester/n{number}"
        push(PushConfig.model_validate({"source": place / "sae", "repo": repo, "private": True, **how}))
        codes[place] = code_of(hub.model(repo).files["README.md"].decode())
    run_without_sagsae(codes, tmp_path)
    for place, sae in saes.items():
        f, x_hat = torch.load(place / "said.pt")
        check_equal(sae, x, (f.double().numpy(), x_hat.double().numpy()))
