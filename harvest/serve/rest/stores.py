"""The catalog: stores, what is in them, their pins and leases."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Annotated, Any, Final, get_args

from anyio import to_thread
from pydantic import Field
from starlette.responses import Response, StreamingResponse

from harvest.serve.rest.endpoint import Endpoint, HttpError, Level, Query, RestCall, Service, answer, no_content
from harvest.serve.rest.files import matches
from harvest.serve.rest.jobs import CURSOR, LIMIT, MOST_ROWS
from harvest.serve.rest.open_stores import ServedStore
from harvest.serve.rest.security import check_level
from shared.gate import members, parse_json, passed
from shared.request import Job, LeaseGrant, LogFile, StoreFilter, StorePage, StoreSort
from shared.schema import Frozen, build
from shared.store.create import RECORD
from shared.store.listing import described, store_rows
from shared.store.manifest import in_pieces
from shared.store.opened import Store

SORTS: Final = get_args(StoreSort)
COUNTED_ROWS: Final = 1 << 26
"""Rows of all hookpoints together up to which the statistics of a store are computed when it is described."""
DESCRIBED: Final = 32
"""Descriptions that are kept."""
TEXTS: Final = 50


class LeaseBody(Frozen):
    """Who wants to read a store without it being deleted, and for how long."""

    holder: Annotated[str, Field(min_length=1, max_length=200)]
    """Who reads, for people."""
    ttl_s: Annotated[float, Field(gt=0, le=3600)] = 600.0
    """Seconds after which the lease lapses unless it is renewed."""


class DamageBody(Frozen):
    """What a reader found wrong with a store."""

    lines: Annotated[tuple[Annotated[str, Field(max_length=1000)], ...], Field(min_length=1, max_length=100)]
    """The sentences of `sagsae store verify`, or of the error that ended a training."""


class Descriptions:
    """What stores hold, computed once for every set of committed shards, one store at a time."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.found: OrderedDict[tuple[str, str, str], dict[str, Any]] = OrderedDict()

    def of(self, name: str, served: ServedStore) -> dict[str, Any]:
        key = (name, served.store.snapshot_id, served.store.state)
        with self.turn:
            if key not in self.found:
                self.found[key] = description(name, served)
                while len(self.found) > DESCRIBED:
                    self.found.popitem(last=False)
            return self.found[key]


def description(name: str, served: ServedStore) -> dict[str, Any]:
    """The spec, the record and every hookpoint; of a finished store its statistics, too, unless reading all of its
    norms would take long."""
    store = served.store
    rows = store.n_rows * len(store.spec.hookpoints)
    if store.state == "final" and rows <= COUNTED_ROWS:
        about = described(store, name)
    else:
        about = {"store": name, "state": store.state, "tokens": store.n_rows}
        about |= {"shards": f"{len(store.commits)} of {store.spec.n_shards}"}
        about |= {"spec": store.spec.model_dump(mode="json"), "hookpoints": store_rows(store)}
    record = record_of(store)
    ids = {"spec_id": store.spec_id, "snapshot_id": store.snapshot_id}
    plain: dict[str, Any] = json.loads(json.dumps({**about, **ids, "record": record}, default=str))
    return plain


def record_of(store: Store) -> dict[str, Any] | None:
    """A store's record.json: the command and the versions that wrote it; None where it is lost."""
    try:
        with passed(f"{store.name}/{RECORD}"):
            return members(parse_json(store.files.read(RECORD)), (), None)
    except FileNotFoundError:
        return None


