"""Models and weights as people have them, and as somebody hostile may make them: a wrong one is told before anything is
tokenised, written or removed, and two models are the same when their bytes are."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.command import ROOT
from support.folders import contents
from support.models import END, save_corpus, save_decoder, save_model, save_tokenizer, sentences
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig

import harvest.plan
import shared.model.source
from harvest.run import harvest as run_harvest
from shared.config import EvalConfig, HarvestConfig, RecodeConfig, SynthConfig, TrainConfig
from shared.errors import UserError
from shared.files.digest import cache_file, file_digest, file_identity, write_cached
from shared.model.hooks import hook_table
from shared.model.language_model import load_weights
from shared.model.outline import outline
from shared.model.source import read_config, resolve_model, same_model, sampled_digest
from shared.model.tokenizer import Encoder, open_encoder, resolve_tokenizer
from shared.model.weights import INDEX, SINGLE, weight_files
from shared.store.opened import Store

Config = Callable[..., HarvestConfig]
SHAPE: dict[str, Any] = {
    "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2, "hidden_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers, with a tokenizer and a corpus. Read only."""
    folder = save_decoder(tmp_path_factory.mktemp("models") / "llama", LlamaConfig(**SHAPE))
    save_tokenizer(folder)
    save_corpus(folder / "corpus.jsonl", sentences(100))
    return folder


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def ask(tmp_path: Path) -> Config:
    """A harvest of 640 tokens of a model."""

    def config(model: Path | str, **changes: Any) -> HarvestConfig:
        values = {
            "model": str(model), "context": 16, "tokens": 640, "layers": (1,), "hooks": ("resid_post",),
            "chunk_rows": 64, "shard_rows": 128, "device": "cpu", "dtype": "float32", "out": str(tmp_path / "st"),
            "name": "s", **changes,
        }  # fmt: skip
        return HarvestConfig(**values)

    return config


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = change(load_file(folder / SINGLE))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / SINGLE, {"format": "pt"})


def edit(path: Path, **changes: Any) -> None:
    """Keys of a JSON file; None takes one away."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def shards_of(folder: Path) -> None:
    """Its weights in two files with an index."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(weights)
    where = {name: f"model-0000{1 + (at >= len(names) // 2)}-of-00002.safetensors" for at, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def refused(config: HarvestConfig, message: str) -> None:
    """With a message, and nothing is left behind."""
    with pytest.raises(UserError, match=message) as error:
        run_harvest(config)
    assert len(str(error.value)) < 1200
    assert not Path(config.out).exists() or list(Path(config.out).iterdir()) == []


# A library's silence is not consent: weights


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model.", "no.such."])
def test_weights_under_another_prefix(wrapper: str, copied: Path, ask: Config) -> None:
    """As torch.compile saves them (pytorch#101107): every tensor was drawn at random, and nothing was said."""
    rewrite(copied, lambda weights: {f"{wrapper}{name}": tensor for name, tensor in weights.items()})
    refused(ask(copied), rf"its files lack .* of the model's weights: .*{wrapper}")


def test_one_tensor_of_many_is_missing(copied: Path, ask: Config) -> None:
    """An incomplete conversion: the tensor was drawn at random, another one in each run (transformers#28414)."""
    rewrite(copied, lambda weights: {n: t for n, t in weights.items() if n != "model.layers.1.mlp.down_proj.weight"})
    refused(ask(copied), r"its files lack 1 of the model's weights: model\.layers\.1\.mlp\.down_proj\.weight")
    with pytest.raises(UserError, match="lack 1 of"):
        load_weights(resolve_model(str(copied)), "map", "float32", "sdpa")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.3.mlp.down_proj.weight", (32, 64)),
        ("model.layers.0.self_attn.q_proj.bias", (32,)),
        ("model.layers.0.self_attn.q_norm.weight", (8,)),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (2, 32)),
    ],
)
def test_weights_without_a_place_in_the_model(name: str, shape: tuple[int, ...], copied: Path, ask: Config) -> None:
    """A configuration that leaves out layers, biases or norms of its files: the model would compute without them."""
    rewrite(copied, lambda weights: {**weights, name: torch.ones(shape)})
    refused(ask(copied), rf"{name}.*compute without them")


