"""Exports of a whole run: where the files lie, what is replaced, what a run and its store say about an autoencoder."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.command import Sagsae
from support.exchange import check_equal, dictionary_learning_says, read, saelens_says, save
from support.folders import before_each_file, contents
from support.models import save_decoder
from transformers import AutoModelForCausalLM

from shared.config import EvalConfig, TrainConfig
from shared.errors import UserError
from shared.model.language_model import LanguageModel
from shared.model.source import resolve_model
from shared.saes import sae_config
from shared.schemas.exchange import ExportConfig
from shared.store.opened import Store
from train.autoencoder import Autoencoder
from train.evaluate import evaluate
from train.exchange.about import FAMILIES, HUB_FAMILIES, about_sae, hf_hook, model_type
from train.exchange.export import Exported, export
from train.exchange.saved import find_saes
from train.run import train
from train.runs.folder import RunFolder

HOOK = "blocks.1.hook_mlp_out"
SA_GSAE, GATED, BATCH_TOPK = "sa-gsae-48-lambda0.2-seed0", "gated-48-lambda0.2-seed0", "batch-topk-48-k4-seed0"


@pytest.fixture(scope="module")
def trained(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three evaluated autoencoders: sa-gsae, gated and batch-topk. Read only."""
    saes = [sae_config(arch=arch, d_sae=48, sparsity=0.2) for arch in ("sa-gsae", "gated")]
    settings = {
        "store": str(store.root), "hook": "mlp_out", "saes": [*saes, sae_config(arch="batch-topk", d_sae=48, k=4)],
        "tokens": 20 * 64, "batch": 64, "lr": 5e-3, "streams": 4, "window_rows": 1024, "device": "cpu",
        "heldout_tokens": 320, "out": tmp_path_factory.mktemp("runs") / "run",
    }  # fmt: skip
    config = TrainConfig.model_validate(settings)
    train(config)
    assert config.out is not None
    evaluate(EvalConfig(run=config.out, ce=False))
    return config.out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def exported(source: Path, out: Path, to: str = "saelens", **more: Any) -> list[Exported]:
    return export(ExportConfig.model_validate({"source": source, "to": to, "out": out, **more}))


def test_all_autoencoders_of_a_run(run: Path, tmp_path: Path) -> None:
    done = exported(run, tmp_path / "out")
    assert [each.folder for each in done] == [tmp_path / "out" / HOOK / name for name in (BATCH_TOPK, GATED, SA_GSAE)]
    evaluation = RunFolder(run).read("evaluation.json")
    for each in done:
        metadata = read(each.folder / "cfg.json")["metadata"]
        measured = next(sae for sae in evaluation["saes"] if sae["name"] == each.name)
        assert (metadata["l0"], metadata["r2"]) == (measured["l0"], measured["r2"])
        assert metadata["dataset_path"] == "corpus.jsonl"
        assert (metadata["hook_name"], metadata["hf_hook_name"]) == (HOOK, "gpt_neox.layers.1.mlp")
        assert (metadata["context_size"], metadata["prepend_bos"], metadata["seqpos_slice"]) == (16, False, [1, None])
        sae = Autoencoder.load(run / "saes" / each.name)
        x = (sae.weights.b_dec + 2 * sae.scale * torch.randn(2048, 32) / 32**0.5).float()
        check_equal(sae, x, saelens_says(each.folder, x.double().numpy()))


def test_one_of_a_run_by_name_and_by_folder(run: Path, tmp_path: Path) -> None:
    for number, source in enumerate((run / SA_GSAE, run / "saes" / SA_GSAE)):
        (done,) = exported(source, tmp_path / str(number))
        assert (done.folder, done.name, done.width) == (tmp_path / str(number), SA_GSAE, 96)
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def test_dead_latents_are_those_of_the_exported_width(run: Path, tmp_path: Path) -> None:
    """A pole that never fired is a dead latent of the doubled dictionary."""
    (done,) = exported(run / SA_GSAE, tmp_path / "out")
    sae = next(each for each in RunFolder(run).read("evaluation.json")["saes"] if each["name"] == SA_GSAE)
    never = sae["densities"]["never"]
    metadata = read(done.folder / "cfg.json")["metadata"]
    assert metadata["num_dead_features"] == never["positive"] + never["negative"] >= never["either"]


