"""The pages of the cache: what a browser gets at `/`, `/stores/…` and `/jobs/…`, and what its forms send.

Every page is complete without JavaScript. Where it runs, /live sends the parts of a page that changed as server-sent
events, whose ids are revisions of the state.
"""

import re
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Final, get_args
from urllib.parse import parse_qs, quote, urlencode

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from harvest.serve.page.answers import LaterAnswers
from harvest.serve.page.checks import StoreChecks
from harvest.serve.page.form import FormView, Option, Site, SitesView, entered, model_options, request_of
from harvest.serve.page.reading import CacheNow, read_cache, read_catalog, read_job, read_store_rows
from harvest.serve.page.render import TYPES, render, static_file
from harvest.serve.page.store import StoreNumbers, TextsView, read_numbers, reader_facts, store_view, texts_view
from harvest.serve.rest.endpoint import CALLER, Caller, HttpError, Level, RestCall, Service, read_body
from harvest.serve.rest.errors import status_of, words_of
from harvest.serve.rest.events import Events
from harvest.serve.rest.jobs import last_event, log_part, stream
from harvest.serve.rest.names import admit
from harvest.serve.rest.requests import RequestRoutes, with_request
from harvest.serve.rest.security import COOKIE, check_level
from harvest.serve.view import (
    LOG_LINES,
    asked_facts,
    attempt_lines,
    catalog_line,
    head_view,
    log_tail,
    next_link,
    plan_line,
    queue_line,
)
from shared.errors import DamagedError, UserError
from shared.gate import printable
from shared.model.source import list_models
from shared.refusals import WrongStateError
from shared.request import StoreFilter, StoreSort
from shared.schema import build

SORTS: Final = get_args(StoreSort)
LOG_BYTES: Final = 64 << 10
"""Bytes of a log's end on the page of a job."""
TEXTS: Final = 20
SOON_S: Final = 0.5
"""Seconds that a page waits for something that it can also show later."""
PART_S: Final = 60.0
"""Seconds that a part waits for it."""
COOKIE_S: Final = 30 * 24 * 3600
"""Seconds for which a browser keeps the token."""
FIELDS: Final = 400
"""Fields of a form at most."""
TEMPLATES: Final = {"job": "job_state.html"}
"""The templates of parts that are not named like their part."""
TITLES: Final = {404: "Not found", 401: "Sign in first", 403: "Not allowed", 503: "Try again in a moment"}

Handler = Callable[[RestCall], Awaitable[Response]]


