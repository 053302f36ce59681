"""What a user asks of the activation cache, and what it answers: the words that the command line, the client and the
server share.

`WantedActivations` says which numbers are wanted. `HarvestConfig` adds where they go and how they are computed, and
`StoreRequest` adds which stores may answer. Two requests are the same when the numbers are: see
docs/explanation/cache.md.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field

from shared.schema import Frozen, Shown
from shared.store.spec import MOST_TOKENS


def layer_number(value: object) -> object:
    """A layer's number from its text, or `mid`."""
    if not isinstance(value, str) or value == "mid":
        return value
    if not re.fullmatch("-?[0-9]{1,9}", value):
        raise ValueError("must be a layer number from 0, or mid")
    return int(value)


Layer = Annotated[int | Literal["mid"], BeforeValidator(layer_number), Shown("LAYER", type="integer or mid")]


class WantedActivations(Frozen):
    """Everything that decides which activations a store holds, and in which format."""

    model: str
    """An alias (tiny, pythia-1b, gpt2, …), a Hugging Face id, a folder or a GGUF file.

    `sagsae models` lists the aliases."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face model. Default: its main branch."""
    tokenizer: str | None = None
    """Another tokenizer: a folder, a GGUF file or a Hugging Face id. Default: the model's own."""
    eos: int | str | None = None
    """The id, or the token, that ends a document. Default: the tokenizer's."""
    special_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Further token ids to leave out of statistics and training.

    What the tokenizer marks as special is left out anyway."""
    split_special_tokens: bool = False
    """Treat special tokens that are spelt out in a text as plain text. Otherwise they become their ids."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the model computes in. auto: bfloat16 where the hardware multiplies it natively, else float32.

    A harvest that resumes keeps the dtype of its store."""
    store_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the stored activations. bfloat16 keeps 8 bits of mantissa (55 dB)."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """sdpa: the model's own modules, bit for bit. eager: slower, with hooks inside attention.

    eager is TransformerLens' attention."""
    layers: tuple[Layer, ...] = ("mid",)
    """Layer numbers from 0; mid is n_layers // 2."""
    hooks: tuple[str, ...] = ("resid_post", "attn_out", "mlp_out")
    """Short names (resid_pre, mlp_out, …) or TransformerLens names such as `blocks.3.attn.hook_z`.

    `sagsae hooks` lists those of a model."""
    corpus: str | None = None
    """A file, a folder or a Hugging Face dataset; a text file is one document. Default: the corpus.jsonl beside a local
    model.

    docs/reference/corpora.md describes every kind."""
    corpus_config: str | None = None
    """Configuration (subset) of a Hugging Face dataset. Default: the dataset's own."""
    corpus_split: str = "train"
    """Split of a Hugging Face dataset."""
    corpus_revision: str | None = None
    """Branch, tag or commit of a Hugging Face dataset. Default: its main branch."""
    text_field: str = "text"
    """The field or column that holds a document: its text, or the list of its token ids.

    It applies to JSON lines, parquet and Hugging Face datasets."""
    on_bad_document: Literal["refuse", "skip"] = "refuse"
    """What to do with a document that cannot be read; skip counts them.

    Such a document is not UTF-8, not JSON, lacks the field or holds something else in it."""
    shuffle_documents: bool = True
    """Shuffle documents before they are packed.

    The shuffle is seeded and uses a buffer of 100,000 documents and 1 GiB."""
    context: Annotated[int, Field(ge=2)] | None = None
    """Tokens per row of the corpus. Default: the model's longest context, at most 1024."""
    bos: Literal["auto", "true", "false"] = "auto"
    """Begin every row with the BOS token. auto: as the model's tokenizer does."""
    skip_positions: Annotated[int, Field(ge=0)] = 1
    """Positions at the start of every context to leave out of statistics and training.

    They are stored all the same. In most models position 0 is an outlier."""
    tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    """Activation rows to write, exactly. Default: all that the corpus gives."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the shuffles of documents and of rows inside a shard."""
    codec: Literal["zstd", "lz4", "none", "int8"] = "zstd"
    """zstd is the smallest without loss, lz4 the fastest to write; int8 is lossy: half of bfloat16, 42 dB."""