def test_tensors_that_are_not_part_of_the_model_are_said(copied: Path, ask: Config, capsys: Any) -> None:
    """Buffers of older checkpoints, value heads and layers of multi-token prediction do no harm."""
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": 4, "v_head.summary.weight": 32,
        "model.layers.3.eh_proj.weight": 32, "model.layers.3.mlp.eh.weight": 32,
    }  # fmt: skip
    rewrite(copied, lambda weights: {**weights, **{name: torch.ones(size) for name, size in extra.items()}})
    run_harvest(ask(copied))
    said = capsys.readouterr().err
    assert "3 tensors of its files are not part of the language model" in said
    assert "inv_freq" not in said


def test_a_tied_output_layer_is_not_missing(tmp_path: Path, ask: Config) -> None:
    tied = save_decoder(tmp_path / "tied", LlamaConfig(**SHAPE, tie_word_embeddings=True))
    save_tokenizer(tied)
    assert "lm_head.weight" not in load_file(tied / SINGLE)
    run_harvest(ask(tied, corpus=str(save_corpus(tmp_path / "c.jsonl", sentences(100)))))
    edit(tied / "config.json", tie_word_embeddings=False)
    refused(ask(tied, out=str(tmp_path / "other"), corpus=str(tmp_path / "c.jsonl")), "output layer alone")


# Cheap checks come first, and before anything is removed


def cut(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) - 1000])


def pointer(folder: Path) -> None:
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")


