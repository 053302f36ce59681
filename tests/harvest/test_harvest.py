"""A harvest stores what the model computes, exactly as many rows as were asked for, and survives being killed."""

import errno
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command import Sagsae
from support.folders import before_each_file, contents
from support.models import CONTEXT, save_corpus, save_model, sentences
from support.stores import in_token_order, manifest_lines
from transformers import AutoModelForCausalLM

import harvest.disk_space
import harvest.run
from harvest.begin import too_little
from harvest.run import harvest as run_harvest
from shared.config import HarvestConfig
from shared.errors import BusyError, DamagedError, Interrupted, UserError
from shared.files.local import LocalFiles
from shared.files.locks import folder_lock
from shared.store.opened import Store, is_store
from shared.store.shard import as_float32
from shared.store.verify import verify

Config = Callable[..., HarvestConfig]


def test_rows_equal_a_direct_forward_bit_for_bit(harvest_config: Config, model_folder: Path, tmp_path: Path) -> None:
    config = harvest_config(tmp_path, store_dtype="float32", dtype="float32", layers=(1, 2), tokens=1203)
    store = Store.open(run_harvest(config).store)
    assert store.spec.n_tokens == store.n_rows == 1203, "exactly as many rows as asked for"
    assert len(store.spec.hookpoints) == 6
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            found.setdefault(name, []).append((output[0] if isinstance(output, tuple) else output).flatten(0, 1))

        return hook

    for layer in (1, 2):
        block = model.gpt_neox.layers[layer]
        for name, module in (("resid_post", block), ("attn_out", block.attention), ("mlp_out", block.mlp)):
            module.register_forward_hook(keep(f"layer_{layer:02d}/{name}"))
    tokens = torch.from_numpy(store.tokens().astype("int64"))
    per_batch, per_shard = 128 // CONTEXT, 512 // CONTEXT
    with torch.inference_mode():
        for shard in torch.split(tokens, per_shard):
            for batch in torch.split(shard, per_batch):
                model(batch, use_cache=False)
    for hook, parts in found.items():
        assert np.array_equal(in_token_order(store, hook), torch.cat(parts)[:1203].numpy()), hook


def test_bfloat16_is_the_rounded_float32(store: Store, harvest_config: Config, tmp_path: Path) -> None:
    exact = Store.open(run_harvest(harvest_config(tmp_path, store_dtype="float32")).store)
    for hook in store.spec.hookpoints:
        expected = torch.from_numpy(in_token_order(exact, hook)).bfloat16().float().numpy()
        assert np.array_equal(as_float32(in_token_order(store, hook), "bfloat16"), expected)


def test_shards_that_cut_contexts(harvest_config: Config, tmp_path: Path) -> None:
    """A context longer than the shard's remainder is computed for both shards; no row is lost or doubled."""
    odd = Store.open(run_harvest(harvest_config(tmp_path / "odd", context=23, tokens=1000, shard_rows=192)).store)
    whole = Store.open(run_harvest(harvest_config(tmp_path / "whole", context=23, tokens=1000, shard_rows=1024)).store)
    for hook in odd.spec.hookpoints:
        cut, uncut = (as_float32(in_token_order(s, hook), "bfloat16") for s in (odd, whole))
        np.testing.assert_allclose(cut, uncut, rtol=2**-6, atol=1e-3)


def test_tokens_are_packed_and_bos_is_a_policy(harvest_config: Config, tmp_path: Path) -> None:
    plain = Store.open(run_harvest(harvest_config(tmp_path / "a", hooks=("mlp_out",))).store)
    assert plain.spec.bos_id is None, "this tokenizer adds none by itself"
    assert (plain.tokens() == 0).sum() > 50, "documents are joined by the end-of-text token"
    begun = Store.open(run_harvest(harvest_config(tmp_path / "b", hooks=("mlp_out",), bos="true")).store)
    assert begun.spec.bos_id == 0, "0 is a valid id"
    assert (begun.tokens()[:, 0] == 0).all()


def test_all_of_a_corpus_by_default(harvest_config: Config, tmp_path: Path) -> None:
    store = Store.open(run_harvest(harvest_config(tmp_path, tokens=None, hooks=("mlp_out",))).store)
    assert store.spec.n_tokens == store.tokens().size
    assert store.spec.corpus["documents"] == 400