RATES: Final = ".sagsae-rates.jsonl"
"""The file beside the stores that says how fast harvests were."""
Accept = Literal["exact", "covering"]
JobState = Literal["queued", "running", "verifying", "done", "failed", "cancelled"]
Action = Literal["ready", "view", "extend", "hookpoints", "recode", "harvest"]
"""How a request is answered: a store is there; a part of one is linked; only new shards, or only new hookpoints, are
harvested; a store is rewritten with another codec; everything is harvested."""


class StoreRequest(WantedActivations):
    """A request to the activation cache: which activations, and which stores may answer."""

    groups: ClassVar[Mapping[str, str]] = {
        "Model": "model revision tokenizer eos special_ids split_special_tokens bos",
        "Activations": "layers hooks tokens context skip_positions",
        "Corpus": "corpus corpus_config corpus_split corpus_revision text_field on_bad_document shuffle_documents seed",
        "Format": "codec store_dtype dtype attention",
        "Answer": "accept environment priority pin refresh",
    }

    accept: Accept = "covering"
    """exact: a store of just these tokens. covering: a store of more tokens will do, too.

    A larger store begins with the same rows in the same order, shard by shard."""
    environment: Literal["any", "same"] = "any"
    """same: only stores that the same versions on the same kind of device wrote. any: versions do not matter."""
    priority: Literal["normal", "low"] = "normal"
    """Jobs of low priority wait until no other job is queued."""
    pin: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")] | None = None
    """Pin the store under this name, so that it is never evicted. Default: no pin."""
    refresh: bool = False
    """Look again where the names of the model and the corpus point to now, instead of trusting the last hour's look."""


class Place(Frozen):
    """Where one hookpoint of an answer is."""

    store: str
    """The store's id: the name of its folder."""
    url: str | None = None
    """Its address on the server; None without a server."""
    file: str | None = None
    """Its folder, for programs on the server's machine or on a shared disk."""


class RequestPlan(Frozen):
    """What answering a request takes, before anything is done."""

    action: Action
    tokens: int | None
    """Rows of the answer; None for a whole corpus that was never read."""
    shards_to_harvest: int | None = None
    bytes_to_write: int | None = None
    seconds: float | None = None
    """Estimated from earlier harvests of the same model; None when there was none."""
    from_stores: tuple[str, ...] = ()
    """Stores that give tokens, shards or hookpoints."""
    evicts: tuple[str, ...] = ()
    """Stores that would be deleted to make room."""
    text: str = ""
    """The same as one line for people."""


class CacheAnswer(Frozen):
    """The answer to a request: a store that is ready, or the job that makes it."""

    state: Literal["ready", "queued", "running"]
    key: str
    """The identity of the activations: equal keys mean equal rows, in the same order and format."""
    hookpoints: Mapping[str, Place] = {}
    """By hookpoint path (`layer_8/mlp_out`). For an unfinished store these places can be followed."""
    exact: bool = True
    """Whether the stores hold just the tokens that were asked for."""
    tokens: int | None = None
    """Rows that the stores hold, or will hold."""
    job: int | None = None
    place: int | None = None
    """Jobs before this one in the queue."""
    eta_s: float | None = None
    spec_id: str | None = None
    snapshot_id: str | None = None
    plan: RequestPlan | None = None


class Job(Frozen):
    """One job of the queue, as clients see it."""

    id: int
    state: JobState
    action: Action
    key: str
    store: str
    """The folder that it writes."""
    request: Mapping[str, Any]
    asked: int
    """Requests that wait for it."""
    attempt: int
    priority: str
    worker: str | None = None
    rows: int = 0
    total: int | None = None
    rows_per_s: float | None = None
    note: str = ""
    """The worker's last line of progress."""
    error: str | None = None
    """Why it failed, in one sentence."""
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    revision: int = 0
    """Grows with every change."""