class StoreRoutes:
    """The endpoints of stores."""

    def __init__(self) -> None:
        self.descriptions = Descriptions()

    async def show(self, call: RestCall) -> Response:
        """GET /v1/stores/{store}"""
        name, contexts = call.path("store"), call.query_number("texts", 0, 0, TEXTS)
        row = await to_thread.run_sync(call.state.store, name)
        about = await to_thread.run_sync(self.describe, call.service, name)
        document = {**about, "row": row.model_dump(mode="json")}
        if contexts:
            document["texts"] = await call.service.planner.texts(call.service.stores.folder(name), contexts)
        return answer(document)

    def describe(self, service: Service, name: str) -> dict[str, Any]:
        return self.descriptions.of(name, service.stores.open(name))

    def endpoints(self) -> tuple[Endpoint, ...]:
        texts = Query("texts", {"type": "integer", "minimum": 0, "maximum": TEXTS}, "First contexts to decode.")
        show = Endpoint(
            "GET",
            "/v1/stores/{store}",
            self.show,
            Level.READ,
            "Describe a store: its spec, where it came from, statistics of every hookpoint.",
            answers={200: {"type": "object"}},
            queries=(texts,),
            errors=(401, 404, 422, 503),
        )
        return (show, *ENDPOINTS)


async def list_stores(call: RestCall) -> Response:
    """GET /v1/stores"""
    given = dict(call.request.query_params)
    sort: Any = given.pop("sort", "used")
    cursor = given.pop("cursor", None)
    given.pop("limit", None)
    if sort not in SORTS:
        raise HttpError(422, "invalid", f"sort={sort[:40]}: must be one of {', '.join(SORTS)}")
    filters = build(StoreFilter, given)
    limit = call.query_number("limit", 100, 1, MOST_ROWS)
    page = await to_thread.run_sync(call.state.stores, filters, sort, cursor, limit)
    return answer(page)


async def remove_store(call: RestCall) -> Response:
    """DELETE /v1/stores/{store}"""
    force = call.query("force")
    if force not in (None, "true", "false"):
        raise HttpError(422, "invalid", f"force={force[:40]}: must be true or false")
    if force == "true":
        check_level(call.caller, Level.ADMIN)
    await to_thread.run_sync(call.state.remove, call.path("store"), force == "true")
    return no_content()


async def list_logs(call: RestCall) -> Response:
    """GET /v1/stores/{store}/logs"""
    found = await to_thread.run_sync(log_files, call.service, call.path("store"))
    return Response(json.dumps(found), 200, {"Cache-Control": "no-store"}, "application/json")


def log_files(service: Service, name: str) -> list[dict[str, Any]]:
    """The logs of a store's manifest as they are now. The index is listed last: a harvest that ends meanwhile writes it
    before it deletes the logs."""
    files = service.stores.open(name).store.files
    marks = {**files.marks("manifest", "rank-"), **files.marks("manifest", "index")}
    return [LogFile(path=path, **mark._asdict()).model_dump(mode="json") for path, mark in marks.items()]


async def show_manifest(call: RestCall) -> Response:
    """GET /v1/stores/{store}/manifest"""
    served = await to_thread.run_sync(call.service.stores.open, call.path("store"))
    tag = f'"{served.store.state}-{served.store.spec_id}-{await to_thread.run_sync(lambda: served.store.snapshot_id)}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if matches(call.request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    return StreamingResponse(manifest_lines(served), 200, headers, "application/x-ndjson")


def manifest_lines(served: ServedStore) -> Iterator[bytes]:
    """The store's zarr.json on one line, then a line for every committed shard; many lines a piece."""
    yield json.dumps(json.loads(served.document)).encode() + b"\n"
    yield from in_pieces(served.store.commits.lines())


async def report_damage(call: RestCall) -> Response:
    """POST /v1/stores/{store}/damage"""
    body: DamageBody = call.body
    job = await to_thread.run_sync(call.state.damaged, call.path("store"), body.lines[0])
    return answer(job, 202, {"Location": f"{str(call.request.base_url).rstrip('/')}/v1/jobs/{job.id}"})


async def take_lease(call: RestCall) -> Response:
    """POST /v1/stores/{store}/leases"""
    body: LeaseBody = call.body
    return answer(await to_thread.run_sync(call.state.lease, call.path("store"), body.holder, body.ttl_s), 201)


