"""sagsae eval --sae: any autoencoder on any store that fits, measured as by hand, and its place in a report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from support.command import Sagsae
from support.folders import contents
from support.stores import in_token_order
from support.variants import imported
from transformers import AutoModelForCausalLM

from harvest.run import harvest
from shared.config import EvalConfig, HarvestConfig, TrainConfig
from shared.errors import UserError
from shared.saes import sae_config
from shared.store.opened import Store
from shared.store.shard import as_float32
from train.data.order import heldout_contexts
from train.evaluate import evaluate
from train.measure.written import MEASURED
from train.report import write_report
from train.report.data import read_run
from train.report.settings import sections
from train.run import train

HOOK = "layer_01/mlp_out"


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two autoencoders of 20 steps, with other held-out tokens than by default, evaluated with the model."""
    saes = tuple(sae_config(arch=arch, d_sae=48, sparsity=0.2) for arch in ("sa-gsae", "jumprelu"))
    out = tmp_path_factory.mktemp("runs") / "three"
    config = TrainConfig(
        store=str(store.root), hook=HOOK, saes=saes, tokens=20 * 64, batch=64, lr=5e-3, streams=4, window_rows=1024,
        heldout_tokens=200, seed=3, exclude_positions=(0, 1), device="cpu", out=out,
    )  # fmt: skip
    train(config)
    evaluate(EvalConfig(run=out, device="cpu"))
    return out


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, harvest_config: Callable[..., HarvestConfig]) -> Store:
    """A store whose language model computes in float32."""
    return Store.open(harvest(harvest_config(tmp_path_factory.mktemp("exact"), dtype="float32")).store)


def asked(sae: Path, out: Path, **values: Any) -> EvalConfig:
    return EvalConfig(**{"sae": sae, "out": out, "device": "cpu", "ce": False, **values})


# ------------------------------------------------------------------------------------- the numbers, by hand


