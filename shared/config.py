"""The frozen configuration of each stage: what a TOML file, `--set key=value` and the command line may say.

Unknown keys are refused with the nearest valid name. Nothing here is changed after it is built; what a run works out
from it (a default context length, the number of steps) goes into the run's record.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from shared.memory import parse_bytes
from shared.saes import AnySAE, sae_config
from shared.schema import Frozen
from shared.store.shard import CODECS, CodecName, codec_help
from shared.store.spec import MOST_SHARD_ROWS, MOST_TOKENS
from shared.synthetic import Synthetic


def at_home(value: object) -> object:
    """A path with `~` at its beginning made whole; whatever else as it is."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    return os.path.expanduser(value) if isinstance(value, str) else value  # leaves an unknown ~user alone


Location = Annotated[str, BeforeValidator(lambda value: at_home(str(value) if isinstance(value, Path) else value))]
"""A folder or a URL. Not a Path, which would take a slash out of `s3://`."""
Folder = Annotated[Path, BeforeValidator(at_home)]


def memory_of(value: object) -> object:
    """`auto`, or a number of bytes from its text."""
    if isinstance(value, str) and value != "auto":
        value = parse_bytes(value)
    if isinstance(value, int) and value < 1:
        raise ValueError("expected auto, or at least one byte")
    return value


CodecChoice = Annotated[CodecName, Field(description=codec_help())]
DEMO_HOOKS = ("resid_post", "attn_out", "mlp_out")
DEMO_SPARSITIES = (0.05, 0.1, 0.2, 0.4)


class HarvestConfig(Frozen):
    """One harvest: a model, a corpus and the hookpoints to keep."""

    model: str
    """An alias (`tiny`, `pythia-1b`, `gpt2`, …: shared/model/source.py), a Hugging Face id, a folder or a GGUF file."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face model."""
    tokenizer: str | None = None
    """Another tokenizer than the model's own: a folder, a GGUF file or a Hugging Face id."""
    eos: int | str | None = None
    """The id, or the token, that ends a document. Default: the tokenizer's."""
    special_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Further ids that count as special: left out of statistics and training, beside all that the tokenizer marks."""
    split_special_tokens: bool = False
    """Take special tokens that are spelt out in a text as text. Default: they become their ids."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the model computes in. auto: what the store has that is gone on with, else bfloat16 where the hardware
    multiplies it natively, else float32."""
    store_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What is written. bfloat16 keeps 8 bits of mantissa (55 dB)."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """sdpa: the model's own modules, bit for bit. eager: TransformerLens' attention, slower, with hooks inside it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …; map spreads a model over every GPU, as transformers' device_map="auto" does."""
    layers: tuple[int | Literal["mid"], ...] = ("mid",)
    """Layer numbers from 0; `mid` is n_layers // 2."""
    hooks: tuple[str, ...] = ("resid_post", "attn_out", "mlp_out")
    """Short names, or TransformerLens names such as `blocks.3.attn.hook_z`."""
    corpus: str | None = None
    """A file, a folder or the name of a Hugging Face data set (docs/corpora.md). Default: the `corpus.jsonl` beside a
    local model."""
    corpus_config: str | None = None
    """Configuration (subset) of a Hugging Face data set."""
    corpus_split: str = "train"
    corpus_revision: str | None = None
    """Branch, tag or commit of a Hugging Face data set."""
    text_field: str = "text"
    """The field or column that holds a document, in JSON lines, parquet and Hugging Face data sets: its text, or the
    list of its token ids."""
    on_bad_document: Literal["refuse", "skip"] = "refuse"
    """What to do at a document that is not UTF-8, not JSON, lacks the field or holds something else in it."""
    shuffle_documents: bool = True
    """Shuffle documents (seeded, a buffer of 100,000 and 1 GiB) before they are packed."""
    context: Annotated[int, Field(ge=2)] | None = None
    """Tokens in a row. Default: the model's longest, at most 1024."""
    bos: Literal["auto", "true", "false"] = "auto"
    """Begin every row with the BOS token. auto: as the model's tokenizer does."""
    skip_positions: Annotated[int, Field(ge=0)] = 1
    """The first positions of every context: stored, but left out of statistics and training. In most models position 0
    is an outlier."""
    tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    """Activation rows wanted, exactly. Default: all that the corpus gives."""
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens in one forward pass. Default: 2,048 on a CPU, on a GPU what surely fits, at most 65,536. What does not
    fit after all is halved."""
    allow_nonfinite: bool = False
    """Keep rows with NaN or infinities instead of stopping; they are left out of statistics and training."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Shuffles documents and permutes rows inside a shard."""
    codec: CodecChoice = "zstd"
    """How rows are stored."""
    chunk_rows: Annotated[int, Field(ge=1, le=MOST_SHARD_ROWS)] | None = None
    """Rows decoded at a time. Default: the power of two that makes at most 2 MiB."""
    shard_rows: Annotated[int, Field(ge=1, le=MOST_SHARD_ROWS)] | None = None
    """Rows committed at a time, a multiple of chunk_rows. Default: 128 chunks, fewer in a small store."""
    out: Location = "stores"
    """The folder that holds stores, or an s3:// prefix."""
    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$")] | None = None
    """The store's folder in `out`. Default: the model's name."""
    overwrite: bool = False

    @model_validator(mode="after")
    def check(self) -> "HarvestConfig":
        if self.chunk_rows and self.shard_rows and self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows: {self.shard_rows} is not a multiple of chunk_rows = {self.chunk_rows}")
        if self.allow_nonfinite and CODECS[self.codec].lossy:
            raise ValueError(f"allow_nonfinite: {self.codec} has no NaN and no infinity. Choose another codec")
        return self