async def renew_lease(call: RestCall) -> Response:
    """PUT /v1/leases/{lease}"""
    await to_thread.run_sync(call.state.renew, call.path("lease"))
    return no_content()


async def release_lease(call: RestCall) -> Response:
    """DELETE /v1/leases/{lease}"""
    await to_thread.run_sync(call.state.release, call.path("lease"))
    return no_content()


async def pin_store(call: RestCall) -> Response:
    """PUT /v1/stores/{store}/pins/{name}"""
    await to_thread.run_sync(call.state.pin, call.path("store"), call.path("name"))
    return no_content()


async def unpin_store(call: RestCall) -> Response:
    """DELETE /v1/stores/{store}/pins/{name}"""
    await to_thread.run_sync(call.state.unpin, call.path("store"), call.path("name"))
    return no_content()


def filters() -> tuple[Query, ...]:
    properties = StoreFilter.model_json_schema()["properties"]
    return tuple(Query(name, schema, f"Only stores of this {name}.") for name, schema in properties.items())


FORCE: Final = Query("force", {"type": "boolean"}, "Delete it although it is pinned or leased (level admin).")
SORT: Final = Query("sort", {"type": "string", "enum": list(SORTS)}, "The order of the list.")
LOGS: Final = {"type": "array", "items": {"$ref": "#/components/schemas/LogFile"}}
ENDPOINTS: Final = (
    Endpoint(
        "GET", "/v1/stores", list_stores, Level.READ, "List the stores.",
        answers={200: StorePage}, queries=(*filters(), SORT, CURSOR, LIMIT), errors=(401, 422),
    ),
    Endpoint(
        "DELETE", "/v1/stores/{store}", remove_store, Level.ASK, "Delete a store.",
        answers={204: None}, queries=(FORCE,), errors=(401, 403, 404, 409, 422),
    ),
    Endpoint(
        "GET", "/v1/stores/{store}/logs", list_logs, Level.READ,
        "List the logs of a store's manifest, to follow a store that is being written.",
        answers={200: LOGS}, errors=(401, 404),
    ),
    Endpoint(
        "GET", "/v1/stores/{store}/manifest", show_manifest, Level.READ,
        "Read zarr.json and every commit of a store, consistent with each other (lines of JSON).",
        answers={200: "application/x-ndjson", 304: None}, errors=(401, 404),
    ),
    Endpoint(
        "POST", "/v1/stores/{store}/damage", report_damage, Level.ASK,
        "Report that a store is damaged: a job checks it, drops what is damaged and harvests that again.",
        DamageBody, {202: Job}, errors=(400, 401, 403, 404, 409, 413, 422),
    ),
    Endpoint(
        "POST", "/v1/stores/{store}/leases", take_lease, Level.ASK, "Lease a store, so that it is not deleted.",
        LeaseBody, {201: LeaseGrant}, errors=(400, 401, 403, 404, 413, 422),
    ),
    Endpoint(
        "PUT", "/v1/leases/{lease}", renew_lease, Level.ASK, "Renew a lease for its whole time.",
        answers={204: None}, errors=(401, 403, 404, 410),
    ),
    Endpoint(
        "DELETE", "/v1/leases/{lease}", release_lease, Level.ASK, "End a lease.",
        answers={204: None}, errors=(401, 403),
    ),
    Endpoint(
        "PUT", "/v1/stores/{store}/pins/{name}", pin_store, Level.ASK, "Pin a store, so that it is never evicted.",
        answers={204: None}, errors=(401, 403, 404, 422),
    ),
    Endpoint(
        "DELETE", "/v1/stores/{store}/pins/{name}", unpin_store, Level.ASK, "Take a pin off a store.",
        answers={204: None}, errors=(401, 403, 404, 422),
    ),
)  # fmt: skip
