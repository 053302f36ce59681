"""The shipped model is what its provenance says, and a language model worth looking into."""

import hashlib
import json

import numpy as np
import torch

from shared.model.language_model import LanguageModel
from shared.model.source import SHIPPED, model_info, read_config, resolve_model
from shared.model.tokenizer import load_tokenizer


def test_size_and_provenance() -> None:
    weights = SHIPPED / "model.safetensors"
    assert weights.stat().st_size <= 10_000_000
    record = json.loads((SHIPPED / "provenance.json").read_text())
    assert record["model_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["heldout_loss_nats_per_token_bf16_weights"] <= 3.7
    assert (SHIPPED / "LICENSE-WordNet.txt").exists()
    assert 1_000_000 <= (SHIPPED / "corpus.jsonl").stat().st_size <= 3_000_000


def test_it_predicts_text_it_never_saw() -> None:
    """On the documents of the excerpt that were held out of its training: at most 3.7 nats a token."""
    source = resolve_model("tiny")
    info = model_info(read_config(source))
    assert (info.n_layers, info.d_model, info.vocab_size, info.max_context) == (4, 256, 4096, 128)
    tokenizer = load_tokenizer(source)
    lines = (SHIPPED / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [document["text"] for document in map(json.loads, lines) if document["split"] == "heldout"]
    ids = [np.array([*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], 0]) for text in texts[:60]]
    stream = np.concatenate(ids)
    rows = stream[: len(stream) // 127 * 127].reshape(-1, 127)
    tokens = torch.from_numpy(np.insert(rows, 0, 0, axis=1))
    model = LanguageModel(source, "cpu", "float32")
    loss = torch.cat([model.losses(part) for part in torch.split(tokens[:160], 32)]).mean().item()
    assert loss <= 3.7