def by_hand(arch: str, folder: Path) -> Callable[[NDArray[np.float64]], tuple[NDArray[Any], NDArray[Any]]]:
    """The autoencoder in the file as numpy functions of float64: x -> (f, x̂)."""
    w = {name: tensor.astype(np.float64) for name, tensor in load_file(folder / "sae_weights.safetensors").items()}

    def both(x: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
        u = (x - w["b_dec"]) @ w["W_enc"].T
        if arch == "relu":
            f = np.maximum(u + w["b_enc"], 0)
        elif arch == "jumprelu":
            f = (u + w["b_enc"]) * (u + w["b_enc"] > w["theta"])
        elif arch == "gated":
            f = (u > w["theta"]) * np.maximum(np.exp(w["r"]) * u + w["b"], 0)
        elif arch == "sa-gsae":
            size = np.abs(u)
            f = np.sign(u) * (size > w["theta"]) * np.maximum(np.exp(w["r"]) * size + w["b"], 0)
        else:
            a = np.maximum(u + w["b_enc"], 0)
            f = a * (a >= w["threshold"])
        return f, f @ w["W_dec"] + w["b_dec"]

    return both


@pytest.mark.parametrize("arch", ["relu", "jumprelu", "gated", "sa-gsae", "batch-topk"])
def test_an_imported_one_measures_what_it_is(
    arch: str, exact: Store, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R², L0, dead and the three losses, from the stored rows, the token ids and the model alone."""
    store, folder = exact, imported(tmp_path / "sae", exact, HOOK, arch)
    done = evaluate(asked(folder, tmp_path / "out", store=str(store.root), hook=HOOK, ce=True))
    (found,) = done.results["saes"]
    assert "does not say its language model" in capsys.readouterr().err

    spec = store.spec
    chosen = heldout_contexts(spec, 100_000, 0)
    ids = store.tokens()[chosen].astype(np.int64)
    counted = ~np.isin(ids, list(spec.special_ids))
    counted[:, : spec.skip_positions] = False
    assert chosen.max() < spec.n_tokens // spec.context, "the last context is short"
    stored = as_float32(in_token_order(store, HOOK), spec.dtype)
    x = stored[(chosen[:, None] * spec.context + np.arange(spec.context))[counted]].astype(np.float64)
    code = by_hand(arch, folder)
    f, x_hat = code(x)
    r2 = 1 - np.square(x - x_hat).sum() / np.square(x - x.mean(0)).sum()
    assert 0.02 < (f != 0).mean() < 0.9, "neither dead nor dense"
    assert done.results["tokens"] == len(x) == found["tokens"]
    assert found["r2"] == pytest.approx(r2, abs=1e-6)
    assert found["l0"] == pytest.approx((f != 0).sum(1).mean(), abs=1e-3)
    assert found["dead_fraction"] == (f == 0).all(0).mean()
    assert (found["sparsity"], found["seed"], found["name"]) == (None, None, "sae")

    model = AutoModelForCausalLM.from_pretrained(model_folder).double().eval()
    tokens, wanted = torch.from_numpy(ids), torch.from_numpy(counted[:, :-1] & ~np.isin(ids[:, 1:], spec.special_ids))

    def loss(change: Callable[[NDArray[Any]], NDArray[Any]] | None) -> float:
        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            changed = output.clone()
            here = torch.from_numpy(counted)
            changed[here] = torch.from_numpy(change(output[here].numpy()))  # type: ignore[misc]
            return changed

        handle = model.gpt_neox.layers[1].mlp.register_forward_hook(hook) if change else None
        with torch.no_grad():
            logits = model(tokens).logits[:, :-1]
        if handle is not None:
            handle.remove()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return float(each[wanted].mean())

    clean, zero, spliced = loss(None), loss(np.zeros_like), loss(lambda x: code(x)[1])
    assert done.results["ce_clean"] == pytest.approx(clean, abs=2e-5)
    assert done.results["ce_zero"] == pytest.approx(zero, abs=2e-5)
    assert found["ce_spliced"] == pytest.approx(spliced, abs=2e-4)
    assert found["ce_recovered"] == pytest.approx((zero - spliced) / (zero - clean), abs=2e-2)


def test_on_a_run_s_rows_it_is_what_the_run_s_evaluation_says(run: Path, tmp_path: Path) -> None:
    """All of a run's, and one by RUN/NAME: the same numbers, and the file says which rows they are of."""
    measured = json.loads((run / "evaluation.json").read_text())
    everything = evaluate(asked(run, tmp_path / "all", rows_of=run, ce=True))
    added = {"origin", "sha256", "imported", "made_for"}
    again = [{key: value for key, value in sae.items() if key not in added} for sae in everything.results["saes"]]
    dead = {sae["name"]: sae["dead"] for sae in again}
    assert sorted(again, key=lambda sae: str(sae["name"])) == sorted(
        ({**sae, "dead": dead[sae["name"]]} for sae in measured["saes"]), key=lambda sae: str(sae["name"])
    )
    for sae in measured["saes"]:
        assert {**sae["dead"], "silent": None} == dead[sae["name"]], "what training logged is the run's"
        one = evaluate(asked(run / sae["name"], tmp_path / sae["name"], rows_of=run)).results
        assert [each["r2"] for each in one["saes"]] == [sae["r2"]]
    config = json.loads((run / "config.json").read_text())
    rows = json.loads((tmp_path / "all" / MEASURED).read_text())["rows"]
    assert rows == {key: config[key] for key in rows}
    assert rows.keys() >= {"snapshot", "shards", "seed", "heldout_tokens", "exclude_positions", "exclude_special"}


def test_a_second_look_keeps_the_losses(store: Store, run: Path, tmp_path: Path) -> None:
    folder = imported(tmp_path / "sae", store, HOOK)
    first = evaluate(asked(folder, tmp_path / "out", rows_of=run, ce=True)).results
    second = evaluate(asked(folder, tmp_path / "out", rows_of=run, peer_conventions=True)).results
    assert first["ce_clean"] == second["ce_clean"] is not None
    assert first["saes"][0]["ce_spliced"] == second["saes"][0]["ce_spliced"] is not None
    assert "peers" in second["saes"][0]


def test_the_default_place_follows_from_what_is_measured(
    store: Store, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = imported(tmp_path / "sae", store, HOOK)

    def place(sae: Path, **rows: Any) -> str:
        file = evaluate(EvalConfig(sae=sae, device="cpu", ce=False, directions=False, **rows)).file
        assert file.name == MEASURED
        assert file.parents[1] == Path("evaluations")
        return file.parent.name

    usual = place(folder, store=str(store.root), hook=HOOK)
    assert usual.startswith("sae-s-layer_01-mlp_out-")
    assert usual == place(folder, store=str(store.root / HOOK))
    other = imported(tmp_path / "other" / "sae", store, HOOK, seed=1)
    names = [usual, place(folder, rows_of=run), place(other, store=str(store.root), hook=HOOK)]
    names.append(place(folder, store=str(store.root), hook=HOOK, heldout_tokens=64))
    assert len(set(names)) == 4


# -------------------------------------------------------------------------------------------- what does not fit


def test_what_does_not_fit_is_refused(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"hook_name": "blocks.2.hook_mlp_out"}, r"was made for 'blocks\.2\.hook_mlp_out'; .*mlp_out is blocks\.1"),
        ({"hook_name": "blocks.1.hook_resid_post"}, "was made for"),
        ({"model": "openai-community/gpt2", "hook_name": "blocks.1.hook_mlp_out"}, None),
        ({"model": {"name": "another", "commit": "ab" * 32}}, "was harvested from .*and their contents differ"),
        ({"model": 7}, "model is 7 instead of a text"),
        ({"hook_name": ["x"]}, "hook_name is .* instead of a text"),
        ({"imported": {"tool": 3, "source": "x"}}, "imported: tool is 3 instead of a text"),
        ({"imported": []}, "imported: is .* instead of an object"),
    ]
    for number, (about, message) in enumerate(cases):
        folder = imported(tmp_path / str(number), store, HOOK, **about)
        config = asked(folder, out, store=str(store.root), hook=HOOK, directions=False)
        if message is None:
            evaluate(config)
            assert "cannot be compared: it is taken to be the same model" in capsys.readouterr().err
            (out / MEASURED).unlink()
            continue
        with pytest.raises(UserError, match=message) as refused:
            evaluate(config)
        assert str(folder) in str(refused.value)
        assert not (out / MEASURED).exists()
        if "was made for" in message or "harvested" in message:
            done = evaluate(config.model_copy(update={"transfer": True}))
            assert done.results["transfer"]
            (out / MEASURED).unlink()


def test_a_layer_s_end_is_the_next_one_s_beginning(store: Store, tmp_path: Path) -> None:
    hook = "layer_01/resid_post"
    folder = imported(tmp_path / "sae", store, hook, hook_name="blocks.2.hook_resid_pre")
    assert evaluate(asked(folder, tmp_path / "out", store=str(store.root), hook=hook)).results["saes"]


def test_another_width_is_refused(store: Store, tmp_path: Path, synth_store: Store) -> None:
    folder = imported(tmp_path / "sae", synth_store, next(iter(synth_store.spec.hookpoints)))
    with pytest.raises(UserError, match=r"is for activations of d_in 16; .*/layer_01/mlp_out has 32"):
        evaluate(asked(folder, tmp_path / "out", store=str(store.root), hook=HOOK, transfer=True))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def synth_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    from harvest.synth import synth
    from shared.config import SynthConfig

    place = tmp_path_factory.mktemp("synth")
    return Store.open(synth(SynthConfig(d_in=16, features=24, tokens=5000, out=str(place))).store)


def test_a_synthetic_store_says_what_was_recovered(synth_store: Store, tmp_path: Path) -> None:
    hook = next(iter(synth_store.spec.hookpoints))
    folder = imported(tmp_path / "sae", synth_store, hook)
    config = asked(folder, tmp_path / "out", store=str(synth_store.root), ce=None)
    assert "rec" in evaluate(config).results["saes"][0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "RUN: name a run, or an autoencoder and a store"),
        ({"run": "r", "sae": "s"}, "got both"),
        ({"sae": "s"}, "on which rows"),
        ({"run": "r", "hook": "mlp_out"}, "--hook: is for --sae"),
        ({"run": "r", "out": "x"}, "--out: is for --sae"),
        ({"sae": "s", "rows_of": "r", "heldout_tokens": 3}, "--heldout-tokens: --rows-of r says it"),
    ],
)
def test_what_is_asked_for_is_clear(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**values)


