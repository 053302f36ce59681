"""Small models with random weights, their tokenizer, and corpora for them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

WORDS = "the a cat dog king sat saw said on in of and mat house 12 café naïve if then else return while".split()


CONTEXT = 16


END = "<|endoftext|>"


def sentences(n: int, seed: int = 0) -> list[str]:
    """Documents of 5 to 60 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(n)]


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(50), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)
    fast.save_pretrained(folder)


def save_decoder(folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
    """Any language model with random weights, norms and biases too, as Hugging Face saves one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # these begin as all ones or all zeros, which would hide a norm left out
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def save_model(folder: Path, **changes: Any) -> Path:
    """A GPT-NeoX model (d_model 32, 3 layers) and its tokenizer."""
    settings: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3,
        "bos_token_id": 0, "eos_token_id": 0, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    GPTNeoXForCausalLM(GPTNeoXConfig(**settings)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_wide_model(folder: Path) -> Path:
    """Two layers of the shape of Pythia-1b (100 million weights, bfloat16, a small vocabulary) and a tokenizer."""
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=2048, num_hidden_layers=2, num_attention_heads=8, intermediate_size=8192,
        max_position_embeddings=2048, initializer_range=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    save_decoder(folder, config, torch.bfloat16)
    save_tokenizer(folder)
    return folder


def save_corpus(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path