def missing_shard(folder: Path) -> None:
    shards_of(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def outside(folder: Path) -> None:
    shards_of(folder)
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "outside.safetensors")
    moved = {n: f.replace("model-00001-of-00002", "../outside") for n, f in where.items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": moved}))


def shard_without_its_tensor(folder: Path) -> None:
    shards_of(folder)
    file = folder / "model-00001-of-00002.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file, {"format": "pt"})


def other_shapes(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=96)


def lies_about_size(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes((2**62).to_bytes(8, "little") + data[8:])


def nested(folder: Path) -> None:
    (folder / SINGLE).write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def fifo(folder: Path) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


def prefixed(folder: Path) -> None:
    rewrite(folder, lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()})


DAMAGES: dict[Callable[[Path], None], str] = {
    cut: "it has .* bytes, its header says", pointer: "is a Git LFS pointer", missing_shard: "1 are missing",
    outside: "names '../outside.safetensors'", shard_without_its_tensor: "lacks 1 of the tensors",
    other_shapes: "9 weights have another shape in the files than config.json says: .*64.* for .*96",
    lies_about_size: "it is cut, or no safetensors",
    nested: "header cannot be read", pickled: "holds no weights", fifo: "is not a file", prefixed: "DataParallel",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: str(damage.__name__))
def test_overwrite_removes_nothing_before_the_weights_are_loaded(
    damage: Callable[[Path], None], copied: Path, ask: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--overwrite` deleted a finished store and then found that a shard of the weights was missing."""
    store = tmp_path / "st" / "s"
    run_harvest(ask(copied))
    before = contents(store)
    damage(copied)
    monkeypatch.setattr("harvest.begin.write_rows", lambda *_: pytest.fail("the corpus was tokenised first"))
    with pytest.raises(UserError, match=DAMAGES[damage]):
        run_harvest(ask(copied, overwrite=True, seed=1))
    assert contents(store) == before


# What is identical is decided by content


def large_model(folder: Path) -> Path:
    """11 MB: its middle is neither in the first nor in the last MiB."""
    save_model(folder, hidden_size=256, intermediate_size=1024)
    save_corpus(folder / "corpus.jsonl", sentences(100))
    return folder


def test_a_change_in_the_middle_of_the_weights_is_another_model(tmp_path: Path, ask: Config) -> None:
    """A LoRA merged into the middle layers, ROME, an ablated direction: the store went on with the other model."""
    folder = large_model(tmp_path / "m")
    run_harvest(ask(folder))
    first, sampled = resolve_model(str(folder)), sampled_digest(folder)
    rewrite(folder, lambda weights: {n: 50 * t if "1.mlp.dense_4h" in n else t for n, t in weights.items()})
    assert sampled_digest(folder) == sampled
    assert resolve_model(str(folder)).commit != first.commit
    with pytest.raises(UserError, match=r"model: the store has .*this asks for .*another --name.*--overwrite") as error:
        run_harvest(ask(folder))
    assert "hookpoints" not in str(error.value)


def test_names_and_places_do_not_count(
    llama: Path, copied: Path, tmp_path: Path, ask: Config, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`./m`, an absolute path, `~`, a link and a moved folder are one model; resuming by another one was refused."""
    run_harvest(ask(copied))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(copied)
    copied.rename(tmp_path / "moved")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    for name in ("./moved", "moved", "~/moved", str(tmp_path / "link"), str(llama), "../" + tmp_path.name + "/moved"):
        run_harvest(ask(name))
        assert "is complete" in capsys.readouterr().err, name


def test_a_store_of_the_sampled_digest_goes_on(
    copied: Path, ask: Config, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A store of an earlier version names its model by samples; it is readable, resumable, and says what they are."""
    with monkeypatch.context() as patch:
        patch.setattr(shared.model.source, "folder_digest", lambda folder, _name=None: sampled_digest(folder))
        store = run_harvest(ask(copied)).store
    commit = Store.open(store).spec.model["commit"]
    assert len(commit) == 32
    run_harvest(ask(copied))
    said = capsys.readouterr().err
    assert "first and last MiB" in said.replace("\n", " ")
    assert "is complete" in said
    rewrite(copied, lambda weights: {n: 2 * t for n, t in weights.items()})
    assert not same_model(resolve_model(str(copied)), commit)


def test_digests_are_remembered_for_as_long_as_the_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered is believed only from this user, whole, and for the very same file."""
    monkeypatch.setenv("SAGSAE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(5 << 20))
    true = hashlib.blake2b(file.read_bytes(), digest_size=32).hexdigest()
    assert file_digest(file) == true
    about = file_identity(file)
    place = cache_file(about)
    assert place is not None
    assert not place.exists(), "it changed a moment ago"
    write_cached(place, about, "ab" * 32)
    assert file_digest(file) == "ab" * 32, "not read again"
    good = place.read_bytes()
    for damaged in (b"", good[:-5], good.replace(b"ab", b"cd", 1), b"\xff" * 200, good + good):
        place.write_bytes(damaged)
        assert file_digest(file) == true
    place.write_bytes(good)
    place.chmod(0o666)
    assert file_digest(file) == true, "anybody could have written it"
    place.unlink()
    (tmp_path / "elsewhere").write_bytes(good)
    place.symlink_to(tmp_path / "elsewhere")
    assert file_digest(file) == true, "a link"
    place.unlink()
    write_cached(place, about, "ab" * 32)
    file.write_bytes(os.urandom(5 << 20))
    assert file_digest(file) == hashlib.blake2b(file.read_bytes(), digest_size=32).hexdigest()


def test_auto_is_what_the_store_has(copied: Path, ask: Config, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """On a machine of another kind `dtype` at auto had another answer, and the same command was refused."""
    monkeypatch.setattr(harvest.plan, "native_dtype", lambda _device: "float32")
    run_harvest(ask(copied, dtype="auto"))
    monkeypatch.setattr(harvest.plan, "native_dtype", lambda _device: "bfloat16")
    run_harvest(ask(copied, dtype="auto"))
    assert "is complete" in capsys.readouterr().err
    with pytest.raises(UserError, match="model: the store has dtype float32, this asks for dtype bfloat16"):
        run_harvest(ask(copied, dtype="bfloat16"))


def test_a_lossless_codec_is_the_stores_own(copied: Path, ask: Config, capsys: Any) -> None:
    """A store that was recoded without loss is still complete; another codec in so many words points to recode."""
    store = run_harvest(ask(copied, codec="lz4")).store
    run_harvest(ask(copied))
    assert "is complete" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"rows are the same with either codec.*store recode {store} NEW --codec zstd"):
        run_harvest(ask(copied, codec="zstd"))


def test_refusals_name_what_loses_nothing_first(copied: Path, ask: Config) -> None:
    """More tokens or another hookpoint for a finished store: the advice was --overwrite alone."""
    run_harvest(ask(copied))
    mended: list[tuple[dict[str, Any], str]] = [
        ({"tokens": 800}, "another --name.*is not made longer"),
        ({"hooks": ("mlp_out",)}, "beside it .another --name.: it takes the tokens"),
    ]
    for changes, advice in mended:
        with pytest.raises(UserError, match=rf"{advice}.*--overwrite would delete"):
            run_harvest(ask(copied, **changes))


# Tokenizers


def test_a_folder_without_a_tokenizer(copied: Path, ask: Config, tmp_path: Path, llama: Path) -> None:
    """transformers makes an empty one, with which every document became EOS alone."""
    gpt2 = save_decoder(tmp_path / "gpt2", GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=2, n_positions=64))
    for folder in (copied, gpt2):
        for path in folder.glob("*token*"):
            path.unlink()
        refused(ask(folder, corpus=str(llama / "corpus.jsonl")), "comes with no tokenizer.*--tokenizer FOLDER_OR_ID")
        refused(ask(folder, corpus=str(llama / "corpus.jsonl"), eos=0), "comes with no tokenizer.*holds text")
    named = Store.open(run_harvest(ask(copied, tokenizer=str(llama))).store)
    own = Store.open(run_harvest(ask(llama, name="own")).store)
    assert np.array_equal(named.tokens(), own.tokens())
    assert named.spec.tokenizer == own.spec.tokenizer


def test_a_model_without_tokenizer_takes_ids(copied: Path, ask: Config, tmp_path: Path) -> None:
    """There was no way to harvest it, not even from an array of ids."""
    for path in copied.glob("*token*"):
        path.unlink()
    ids = np.random.default_rng(0).integers(1, 300, 2000)
    np.save(tmp_path / "ids.npy", ids)
    stream = Store.open(run_harvest(ask(copied, corpus=str(tmp_path / "ids.npy"))).store)
    assert np.array_equal(stream.tokens().ravel(), ids[:640])
    assert stream.spec.tokenizer == {"blake2b": None, "eos_id": None}
    assert stream.spec.special_ids == ()
    lines = "".join(json.dumps({"text": ids[at : at + 50].tolist()}) + "\n" for at in range(0, 2000, 50))
    (tmp_path / "ids.jsonl").write_text(lines)
    documents = ask(copied, name="d", corpus=str(tmp_path / "ids.jsonl"), shuffle_documents=False, eos="7")
    joined = Store.open(run_harvest(documents).store)
    assert joined.tokens().ravel()[[50, 101]].tolist() == [7, 7]
    assert joined.spec.special_ids == (7,)
    with pytest.raises(UserError, match=r"comes with no tokenizer.*--eos"):
        run_harvest(ask(copied, name="e", corpus=str(tmp_path / "ids.jsonl")))


@pytest.mark.parametrize("kind", ["empty", "only unknown", "no end"])
def test_a_tokenizer_that_knows_no_text(kind: str, copied: Path, ask: Config) -> None:
    found = json.loads((copied / "tokenizer.json").read_text())
    if kind == "empty":
        found["model"] |= {"vocab": {}, "merges": []}
    elif kind == "only unknown":
        found["model"] = {"type": "WordLevel", "vocab": {END: 0, "nowhere": 1}, "unk_token": END}
    else:
        edit(copied / "tokenizer_config.json", eos_token=None)
    (copied / "tokenizer.json").write_text(json.dumps(found))
    refused(ask(copied), "names no end-of-text token.*--eos" if kind == "no end" else "turns plain text into")
    if kind == "no end":
        assert Store.open(run_harvest(ask(copied, eos=END)).store).spec.tokenizer["eos_id"] == 0
        refused(ask(copied, eos="nothing such", out=ask(copied).out + "2"), "neither an id nor a token")


def add_token(folder: Path, number: int, text: str, special: bool = True) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    found["added_tokens"].append({"id": number, "content": text, "special": special, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(found))


def test_every_special_token_is_special(tmp_path: Path, ask: Config) -> None:
    """Llama 3 lists two of its 256 special tokens as such: chat markers counted as ordinary rows."""
    folder = save_model(tmp_path / "m", vocab_size=310)
    save_corpus(folder / "corpus.jsonl", [f"{text}<|eot|>{text}" for text in sentences(100)])
    add_token(folder, 300, "<|eot|>")
    store = Store.open(run_harvest(ask(folder, special_ids=(5,))).store)
    assert store.spec.special_ids == (0, 5, 300)
    assert (store.tokens() == 300).any()
    text = Store.open(run_harvest(ask(folder, name="text", split_special_tokens=True)).store)
    assert not (text.tokens() == 300).any(), "spelt out in a text it stays text"
    with pytest.raises(UserError, match=r"tokenizer: the store has .*split_special_tokens"):
        run_harvest(ask(folder, special_ids=(5,), split_special_tokens=True))
    with pytest.raises(UserError, match="special_ids: 400 is outside"):
        run_harvest(ask(folder, special_ids=(400,)))


def test_a_store_with_fewer_special_ids_goes_on(
    copied: Path, ask: Config, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One of an earlier version, which knew the listed ones only."""
    edit(copied / "config.json", vocab_size=300)
    found = json.loads((copied / "tokenizer.json").read_text())
    next(iter(found["added_tokens"]))["special"] = True
    for token, number in list(found["model"]["vocab"].items())[5:6]:
        found["added_tokens"].append({**found["added_tokens"][0], "id": number, "content": token})
    (copied / "tokenizer.json").write_text(json.dumps(found))
    with monkeypatch.context() as patch:
        patch.setattr("shared.model.tokenizer.Encoder.special_ids", lambda self: self.listed_special_ids())
        old = Store.open(run_harvest(ask(copied)).store).spec.special_ids
    run_harvest(ask(copied))
    said = capsys.readouterr().err
    assert old == (0,)
    assert "counted 1 ids as special; now 2 are" in said
    assert "is complete" in said


def test_ids_are_refused_not_lengths(copied: Path, ask: Config, tmp_path: Path) -> None:
    """Gemma 3: 262,144 embeddings and one token more, for images, which no text has. The model was refused for it."""
    add_token(copied, 300, "<image_soft_token>")
    run_harvest(ask(copied))
    corpus = save_corpus(tmp_path / "c.jsonl", [*sentences(40), "look <image_soft_token> here", *sentences(40)])
    refused(
        ask(copied, corpus=str(corpus), out=str(tmp_path / "other")),
        r"the tokenizer returns id 300, and the model has embeddings for 0 to 299",
    )


def test_a_panic_in_the_tokenizer_is_one_message(llama: Path) -> None:
    """A regular expression that backtracks without end: the Rust library panics, and that is no Exception."""

    class PanicException(BaseException):
        """As pyo3 raises it."""

    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("called `Result::unwrap()` on an `Err` value: Error { retry-limit-in-match over }")

    broken = Encoder(resolve_model(str(llama)), panic)
    with pytest.raises(UserError, match="its tokenizer, given this text, cannot be loaded: PanicException: called"):
        broken(["text"])


# What cannot be harvested, in one sentence


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"weights are quantised \(gptq"),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, "weights are quantised"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8"),
    "encoder-decoder": ({"model_type": "t5", "is_encoder_decoder": True}, "is an encoder-decoder"),
    "t5 by its type": ({"model_type": "t5"}, "is an encoder-decoder"),
    "remote code": ({"model_type": "mine", "auto_map": {"AutoConfig": "evil.C"}}, "comes with code of its own"),
    "unknown type": ({"model_type": "nothing-such"}, "configuration cannot be loaded"),
    "no decoder": ({"model_type": "vit"}, "no causal language model"),
    "bert": ({"model_type": "bert"}, "its attention is bidirectional"),
    "kernel": ({"_attn_implementation": "owner/kernel"}, "code from the hub, which is never fetched"),
    "kernel inside": ({"text_config": {"attn_implementation": "o/k@v:f"}}, "code from the hub"),
    "own file": ({"transformers_weights": "../x.safetensors"}, "a weights file of its own"),
    "ten million layers": ({"num_hidden_layers": 10**7}, "num_hidden_layers = 10000000; a whole number from 1"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    "a wide one": ({"hidden_size": 2**40}, "hidden_size = 1099511627776"),
    "no width": ({"hidden_size": 0}, "hidden_size = 0"),
    "a negative width": ({"hidden_size": -4}, "hidden_size = -4"),
    "a word for a width": ({"hidden_size": "x"}, "hidden_size = 'x'"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads = 0"),
    "heads that do not divide": ({"num_attention_heads": 7, "head_dim": None}, "--model"),
    "a list for a type": ({"model_type": []}, "model_type = "),
    "rope": ({"rope_scaling": {"rope_type": "nothing"}}, "--model"),
    "rope of numbers": ({"rope_scaling": [1, 2], "rope_parameters": None}, "--model"),
    "activation": ({"hidden_act": "nothing"}, "cannot be made"),
    "digits": ({"vocab_size": 10**4000}, "vocab_size = a number of many digits"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_that_cannot_be_harvested(kind: str, copied: Path, ask: Config) -> None:
    """Tracebacks, pages of class names, or a minute of planning, for a line in a downloaded config.json."""
    changes, message = KINDS[kind]
    edit(copied / "config.json", **changes)
    refused(ask(copied), message)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a":' * 100_000, "\xff", "null"])
def test_a_configuration_that_is_none(text: str, copied: Path, ask: Config) -> None:
    (copied / "config.json").write_text(text, encoding="latin-1")
    refused(ask(copied), "configuration cannot be loaded")


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '{"version": "1.0", "model": []}', "\xff"])
def test_a_tokenizer_that_is_none(text: str, copied: Path, ask: Config) -> None:
    (copied / "tokenizer.json").write_text(text, encoding="latin-1")
    refused(ask(copied), "tokenizer")


def test_an_adapter(copied: Path, ask: Config) -> None:
    """With PEFT installed transformers would have loaded it, and asked the hub for the model that it names."""
    (copied / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/name"}))
    refused(ask(copied), "holds an adapter")
    (copied / SINGLE).unlink()
    refused(ask(copied), "holds an adapter")
    (copied / "config.json").unlink()
    refused(ask(copied), "It holds an adapter")


KEYS = [*json.loads((ROOT / "shared/tiny/config.json").read_text()), "head_dim", "layer_types", "rope_scaling"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(changes=st.dictionaries(st.sampled_from(KEYS), ANYTHING, min_size=1, max_size=3))
def test_any_configuration_is_taken_or_refused_in_words(changes: dict[str, Any], llama: Path) -> None:
    folder = llama.parent / "any"
    if not folder.exists():
        shutil.copytree(llama, folder)
    found = json.loads((llama / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **changes}))
    with suppress(UserError):
        hook_table(str(folder), None, ("mid",), "sdpa")


def test_dynamic_rope_is_harvested(tmp_path: Path) -> None:
    """It was refused with either attention, each message advising the other."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = save_decoder(tmp_path / "m", LlamaConfig(**SHAPE, rope_parameters=rope))
    config = read_config(resolve_model(str(folder)))
    for attention in ("sdpa", "eager"):
        assert "blocks.1.hook_resid_post" in outline(config, attention, "m", [1])


def test_advice_is_tried_first(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    config = read_config(resolve_model(str(llama)))

    def fails(*_: Any, **__: Any) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", fails)
    with pytest.raises(UserError, match="The other kind of attention fails too"):
        outline(config, "sdpa", "m", [1])


# ~ in every path


@pytest.mark.usefixtures("copied")
def test_home_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ask: Config) -> None:
    """`--out=~/st`, or `out = "~/st"` in a file, made a folder called `~` in the current one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    home = str(tmp_path)
    assert HarvestConfig(model="tiny", out="~/st").out == f"{home}/st"
    assert SynthConfig(d_in=8, features=8, l0=2, out="~/st").out == f"{home}/st"
    saes = [{"arch": "relu", "d_sae": 4}]
    train = TrainConfig(store="~/st/s", saes=saes, out="~/run")
    assert (train.store, str(train.out)) == (f"{home}/st/s", f"{home}/run")
    recode = RecodeConfig(source="~/a", target="~/b", codec="lz4")
    assert (recode.source, recode.target) == (f"{home}/a", f"{home}/b")
    measured = EvalConfig(run="~/run", store="~/st/s")
    assert (str(measured.run), measured.store) == (f"{home}/run", f"{home}/st/s")
    assert HarvestConfig(model="tiny", out="s3://a~/b").out == "s3://a~/b"
    run_harvest(ask("~/model", out="~/out", corpus="~/model/corpus.jsonl"))
    assert Store.open("~/out/s").n_rows == 640
    assert not (tmp_path / "~").exists()


# GGUF


def save_gguf(folder: Path, path: Path) -> Path:
    """A Llama's weights and tokenizer as llama.cpp keeps them."""
    gguf = pytest.importorskip("gguf")
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / SINGLE)
    found = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = sorted(found["model"]["vocab"], key=found["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token == END else 1 for token in vocabulary])
    writer.add_token_merges(
        [" ".join(merge) if isinstance(merge, list) else merge for merge in found["model"]["merges"]]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in weights.items():
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        count = next((n for part, n in heads.items() if part in name), None)
        if count:  # llama.cpp's order of rotary pairs
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        for part, short in names.items():
            name = name.replace(part, short)
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_a_model(llama: Path, tmp_path: Path, ask: Config, capsys: Any) -> None:
    """What most people have on a laptop. Its rows are those of the folder that it was made from."""
    (tmp_path / "files").mkdir()
    path = save_gguf(llama, tmp_path / "files" / "small.gguf")
    corpus = str(llama / "corpus.jsonl")
    asked = ask(path, corpus=corpus, store_dtype="float32")
    store = Store.open(run_harvest(asked).store)
    whole = Store.open(run_harvest(ask(llama, name="whole", store_dtype="float32")).store)
    assert np.array_equal(store.tokens(), whole.tokens())
    hook = "layer_01/resid_post"
    assert store.statistics(hook).mean == pytest.approx(whole.statistics(hook).mean, abs=1e-5)
    path.rename(path.with_name("renamed.gguf"))
    run_harvest(ask(path.parent, corpus=corpus, store_dtype="float32"))
    assert "is complete" in capsys.readouterr().err, "named by its folder, and renamed: the same bytes"
    shutil.copy(path.with_name("renamed.gguf"), path)
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(renamed\.gguf, small\.gguf\)\. Name one of them"):
        resolve_model(str(path.parent))
    data = path.read_bytes()
    for wrong, message in ((b"GGUF", "no GGUF"), (b"x" * 99, "no GGUF"), (data[:5000], "cannot be loaded")):
        path.write_bytes(wrong)
        refused(ask(path, corpus=corpus, out=str(tmp_path / "other")), message)


def test_gemma_3_with_one_token_more(tmp_path: Path, ask: Config) -> None:
    folder = save_decoder(tmp_path / "m", Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=16, pad_token_id=0))
    save_tokenizer(folder)
    add_token(folder, 300, "<image_soft_token>")
    save_corpus(folder / "corpus.jsonl", sentences(100))
    assert 300 not in Store.open(run_harvest(ask(folder)).store).spec.special_ids


# Hostile bytes


def mutated(data: bytes, changes: list[tuple[int, int]], end: int) -> bytes:
    found = bytearray(data)
    for place, byte in changes:
        found[place % len(found)] = byte
    return bytes(found[: max(1, end % (len(found) + 1))] if end else found)


MUTATIONS = st.tuples(
    st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), max_size=6), st.integers(0, 1 << 16) | st.just(0)
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(change=MUTATIONS)
def test_any_header_is_taken_or_refused_in_words(change: tuple[list[tuple[int, int]], int], llama: Path) -> None:
    folder = llama.parent / "headers"
    folder.mkdir(exist_ok=True)
    (folder / SINGLE).write_bytes(mutated((llama / SINGLE).read_bytes(), *change))
    with suppress(UserError):
        weight_files(folder, "m")


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(change=MUTATIONS)
def test_any_gguf_file_is_taken_or_refused_in_words(change: tuple[list[tuple[int, int]], int], llama: Path) -> None:
    whole = llama.parent / "whole.gguf"
    if not whole.exists():
        save_gguf(llama, whole)
    (llama.parent / "any.gguf").write_bytes(mutated(whole.read_bytes(), *change))
    with suppress(UserError):
        source = resolve_model(str(llama.parent / "any.gguf"), weights=False)
        open_encoder(source)
        outline(read_config(source), "sdpa", "m", [0])
        load_weights(source, "cpu", "float32", "sdpa")


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "chat_template.jinja", "config.json"])
def test_descriptions_of_a_model_are_bounded(file: str, copied: Path) -> None:
    """Cold review: a hole of 8 GB beside the weights was read whole by the library, into memory."""
    (copied / file).touch()
    os.truncate(copied / file, 8 << 30)
    with pytest.raises(UserError, match=rf"{file} has 8,589,934,592 bytes"):
        resolve_model(str(copied))
    if file != "config.json":
        with pytest.raises(UserError, match=rf"{file} has 8,589,934,592 bytes"):
            resolve_tokenizer(str(copied))