class JobAttempt(Frozen):
    """One attempt of a job: who made it, and how it ended."""

    number: int
    worker: str
    began: float
    ended: float | None = None
    code: int | None = None
    """The command's exit code, negative for a signal; None while it runs, and where its worker fell silent."""
    words: str = ""
    """The command's last words."""


class StoreReader(Frozen):
    """A program that leased a store."""

    holder: str
    since: float
    """When it took its last lease, in seconds since 1970."""
    reads: bool
    """Whether it still holds one."""


class StoreRow(Frozen):
    """One store of the catalog, as clients see it."""

    id: str
    """The name of its folder."""
    key: str
    spec_id: str
    model: str
    corpus: str
    hookpoints: tuple[str, ...]
    rows: int
    """Rows that are committed."""
    n_tokens: int
    """Rows of the finished store."""
    context: int
    codec: str
    bytes: int | None = None
    state: Literal["writing", "final"]
    environment: str = ""
    created: float | None = None
    used: float | None = None
    """When it was last asked for or leased, in seconds since 1970."""
    pins: tuple[str, ...] = ()
    leases: int = 0
    job: int | None = None
    """The open job that writes it."""


class StorePage(Frozen):
    """A part of the catalog."""

    stores: tuple[StoreRow, ...]
    next: str | None = None
    """The cursor of the next part; None after the last one."""


class JobPage(Frozen):
    """A part of the list of jobs."""

    jobs: tuple[Job, ...]
    next: str | None = None
    """The cursor of the next part; None after the last one."""


class LogPart(Frozen):
    """A part of a job's log."""

    text: str
    next: int
    """The byte at which the next part begins."""
    ended: bool
    """Whether the job has ended and nothing follows."""


class LeaseGrant(Frozen):
    """A lease of a store: until it lapses, the store is not evicted."""

    id: str
    store: str
    ttl_s: float


class LogFile(Frozen):
    """The state of one log of a store's manifest: see LogMark in shared/files/base.py."""

    path: str
    identity: str
    size: int
    grows: bool


class StoreFilter(Frozen):
    """Which stores of the catalog are listed. Every field narrows the list; None does not."""

    model: str | None = None
    layer: Annotated[int, Field(ge=0)] | None = None
    hook: str | None = None
    corpus: str | None = None
    state: Literal["writing", "final"] | None = None
    key: str | None = None


StoreSort = Literal["used", "created", "bytes", "tokens", "id"]


class WorkerInfo(Frozen):
    """What a worker says of itself when it asks for a job."""

    name: Annotated[str, Field(pattern=r"^[\w.:-]{1,64}$")]
    device: str = "cpu"
    gpus: Annotated[int, Field(ge=0, le=1024)] = 0
    memory: Annotated[int, Field(ge=0)] = 0
    """Bytes of memory of its devices together; of the machine, without one."""
    bf16: bool = False
    """Whether the hardware multiplies bfloat16 natively."""
    environment: str = ""
    """The digest of its versions and kind of device."""
    versions: Mapping[str, str] = {}
    light: bool = False
    """Whether it takes only jobs that load no model: views and recoding."""


class WorkerRow(Frozen):
    """A worker that was heard of lately."""

    worker: WorkerInfo
    job: int | None = None
    """What it works on."""
    seen: float
    """When it was last heard of, in seconds since 1970."""


class TakenJob(Frozen):
    """A job that a worker has taken: which command it runs."""

    job: int
    attempt: int
    action: Action
    store: str
    """The folder that it writes."""
    command: Literal["harvest", "store recode"]
    settings: Mapping[str, Any]
    """The command's settings, as a --config file has them."""
    repair: bool = False
    """Whether damage was found: the store is repaired before it is resumed."""
    lease_s: float
    """Seconds without a beat after which another worker may take the job."""
    beat_s: float = 5.0
    """Seconds between two beats."""
