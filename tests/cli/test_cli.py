"""The command line as a person meets it: fast help, one message for every mistake, one JSON document when asked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from support.command import ROOT, Sagsae
from support.stores import unfinished

from shared.store.opened import Store
from shared.store.spec import shard_file

SAE_KEYS = {
    "arch",
    "d_sae",
    "sparsity",
    "seed",
    "r2",
    "l0",
    "l0_pos",
    "l0_neg",
    "dead_fraction",
    "ce_recovered",
    "tokens",
}


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'zarr', 'numpy', 'pydantic', 'accelerate', 'datasets'} & set(sys.modules))"
    )
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - started)
    assert done.stdout.splitlines()[-1] == "set()"
    for command in ("harvest", "train", "eval", "report", "demo", "store"):
        assert command in done.stdout
    assert min(seconds) < 0.5


def test_help_of_a_command_needs_its_schema_alone() -> None:
    code = (
        "import sys, cli\n"
        "try: cli.app(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'zarr', 'accelerate', 'datasets', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_verify_starts_light(store: Store) -> None:
    """It imports only what it needs, and numpy's matrix products get no threads of their own, which would spin."""
    code = (
        "import os, sys, time, cli\n"
        f"try: cli.app(['store', 'verify', '--full', {str(store.root)!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "print({'torch', 'zarr', 'rich', 'tomllib', 'shared.config', 'obstore'} & set(sys.modules))\n"
        "ended = time.monotonic() + 5\n"
        "while (threads := len(os.listdir('/proc/self/task'))) > 1 and time.monotonic() < ended: time.sleep(0.05)\n"
        "print(threads)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-2:] == ["set()", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["harvest", "--model", "nope"], "error: --model nope: is not an alias"),
        (["harvest"], "error: model: is needed; give --model"),
        (["harvest", "--model", "tiny", "--layer", "9"], "error: --layer 9: the model has 4 layers, 0 to 3"),
        (
            ["harvest", "--model", "tiny", "--layer", "--5"],
            "error: --layer: must be a layer number from 0, or mid (got '--5')",
        ),
        (["harvest", "--model", "tiny", "--hook", "resid_mid"], "Use resid_pre, resid_post, attn_out or mlp_out"),
        (["harvest", "--model", "tiny", "--context", "4096"], "was made for at most 128 tokens"),
        (["harvest", "--model", "tiny", "--tokens", "-5"], "error: --tokens: must be 1 or more (got -5)"),
        (["harvest", "--model", "tiny", "--corpus", "./none"], "there is no such file or folder"),
        (["harvest", "--model", "tiny", "--tokens", "999999999999"], "the whole disk has"),
        (["train", "--store", "none", "--arch", "gated:8"], "does not exist. Make a store with: sagsae harvest"),
        (["train", "--store", "none"], "error: --arch: which autoencoders, and how wide? Give --arch ARCH:WIDTH"),
        (["train", "--config", "none.toml"], "error: --config none.toml: cannot be read"),
        (["eval", "none"], "is not a training run"),
        (["report", "none"], "none"),
        (["store", "ls", "none"], "there is no such folder"),
        (["store", "verify", "none"], "does not exist"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    sagsae: Sagsae, tmp_path: Path, arguments: list[str], message: str
) -> None:
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        done = sagsae(*arguments)
    finally:
        os.chdir(before)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.rglob("*.json")), "nothing is half-written"


def test_stores_are_listed_described_verified_and_removed(sagsae: Sagsae, store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.root, tmp_path / "stores" / "s"))
    rows = json.loads(sagsae("store", "ls", tmp_path / "stores", "--json").stdout)
    assert [f"layer_{row['layer']}/{row['hook']}" for row in rows] == list(store.spec.hookpoints)
    assert {row["tokens"] for row in rows} == {5000}
    about = json.loads(sagsae("store", "info", copy, "--json").stdout)
    assert about["state"] == "final"
    assert about["spec"]["corpus"]["documents"] > 0
    for depth in ("--quick", "--full"):
        done = sagsae("store", "verify", copy, depth)
        assert (done.returncode, "no damage" in done.stdout) == (0, True)
    os.truncate(copy / shard_file("layer_01/attn_out", 2, True), 100)
    done = sagsae("store", "verify", copy, "--json")
    assert done.returncode == 3
    assert len(json.loads(done.stdout)["damage"]) == 1
    done = sagsae(
        "train", "--store", copy, "--hook", "attn_out", "--arch", "gated:8", "--batch", "64", "--out", tmp_path / "r"
    )
    assert done.returncode == 3
    assert "List all damage with: sagsae store verify" in done.stderr
    assert "Traceback" not in done.stderr
    done = sagsae("store", "rm", copy, "--yes", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"store": str(copy), "deleted": f"5,000 tokens of {store.spec.model['name']}"}
    assert not copy.exists()


