"""The frozen configuration of each stage: what a TOML file, `--set key=value` and the command line may say.

A field is an option, a key and an entry of docs/reference/settings.md at once: its docstring is the help text (the
first paragraph in `--help`, all of it in the reference), and `Default: …` says in words what None stands for. A new
field needs a place in its class's `groups` and `make reference`.

Unknown keys are refused with the nearest valid name. Nothing here is changed after it is built; what a run works out
from it (a default context length, the number of steps) goes into the run's record.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from shared.memory import parse_bytes
from shared.request import Layer, StoreRequest, WantedActivations
from shared.saes import AnySAE, Penalised, sae_config
from shared.schema import Frozen, Shown
from shared.store.spec import MOST_SHARD_ROWS, MOST_TOKENS
from shared.synthetic import Synthetic


def at_home(value: object) -> object:
    """A path with `~` at its beginning made whole; whatever else as it is."""
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    return os.path.expanduser(value) if isinstance(value, str) else value  # leaves an unknown ~user alone


Location = Annotated[
    str,
    BeforeValidator(lambda value: at_home(str(value) if isinstance(value, Path) else value)),
    Shown("PATH|URL", type="path or URL"),
]
"""A folder or a URL. Not a Path, which would take a slash out of `s3://`."""
Folder = Annotated[Path, BeforeValidator(at_home)]


def memory_of(value: object) -> object:
    """`auto`, or a number of bytes from its text."""
    if isinstance(value, str) and value != "auto":
        value = parse_bytes(value)
    if isinstance(value, int) and value < 1:
        raise ValueError("must be auto, or at least one byte")
    return value


def quota_of(value: object) -> object:
    """`disk`, or a number of bytes from its text."""
    size = parse_bytes(value) if isinstance(value, str) and value != "disk" else value
    if isinstance(size, int) and size < 1:
        raise ValueError("must be disk, or at least one byte")
    return size


SlurmOption = Annotated[str, Field(pattern=r"^(--)?[a-z][a-z0-9-]*(=[^\n]+)?$")]
"""One long option of sbatch, with or without its dashes."""


def gpu_numbers(value: str | None) -> str | None:
    if value is not None and not re.fullmatch("[0-9]{1,4}(,[0-9]{1,4}){0,63}", value):
        raise ValueError("must be numbers of GPUs with commas between them, such as 0,1")
    return value


def store_name(value: str) -> str:
    """The name of a folder inside the folder that holds stores."""
    if not re.fullmatch(r"\w[\w.-]*", value):
        raise ValueError("must begin with a letter or a digit; then letters, digits, dots, - and _ can follow")
    return value


DEMO_HOOKS = ("resid_post", "attn_out", "mlp_out")
DEMO_SPARSITIES = (0.05, 0.1, 0.2, 0.4)


class HarvestConfig(WantedActivations):
    """One harvest: a model, a corpus and the hookpoints to keep."""

    groups: ClassVar[Mapping[str, str]] = {
        "Model": "model revision tokenizer eos special_ids split_special_tokens bos",
        "Activations": "layers hooks tokens context skip_positions allow_nonfinite",
        "Corpus": "corpus corpus_config corpus_split corpus_revision text_field on_bad_document shuffle_documents seed",
        "Store": "out name codec store_dtype chunk_rows shard_rows reuse overwrite",
        "Computation": "device dtype attention batch_tokens",
    }

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …, or map, which spreads a model over every GPU.

    map is transformers' device_map="auto"."""
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens in one forward pass. Default: 2048 on a CPU; on a GPU what fits, at most 65536.

    A batch that runs out of memory is halved."""
    allow_nonfinite: bool = False
    """Keep rows with NaN or infinities, marked, instead of stopping.

    They are left out of statistics and training."""
    chunk_rows: Annotated[int, Field(ge=1, le=MOST_SHARD_ROWS)] | None = None
    """Rows to decode at a time. Default: the power of two that makes at most 2 MiB."""
    shard_rows: Annotated[int, Field(ge=1, le=MOST_SHARD_ROWS)] | None = None
    """Rows to commit at a time, a multiple of chunk_rows. Default: 128 chunks; below 2^20 tokens, 16,384 rows.

    Those 16,384 rows are at most 16 chunks. Stores of equal shape share whole shards (docs/explanation/cache.md)."""
    reuse: Literal["any", "same", "none"] = "any"
    """Which stores in the same folder this one may take shards from. any: all of them. none: it captures every shard.

    same: only stores that the same versions on the same kind of device wrote. Shards are linked, so they take no
    space (docs/explanation/cache.md)."""
    out: Location = "stores"
    """The folder, or s3:// prefix, that holds stores."""
    name: Annotated[str, AfterValidator(store_name)] | None = None
    """The store's folder inside --out. Default: the model's name."""
    overwrite: bool = False
    """Start from scratch instead of resuming."""

    @model_validator(mode="after")
    def check(self) -> "HarvestConfig":
        if self.chunk_rows and self.shard_rows and self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows: {self.shard_rows} is not a multiple of chunk_rows = {self.chunk_rows}")
        if self.allow_nonfinite and self.codec == "int8":
            raise ValueError("allow_nonfinite: int8 has no NaN and no infinity. Choose another codec")
        return self