class Pages:
    """The pages' handlers, with what they keep between requests."""

    def __init__(self, service: Service, requests: RequestRoutes) -> None:
        self.service, self.requests = service, requests
        self.answers = LaterAnswers()
        self.checks = StoreChecks(time.time, lambda: service.announcer.heard(0))
        self.numbers: dict[tuple[str, str, str], StoreNumbers] = {}

    def close(self) -> None:
        self.answers.close()
        self.checks.close()

    def routes(self) -> list[Route]:
        get, post = partial(self.route, ("GET",)), partial(self.route, ("POST",))
        return [
            get("/", self.home, Level.READ),
            get("/stores/{store}", self.store, Level.READ),
            get("/jobs/{job}", self.job, Level.READ),
            get("/live", self.live, Level.READ),
            get("/login", self.show_login, Level.OPEN),
            get("/page/{file}", self.file, Level.OPEN),
            post("/login", self.login, Level.OPEN),
            post("/request", self.request, Level.ASK),
            post("/plan", self.plan, Level.ASK),
            post("/jobs/{job}/cancel", partial(self.change_job, "cancel"), Level.ASK),
            post("/jobs/{job}/retry", partial(self.change_job, "retry"), Level.ASK),
            post("/stores/{store}/pins", self.pin, Level.ASK),
            post("/stores/{store}/pins/{name}/remove", self.unpin, Level.ASK),
            post("/stores/{store}/verify", self.verify, Level.ASK),
            post("/stores/{store}/repair", self.repair, Level.ASK),
        ]

    def route(self, methods: tuple[str, ...], path: str, handler: Handler, level: Level) -> Route:
        async def endpoint(request: Request) -> Response:
            caller: Caller = request.scope[CALLER]
            call = RestCall(self.service, request, caller)
            try:
                if level > Level.OPEN and caller.level is Level.OPEN and request.method == "GET":
                    return RedirectResponse("/login?" + urlencode({"next": own_address(request)}), 303)
                check_level(caller, level)
                return await handler(call)
            except Exception as error:
                return error_page(request, error)

        return Route(path, endpoint, methods=list(methods), include_in_schema=False)

    # the catalog and the queue

    async def home(self, call: RestCall) -> Response:
        """GET /"""
        if call.query("part") == "sites":
            form = await self.form({"model": (call.query("model") or "tiny",)}, PART_S)
            return page("sites.html", form=form)
        given = parse_qs(call.request.url.query, max_num_fields=FIELDS)
        return await self.home_page(call, await self.form(entered(given), SOON_S))

    async def home_page(self, call: RestCall, form: FormView, status: int = 200) -> Response:
        filters, sort, cursor, message = asked_catalog(call.request.query_params)
        now = await to_thread.run_sync(read_cache, call.state)
        stores = await to_thread.run_sync(read_catalog, call.state, filters, sort, cursor)
        query = {"page": "home", **{name: str(value) for name, value in filters if value is not None}, "sort": sort}
        values = {**queue_part(now), **catalog_part(stores, filters, sort), "filters": filters, "sort": sort}
        live = {**query, **({"cursor": cursor} if cursor else {})}
        return page("home.html", status, **self.frame(call, now, live, message), **values, form=form)

    def frame(self, call: RestCall, now: CacheNow, live: Mapping[str, str], message: str = "") -> dict[str, Any]:
        """What every page with a head shows."""
        return {
            "head": head_view(now.usage, now.workers, now.queue, time.time()),
            "live": "/live?" + urlencode(live),
            "revision": now.revision,
            "can_ask": call.caller.level >= Level.ASK,
            "message": message,
        }

    async def form(self, values: Mapping[str, tuple[str, ...]], seconds: float) -> FormView:
        """The form with what was entered. The list of the model's layers is left out where it takes longer."""
        names = self.requests.names
        corpora = tuple(Option(name, name) for name in sorted(names.corpora))
        models = model_options(list_models(), sorted(names.models))
        sites = await self.sites(next(iter(values.get("model", ("tiny",)))), seconds)
        return FormView(models, corpora, sites, values)

    async def sites(self, model: str, seconds: float) -> SitesView:
        """The layers and hooks of a model that this server knows by name."""
        names = self.requests.names
        known = {str(row["alias"]) for row in list_models()} | set(names.models)
        if model not in known:
            return SitesView(model)
        place = str(names.models.get(model, model))
        try:
            found = await self.answers.get(("sites", place), lambda: self.service.planner.sites(place), seconds)
        except (UserError, DamagedError) as error:
            return SitesView(model, note=words_of(error))
        if found is None:
            return SitesView(model, pending=True)
        hooks = tuple(Site(str(name), int(width)) for name, width in found["hooks"])
        return SitesView(model, found["layers"], hooks)

    # asking

    async def request(self, call: RestCall) -> Response:
        """POST /request"""
        values = entered(await form_fields(call.request))
        try:
            admitted = admit(request_of(values), self.requests.names, self.service.config)
            found = await self.requests.ask(call, admitted)
            if found.state != "ready" and found.job is not None:
                found = await self.requests.made_in_line(call, admitted, found)
        except UserError as error:
            form = await self.form(values, SOON_S)
            return await self.home_page(call, with_error(form, error), status_of(error)[0])
        if found.state == "ready":
            store = next(iter(found.hookpoints.values())).store
            hook = next(iter(found.hookpoints))
            return RedirectResponse(f"/stores/{quote(store)}?{urlencode({'hook': hook})}", 303)
        return RedirectResponse(f"/jobs/{found.job}", 303)

    async def plan(self, call: RestCall) -> Response:
        """POST /plan"""
        values = entered(await form_fields(call.request))
        only_part = call.query("part") == "plan"
        form = FormView((), (), SitesView(), values) if only_part else await self.form(values, SOON_S)
        status = 200
        try:
            admitted = admit(request_of(values), self.requests.names, self.service.config)
            planned = await self.requests.planned(self.service, admitted)
            found = await to_thread.run_sync(call.state.preview, with_request(planned, admitted))
            form = replace(form, plan=plan_line(found))
        except UserError as error:
            form, status = with_error(form, error), status_of(error)[0]
        return page("plan.html", status, form=form) if only_part else await self.home_page(call, form, status)

    # one job

    async def job(self, call: RestCall) -> Response:
        """GET /jobs/{job}"""
        number = call.number("job")
        now = await to_thread.run_sync(read_cache, call.state)
        values = {**self.frame(call, now, {"job": str(number)}), **await self.job_parts(call, number)}
        return page("job.html", **values, log_lines=LOG_LINES)

    async def job_parts(self, call: RestCall, number: int) -> dict[str, Any]:
        found = await to_thread.run_sync(read_job, call.state, number)
        log = await to_thread.run_sync(log_part, call.state, number, -LOG_BYTES)
        return {
            "job": queue_line(found.job, found.row, time.time()),
            "has_store": found.row is not None,
            "attempts": attempt_lines(found.attempts, time.time()),
            "asked": asked_facts(found.job.request),
            "log": log_tail(log.text),
            "can_ask": call.caller.level >= Level.ASK,
        }

    async def change_job(self, name: str, call: RestCall) -> Response:
        """POST /jobs/{job}/cancel and /retry"""
        job = await to_thread.run_sync(getattr(call.state, name), call.number("job"))
        return RedirectResponse(f"/jobs/{job.id}", 303)

    # one store

    async def store(self, call: RestCall) -> Response:
        """GET /stores/{store}"""
        name, clock = call.path("store"), time.time()
        found = await to_thread.run_sync(read_store_rows, call.state, name)
        if call.query("part") == "texts":
            return page("texts.html", texts=await self.texts(name, PART_S))
        now = await to_thread.run_sync(read_cache, call.state)
        numbers = await to_thread.run_sync(self.read_numbers, name, call.query("hook"))
        url = f"{str(call.request.base_url).rstrip('/')}/v1/stores/{name}"
        folder = call.service.stores.folder(name) if call.caller.here else None
        values: dict[str, Any] = {
            "store": store_view(found.row, numbers, found.origin, url, folder, clock),
            "texts": await self.texts(name, SOON_S),
            "readers": reader_facts(found.readers, clock),
            "check": self.checks.view(name),
            "name": name,
        }
        return page("store.html", **self.frame(call, now, {"store": name}), **values)

    def read_numbers(self, name: str, hook: str | None) -> StoreNumbers:
        """The numbers of a store, which are kept while its committed shards stay the same."""
        store = self.service.stores.open(name).store
        key = (name, store.snapshot_id, hook or "")
        if key not in self.numbers:
            while len(self.numbers) >= 64:
                self.numbers.pop(next(iter(self.numbers)), None)
            self.numbers[key] = read_numbers(store, hook)
        return self.numbers[key]

    async def texts(self, name: str, seconds: float) -> TextsView:
        folder = self.service.stores.folder(name)
        try:
            key = ("texts", name, (folder / "zarr.json").stat().st_ino)
            found = await self.answers.get(key, lambda: self.service.planner.texts(folder, TEXTS), seconds)
        except (UserError, DamagedError, OSError) as error:
            return TextsView(note=words_of(error))
        return texts_view(found)

    async def pin(self, call: RestCall) -> Response:
        """POST /stores/{store}/pins"""
        fields = await form_fields(call.request)
        name = next(iter(fields.get("pin", [])), "").strip()
        await to_thread.run_sync(call.state.pin, call.path("store"), name)
        return back_to_store(call)

    async def unpin(self, call: RestCall) -> Response:
        """POST /stores/{store}/pins/{name}/remove"""
        await to_thread.run_sync(call.state.unpin, call.path("store"), call.path("name"))
        return back_to_store(call)

    async def verify(self, call: RestCall) -> Response:
        """POST /stores/{store}/verify"""
        name = call.path("store")
        await to_thread.run_sync(call.state.store, name)
        self.checks.start(name, call.service.stores.folder(name))
        return back_to_store(call)

    async def repair(self, call: RestCall) -> Response:
        """POST /stores/{store}/repair: of what the last check found"""
        name = call.path("store")
        check = self.checks.view(name)
        if check is None or not check.damage:
            raise WrongStateError(f"store {name}: no check found damage since this server started. Verify it first")
        job = await to_thread.run_sync(call.state.damaged, name, check.damage[0])
        return RedirectResponse(f"/jobs/{job.id}", 303)

    # live parts

    async def live(self, call: RestCall) -> Response:
        """GET /live: the parts of a page, whenever they change"""
        parts = self.parts_of(call)
        sent: dict[str, str] = {}

        async def look(after: int) -> Events:
            revision, found = await parts()
            changed = {name: html for name, html in found.items() if sent.get(name) != html}
            first = not sent
            sent.update(found)
            if first and revision == after:  # the page has just been made of this revision
                return revision, [], False
            return revision, [("parts", changed)] if changed else [], False

        seen = last_event(call)
        return stream(call, number_or(call.query("after"), -1) if seen is None else seen, look)

    def parts_of(self, call: RestCall) -> Callable[[], Awaitable[tuple[int, dict[str, str]]]]:
        if call.query("job") is not None:
            return partial(self.live_job, call, number_or(call.query("job"), 0))
        if call.query("store") is not None:
            return partial(self.live_store, call, str(call.query("store")))
        return partial(self.live_home, call)

    async def live_home(self, call: RestCall) -> tuple[int, dict[str, str]]:
        filters, sort, cursor, _ = asked_catalog(call.request.query_params)
        now = await to_thread.run_sync(read_cache, call.state)
        stores = await to_thread.run_sync(read_catalog, call.state, filters, sort, cursor)
        values = {**queue_part(now), **catalog_part(stores, filters, sort), "can_ask": call.caller.level >= Level.ASK}
        return now.revision, {**head_part(now), **rendered(("queue", "catalog"), values)}

    async def live_job(self, call: RestCall, number: int) -> tuple[int, dict[str, str]]:
        now = await to_thread.run_sync(read_cache, call.state)
        values = await self.job_parts(call, number)
        return now.revision, {**head_part(now), **rendered(("job", "attempts", "log"), values)}

    async def live_store(self, call: RestCall, name: str) -> tuple[int, dict[str, str]]:
        values = {"check": self.checks.view(name), "can_ask": call.caller.level >= Level.ASK, "name": name}
        now = await to_thread.run_sync(read_cache, call.state)
        return now.revision, {**head_part(now), **rendered(("check",), values)}

    # signing in, files

    async def show_login(self, call: RestCall) -> Response:
        """GET /login"""
        return login_page(call.query("next") or "/", "")

    async def login(self, call: RestCall) -> Response:
        """POST /login: keeps the token in a cookie that no script can read and no other site's page sends"""
        fields = await form_fields(call.request)
        target, token = (next(iter(fields.get(name, [])), "").strip() for name in ("next", "token"))
        tokens = self.service.tokens
        if tokens is not None and tokens.find(token) is None:
            return login_page(target, "The token is not one of this server’s. Ask its owner.", 401)
        answer = RedirectResponse(local_target(target), 303)
        if tokens is not None:
            secure = call.request.url.scheme == "https"
            answer.set_cookie(COOKIE, token, COOKIE_S, path="/", secure=secure, httponly=True, samesite="strict")
        return answer

    async def file(self, call: RestCall) -> Response:
        """GET /page/{file}"""
        name = call.path("file")
        data = static_file(name)
        if data is None:
            raise HttpError(404, "unknown", "there is no such file")
        return Response(data, 200, {"Cache-Control": "public, max-age=31536000, immutable"}, TYPES[name])


