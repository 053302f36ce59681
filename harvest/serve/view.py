"""What the pages of the cache show, computed from rows of the state: pure functions, no I/O.

The templates in harvest/serve/page/ only place these texts. The page of a store has its own module
(harvest/serve/page/store.py), and so has the form (harvest/serve/page/form.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

from harvest.serve.page.words import ABSENT, Fact, ago, count, left, percent, size
from harvest.serve.records import Usage
from shared.progress import duration
from shared.request import (
    Action,
    Job,
    JobAttempt,
    JobState,
    RequestPlan,
    StoreFilter,
    StoreRequest,
    StoreRow,
    WorkerRow,
)

OPEN: Final[tuple[JobState, ...]] = ("queued", "running", "verifying")
ACTIONS: Final[Mapping[Action, str]] = {
    "ready": "Hit",
    "view": "View",
    "extend": "Extend",
    "hookpoints": "New hookpoints",
    "recode": "Recode",
    "harvest": "Harvest",
}
"""How a request is answered, in words."""
CODES: Final[Mapping[int, str]] = {
    0: "done",
    2: "refused: the request cannot be fulfilled",
    3: "damage found: the store is repaired once",
    4: "another process of the run ended",
    75: "a passing failure: queued again",
    130: "stopped: the store stays and is resumed",
}
"""What the exit code of an attempt means."""
STALE_S: Final = 60.0
"""Seconds after which a silent worker is shown as silent."""
LOG_LINES: Final = 200
ALWAYS: Final = ("model", "layers", "hooks", "tokens")
"""Fields of a request that are shown even as they are by default."""


@dataclass(frozen=True)
class DiskPart:
    """One part of the bar of the disk, in percent of its width."""

    name: str
    start: float
    width: float


@dataclass(frozen=True)
class WorkerLine:
    """One worker in the head of the page."""

    name: str
    device: str
    job: int | None
    doing: str
    silent: bool


@dataclass(frozen=True)
class HeadView:
    """The head of every page: the disk, the workers, the length of the queue."""

    disk: tuple[Fact, ...]
    parts: tuple[DiskPart, ...]
    disk_text: str
    workers: tuple[WorkerLine, ...]
    queue: str


@dataclass(frozen=True)
class QueueLine:
    """One job in a table, and in the head of its own page."""

    id: int
    store: str
    subject: str
    """The model, the hookpoints and the tokens."""
    action: str
    state: JobState
    percent: float | None
    rows: str
    speed: str
    left: str
    note: str
    attempt: int
    asked: str
    worker: str
    error: str
    when: str
    low: bool

    @property
    def can_cancel(self) -> bool:
        return self.state in OPEN

    @property
    def can_retry(self) -> bool:
        return self.state in ("failed", "cancelled")


@dataclass(frozen=True)
class AttemptLine:
    """One attempt of a job."""

    number: int
    worker: str
    begun: str
    lasted: str
    code: str
    meaning: str
    words: str


@dataclass(frozen=True)
class CatalogLine:
    """One store in the catalog."""

    id: str
    model: str
    layers: str
    hooks: str
    corpus: str
    tokens: str
    context: str
    codec: str
    size: str
    state: str
    percent: float | None
    used: str
    pins: tuple[str, ...]
    leases: int
    job: int | None


@dataclass(frozen=True)
class PlanLine:
    """What a request takes, before anything is done."""

    action: str
    text: str
    facts: tuple[Fact, ...]
    from_stores: tuple[str, ...]
    evicts: tuple[str, ...]


def head_view(usage: Usage, workers: Sequence[WorkerRow], jobs: Sequence[Job], now: float) -> HeadView:
    whole = usage.quota if usage.quota is not None else usage.used + usage.reserved + usage.free
    facts = [
        Fact("Used", size(usage.used)),
        Fact("Pinned", size(usage.pinned)),
        Fact("Reserved", size(usage.reserved)),
        Fact("Quota", size(usage.quota) if usage.quota is not None else "none"),
        Fact("Free on disk", size(usage.free)),
    ]
    if usage.leaving:
        facts.append(Fact("Being deleted", size(usage.leaving)))
    text = f"{size(usage.used)} used and {size(usage.reserved)} reserved of {size(whole)}"
    lines = tuple(worker_line(row, now) for row in workers)
    return HeadView(tuple(facts), disk_parts(usage, whole), text, lines, queue_text(jobs))


def disk_parts(usage: Usage, whole: int) -> tuple[DiskPart, ...]:
    """Pinned, otherwise used, and reserved bytes, side by side."""
    parts, start = [], 0.0
    for name, amount in (("pinned", usage.pinned), ("used", usage.used - usage.pinned), ("reserved", usage.reserved)):
        width = min(100.0 - start, 100 * max(0, amount) / max(1, whole))
        parts.append(DiskPart(name, round(start, 2), round(width, 2)))
        start += width
    return tuple(parts)


def worker_line(row: WorkerRow, now: float) -> WorkerLine:
    worker = row.worker
    gpus = f"{worker.gpus} × {worker.device}" if worker.gpus > 1 else worker.device
    memory = f", {size(worker.memory)}" if worker.memory else ""
    silent = now - row.seen > STALE_S
    doing = f"silent, seen {ago(row.seen, now)}" if silent else "works on" if row.job is not None else "waits"
    return WorkerLine(worker.name, gpus + memory, row.job, doing, silent)


def queue_text(jobs: Sequence[Job]) -> str:
    """`1 running, 3 queued`."""
    waiting = sum(job.state == "queued" for job in jobs)
    return f"{len(jobs) - waiting} running, {waiting} queued" if jobs else "empty"


def queue_line(job: Job, store: StoreRow | None, now: float) -> QueueLine:
    """A job as a line. `store` is the catalog's row of the folder that it writes, where there is one."""
    rows = job.total if job.state == "done" and job.total else job.rows
    done = percent(rows, job.total)
    return QueueLine(
        id=job.id,
        store=job.store,
        subject=subject(job.request),
        action=ACTIONS[job.action],
        state=job.state,
        percent=100.0 if job.state == "done" else done,
        rows=f"{count(rows)} of {count(job.total)}" if job.total else count(rows),
        speed=speed(job, store),
        left=time_left(job),
        note=job.note,
        attempt=job.attempt,
        asked="1 request" if job.asked == 1 else f"{count(job.asked)} requests",
        worker=job.worker or "",
        error=job.error or "",
        when=ago(job.ended or job.created, now),
        low=job.priority == "low",
    )


