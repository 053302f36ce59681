"""What a request asks for, once the model, the corpus and the hookpoints are looked up. It reads no weights."""

from dataclasses import dataclass, replace
from typing import get_args

from harvest.corpus.documents import StopCheck, never_stop
from harvest.plan import HarvestPlan, asked_spec, corpus_name, make_plan, model_row, store_name
from harvest.reuse.key import environment_of, rows_key, store_key, token_key, with_codec
from harvest.reuse.match import Shape, Wanted, disk_bytes
from harvest.reuse.shape import FEW_TOKENS, fixed_shape
from shared.config import HarvestConfig
from shared.device import device_name
from shared.model.source import in_words
from shared.record import provenance
from shared.request import StoreRequest, WantedActivations
from shared.store.shard import CODECS, CodecName
from shared.store.spec import DTYPES, StoreSpec


@dataclass(frozen=True)
class Planned:
    """A request whose names are looked up."""

    wanted: Wanted
    config: HarvestConfig
    """The harvest of all that is wanted. `harvest_of` makes the one for a store that is missing."""
    spec: StoreSpec
    """The spec of the store that would hold all that is wanted; without its real tokens."""
    device: str
    """The kind of device that would compute it."""
    bytes: int | None
    """About how many bytes all that is wanted takes on disk; None for a whole corpus."""
    model: str
    corpus: str
    """Model and corpus in words."""


def plan_request(
    request: StoreRequest,
    root: str,
    device: str = "auto",
    batch_tokens: int | None = None,
    check_stop: StopCheck = never_stop,
) -> Planned:
    """Looks up what a request names. Raises UserError at the first thing that is wrong with it."""
    asked = {name: getattr(request, name) for name in WantedActivations.model_fields}
    reuse = "same" if request.environment == "same" else "any"
    config = HarvestConfig(**asked, out=root, device=device, batch_tokens=batch_tokens, reuse=reuse)
    plan = make_plan(config.model_copy(update={"overwrite": True}), check_stop)  # looks at no store of that name
    config = config.model_copy(update={"dtype": plan.dtype})
    plan = replace(plan, config=config)
    kind = device_name(plan.device)
    environment = environment_of({**provenance(), "device": kind}) if request.environment == "same" else None
    specs = specs_of(plan)
    wanted = Wanted(
        label=store_name(plan.source),
        shapes=tuple(map(shape_of_spec, specs)),
        rows_key=rows_key(specs[0]),
        token_key=token_key(specs[0]),
        hookpoints=plan.hooks,
        tokens=request.tokens,
        context=plan.context,
        accept=request.accept,
        environment=environment,
        codec=request.codec,
        dtype=request.store_dtype,
    )
    size = disk_bytes(plan.hooks, request.tokens, request.store_dtype, request.codec) if request.tokens else None
    words = in_words(plan.source.name, plan.source.commit)
    return Planned(wanted, config, specs[-1], kind, size, words, corpus_name(plan.corpus.description))


def specs_of(plan: HarvestPlan) -> list[StoreSpec]:
    """The spec of the wanted store; for a whole corpus one of either shape, the small one first."""
    row, itemsize = model_row(plan), DTYPES[plan.config.store_dtype][0].itemsize
    widest = max(hook.d_in for hook in plan.hooks.values()) * itemsize
    sizes = [plan.config.tokens] if plan.config.tokens else [1, FEW_TOKENS]
    found = []
    for tokens in sizes:
        chunk_rows, shard_rows = fixed_shape(row, max(row, widest), tokens)
        shaped = plan.config.model_copy(update={"chunk_rows": chunk_rows, "shard_rows": shard_rows})
        found.append(asked_spec(replace(plan, config=shaped), tokens))
    return found


def shape_of_spec(spec: StoreSpec) -> Shape:
    others: list[CodecName] = [
        codec for codec in get_args(CodecName) if codec != spec.codec and not CODECS[codec].lossy
    ]
    keys = tuple(store_key(with_codec(spec, codec)) for codec in others)
    return Shape(store_key(spec), keys, spec.chunk_rows, spec.shard_rows)