class SynthConfig(Synthetic):
    """One synthetic store: the generator's parameters (docs/synthetic.md), and what every store has."""

    tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 1_000_000
    """Rows."""
    context: Annotated[int, Field(ge=1, le=1 << 16)] = 128
    """Rows that are held out together. Otherwise they have nothing to do with each other."""
    store_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    codec: CodecChoice = "zstd"
    """How rows are stored."""
    chunk_rows: Annotated[int, Field(ge=1, le=MOST_SHARD_ROWS)] | None = None
    """Rows decoded at a time. Default: the power of two that makes at most 2 MiB."""
    shard_rows: Annotated[int, Field(ge=1, le=MOST_SHARD_ROWS)] | None = None
    """Rows committed at a time, a multiple of chunk_rows. Default: 128 chunks, fewer in a small store."""
    out: Location = "stores"
    """The folder that holds stores, or an s3:// prefix."""
    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$")] = "synthetic"
    """The store's folder in `out`."""
    overwrite: bool = False

    @model_validator(mode="after")
    def check_shape(self) -> "SynthConfig":
        if self.chunk_rows and self.shard_rows and self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows: {self.shard_rows} is not a multiple of chunk_rows = {self.chunk_rows}")
        return self


class TrainConfig(Frozen):
    """One training run: any number of autoencoders on one pass over one hookpoint's activations."""

    store: Location
    """A folder or a URL (s3://, gs://, http(s)://): of a store (with `hook`, or with one hookpoint inside), or of one
    hookpoint's array inside a store."""
    hook: str | None = None
    """Which hookpoint of the store, such as `layer_08/mlp_out`."""
    saes: tuple[AnySAE, ...]
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Training tokens. Default: one epoch. More than the store holds means several epochs."""
    batch: Annotated[int, Field(ge=1)] = 4096
    """Tokens in a step, over all processes."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    """Peak learning rate of Adam. Short runs (under a million tokens) want 3e-3 to 8e-3."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up. Default: 100, or 5 % of a run that is shorter than 2,000 steps."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.3
    """The last part of the run, over which the learning rate falls linearly to zero."""
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Longest gradient of an autoencoder, all its weights together; longer ones are scaled down. Default: no limit."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Matrix products' inputs. auto: bfloat16 where the hardware multiplies it natively, else float32. tf32: float32,
    rounded to 10 bits of mantissa inside a CUDA device's products. Everything else, the weights too, is float32."""
    parallel: Literal["auto", "data", "sweep"] = "auto"
    """How several processes share the work. data: each computes a part of every batch. sweep: each trains some of the
    autoencoders, on whole batches, and reads all of the store. auto: sweep where they can be shared out evenly."""
    compile: bool = False
    """Compile the dense steps (torch.compile): faster by what docs/benchmarks.md says, after up to a minute an
    autoencoder. Needs a C++ compiler on a CPU."""
    parts: Annotated[int, Field(ge=1)] | None = None
    """Equal parts of each batch whose gradients are computed one after another and then averaged: less memory, and on
    CPUs, for powers of two, the same bits with any number of processes that divides it. Default: one for each process
    that shares the batch."""
    step: Literal["auto", "dense", "sparse"] = "auto"
    """How gated architectures compute a step: with every latent, or from the open gates alone. auto: the faster one, by
    the share of the dictionary that is active; on CUDA by an estimate of that share, and only where triton is."""
    device: str = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Orders the activations and chooses the held-out contexts."""
    heldout_tokens: Annotated[int, Field(ge=1)] = 100_000
    """Tokens kept from training for evaluation, as whole contexts; at most a tenth of the store."""
    exclude_positions: tuple[int, ...] | None = None
    """Positions in a context that are neither trained nor measured on. Default: the store's `skip_positions`."""
    exclude_special: bool = True
    """Neither train nor measure on the tokenizer's special tokens."""
    max_norm: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Rows whose norm exceeds so many times the median are neither trained nor measured on. Default: all count. 5
    leaves out massive activations: a few tokens that hold most of the variance (docs/method.md)."""
    follow: bool = False
    """Train while the store is still being harvested, on what is committed so far; waits for the harvest where it
    must. One epoch is all that is planned for the store."""
    verify: Literal["always", "first-epoch", "off"] = "always"
    """When the checksum of each chunk is compared. Lengths and indexes always are."""
    streams: Annotated[int, Field(ge=1)] = 8
    """Virtual streams that a global batch is made of."""
    run_chunks: Annotated[int, Field(ge=1)] | None = None
    """Neighbouring chunks read together. Default: 1 on a disk; 2 from an object store, where a request costs more.
    Batches stay as well mixed with 1 for every 262,144 of `window_rows`."""
    window_rows: Annotated[int, Field(ge=1)] = 524_288
    """Most rows in memory that are shuffled together, over all streams."""
    memory: Annotated[Literal["auto"] | int, BeforeValidator(memory_of)] = "auto"
    """What training may take on each device, such as 24GB. auto: nine tenths of what is free. Autoencoders that do not
    fit into it together are trained in waves, each in a pass over the store."""
    dead_after_tokens: Annotated[int, Field(ge=1)] = 1_000_000
    """A latent counts as dead in metrics.jsonl when it has not fired for this many training tokens."""
    checkpoint_every: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Steps between checkpoints. auto: 1000, or more where they would take more than a tenth of the time."""
    keep_checkpoints: bool = False
    """Keep a finished run's checkpoints, which are several times as large as its autoencoders."""
    log_every: Annotated[int, Field(ge=1)] = 50
    """Steps between lines of metrics.jsonl."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers that are told each line of metrics.jsonl, in the run's folder (docs/training.md). wandb stays
    offline unless WANDB_MODE says otherwise."""
    out: Folder | None = None
    """The run's folder. Default: runs/NAME, where NAME follows from the store and this configuration."""
    overwrite: bool = False

    @model_validator(mode="after")
    def check(self) -> "TrainConfig":
        if not self.saes:
            raise ValueError("saes: name at least one autoencoder (arch, d_sae, sparsity)")
        names = [sae.name for sae in self.saes]
        if len(set(names)) < len(names):
            raise ValueError(f"saes: {max(names, key=names.count)} is listed twice; change its seed, or remove one")
        if self.batch % self.streams:
            raise ValueError(f"batch: {self.batch} is not a multiple of streams = {self.streams}")
        return self