def subject(request: Mapping[str, Any]) -> str:
    """What was asked for: `pythia-1b, layer 8, mlp_out, 20,000,000 tokens`."""
    layers, hooks = (named_list(request.get(name)) for name in ("layers", "hooks"))
    tokens = request.get("tokens")
    parts = [str(request.get("model") or ABSENT), f"layer {layers}" if layers else "", hooks]
    parts.append(f"{count(tokens)} tokens" if isinstance(tokens, int) else "all tokens")
    return ", ".join(part for part in parts if part)


def named_list(value: object, most: int = 6) -> str:
    if not isinstance(value, list | tuple):
        return ""
    return ", ".join(map(str, value[:most])) + (" …" if len(value) > most else "")


def speed(job: Job, store: StoreRow | None) -> str:
    """Tokens and bytes per second; bytes from what the store's rows took so far."""
    if job.state != "running" or not job.rows_per_s:
        return ABSENT
    text = f"{count(round(job.rows_per_s))} tokens/s"
    if store and store.bytes and store.rows:
        text += f", {size(job.rows_per_s * store.bytes / store.rows)}/s"
    return text


def time_left(job: Job) -> str:
    if job.state != "running" or not job.rows_per_s or not job.total:
        return ABSENT
    return left((job.total - job.rows) / job.rows_per_s)


def attempt_lines(attempts: Sequence[JobAttempt], now: float) -> tuple[AttemptLine, ...]:
    return tuple(attempt_line(attempt, now) for attempt in attempts)