class RequestConfig(StoreRequest):
    """One request to the activation cache, answered from a folder of stores."""

    groups: ClassVar[Mapping[str, str]] = {
        **{name: fields for name, fields in StoreRequest.groups.items() if name != "Answer"},
        "Answer": "root accept environment priority pin refresh",
        "Computation": "device batch_tokens",
    }

    root: Location = "stores"
    """The folder that holds the stores."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …, or map: where what is missing is computed."""
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens in one forward pass. Default: 2048 on a CPU; on a GPU what fits, at most 65536."""


class SynthConfig(Synthetic):
    """One synthetic store: the generator's parameters (docs/explanation/synthetic.md) and the store's own."""

    groups: ClassVar[Mapping[str, str]] = {
        "Features": "d_in features p_bipolar l0 zipf coefficients noise seed",
        "Store": "tokens context out name codec store_dtype chunk_rows shard_rows overwrite",
    }

    tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 1_000_000
    """Rows to write."""
    context: Annotated[int, Field(ge=1, le=1 << 16)] = 128
    """Rows that are held out together. They have nothing else to do with each other."""
    store_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the stored activations. bfloat16 keeps 8 bits of mantissa (55 dB)."""
    codec: Literal["zstd", "lz4", "none", "int8"] = "zstd"
    """zstd is the smallest without loss, lz4 the fastest to write; int8 is lossy: half of bfloat16, 42 dB."""
    chunk_rows: Annotated[int, Field(ge=1, le=MOST_SHARD_ROWS)] | None = None
    """Rows to decode at a time. Default: the power of two that makes at most 2 MiB."""
    shard_rows: Annotated[int, Field(ge=1, le=MOST_SHARD_ROWS)] | None = None
    """Rows to commit at a time, a multiple of chunk_rows. Default: 128 chunks, fewer in a small store."""
    out: Location = "stores"
    """The folder, or s3:// prefix, that holds stores."""
    name: Annotated[str, AfterValidator(store_name)] = "synthetic"
    """The store's folder inside --out."""
    overwrite: bool = False
    """Start from scratch instead of resuming."""

    @model_validator(mode="after")
    def check_shape(self) -> "SynthConfig":
        if self.chunk_rows and self.shard_rows and self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows: {self.shard_rows} is not a multiple of chunk_rows = {self.chunk_rows}")
        return self