class RecodeConfig(Frozen):
    """A store written anew with another codec."""

    source: Location
    target: Location
    codec: CodecChoice
    """How rows are stored."""


class EvalConfig(Frozen):
    """One evaluation of a finished training run on its held-out tokens."""

    run: Folder
    """The run's folder."""
    store: Location | None = None
    """Where the run's store is now, if it moved."""
    ce: bool | None = None
    """Splice reconstructions into the language model and measure its next-token loss. Default: where there is one; a
    synthetic store has none."""
    model: str | None = None
    """The language model, if it moved. Default: the one the store was harvested from."""
    device: str = "auto"
    ce_tokens: Annotated[int, Field(ge=1)] = 100_000
    """Predictions that the losses are averaged over, at most (and at most the held-out ones)."""
    directions: bool = True
    """Measure how the decoder's directions lie to each other; of a wide dictionary, those of a sample of latents."""
    peer_conventions: bool = False
    """R², L0 and dead as SAELens, dictionary_learning and SAEBench define them, beside ours."""


def demo_harvest(out: Path) -> HarvestConfig:
    """The shipped model over the text that comes with it."""
    return HarvestConfig(model="tiny", hooks=DEMO_HOOKS, tokens=600_000, out=str(out / "stores"))


def demo_train(out: Path, store: str) -> TrainConfig:
    """SA-GSAE at one width against Gated at twice that width, both with the recipe for a short run."""
    saes = tuple(
        sae_config(arch=arch, d_sae=d_sae, sparsity=sparsity, theta0=1.0)
        for arch, d_sae in (("sa-gsae", 512), ("gated", 1024))
        for sparsity in DEMO_SPARSITIES
    )
    return TrainConfig(
        store=store,
        hook="attn_out",
        saes=saes,
        tokens=512 * 1000,
        batch=512,
        lr=8e-3,
        heldout_tokens=50_000,
        dead_after_tokens=100_000,
        checkpoint_every=200,
        out=out / "run",
    )