def attempt_line(attempt: JobAttempt, now: float) -> AttemptLine:
    over = attempt.ended is not None
    return AttemptLine(
        number=attempt.number,
        worker=attempt.worker,
        begun=ago(attempt.began, now),
        lasted=ABSENT if attempt.ended is None else duration(max(0.0, attempt.ended - attempt.began)),
        code=ABSENT if attempt.code is None else str(attempt.code),
        meaning=code_meaning(attempt.code) if over else "runs",
        words=attempt.words,
    )


def code_meaning(code: int | None) -> str:
    """What an exit code means. A negative one is a signal; there is none where a worker fell silent."""
    if code is None:
        return "its worker fell silent: queued again"
    if code < 0:
        return f"killed by signal {-code}: queued again"
    return CODES.get(code, "ended unexpectedly: queued again")


def catalog_line(row: StoreRow, now: float) -> CatalogLine:
    layers, hooks = hookpoints_in_words(row.hookpoints)
    return CatalogLine(
        id=row.id,
        model=row.model,
        layers=layers,
        hooks=hooks,
        corpus=row.corpus,
        tokens=count(row.rows),
        context=count(row.context),
        codec=row.codec,
        size=size(row.bytes),
        state=row.state,
        percent=None if row.state == "final" else percent(row.rows, row.n_tokens),
        used=ago(row.used, now),
        pins=row.pins,
        leases=row.leases,
        job=row.job,
    )


def hookpoints_in_words(paths: Sequence[str]) -> tuple[str, str]:
    """`("0–3, 8", "mlp_out, resid_post")` for the paths of a store's hookpoints."""
    pairs = [path.partition("/") for path in paths]
    numbers = sorted({int(layer.removeprefix("layer_")) for layer, _, _ in pairs})
    hooks = dict.fromkeys(hook for _, _, hook in pairs)
    return ranges(numbers), ", ".join(list(hooks)[:4]) + (" …" if len(hooks) > 4 else "")


def ranges(numbers: Sequence[int]) -> str:
    """`0–3, 8` for 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def plan_line(plan: RequestPlan) -> PlanLine:
    facts = []
    if plan.bytes_to_write:
        facts.append(Fact("To write", size(plan.bytes_to_write)))
    if plan.seconds is not None:
        facts.append(Fact("Time", f"about {left(plan.seconds)}"))
    return PlanLine(ACTIONS[plan.action], plan_sentence(plan), tuple(facts), plan.from_stores, plan.evicts)


def plan_sentence(plan: RequestPlan) -> str:
    """One sentence that says how a request is answered."""
    many = "all shards" if plan.shards_to_harvest is None else f"{count(plan.shards_to_harvest)} shards"
    return {
        "ready": "These activations are here already.",
        "view": "Whole shards are linked, without the model.",
        "recode": "A store is rewritten with another codec, without the model.",
        "extend": f"The first shards are here; {many} are harvested.",
        "hookpoints": f"The tokens are here; {many} of further hookpoints are harvested.",
        "harvest": f"Nothing of it is here yet; {many} are harvested.",
    }[plan.action]


def next_link(filters: StoreFilter, sort: str, cursor: str | None) -> str | None:
    """The address of the next part of the catalog, with the same filters."""
    if cursor is None:
        return None
    asked = {name: value for name, value in filters.model_dump().items() if value is not None}
    return "/?" + urlencode({**asked, "sort": sort, "cursor": cursor}) + "#catalog"


def log_tail(text: str, lines: int = LOG_LINES) -> str:
    """The last lines of a log. A line that was rewritten with carriage returns is shown as it ended."""
    kept = text.splitlines()[-lines:]
    return "\n".join(line.rsplit("\r", 1)[-1] for line in kept)


def asked_facts(request: Mapping[str, Any]) -> tuple[Fact, ...]:
    """What was asked for, without what stands at its default."""
    defaults = {name: about.default for name, about in StoreRequest.model_fields.items()}
    facts = []
    for name, value in request.items():
        plain = tuple(value) if isinstance(value, list) else value
        if value is not None and (name in ALWAYS or plain != defaults.get(name)):
            facts.append(Fact(name.replace("_", " ").capitalize(), named_list(value, 60) or written(value)))
    return tuple(facts)


def written(value: object) -> str:
    text = count(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