class TrainConfig(Frozen):
    """One training run: any number of autoencoders on one pass over one hookpoint's activations."""

    groups: ClassVar[Mapping[str, str]] = {
        "Activations": (
            "store request hook tokens heldout_tokens exclude_positions exclude_special max_norm longest_row follow "
            "seed"
        ),
        "Autoencoders": "saes warm_start",
        "Optimisation": "lr batch warmup_steps decay_fraction clip_norm",
        "Run": "out overwrite checkpoint_every keep_checkpoints log_every track dead_after_tokens",
        "Computation": "device precision memory parallel parts step compile",
        "Reading": "verify streams run_chunks window_rows",
    }

    store: Location
    """A store, or one hookpoint's array in it: a folder or a URL (s3://, gs://, hf://, http(s)://).

    http://HOST:PORT/v1/stores/ID is a store that an activation cache serves."""
    request: Annotated[tuple[str, ...], Shown("KEY=VALUE")] = ()
    """What to ask the activation cache for, in place of --store. `sagsae settings request` lists keys.

    The answer becomes `store`; a run records both."""
    hook: str | None = None
    """The hookpoint to train on, such as layer_08/mlp_out or mlp_out. Default: the only one in the store."""
    saes: tuple[AnySAE, ...]
    """The autoencoders, each with its architecture (`arch`), its width (`d_sae`) and settings of its own.

    `sagsae settings gated` lists those of an architecture. The command line builds this list: every combination of what
    its options name."""
    warm_start: Annotated[Folder, Shown(option="--from")] | None = None
    """An autoencoder whose weights all of these start from: its folder, or RUN/NAME. Default: random weights.

    It may be an imported one. The new ones have its architecture, width and tie; a gated one of width 2H can also start
    from an sa-gsae of width H, and back. Optimisers begin from nothing."""
    tokens: Annotated[int, Field(ge=1)] | None = None
    """Training tokens; more than the store holds means several epochs. Default: one epoch."""
    batch: Annotated[int, Field(ge=1)] = 4096
    """Tokens per step, over all processes."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False), Shown(repeatable=True)] = 1e-3
    """Peak learning rate of Adam. Runs under a million tokens want 3e-3 to 8e-3.

    Several rates on the command line train every autoencoder with each of them."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of linear warm-up. Default: 100, or 5 % of a run that is shorter than 2,000 steps."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.3
    """The last part of the run, over which the learning rate falls linearly to zero."""
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Maximum gradient norm of an autoencoder, all its weights together. Default: no limit.

    A longer gradient is scaled down to it."""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """Inputs of matrix products. auto: bfloat16 where the hardware multiplies it natively, else float32.

    tf32 is float32, rounded to 10 bits of mantissa inside a CUDA device's products. Everything else, the weights too,
    is float32."""
    parallel: Literal["auto", "data", "sweep"] = "auto"
    """How several processes share the work. auto: sweep where the autoencoders can be shared out evenly, else data.

    data: each process computes a part of every batch. sweep: each trains some of the autoencoders, on whole batches,
    and reads all of the store."""
    compile: bool = False
    """Compile the dense steps with torch.compile.

    docs/records/benchmarks.md says how much faster they are. The first step of an autoencoder takes up to a minute
    longer. Needs a C++ compiler on a CPU."""
    parts: Annotated[int, Field(ge=1)] | None = None
    """Gradient accumulation: micro-batches per batch. Default: one per process that shares the batch.

    More micro-batches take less memory. On CPUs, for powers of two, the result has the same bits with any number of
    processes that divides it."""
    step: Literal["auto", "dense", "sparse"] = "auto"
    """How gated architectures compute a step: with every latent, or from the open gates. auto: the faster one.

    auto decides by the share of the dictionary that is active; on CUDA by an estimate of that share, and only where
    triton is installed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    seed: Annotated[int, Field(ge=0, lt=2**63), Shown(option="--data-seed")] = 0
    """Seeds the order of the activations and the choice of held-out contexts. --seed is that of the weights."""
    heldout_tokens: Annotated[int, Field(ge=1)] = 100_000
    """Tokens kept from training for evaluation, as whole contexts; at most a tenth of the store."""
    exclude_positions: tuple[int, ...] | None = None
    """Positions in a context to leave out of training and evaluation. Default: the store's skip_positions."""
    exclude_special: bool = True
    """Leave the tokenizer's special tokens out of training and evaluation."""
    max_norm: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Leave out rows whose norm exceeds this many times the median. Default: no limit.

    5 leaves out massive activations: a few tokens that hold most of the variance (docs/explanation/method.md)."""
    longest_row: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """Train on a row that is farther from the mean than this as if it were this far. 0: on all rows as they are.

    In units of the root mean square distance. A single massive row in a batch would undo most of what Adam has
    learned. Measuring takes rows as they are."""
    follow: bool = False
    """Train while the store is still being harvested.

    Training reads the shards in the order of their numbers and waits for the harvest where it must, so the weights do
    not depend on its speed. It plans one epoch."""
    verify: Literal["always", "first-epoch", "off"] = "always"
    """When to compare the checksum of each chunk.

    Lengths and indexes are always compared."""
    streams: Annotated[int, Field(ge=1)] = 8
    """Virtual streams that a global batch is made of."""
    run_chunks: Annotated[int, Field(ge=1)] | None = None
    """Neighbouring chunks to read together. Default: 1 from a disk, 2 from an object store.

    A request to an object store costs more. Use at most one chunk per 262,144 `window_rows` to keep batches well
    mixed."""
    window_rows: Annotated[int, Field(ge=1)] = 524_288
    """Maximum rows that are held in memory and shuffled together, over all streams."""
    memory: Annotated[Literal["auto"] | int, BeforeValidator(memory_of), Shown("auto|SIZE", type="auto or a size")] = (
        "auto"
    )
    """What training may take on each device, such as 24GB. auto: nine tenths of what is free.

    Autoencoders that do not fit into it together are trained in waves, each in a pass over the store."""
    dead_after_tokens: Annotated[int, Field(ge=1)] = 1_000_000
    """Training tokens without firing after which metrics.jsonl counts a latent as dead."""
    checkpoint_every: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Steps between checkpoints. auto: 1000, or more where they would take over a tenth of the time."""
    keep_checkpoints: bool = False
    """Keep a finished run's checkpoints, which are several times as large as its autoencoders."""
    log_every: Annotated[int, Field(ge=1)] = 50
    """Steps between lines of metrics.jsonl."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers. wandb stays offline unless WANDB_MODE says otherwise.

    They are sent each line of metrics.jsonl and write into the run's folder (docs/explanation/training.md)."""
    out: Folder | None = None
    """The run's folder. Default: runs/NAME, where NAME follows from the store and the settings."""
    overwrite: bool = False
    """Start from scratch instead of resuming."""

    @model_validator(mode="after")
    def check(self) -> "TrainConfig":
        if not self.saes:
            raise ValueError("saes: name at least one autoencoder (arch, d_sae, sparsity)")
        for sae in self.saes:
            if isinstance(sae, Penalised):
                _ = sae.known_sparsity
        names = [sae.name for sae in self.saes]
        if len(set(names)) < len(names):
            raise ValueError(f"saes: {max(names, key=names.count)} is listed twice; change its seed, or remove one")
        if self.batch % self.streams:
            raise ValueError(f"batch: {self.batch} is not a multiple of streams = {self.streams}")
        return self