def test_a_folder_of_an_earlier_version_takes_the_rest_from_its_run(run: Path, tmp_path: Path) -> None:
    """It says neither corpus nor positions: the run and its store do; without the store a note does."""
    cfg = run / "saes" / GATED / "cfg.json"
    new = ("corpus", "exclude_special", "exclude_positions", "crc32c")
    cfg.write_text(json.dumps({key: value for key, value in read(cfg).items() if key not in new}))
    metadata = read(exported(run / GATED, tmp_path / "a")[0].folder / "cfg.json")["metadata"]
    assert (metadata["dataset_path"], metadata["exclude_special_tokens"]) == ("corpus.jsonl", True)
    assert metadata["seqpos_slice"] == [1, None]
    alone = Path(shutil.copytree(run / "saes" / GATED, tmp_path / "alone"))
    (done,) = exported(alone, tmp_path / "b")
    metadata = read(done.folder / "cfg.json")["metadata"]
    assert (metadata["dataset_path"], metadata["exclude_special_tokens"]) == (None, None)
    assert metadata["seqpos_slice"] == [None]
    assert "dataset_path" in done.notes[0]
    assert any("sagsae eval" in note for note in done.notes)


# all or nothing, and nothing of others


def test_nothing_is_written_when_one_of_them_cannot_be(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "saes" / SA_GSAE)
    save(run / "saes" / SA_GSAE, "topk", {"hook_name": HOOK})
    with pytest.raises(UserError, match="gemma-scope cannot say topk"):
        exported(run, tmp_path / "out", "gemma-scope")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def check(path: Path) -> None:
        asked.append(path)
        if len(asked) == 4:
            raise OSError(28, "No space left on device")

    before_each_file(monkeypatch, check)
    with pytest.raises(UserError, match="disk is full"):
        exported(run, tmp_path / "out")
    assert len(asked) == 4
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_export_is_replaced_and_only_when_asked(run: Path, tmp_path: Path) -> None:
    exported(run / GATED, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        exported(run / SA_GSAE, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    exported(run / SA_GSAE, tmp_path / "out", overwrite=True)
    assert read(tmp_path / "out/cfg.json")["metadata"]["sagsae"]["arch"] == "sa-gsae"
    (tmp_path / "out/cfg.json").write_text('{"architecture": "gated", "metadata": {}}')
    with pytest.raises(UserError, match="Choose another --out"):
        exported(run / SA_GSAE, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("to", ["saelens", "dictionary-learning", "sparsify", "gemma-scope"])
def test_every_format_knows_its_own_files(tmp_path: Path, to: str) -> None:
    save(tmp_path / "sae", "relu")
    exported(tmp_path / "sae", tmp_path / "out", to)
    before = contents(tmp_path / "out")
    exported(tmp_path / "sae", tmp_path / "out", to, overwrite=True)
    assert contents(tmp_path / "out") == before, "the same export is the same bytes"


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_other_files_are_in_the_way(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match="Choose another --out"):
        exported(run / GATED, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_files_beside_an_export_stay(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")
    exported(run / GATED, tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text() == "mine"


def test_runs_stores_and_files_are_no_places_for_an_export(run: Path, tmp_path: Path) -> None:
    store = Path(RunFolder(run).config().store)
    for place in (run, run / "exported", run / "saes" / GATED, store / "inside"):
        with pytest.raises(UserError, match="Choose another --out"):
            exported(run / GATED, place, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no folder"):
        exported(run / GATED, tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is no folder"):
        exported(run / GATED, tmp_path / "link")


def test_a_link_in_the_place_of_a_file_is_not_followed(run: Path, tmp_path: Path) -> None:
    exported(run / GATED, tmp_path / "out")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out/sae_weights.safetensors").unlink()
    (tmp_path / "out/sae_weights.safetensors").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="did not write it"):
        exported(run / GATED, tmp_path / "out", overwrite=True)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("hook", ["..", "../../x", "/etc/x", "a\\b", "...", "blocks.1.hook_mlp_out/../../y"])
def test_a_hookpoint_of_anybody_stays_inside_the_folder(run: Path, tmp_path: Path, hook: str) -> None:
    """cfg.json names the folder of several autoencoders, and of sparsify's hookpoint."""
    for cfg in run.glob("saes/*/cfg.json"):
        cfg.write_text(json.dumps({key: x for key, x in read(cfg).items() if key != "crc32c"} | {"hook_name": hook}))
    before, out = contents(tmp_path), tmp_path / "deep/down/out"
    for to in ("saelens", "sparsify"):
        for each in exported(run, out / to, to, force=True, approximate_topk=4 if to == "sparsify" else None):
            assert each.folder.resolve().is_relative_to(out / to)
    written = contents(tmp_path).keys() - before.keys()
    assert len(written) >= 6
    assert all(path.startswith("deep/down/out/") for path in written)


# approximations


def test_what_an_approximation_loses_is_measured(run: Path, tmp_path: Path) -> None:
    (done,) = exported(run / BATCH_TOPK, tmp_path / "out", "sparsify", approximate_topk=4)
    (note,) = [note for note in done.notes if "approximation" in note]
    theirs, ours = map(float, re.findall(r"R² (\S+) instead of (\S+),", note)[0])
    sae = next(each for each in RunFolder(run).read("evaluation.json")["saes"] if each["name"] == BATCH_TOPK)
    assert ours == pytest.approx(sae["r2"], abs=1e-3)
    assert 0 < abs(ours - theirs) < 0.2
    alone = Path(shutil.copytree(run / "saes" / BATCH_TOPK, tmp_path / "alone"))
    (done,) = exported(alone, tmp_path / "alone-out", "sparsify", approximate_topk=4)
    assert any("R² was not measured" in note for note in done.notes)


# the command


def test_the_command(run: Path, tmp_path: Path, sagsae: Sagsae) -> None:
    done = sagsae("export", run, "--to", "dictionary-learning", "--out", tmp_path / "out", "--force", "--json")
    assert done.returncode == 0, done.stderr
    entries = json.loads(done.stdout)
    assert [(each["name"], each["form"], each["width"]) for each in entries] == [
        (BATCH_TOPK, "batch-topk", 48),
        (GATED, "gated", 48),
        (SA_GSAE, "gated", 96),
    ]
    sae = Autoencoder.load(run / "saes" / SA_GSAE)
    x = (sae.weights.b_dec + 2 * sae.scale * torch.randn(2048, 32) / 32**0.5).float()
    check_equal(sae, x, dictionary_learning_says(Path(entries[2]["folder"]), x.double().numpy()))
    done = sagsae("export", run / "nothing", "--to", "saelens", "--out", tmp_path / "no")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*nothing.*\n", done.stderr)
    done = sagsae("export", run / SA_GSAE, "--to", "sparsify", "--out", tmp_path / "no")
    assert done.returncode == 2
    assert "--approximate-topk K" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "no").exists()


# hookpoints as Hugging Face's modules


SIZES = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
PLAIN: dict[str, Any] = {
    **SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt_neox": ("GPTNeoX", PLAIN, "sdpa"),
    "gpt2": ("GPT2", {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "sdpa"),
    "llama": ("Llama", GROUPED, "sdpa"),
    "mistral": ("Mistral", GROUPED, "sdpa"),
    "qwen2": ("Qwen2", GROUPED, "sdpa"),
    "qwen3": ("Qwen3", GROUPED, "sdpa"),
    "smollm3": ("SmolLM3", GROUPED, "sdpa"),
    "gemma": ("Gemma", GROUPED, "sdpa"),
    "gemma2": ("Gemma2", GROUPED, "eager"),
    "gemma3_text": ("Gemma3Text", GROUPED, "sdpa"),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_module_of_hugging_face_gives_what_the_hookpoint_gives(tmp_path: Path, kind: str) -> None:
    """In small models of every family in the table."""
    name, settings, attention = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**settings)
    folder = save_decoder(tmp_path / "model", config)
    assert model_type({"name": str(folder), "local": True}) == kind
    ids = torch.randint(1, 300, (1, 8), generator=torch.Generator().manual_seed(0))
    parts = ("hook_resid_post", "hook_resid_pre", "hook_mlp_out", "hook_attn_out", "attn.hook_z")
    names = [f"blocks.{layer}.{part}" for layer in (0, 1) for part in parts]
    model = LanguageModel(resolve_model(str(folder)), "cpu", "float32", attention)  # type: ignore[arg-type]
    known = {each: hook for each in names if (hook := hf_hook(each, kind)) is not None}
    assert len(known) >= 9
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str, is_input: bool) -> Callable[..., None]:
        def hook(_: Any, given: tuple[Any, ...], returned: Any) -> None:
            value = given[0] if is_input else returned
            seen[key] = value[0] if isinstance(value, tuple) else value

        return hook

    for each, place in known.items():
        module = plain.get_submodule(place.base + place.module)
        module.register_forward_hook(keep(each, place.is_input))
    with torch.no_grad():
        plain(ids)
    found: dict[str, torch.Tensor] = {}
    with model.capturing({each: partial(found.__setitem__, each) for each in known}) as run_model:
        run_model(ids)
    for each in known:
        torch.testing.assert_close(seen[each].flatten(2), found[each].view(1, 8, -1), rtol=1e-4, atol=1e-5)


def test_models_that_are_not_here_are_known_by_their_ids() -> None:
    ids = {
        "pythia-1b": "gpt_neox", "openai-community/gpt2": "gpt2", "gpt2": "gpt2", "smollm3-3b": "smollm3",
        "meta-llama/Llama-3.2-1B": "llama", "Qwen/Qwen2.5-1.5B": "qwen2", "Qwen/Qwen3-0.6B-Base": "qwen3",
        "google/gemma-2-2b": "gemma2", "google/gemma-2b": "gemma", "google/gemma-3-1b-pt": "gemma3_text",
        "HuggingFaceTB/SmolLM2-135M": "llama", "google/gemma-3-4b-pt": None, "owner/pythia-like": None,
    }  # fmt: skip
    assert {name: model_type({"name": name, "local": False}) for name in ids} == ids
    assert set(HUB_FAMILIES.values()) <= set(FAMILIES)


def test_hookpoints_that_no_module_has() -> None:
    for name in ("blocks.1.hook_resid_mid", "blocks.1.attn.hook_q", "hook_embed", "blocks.x.hook_mlp_out"):
        assert hf_hook(name, "llama") is None
    assert hf_hook("blocks.1.hook_resid_post", "opt") is None
    assert hf_hook("blocks.0.hook_resid_pre", "gemma") is None


def test_an_altered_evaluation_is_not_believed(run: Path, tmp_path: Path) -> None:
    file = run / "evaluation.json"
    (saved,) = [each for each in find_saes(run) if each.name == GATED]
    assert about_sae(saved).measured
    value = {key: item for key, item in read(file).items() if key != "crc32c"}
    for entry in value["saes"]:
        entry["l0"] = "many"
    file.write_text(json.dumps(value))
    with pytest.raises(UserError, match="l0 is 'many'"):
        exported(run / GATED, tmp_path / "out")