def test_widths_by_expansion_and_several_learning_rates(sagsae: Sagsae, store: Store, tmp_path: Path) -> None:
    options = ["--hook", "mlp_out", "--arch", "gated", "--expansion", "1.5", "--expansion", "2", "--sparsity", "0.2",
               "--lr", "1e-3", "--lr", "5e-3", "--batch", "64", "--tokens", "640",
               "--out", tmp_path / "run"]  # fmt: skip
    done = sagsae("train", "--store", store.root, *options, "--json")
    assert done.returncode == 0, done.stderr
    names = [sae["name"] for sae in json.loads(done.stdout)["saes"]]
    assert names == [f"gated-{d_sae}-lambda0.2-seed0-lr-{lr}" for d_sae in (48, 64) for lr in ("0.001", "0.005")]
    done = sagsae("train", *options)
    assert (done.returncode, "say which with --store" in done.stderr) == (2, True)


def test_says_which_it_is(sagsae: Sagsae) -> None:
    done = sagsae("--version")
    assert (done.returncode, done.stdout.split(", ")[1]) == (0, f"torch {version('torch')}")
    assert done.stdout.startswith("sagsae 0.")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_meets_its_promises(sagsae: Sagsae, tmp_path: Path) -> None:
    done = sagsae("demo", "--out", tmp_path / "demo", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"store", "runs", "report", "seconds", "saes"} <= set(result)
    report, latents = Path(result["report"]), Path(result["latents"])
    assert report.stat().st_size > 100_000
    link = latents.relative_to(report.parent).as_posix()
    assert latents.is_file()
    assert f'<a href="{link}">' in report.read_text()
    assert len(result["saes"]) >= 8
    for arch in ("sa-gsae", "gated"):
        saes = [sae for sae in result["saes"] if sae["arch"] == arch]
        assert all(set(sae) >= SAE_KEYS for sae in saes)
        assert max(sae["r2"] for sae in saes if sae["l0"] <= 64) >= 0.85
        assert max(sae["ce_recovered"] for sae in saes) >= 0.9
    again = sagsae("demo", "--out", tmp_path / "demo", "--json")
    assert json.loads(again.stdout)["saes"] == result["saes"], "the same command again changes nothing"


def test_a_harvest_is_followed_from_outside(sagsae: Sagsae, store: Store, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.root, tmp_path / "s"))
    done = sagsae("store", "tail", copy, "--json")
    assert (done.returncode, json.loads(done.stdout)["shards"]) == (0, 10)
    assert "10/10 shards, 5,000 tokens" in done.stderr
    log, lines = unfinished(copy)
    log.write_text("".join(lines[:4]))

    def more() -> bool:
        log.write_text("".join(lines[:7]))
        return time.monotonic() > began + 6

    began = time.monotonic()
    stopped = sagsae("store", "tail", copy, "--every", "0.2", stop=(signal.SIGINT, more))
    assert "4/10 shards, 2,048 tokens" in stopped.stdout or "7/10 shards" in stopped.stdout
    assert "no harvest is writing into it" in stopped.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bench_train_prints_its_ratios(sagsae: Sagsae) -> None:
    done = sagsae("bench", "train", "--rounds", "1", "--width", "256", "--batch", "256", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    promised = "sparse_vs_dense_256 dense_vs_autograd_256 products_share_256 one_pass_vs_separate".split()
    assert all(found[key] > 0 for key in promised)
    assert (found["saelens_vs_sparse_256"], found["dictionary_learning_vs_dense_256"]) == (None, None)
    assert (list(found["peers_left_out"]), found["peers"]) == (["saelens", "dictionary_learning"], {})
    assert 0 <= found["data_wait_share"] < 1
    assert {"step, sparse, d_sae 256", "step, autograd, d_sae 256"} <= {row["what"] for row in found["figures"]}
    assert sagsae("bench", "train", "--precision", "float8").returncode == 2


@pytest.mark.slow
def test_bench_store_prints_its_ratios(sagsae: Sagsae) -> None:
    """That every figure is there and the ratio of real activations is what it should be; never how fast it was."""
    done = sagsae("bench", "store", "--tokens", "32768", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    promised = ("reader_vs_decode reader_crc_vs_decode windows_vs_decode batches_vs_decode reader_vs_zarr_zstd "
                "reader_vs_zarr_lz4 writer_vs_encode_zstd writer_vs_encode_lz4 checksums_vs_verify_full "
                "checksums_vs_verify_full_lz4 checksums_vs_verify_full_none "
                "checksums_vs_verify_full_int8").split()  # fmt: skip
    assert all(found[key] > 0 for key in promised)
    assert found["ratio_zstd"] > 1.43
    assert 0 <= found["wait_share_at_half_speed"] < 1
    assert {"decode zstd", "windows lz4", "writer zstd", "checksums none", "verify --full int8"} <= {
        row["what"] for row in found["figures"]
    }
