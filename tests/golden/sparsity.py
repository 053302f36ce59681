"""Makes sparsity.json: what SAELens loads of the firing frequencies in our exports, and what it computes itself.

    .venv/bin/python tests/golden/sparsity.py .peers/env/bin/python      (make test-peers makes the tools' environment)

A run is pushed to a stand-in for the hub. SAELens' `from_pretrained_with_cfg_and_sparsity` is the one loader that reads
sparsity.safetensors. `own` is the logarithm that SAELens' trainer takes of the codes of the same rows.
tests/exchange/test_sparsity.py compares both with what the project writes today.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

LOAD = """
import json, sys
import numpy as np, torch
from sae_lens import SAE, __version__
from sae_lens.training.sae_trainer import _log_feature_sparsity
found, x = {}, torch.from_numpy(np.load(sys.argv[2]))
for folder in json.loads(sys.argv[3]):
    sae, _, loaded = SAE.from_pretrained_with_cfg_and_sparsity(sys.argv[1], folder)
    with torch.no_grad():
        share = (sae.encode(x).abs() > 0).float().mean(0)
    numbers = {"loaded": loaded, "own": _log_feature_sparsity(share)}
    assert all(each.dtype == torch.float32 and each.shape == (sae.cfg.d_sae,) for each in numbers.values())
    found[folder.split("/")[1]] = {key: [round(v, 6) for v in each.tolist()] for key, each in numbers.items()}
print(json.dumps({"sae_lens": __version__, "rows": len(x), "saes": found}))
"""


def main(python: str) -> None:
    from support.exact.frequencies import counted_run, heldout_rows
    from support.serving.hub import TOKEN, running_hub

    with running_hub() as hub, tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": f"{scratch}/hf"}
        from shared.schemas.exchange import PushConfig
        from train.hub.push import push

        run = counted_run(Path(scratch))
        push(PushConfig(source=str(run), repo="tester/counted", private=True))
        np.save(f"{scratch}/x.npy", heldout_rows(run))
        rows = json.loads(hub.model("tester/counted").files["sagsae/saes.json"])["saes"]
        folders = json.dumps([row["folder"] for row in rows])
        command = [python, "-c", LOAD, "tester/counted", f"{scratch}/x.npy", folders]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ""})
    (HERE / "sparsity.json").write_text(json.dumps(json.loads(done.stdout), sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