# helpers


def page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(render(template, **values), status, {"Cache-Control": "no-store"})


def rendered(names: tuple[str, ...], values: Mapping[str, Any]) -> dict[str, str]:
    return {name: render(TEMPLATES.get(name, f"{name}.html"), **values) for name in names}


def head_part(now: CacheNow) -> dict[str, str]:
    return {"head": render("head.html", head=head_view(now.usage, now.workers, now.queue, time.time()))}


def queue_part(now: CacheNow) -> dict[str, Any]:
    clock = time.time()
    return {
        "queue": [queue_line(job, now.written.get(job.store), clock) for job in now.queue],
        "recent": [queue_line(job, None, clock) for job in now.recent],
    }


def catalog_part(stores: Any, filters: StoreFilter, sort: str) -> dict[str, Any]:
    clock = time.time()
    return {
        "catalog": [catalog_line(row, clock) for row in stores.stores],
        "next": next_link(filters, sort, stores.next),
        "filtered": any(value is not None for _, value in filters),
    }


def asked_catalog(query: Mapping[str, str]) -> tuple[StoreFilter, StoreSort, str | None, str]:
    """The filters, the order and the place in the list that an address says; and a sentence where it says nonsense."""
    given = {name: query[name] for name in StoreFilter.model_fields if query.get(name)}
    sort: StoreSort = query["sort"] if query.get("sort") in SORTS else "used"  # type: ignore[assignment]
    try:
        return build(StoreFilter, given), sort, query.get("cursor") or None, ""
    except UserError as error:
        return StoreFilter(), sort, None, f"The filter was left out. {words_of(error)}"


