"""Builds the shipped model `tiny`: a 4.7M-parameter GPT-NeoX language model and its tokenizer, from free text.

    python shared/tiny/build.py --train train.jsonl.gz --heldout val.jsonl.gz --out build/tiny

Input is JSON lines with a `text` and a `source` field, one document a line (PROVENANCE.md lists the sources).
Training is a fixed number of steps, so the same inputs, seed and device give the same run; `provenance.json`
records what came out. It takes minutes on one GPU and some hours on a CPU core. The product never imports this file.
"""

import argparse
import gzip
import hashlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

VOCAB, CONTEXT, END = 4096, 128, "<|endoftext|>"
BATCH_ROWS, PEAK_LR, WARMUP_STEPS, FLOOR = 256, 2e-3, 200, 0.02


def documents(path: Path) -> list[dict[str, str]]:
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `<|endoftext|>` = id 0 = bos = eos = pad; adds no special token by itself."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each document, `<|endoftext|>` appended."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [np.asarray([*doc, 0], dtype=np.int64) for doc in ids]


def training_rows(docs: list[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """Endless rows of CONTEXT ids. Every epoch: documents shuffled and joined, cut at a random phase, the rows
    shuffled; a random half of the rows begins with `<|endoftext|>`, the other half in mid-document."""
    for epoch in range(1_000_000):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,)))
        stream = np.concatenate([docs[i] for i in rng.permutation(len(docs))])[rng.integers(CONTEXT) :]
        rows = stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT).copy()
        rows[rng.random(len(rows)) < 0.5, 0] = 0
        yield from rows[rng.permutation(len(rows))]


def heldout_loss(model: torch.nn.Module, docs: list[np.ndarray], device: str) -> tuple[float, int]:
    """Mean nats per predicted token over all held-out rows (each begins with `<|endoftext|>`), and their number."""
    stream = np.concatenate(docs)
    width = CONTEXT - 1
    rows = stream[: len(stream) // width * width].reshape(-1, width)
    rows = np.concatenate([np.zeros((len(rows), 1), dtype=np.int64), rows], axis=1)
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            ids = torch.from_numpy(rows[start : start + 64]).to(device)
            logits = model(input_ids=ids, use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            total, count = total + loss.item(), count + ids[:, 1:].numel()
    return total / count, count


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))
    return PEAK_LR * (FLOOR + (1 - FLOOR) * cosine)


def new_model(device: str) -> GPTNeoXForCausalLM:
    """Pythia's architecture; the MLP is 3x wide, not 4x, which keeps the bf16 file under 10 MB."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=768,
        max_position_embeddings=CONTEXT,
        rotary_pct=0.25,
        use_parallel_residual=True,
        hidden_act="gelu",
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPTNeoXForCausalLM(config).to(device)


def train(
    model: GPTNeoXForCausalLM, docs: list[np.ndarray], heldout: list[np.ndarray], args: argparse.Namespace
) -> list[dict[str, float]]:
    device = args.device
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if args.compile else model
    rows = training_rows(docs, args.seed)
    log, started = [], time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        ids = torch.from_numpy(np.stack([next(rows) for _ in range(args.batch_rows)])).to(device, non_blocking=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = forward(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            model.eval()
            record = {
                "step": step + 1,
                "tokens": (step + 1) * args.batch_rows * CONTEXT,
                "seconds": round(time.monotonic() - started, 1),
                "train_loss": round(loss.item(), 4),
                "heldout_loss": round(heldout_loss(model, heldout, device)[0], 4),
            }
            model.train()
            log.append(record)
            print(json.dumps(record), file=sys.stderr, flush=True)
    return log


def greedy(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, device: str) -> str:
    ids = torch.tensor([[0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]], device=device)
    with torch.inference_mode():
        for _ in range(40):
            best = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, best.view(1, 1)], dim=1)
    return str(tokenizer.decode(ids[0, 1:]))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command_line(args: argparse.Namespace) -> str:
    given = {k.replace("_", "-"): v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    words = [f"--{k}" if v is True else f"--{k} {v}" for k, v in given.items() if v is not False]
    return f"python shared/tiny/build.py {' '.join(words)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="training documents, .jsonl or .jsonl.gz")
    parser.add_argument("--heldout", type=Path, required=True, help="held-out documents, .jsonl or .jsonl.gz")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the model, the tokenizer and provenance.json"
    )
    parser.add_argument("--steps", type=int, default=4400, help="optimiser steps")
    parser.add_argument("--batch-rows", type=int, default=BATCH_ROWS, help="rows of 128 tokens in a step")
    parser.add_argument("--log-every", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)

    training, heldout = documents(args.train), documents(args.heldout)
    tokenizer = train_tokenizer([d["text"] for d in training])
    train_ids, heldout_ids = (encode(tokenizer, [d["text"] for d in docs]) for docs in (training, heldout))
    n_train = sum(map(len, train_ids))
    print(
        f"{len(training)} documents, {n_train} tokens; held out {sum(map(len, heldout_ids))} tokens",
        file=sys.stderr,
        flush=True,
    )
    model = new_model(args.device)
    log = train(model, train_ids, heldout_ids, args)

    model = model.eval().to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    save_file(
        {k: v.contiguous().cpu() for k, v in model.state_dict().items()},
        args.out / "model.safetensors",
        {"format": "pt"},
    )
    final, n_heldout = heldout_loss(model.float(), heldout_ids, args.device)
    prompts = ["The king", "SQLite is a", "And he said to them,", "In Python, a function", "oak tree (noun):"]
    weights = args.out / "model.safetensors"
    record = {
        "command": command_line(args),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens_distinct": n_train,
        "training_tokens_seen": args.steps * args.batch_rows * CONTEXT,
        "heldout_tokens": n_heldout,
        "heldout_loss_nats_per_token_bf16_weights": round(final, 4),
        "documents_by_source": dict(sorted(Counter(d["source"] for d in training).items())),
        "inputs_sha256": {"train": sha256(args.train), "heldout": sha256(args.heldout)},
        "model_sha256": sha256(weights),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "greedy_samples": [greedy(model, tokenizer, p, args.device) for p in prompts],
        "log": log,
    }
    (args.out / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "log"}, indent=2))


if __name__ == "__main__":
    main()