class ServeConfig(Frozen):
    """The activation cache as a service: one folder of stores, a queue, and the worker that fills it."""

    groups: ClassVar[Mapping[str, str]] = {
        "Cache": "root quota max_tokens",
        "Server": "host port token_file allow_host accel",
        "Names": "allow_model allow_corpus",
        "Work": "launch workers device dtype",
        "Slurm": "url slurm_options slurm_processes slurm_jobs",
    }

    root: Folder = Path("stores")
    """The folder that holds the stores. It is made where there is none."""
    quota: Annotated[Literal["disk"] | int, BeforeValidator(quota_of), Shown("disk|SIZE", type="disk or a size")] = (
        "disk"
    )
    """What all stores together may take, such as 2TB. disk: what the disk has, less 5 %.

    The least recently used stores are deleted to stay below it, unless they are pinned or leased."""
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 1_000_000_000
    """The most tokens that one request may ask for."""
    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,255}$")] = "127.0.0.1"
    """The address to listen on. One that other machines reach needs --token-file."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8642
    """The port to listen on. 0: any free one, which is printed."""
    token_file: Folder | None = None
    """A file with the tokens that open the server, which only you may read. Default: none, for this machine alone.

    A line is read:TOKEN, ask:TOKEN or admin:TOKEN. One token alone is admin's."""
    allow_host: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,255}$")], ...] = ()
    """A further name under which the server is reached, such as cache.lab.example.

    Requests whose Host header is another name are refused: a page of another site cannot read answers."""
    accel: Literal["off", "nginx"] = "off"
    """nginx: leave the bytes of stores to an nginx in front of the server (X-Accel-Redirect).

    It needs `location /.sagsae-files/ { internal; alias ROOT/; disable_symlinks on; }` there, where ROOT is --root."""
    allow_model: Annotated[tuple[str, ...], Shown("NAME=PATH")] = ()
    """A model folder or GGUF file that requests may name. Aliases and Hugging Face ids are allowed anyway."""
    allow_corpus: Annotated[tuple[str, ...], Shown("NAME=PATH", option="--allow-corpus")] = ()
    """A corpus on this machine that requests may name. Hugging Face datasets are allowed anyway."""
    launch: Literal["local", "slurm", "none"] = "local"
    """local: start a worker beside the server. slurm: submit each job with sbatch. none: workers come by themselves.

    `sagsae work` is such a worker (docs/how-to/slurm.md)."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Workers to start beside the server."""
    device: str = "auto"
    """The device of these workers: auto, cpu, cuda, cuda:1, …, or map."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What models compute in where a request says auto. auto: as --device prefers."""
    url: Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9_.:-]{1,255}$"), Shown("URL")] | None = None
    """The address at which workers on other machines reach the server. Default: http://HOST:PORT of this machine."""
    slurm_options: Annotated[tuple[SlurmOption, ...], Shown("NAME=VALUE", option="--slurm")] = ()
    """A further option of sbatch for every job, such as partition=gpu, gres=gpu:1 or time=08:00:00."""
    slurm_processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes of a harvest on each node of a Slurm job; mostly one for each of the node's GPUs."""
    slurm_jobs: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Slurm jobs that may wait or run at a time."""

    @property
    def quota_bytes(self) -> int | None:
        """The quota; None for what the disk has."""
        return self.quota if isinstance(self.quota, int) else None


class WorkConfig(Frozen):
    """One worker of the activation cache: it runs the service's jobs on this machine."""

    groups: ClassVar[Mapping[str, str]] = {"Service": "service root name job", "Computation": "device gpus processes"}

    service: str | None = None
    """The address of the service, http://HOST:PORT. Default: SAGSAE_SERVICE."""
    root: Folder = Path("stores")
    """The service's folder of stores, on a disk that it and this machine see."""
    name: Annotated[str, Field(pattern=r"^[\w.:-]{1,64}$")] | None = None
    """The worker's name in lists. Default: the machine's name and a number.

    Two workers at one time must not have the same name."""
    job: Annotated[int, Field(ge=1, lt=10**15)] | None = None
    """Wait for this job only, run it once and end. Default: run one job after another.

    A batch system starts such workers (docs/how-to/slurm.md)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …, or map, where a job does not say which."""
    gpus: Annotated[str | None, AfterValidator(gpu_numbers), Shown("N,N…")] = None
    """Which GPUs to use, such as 0,1: one process on each. Default: every one that is visible."""
    processes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes of one harvest. Default: one for each of --gpus, else one."""


class RecodeConfig(Frozen):
    """A store rewritten with another codec."""

    groups: ClassVar[Mapping[str, str]] = {"Store": "source target codec"}

    source: Annotated[Location, Shown(option="SOURCE")]
    """A finished store."""
    target: Annotated[Location, Shown(option="TARGET")]
    """The new store: a folder or an s3:// URL."""
    codec: Literal["zstd", "lz4", "none", "int8"]
    """zstd is the smallest without loss, lz4 the fastest to write; int8 is lossy: half of bfloat16, 42 dB."""