def test_the_same_call_again_is_complete(harvest_config: Config, tmp_path: Path, capsys: Any) -> None:
    config = harvest_config(tmp_path)
    before = contents(Path(run_harvest(config).store))
    again = run_harvest(config)
    assert "complete" in capsys.readouterr().err
    assert contents(Path(again.store)) == before
    assert run_harvest(harvest_config(tmp_path, overwrite=True, seed=1)).tokens == 5000
    assert contents(Path(again.store)) != before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed: the store has 0, this asks for 1"),
        ({"context": 32}, "context: the store has 16, this asks for 32"),
        ({"tokens": 100}, "n_tokens: the store has 5000, this asks for 100"),
        ({"codec": "lz4", "bos": "true"}, "bos_id: the store has None, this asks for 0; codec: the store has zstd"),
        ({"layers": (2,)}, "hookpoints"),
        ({"shuffle_documents": False}, "shuffled: the store has True"),
    ],
)
def test_another_request_for_the_same_store_is_refused(
    harvest_config: Config, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    run_harvest(harvest_config(tmp_path, hooks=("mlp_out",)))
    with pytest.raises(UserError, match=named) as refused:
        run_harvest(harvest_config(tmp_path, **{"hooks": ("mlp_out",), **changes}))
    assert "--overwrite" in str(refused.value)


def test_a_store_of_another_corpus_is_refused_by_name(harvest_config: Config, tmp_path: Path) -> None:
    run_harvest(harvest_config(tmp_path))
    mine = save_corpus(tmp_path / "mine.jsonl", sentences(900))
    with pytest.raises(UserError, match=r"corpus: the store has corpus\.jsonl, this asks for mine\.jsonl\.") as refused:
        run_harvest(harvest_config(tmp_path, corpus=str(mine)))
    assert "another --name" in str(refused.value)
    assert "{" not in str(refused.value), "nothing is shown as Python writes it"


def test_a_store_of_another_model_is_refused(harvest_config: Config, model_folder: Path, tmp_path: Path) -> None:
    run_harvest(harvest_config(tmp_path))
    other = save_model(tmp_path / "other", hidden_act="relu")
    shutil.copy(model_folder / "corpus.jsonl", other)
    with pytest.raises(UserError, match="model: the store has"):
        run_harvest(harvest_config(tmp_path, model=str(other)))


def test_unusable_input_writes_nothing(harvest_config: Config, tmp_path: Path) -> None:
    short = save_corpus(tmp_path / "short.jsonl", ["a cat"])
    out = tmp_path / "out"
    refused: dict[str, dict[str, Any]] = {
        r"--context 65: .* at most 64 tokens": {"context": 65},
        r"--layer 3: the model has 3 layers": {"layers": (3,)},
        r"parallel residual": {"hooks": ("resid_mid",)},
        r"never fires in a forward pass": {"hooks": ("blocks.1.attn.hook_pattern",)},
        r"no such folder": {"model": "./nowhere"},
        r"no such file or folder": {"corpus": "./nowhere.jsonl"},
        r"--device cuda:7": {"device": "cuda:7"},
        r"not a multiple of chunk_rows = 64": {"shard_rows": 100},
    }
    for message, changes in refused.items():
        with pytest.raises((UserError, ValueError), match=message):
            run_harvest(harvest_config(out, **changes))
        assert not out.exists(), message
    with pytest.raises(UserError, match=r"the corpus has \d+ tokens, less than one row of 16"):
        run_harvest(harvest_config(out, corpus=str(short), tokens=None))
    with pytest.raises(UserError, match=r"5,000 were asked for. Lower --tokens to \d"):
        run_harvest(harvest_config(out, corpus=str(save_corpus(tmp_path / "few.jsonl", sentences(3)))))
    assert list(out.iterdir()) == [], "not even a lock is left"
    before = contents(Path(run_harvest(harvest_config(out)).store))
    with pytest.raises(UserError, match="were asked for"):
        run_harvest(harvest_config(out, tokens=10**6, overwrite=True))
    assert contents(out / "s") == before, "a store goes only when there is something to put in its place"


def test_tokens_that_fill_no_whole_row_are_named() -> None:
    said = too_little(5268, 41, 128, 5268)
    assert said.startswith("the corpus has 5,268 tokens, which make 41 rows of 128 = 5,248; 5,268 were asked for.")
    assert "Lower --tokens to 5,248" in said
    assert "less than one row of 128. Lower --context" in too_little(100, 0, 128, 5268)


def test_a_folder_that_is_no_store_is_left_alone(harvest_config: Config, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("years of work")
    for _ in range(2):
        with pytest.raises(UserError, match="exists and is not a store"):
            run_harvest(harvest_config(tmp_path, overwrite=True))
        (tmp_path / "s" / ".lock").touch()
    assert (tmp_path / "s" / "thesis.tex").exists()


def test_a_store_whose_description_is_damaged_is_not_begun_anew(harvest_config: Config, tmp_path: Path) -> None:
    run_harvest(harvest_config(tmp_path))
    (tmp_path / "s" / "zarr.json").write_text("{")
    before = contents(tmp_path / "s")
    with pytest.raises(DamagedError, match="cannot be read"):
        run_harvest(harvest_config(tmp_path))
    assert contents(tmp_path / "s") == before


def test_a_store_that_lost_commits_is_completed(harvest_config: Config, tmp_path: Path) -> None:
    before = contents(Path(run_harvest(harvest_config(tmp_path)).store))
    manifest = tmp_path / "s" / "manifest" / "index.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-2]))
    assert run_harvest(harvest_config(tmp_path)).tokens == 5000
    assert contents(tmp_path / "s") == before


def test_a_store_being_written_is_not_overwritten(harvest_config: Config, tmp_path: Path) -> None:
    before = contents(Path(run_harvest(harvest_config(tmp_path)).store))
    with folder_lock(tmp_path / "s"), pytest.raises(UserError, match=r"process \d+ on .* is writing here"):
        run_harvest(harvest_config(tmp_path, overwrite=True))
    assert contents(tmp_path / "s") == before


def test_unwritable_output(harvest_config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*: cannot be written to"):
        run_harvest(harvest_config(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file: is a file"):
        run_harvest(harvest_config(tmp_path, name="file"))


def test_a_disk_too_small_is_refused_before_any_work(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(
        "harvest.disk_space.shutil.disk_usage", lambda _path: shutil._ntuple_diskusage(1 << 40, 9, 1000)
    )
    with pytest.raises(BusyError, match=r"about 0\.00\d+ GB are needed, 1e-06 GB are free"):
        run_harvest(harvest_config(tmp_path))
    said = capsys.readouterr().err
    assert "5,000 tokens of 3 hookpoints" in said
    assert "layer_01/attn_out: d_in 32, about 0.000249 GB" in said, "the estimate is printed"
    assert not (tmp_path / "s").exists()


def test_a_disk_that_fills_up(harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def full(_path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 80:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        before_each_file(patch, full)
        with pytest.raises(UserError, match=r"the disk is full. Free space, then run the same command again"):
            run_harvest(harvest_config(tmp_path))
    half = Store.open(tmp_path / "s")
    assert 0 < len(half.commits) < 10
    assert verify(half, full=True).lines == []
    assert list(half.root.rglob("*.tmp")) == [], "what the shard had written takes up no room"
    run_harvest(harvest_config(tmp_path))
    whole = run_harvest(harvest_config(tmp_path / "whole"))
    assert contents(tmp_path / "s") == contents(Path(whole.store))


def test_infinite_activations_are_named(harvest_config: Config, model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(model_folder, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][5] = float("inf")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    named = r"layer_01/\w+: NaN or infinite activations in 512 rows, the first of them row 0 \(context 0, position 0\)"
    with pytest.raises(UserError, match=named):
        run_harvest(harvest_config(tmp_path, model=str(broken)))
    assert Store.open(tmp_path / "s").commits == {}


def test_a_stop_request_between_batches(
    harvest_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop:
        def __enter__(self) -> Callable[[], bool]:
            return lambda: is_store(LocalFiles(tmp_path / "s")) and len(Store.open(tmp_path / "s").commits) >= 3

        def __exit__(self, *_: object) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(harvest.run, "stop_requests", Stop)
        with pytest.raises(Interrupted, match="run the same command again"):
            run_harvest(harvest_config(tmp_path))
    assert 3 <= len(Store.open(tmp_path / "s").commits) < 10
    assert run_harvest(harvest_config(tmp_path)).tokens == 5000


def test_kill_9_and_again(sagsae: Sagsae, tmp_path: Path) -> None:
    """Killed in the middle of writing, stopped, then finished: the same bytes as a store harvested in one go."""
    command = ["harvest", "--model", "tiny", "--tokens", "60000", "--hook", "mlp_out", "--hook", "attn_out",
               "--set", "shard_rows=2048", "--set", "chunk_rows=512", "--json", "--out"]  # fmt: skip
    root = tmp_path / "killed" / "tiny"
    stop = (signal.SIGKILL, lambda: manifest_lines(root) >= 3)
    assert sagsae(*command, tmp_path / "killed", stop=stop).returncode == -signal.SIGKILL
    half = Store.open(root)
    assert 3 <= len(half.commits) < 30
    assert verify(half, full=True).lines == [], "what is committed is whole"
    asked = sagsae(*command, tmp_path / "killed", stop=(signal.SIGTERM, lambda: manifest_lines(root) >= 10))
    assert asked.returncode == 130
    assert "To continue, run the same command again" in asked.stderr
    for folder in ("killed", "whole"):
        done = sagsae(*command, tmp_path / folder)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["tokens"] == 60_000
    assert contents(root) == contents(tmp_path / "whole" / "tiny")
