"""Runs the Python of the how-to pages in the tools' environment, as it stands there:

    python tests/exchange/peers/pages.py FOLDER PYTHON      in sagsae's environment; PYTHON is the tools'

The pages' commands make what the Python loads: a run, its export, and its repository on a stand-in for the hub. A page
may name `x`, activations that its reader has. The latents, joined by the page's rule of pairs, have to be sagsae's: to
1e-6 of the largest activation, with at most three in a million active in one of both only.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

from support.pages import THREE, PageBlock, blocks_of, run_block  # noqa: E402
from support.serving.hub import TOKEN, running_hub  # noqa: E402

SAE = "runs/three/saes/sa-gsae-512-lambda0.1-seed0"
ROWS, RELATIVE, FLIPS = 2048, 1e-6, 3e-6
RUN = """
import sys
from safetensors.torch import load_file, save_file
page = {"x": load_file("x")["x"]}
exec(sys.argv[1], page)
f, x_hat = page["sae"].encode(page["x"]), page["sae"](page["x"])
assert "f" not in page or (page["f"] == f).all()
save_file({"f": f.detach(), "x_hat": x_hat.detach()}, "said")
"""


def made_by_the_pages(folder: Path) -> None:
    """Runs the commands that come before the Python on both pages."""
    run_block(PageBlock("sh", THREE, None), folder)
    for page in ("use-in-saelens", "publish-on-the-hub"):
        run_block(next(block for block in blocks_of(ROOT / f"docs/how-to/{page}.md") if block.language == "sh"), folder)


def compared(page: str, folder: Path, python: str) -> dict[str, object]:
    """What the Python of a page computes against sagsae itself."""
    from train import load

    (block,) = (block for block in blocks_of(ROOT / f"docs/how-to/{page}.md") if block.language == "python")
    sae = load(folder / SAE)
    drawn = torch.randn(ROWS, sae.d_in, generator=torch.Generator().manual_seed(0))
    x = sae.weights.b_dec + drawn * sae.scale / sae.d_in**0.5
    save_file({"x": x}, folder / "x")
    environment = os.environ | {"PYTHONPATH": ""}
    subprocess.run([python, "-c", RUN, block.code], cwd=folder, check=True, env=environment)
    said, ours = load_file(folder / "said"), sae.encode(x)
    width = sae.config.d_sae
    f = said["f"][:, :width] - said["f"][:, width:]
    flips = (f != 0) != (ours != 0)
    same, bound = ~flips.any(dim=1), RELATIVE * float(x.abs().max())
    apart = [float((f - ours)[~flips].abs().max()), float((said["x_hat"] - sae.decode(ours))[same].abs().max())]
    active = float((ours != 0).float().mean())
    holds = max(apart) <= bound and int(flips.sum()) <= FLIPS * flips.numel() and 0.01 < active < 0.9
    return {
        "page": page,
        "df": apart[0],
        "dx": apart[1],
        "flips": int(flips.sum()),
        "codes": flips.numel(),
        "holds": holds,
    }


def main(folder: Path, python: str) -> None:
    place = folder / "pages"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with running_hub() as hub:
        hub.owners |= {"owner"}
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str((place / "hf").absolute())}
        made_by_the_pages(place)
        found = [compared(page, place, python) for page in ("use-in-saelens", "publish-on-the-hub")]
    (folder / "pages.json").write_text(json.dumps(found, indent=1))
    print("\n".join(map(json.dumps, found)))  # noqa: T201
    sys.exit(0 if all(each["holds"] for each in found) else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