class EvalConfig(Frozen):
    """One evaluation on held-out tokens: of a finished training run, or of autoencoders that stand alone."""

    groups: ClassVar[Mapping[str, str]] = {
        "Run": "run store model device",
        "Autoencoders without a run": "sae hook rows_of heldout_tokens transfer out",
        "Measures": "ce ce_tokens directions peer_conventions",
    }

    run: Annotated[Folder, Shown(option="RUN")] | None = None
    """The training run's folder. Default: none, with --sae."""
    store: Location | None = None
    """Where the run's store is now; with --sae the store to measure on. Default: where it was."""
    sae: Folder | None = None
    """An autoencoder to measure instead of a run: its folder, trained here or imported. Default: those of RUN.

    RUN/NAME is one of a run, RUN all of them. Each is measured on rows that --store and --hook, or --rows-of, name."""
    hook: str | None = None
    """With --sae, the hookpoint to measure on. Default: the only one in the store."""
    rows_of: Folder | None = None
    """With --sae, a run whose held-out tokens to measure on. Default: the tokens that --store holds out by default.

    They are the same rows, so `sagsae report` puts the results beside that run's."""
    heldout_tokens: Annotated[int, Field(ge=1)] | None = None
    """With --sae, tokens to measure on, as whole contexts; at most a tenth of the store. Default: 100,000.

    They are the contexts that a run with this setting, and others by default, keeps from training."""
    transfer: bool = False
    """With --sae, measure it although it was made for another model or hookpoint of the same width.

    A report says so."""
    out: Folder | None = None
    """With --sae, the folder for the results. Default: evaluations/NAME, where NAME follows from what is measured."""
    ce: bool | None = None
    """Splice reconstructions into the language model and measure its loss. Default: on where there is one.

    A synthetic store has no language model. --no-ce keeps what an earlier evaluation measured."""
    model: str | None = None
    """The language model. Default: the one the store was harvested from."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    ce_tokens: Annotated[int, Field(ge=1)] = 100_000
    """Maximum number of predictions that the losses are averaged over."""
    directions: bool = True
    """Compare the decoder's directions with each other; in a wide dictionary, those of a sample of latents."""
    peer_conventions: bool = False
    """Report R², L0 and dead by other tools' definitions, too.

    The tools are SAELens, dictionary_learning and SAEBench. SAELens counts position 0 of every context, which we leave
    out: a second line of it has every position."""

    @model_validator(mode="after")
    def check_what(self) -> "EvalConfig":
        if (self.run is None) == (self.sae is None):
            raise ValueError(
                "RUN: name a run, or an autoencoder and a store: --sae FOLDER --store STORE"
                + (" (got both)" if self.run else "")
            )
        for key in ("hook", "rows_of", "heldout_tokens", "transfer", "out"):
            if self.run is not None and key in self.model_fields_set:
                raise ValueError(f"--{key.replace('_', '-')}: is for --sae; a run says it by itself")
        if self.sae is not None and self.store is None and self.rows_of is None:
            raise ValueError("--sae: on which rows? Give --store STORE --hook H, or --rows-of RUN")
        for key in ("hook", "heldout_tokens"):
            if self.rows_of is not None and key in self.model_fields_set:
                raise ValueError(f"--{key.replace('_', '-')}: --rows-of {self.rows_of} says it. Give one of the two")
        return self