def test_nothing_else_is_written_over(store: Store, run: Path, tmp_path: Path) -> None:
    folder = imported(tmp_path / "sae", store, HOOK)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / MEASURED).write_text("my notes")
    before = contents(run)
    for out, message in ((tmp_path / "mine", "is not an evaluation"), (run, "is in the run"), (folder, "is in the")):
        with pytest.raises(UserError, match=message):
            evaluate(asked(folder, out, store=str(store.root), hook=HOOK))
    assert contents(run) == before
    assert (tmp_path / "mine" / MEASURED).read_text() == "my notes"


# ---------------------------------------------------------------------------------------------------- the report


def test_a_report_puts_it_beside_the_run_of_the_same_tokens(store: Store, run: Path, tmp_path: Path) -> None:
    """And apart from all others, saying in what the tokens differ."""
    folders = [imported(tmp_path / name, store, HOOK, seed=seed) for seed, name in enumerate(("gem", "jewel"))]
    same = [evaluate(asked(sae, tmp_path / f"same-{sae.name}", rows_of=run)).file.parent for sae in folders]
    other = evaluate(asked(folders[0], tmp_path / "other", store=str(store.root), hook=HOOK)).file.parent

    (part,) = sections([read_run(place) for place in (*same, run)])
    assert dict(part.facts)["Autoencoders"] == "2, and 2 from elsewhere"
    assert dict(part.facts)["Trained on"] == "1,280 tokens"
    labels = {trace["meta"]["group"] for trace in part.figures[0].plots[0].json["data"]}
    assert {"JumpReLU 48", "JumpReLU 48 (gem)", "JumpReLU 48 (jewel)"} <= labels
    notes = " ".join(part.notes)
    assert "gem was imported from SAELens (a-release/layer_1). It was measured on the same tokens" in notes
    assert "metrics.jsonl" not in notes

    both = sections([read_run(place) for place in (run, same[0], other)])
    assert [[each.folder for each in part.runs] for part in both] == [[run, same[0]], [other]]
    assert dict(both[1].facts)["Trained on"] == "other data"
    html = write_report([run, *same, other], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<li>heldout tokens: 200 (setting 1), 100,000 (setting 2)</li>" in html.replace("\n", "")
    assert "λ unknown" in html
    assert "lr: " not in html.split("How the runs were made")[0], "nothing was trained in the second setting"
    assert write_report([other], tmp_path / "alone.html").exists()


def test_training_settings_do_not_keep_it_away(store: Store, run: Path, tmp_path: Path) -> None:
    """Two runs with other learning rates are two settings; it was measured on the tokens of both."""
    import shutil

    from support.folders import rewrite

    other = Path(shutil.copytree(run, tmp_path / "other"))
    rewrite(other / "config.json", lambda config: {**config, "lr": 1.0})
    sae = evaluate(asked(imported(tmp_path / "gem", store, HOOK), tmp_path / "e", rows_of=run)).file.parent
    parts = sections([read_run(place) for place in (run, other, sae)])
    assert [[each.folder for each in part.runs] for part in parts] == [[run, sae], [other, sae]]
    assert "1, 2" in write_report([run, other, sae], tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_damaged_one_is_left_out(store: Store, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = evaluate(asked(imported(tmp_path / "gem", store, HOOK), tmp_path / "e", rows_of=run)).file
    sae.write_text(sae.read_text().replace('"tokens": ', '"tokens": 1'))
    write_report([run, sae.parent], tmp_path / "r.html")
    assert "was altered: its checksum does not match" in capsys.readouterr().err
    sae.write_text("{}")
    write_report([run, sae.parent], tmp_path / "r.html")
    assert "does not say which rows it measured" in capsys.readouterr().err


def test_from_the_command_line(store: Store, run: Path, tmp_path: Path, sagsae: Sagsae) -> None:
    folder = imported(tmp_path / "sae", store, HOOK)
    done = sagsae("eval", "--sae", folder, "--rows-of", run, "--no-ce", "--out", tmp_path / "e", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["sae"], document["evaluation"]) == (str(folder), str(tmp_path / "e"))
    assert document["saes"][0]["sparsity"] is None