async def form_fields(request: Request) -> dict[str, list[str]]:
    """The fields that a form sent. Raises HttpError for what is no form of ours."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HttpError(415, "not_a_form", "expected the fields of a form (application/x-www-form-urlencoded)")
    data = await read_body(request)
    try:
        return parse_qs(data.decode("utf-8", "replace"), max_num_fields=FIELDS)
    except ValueError as error:
        raise HttpError(422, "invalid", f"a form has at most {FIELDS} fields") from error


def with_error(form: FormView, error: BaseException) -> FormView:
    return replace(form, error=words_of(error))


def number_or(text: str | None, default: int) -> int:
    """A number of an address; `default` where there is none."""
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 16 else default


def back_to_store(call: RestCall) -> Response:
    return RedirectResponse(f"/stores/{quote(call.path('store'))}#keep", 303)


def own_address(request: Request) -> str:
    """The path and the query of a request."""
    query = request.url.query
    return request.url.path + (f"?{query}" if query else "")


def local_target(target: str) -> str:
    """Where a browser goes after signing in: an address of this server, else the catalog."""
    return target if re.fullmatch(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]{0,2000}", target) else "/"


def login_page(target: str, message: str, status: int = 200) -> Response:
    return page("login.html", status, next=local_target(target), head=None, live=None, message=message)


def error_page(request: Request, error: Exception) -> Response:
    """The page of a request that raised an error, with the same sentence as the REST interface."""
    status, code, headers = status_of(error)
    if code == "internal":
        print(f"error: {request.method} {printable(request.url.path)[:200]}", file=sys.stderr)  # noqa: T201
        traceback.print_exception(error, file=sys.stderr)
    title = TITLES.get(status, "This cannot be done")
    words = {"title": title, "sentence": words_of(error), "sign_in": status == 401}
    answer = page("error.html", status, **words, head=None, live=None, message="")
    answer.headers.update(headers)
    return answer