class ReportConfig(Frozen):
    """One HTML page that compares evaluated runs."""

    groups: ClassVar[Mapping[str, str]] = {"Report": "runs out overwrite"}

    runs: Annotated[tuple[Folder, ...], Shown(option="RUN...")]
    """Folders of evaluated runs."""
    out: Folder = Path("report.html")
    """The HTML file to write."""
    overwrite: bool = False
    """Replace a file that is no report, too."""


class ReproduceConfig(Frozen):
    """The paper's comparison on a model: SA-GSAE at widths H and 2H against Gated, at every λ and seed."""

    groups: ClassVar[Mapping[str, str]] = {
        "Comparison": "models preset cells seeds layer tokens corpus",
        "Run": "out yes device",
    }

    models: tuple[str, ...] = ()
    """Alias, Hugging Face id or folder. Default: the preset's."""
    preset: str = "tiny"
    """smoke (minutes), tiny (under an hour) or paper (GPU-days)."""
    cells: str | None = None
    """Hookpoints, with commas. Default: resid_post,attn_out,mlp_out."""
    seeds: int | None = None
    """Seeds of the two arms that are compared. Default: the preset's."""
    layer: Layer = "mid"
    """Layer number from 0, or mid."""
    tokens: int | None = None
    """Training tokens of every autoencoder. Default: the preset's."""
    corpus: str | None = None
    """A file, a folder or a Hugging Face dataset. Default: the preset's."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    out: Folder = Path("reproduction")
    """The folder for everything."""
    yes: bool = False
    """Start a job that takes hours or tens of GB."""


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
