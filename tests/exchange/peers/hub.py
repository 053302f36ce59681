"""Pushes the autoencoders of a run to a stand-in for the hub and lets SAELens and sparsify load them from there:

    python tests/exchange/peers/hub.py FOLDER PYTHON      FOLDER/runs/resid_post is prepare.py's; PYTHON is the tools'

Every autoencoder goes through `SAE.from_pretrained`, those that sparsify can say through `SparseCoder.load_from_hub`.
FOLDER/hub.json says of how many rows the reconstruction is not sagsae's to 1e-6 of the largest activation. Three in a
thousand may: a code that switches at its threshold changes the whole row.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

from support.serving.hub import TOKEN, running_hub  # noqa: E402

ROWS, RELATIVE, SWITCHED = 1024, 1e-6, 3e-3
LOAD = """
import json, sys
from safetensors.torch import load_file, save_file
folder, cases = sys.argv[1], json.loads(sys.argv[2])
for number, case in enumerate(cases):
    x = load_file(f"{folder}/{number}.x")["x"]
    if case["tool"] == "saelens":
        from sae_lens import SAE
        sae = SAE.from_pretrained(case["repo"], case["folder"])
        sae.eval()
        said = sae(x)
    else:
        from sparsify import SparseCoder
        said = SparseCoder.load_from_hub(case["repo"], hookpoint=case["folder"])(x).sae_out
    save_file({"x": said.detach().float().contiguous()}, f"{folder}/{number}.said")
"""


def main(folder: Path, python: str) -> None:
    with running_hub() as hub, tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": f"{scratch}/hf"}
        from shared.errors import UserError
        from shared.schemas.exchange import PushConfig
        from train import load
        from train.exchange.saved import find_saes
        from train.hub.push import push

        cases: list[dict[str, str]] = []
        expected = []
        for number, saved in enumerate(find_saes(folder / "runs/resid_post")):
            for tool in ("saelens", "sparsify"):
                repo = f"tester/n{number}-{tool}"
                try:
                    push(PushConfig.model_validate({"source": saved.folder, "repo": repo, "private": True, "to": tool}))
                except UserError:
                    continue  # sparsify has no thresholds
                (row,) = json.loads(hub.model(repo).files["sagsae/saes.json"])["saes"]
                sae = load(saved.folder)
                x = torch.randn(ROWS, sae.d_in, generator=torch.Generator().manual_seed(number)) * sae.scale
                save_file({"x": x}, f"{scratch}/{len(cases)}.x")
                cases.append({"repo": repo, "tool": tool, "folder": row["folder"], "name": saved.name})
                expected.append((sae(x), x.abs().max()))
        subprocess.run(
            [python, "-c", LOAD, scratch, json.dumps(cases)], check=True, env=os.environ | {"PYTHONPATH": ""}
        )
        found = []
        for number, (case, (ours, largest)) in enumerate(zip(cases, expected, strict=True)):
            apart = (load_file(f"{scratch}/{number}.said")["x"] - ours).abs().amax(dim=1) > RELATIVE * largest
            holds = bool(apart.float().mean() <= SWITCHED)
            found.append({**case, "rows": ROWS, "differ": int(apart.sum()), "holds": holds})
        (folder / "hub.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
