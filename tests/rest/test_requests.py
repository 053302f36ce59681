"""Asking over HTTP: answers at once, one job for equal requests, the sentences of everything that is refused."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.serving.cache import SHARD, FakeHarvest, fake_store, planned, spec_of
from support.serving.rest import ADMIN, ASK, TOKENS, ScriptedPlanner, client_of, service_of

from harvest.serve.rest.endpoint import Service
from harvest.serve.rest.events import MOST_STREAMS
from shared.errors import BusyError, UserError
from shared.request import CacheAnswer, Job, RequestPlan, StoreRequest

REQUEST = {"model": "tiny", "hooks": ["mlp_out"], "tokens": 4 * SHARD, "accept": "exact"}


def plan_of(request: StoreRequest) -> dict[str, Any]:
    return planned(spec_of(request.tokens or SHARD, seed=request.seed), request.accept)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = service_of(tmp_path / "root", ScriptedPlanner(plan_of))
    yield service
    service.state.close()


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with client_of(service) as client:
        yield client


def planner_of(service: Service) -> ScriptedPlanner:
    assert isinstance(service.planner, ScriptedPlanner)
    return service.planner


def test_a_store_that_is_there_is_the_answer(service: Service, client: TestClient) -> None:
    fake_store(service.root, "s")
    service.state.scan()
    response = client.post("/v1/requests", json=REQUEST)
    assert response.status_code == 200
    answer = CacheAnswer.model_validate(response.json())
    assert (answer.state, answer.exact, answer.job) == ("ready", True, None)
    place = answer.hookpoints["layer_01/mlp_out"]
    assert (place.store, place.url) == ("s", "http://127.0.0.1:8642/v1/stores/s")
    assert place.file == str(service.root / "s")


def test_only_programs_on_the_servers_machine_are_told_its_folders(service: Service) -> None:
    fake_store(service.root, "s")
    service.state.scan()
    callers: list[dict[str, Any]] = [{"client": ("10.0.0.9", 1)}, {}]
    headers: list[dict[str, str]] = [{}, {"X-Forwarded-For": "127.0.0.1"}]
    for caller, header in zip(callers, headers, strict=True):
        with client_of(service, **caller) as client:
            answer = client.post("/v1/requests", json=REQUEST, headers=header).json()
            assert answer["hookpoints"]["layer_01/mlp_out"]["file"] is None


def test_the_second_request_asks_no_planner(service: Service, client: TestClient) -> None:
    fake_store(service.root, "s")
    service.state.scan()
    for _ in range(5):
        assert client.post("/v1/requests", json={**REQUEST, "pin": "mine", "priority": "low"}).status_code == 200
    assert client.post("/v1/plan", json=REQUEST).status_code == 200
    assert len(planner_of(service).plans) == 1
    client.post("/v1/requests", json={**REQUEST, "refresh": True})
    client.post("/v1/requests", json={**REQUEST, "seed": 1})
    assert len(planner_of(service).plans) == 3
    assert client.get("/v1/stores").json()["stores"][0]["pins"] == ["mine"]


def test_a_changed_local_file_is_planned_again(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{}\n")
    service = service_of(tmp_path / "root", ScriptedPlanner(plan_of), allow_corpus=(f"mine={corpus}",))
    with client_of(service) as client:
        asked = {**REQUEST, "corpus": "mine"}
        for _ in range(3):
            job = client.post("/v1/requests", json=asked).json()["job"]
        (plan,) = planner_of(service).plans
        assert plan.corpus == str(corpus)
        assert client.get(f"/v1/jobs/{job}").json()["request"]["corpus"] == "mine"
        corpus.write_text("{}\n{}\n")
        client.post("/v1/requests", json=asked)
        assert len(planner_of(service).plans) == 2
    service.state.close()


def test_200_equal_requests_at_once_are_one_job_and_one_plan(service: Service, client: TestClient) -> None:
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/requests", json=REQUEST), range(200)))
    assert {answer.status_code for answer in answers} == {202}
    (job,) = {answer.json()["job"] for answer in answers}
    assert client.get(f"/v1/jobs/{job}").json()["asked"] == 200
    assert len(client.get("/v1/jobs").json()["jobs"]) == 1
    assert len(planner_of(service).plans) == 1


def test_what_must_be_made_is_a_job(client: TestClient) -> None:
    response = client.post("/v1/requests", json=REQUEST)
    answer = CacheAnswer.model_validate(response.json())
    assert (response.status_code, answer.state) == (202, "queued")
    assert response.headers["location"] == f"http://127.0.0.1:8642/v1/jobs/{answer.job}"
    assert int(response.headers["retry-after"]) > 0
    job = Job.model_validate(client.get(response.headers["location"]).json())
    assert (job.id, job.state, job.asked) == (answer.job, "queued", 1)
    plan = RequestPlan.model_validate(client.post("/v1/plan", json={**REQUEST, "seed": 7}).json())
    assert plan.action == "harvest"
    assert len(client.get("/v1/jobs").json()["jobs"]) == 1


def take(client: TestClient, **more: Any) -> Any:
    return client.post("/v1/workers/box:1/take", json={"name": "box:1", **more})


def test_a_worker_takes_beats_and_ends(service: Service, client: TestClient) -> None:
    job = client.post("/v1/requests", json=REQUEST).json()["job"]
    taken = take(client)
    assert taken.status_code == 200
    attempt = taken.json()["attempt"]
    assert taken.json()["job"] == job
    assert client.post("/v1/workers/box:2/take", json={"name": "box:2"}).status_code == 204
    beat = client.post(f"/v1/jobs/{job}/beat", json={"attempt": attempt, "rows": 5, "rate": 2.5, "note": "on its way"})
    assert beat.json() == {"go_on": True}
    shown = client.get(f"/v1/jobs/{job}").json()
    assert (shown["state"], shown["rows_per_s"], shown["note"]) == ("running", 2.5, "on its way")
    for path in ("beat", "end"):
        body = {"attempt": attempt + 1} | ({"code": 0} if path == "end" else {})
        wrong = client.post(f"/v1/jobs/{job}/{path}", json=body)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (409, "not_yours")
    fake_store(service.root, taken.json()["store"])
    assert client.post(f"/v1/jobs/{job}/end", json={"attempt": attempt, "code": 0}).json()["state"] == "done"
    assert client.post("/v1/requests", json=REQUEST).status_code == 200


def test_a_worker_waits_for_a_job(client: TestClient) -> None:
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(client.post(
        "/v1/workers/box:1/take?wait=20", json={"name": "box:1"})))  # fmt: skip
    waiting.start()
    time.sleep(0.3)
    job = client.post("/v1/requests", json=REQUEST).json()["job"]
    began = time.monotonic()
    waiting.join(10)
    assert found[0].json()["job"] == job
    assert time.monotonic() - began < 5


def test_a_damaged_store_is_repaired_by_its_job(service: Service, client: TestClient) -> None:
    job = client.post("/v1/requests", json=REQUEST).json()["job"]
    taken = take(client).json()
    fake_store(service.root, taken["store"])
    client.post(f"/v1/jobs/{job}/end", json={"attempt": taken["attempt"], "code": 0})
    report = {"lines": ["shard 3 is not what was written"]}
    for _ in range(2):
        response = client.post(f"/v1/stores/{taken['store']}/damage", json=report)
        assert (response.status_code, response.json()["id"], response.json()["state"]) == (202, job, "queued")
    again = take(client).json()
    assert (again["job"], again["repair"], again["attempt"]) == (job, True, taken["attempt"] + 1)
    fake_store(service.root, "other", spec_of(seed=9))
    service.state.scan()
    assert client.post("/v1/stores/other/damage", json=report).status_code == 409
    assert client.post("/v1/stores/nothing/damage", json=report).status_code == 404
    assert client.post("/v1/stores/other/damage", json={"lines": []}).status_code == 422


def test_a_cancelled_job_is_stopped_and_can_be_retried(client: TestClient) -> None:
    job = client.post("/v1/requests", json=REQUEST).json()["job"]
    attempt = take(client).json()["attempt"]
    assert client.post(f"/v1/jobs/{job}/cancel").json()["state"] == "cancelled"
    assert client.post(f"/v1/jobs/{job}/beat", json={"attempt": attempt}).json() == {"go_on": False}
    client.post(f"/v1/jobs/{job}/end", json={"attempt": attempt, "code": 130})
    assert client.post(f"/v1/jobs/{job}/retry").json()["state"] == "queued"
    wrong = client.post(f"/v1/jobs/{job}/retry")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (409, "wrong_state")


def test_prefer_wait_answers_when_the_job_is_done(service: Service, client: TestClient) -> None:
    found: list[Any] = []
    asking = threading.Thread(
        target=lambda: found.append(client.post("/v1/requests", json=REQUEST, headers={"Prefer": "wait=20"}))
    )
    asking.start()
    while (taken := take(client)).status_code == 204:
        time.sleep(0.02)
    fake_store(service.root, taken.json()["store"])
    client.post(f"/v1/jobs/{taken.json()['job']}/end", json={"attempt": taken.json()["attempt"], "code": 0})
    asking.join(10)
    assert (found[0].status_code, found[0].json()["state"]) == (200, "ready")


def test_prefer_wait_says_why_a_job_failed(client: TestClient) -> None:
    found: list[Any] = []
    asking = threading.Thread(
        target=lambda: found.append(client.post("/v1/requests", json=REQUEST, headers={"Prefer": "wait=20"}))
    )
    asking.start()
    while (taken := take(client)).status_code == 204:
        time.sleep(0.02)
    ended = {"attempt": taken.json()["attempt"], "code": 2, "words": "error: the model is gone"}
    client.post(f"/v1/jobs/{taken.json()['job']}/end", json=ended)
    asking.join(10)
    assert (found[0].status_code, found[0].json()["error"]["code"]) == (422, "job_failed")
    assert "the model is gone" in found[0].json()["error"]["message"]


def test_prefer_wait_ends(client: TestClient) -> None:
    began = time.monotonic()
    assert client.post("/v1/requests", json=REQUEST, headers={"Prefer": "wait=1"}).status_code == 202
    assert 0.9 < time.monotonic() - began < 5


def test_a_view_is_made_while_the_request_waits(tmp_path: Path) -> None:
    """The server's own planner links it; no worker is there, and none is needed."""

    class LinkingPlanner(ScriptedPlanner):
        async def make(self, root: Path, store: str, settings: Any) -> None:
            await super().make(root, store, settings)
            FakeHarvest(root, store, spec_of(2 * SHARD), linked=(root / "large",)).whole()

    planner = LinkingPlanner(plan_of)
    service = service_of(tmp_path / "root", planner)
    fake_store(service.root, "large")
    service.state.scan()
    with client_of(service) as client:
        response = client.post("/v1/requests", json={**REQUEST, "tokens": 2 * SHARD})
        assert (response.status_code, response.json()["state"]) == (200, "ready"), response.text
        (place,) = response.json()["hookpoints"].values()
        assert planner.made == [place["store"]]
        (job,) = client.get("/v1/jobs").json()["jobs"]
        assert (job["action"], job["state"], job["worker"]) == ("view", "done", None)
    service.state.close()


def test_a_view_that_cannot_be_made_is_a_job_that_says_why(tmp_path: Path) -> None:
    class FailingPlanner(ScriptedPlanner):
        async def make(self, root: Path, store: str, settings: Any) -> None:  # noqa: ARG002
            raise UserError("the shards lie on two disks")

    service = service_of(tmp_path / "root", FailingPlanner(plan_of))
    fake_store(service.root, "large")
    service.state.scan()
    with client_of(service) as client:
        client.post("/v1/requests", json={**REQUEST, "tokens": 2 * SHARD})
        job = client.get("/v1/jobs").json()["jobs"][-1]
        assert (job["state"], job["error"]) == ("failed", "the shards lie on two disks")
    service.state.close()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UserError("--model x: there is none"), 422, "invalid"),
        (BusyError("the hub cannot be reached"), 503, "busy"),
        (RuntimeError("secret"), 500, "internal"),
    ],
)
def test_what_the_planner_refuses(tmp_path: Path, error: Exception, status: int, code: str) -> None:
    def refuse(request: StoreRequest) -> dict[str, Any]:  # noqa: ARG001
        raise error

    service = service_of(tmp_path, ScriptedPlanner(refuse))
    with client_of(service) as client:
        response = client.post("/v1/requests", json=REQUEST)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert ("secret" in response.text) is False
        assert status == 500 or response.json()["error"]["message"] == str(error)
    service.state.close()


def test_a_full_quota_names_what_holds_the_space(tmp_path: Path) -> None:
    service = service_of(tmp_path / "root", ScriptedPlanner(plan_of), quota=60_000)
    fake_store(service.root, "s")
    service.state.scan()
    service.state.pin("s", "mine")
    with client_of(service) as client:
        response = client.post("/v1/requests", json={**REQUEST, "seed": 1, "tokens": 64 * SHARD})
        assert (response.status_code, response.json()["error"]["code"]) == (507, "quota")
        assert response.json()["error"]["held_by"][0]["store"] == "s"
        assert client.post("/v1/requests", json=REQUEST).status_code == 200
    service.state.close()


def test_one_asker_has_at_most_twenty_open_jobs(service: Service) -> None:
    with client_of(service, TOKENS, ASK) as client:
        answers = [client.post("/v1/requests", json={**REQUEST, "seed": seed}) for seed in range(21)]
        assert [answer.status_code for answer in answers] == [202] * 20 + [429]
        assert answers[-1].json()["error"]["code"] == "queue_full"
        assert "retry-after" in answers[-1].headers
        other = client.post("/v1/requests", json={**REQUEST, "seed": 99}, headers={"Authorization": f"Bearer {ADMIN}"})
        assert other.status_code == 202


def test_leases_and_pins_hold_a_store(service: Service, client: TestClient) -> None:
    fake_store(service.root, "s")
    service.state.scan()
    lease = client.post("/v1/stores/s/leases", json={"holder": "train", "ttl_s": 100})
    assert (lease.status_code, lease.json()["ttl_s"]) == (201, 100)
    held = client.delete("/v1/stores/s")
    assert (held.status_code, held.json()["error"]["code"]) == (409, "held")
    assert "held_by" in held.json()["error"]
    assert client.put(f"/v1/leases/{lease.json()['id']}").status_code == 204
    assert client.delete(f"/v1/leases/{lease.json()['id']}").status_code == 204
    lapsed = client.put(f"/v1/leases/{lease.json()['id']}")
    assert (lapsed.status_code, lapsed.json()["error"]["code"]) == (410, "lapsed")
    assert client.put("/v1/stores/s/pins/mine").status_code == 204
    assert client.get("/v1/stores").json()["stores"][0]["pins"] == ["mine"]
    assert client.delete("/v1/stores/s").status_code == 409
    assert client.delete("/v1/stores/s/pins/mine").status_code == 204
    assert client.delete("/v1/stores/s").status_code == 204
    assert client.get("/v1/stores/s").status_code == 404
    assert not (service.root / "s").exists()


@pytest.mark.parametrize("ttl", [0, -1, 3601, 1e999, "x"])
def test_a_lease_is_bounded(service: Service, client: TestClient, ttl: Any) -> None:
    fake_store(service.root, "s")
    service.state.scan()
    body = (
        f'{{"holder": "x", "ttl_s": {ttl if ttl != 1e999 else "1e999"}}}'
        if ttl != "x"
        else '{"holder": "x", "ttl_s": "x"}'
    )
    assert client.post("/v1/stores/s/leases", content=body).status_code in (400, 422)


def test_lists_come_in_pages_and_are_filtered(service: Service, client: TestClient) -> None:
    for number in range(5):
        fake_store(service.root, f"s{number}", spec_of(seed=number))
    service.state.scan()
    names, cursor = [], ""
    while True:
        page = client.get(f"/v1/stores?sort=id&limit=2{cursor}").json()
        names += [row["id"] for row in page["stores"]]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert sorted(names) == [f"s{number}" for number in range(5)]
    assert len(names) == 5
    assert client.get("/v1/stores?layer=1&hook=mlp_out&model=tiny&state=final").json()["stores"]
    assert client.get("/v1/stores?layer=2").json()["stores"] == []
    for query in ("limit=0", "limit=x", "sort=x", "state=x", "layer=x", "cursor=x", "colour=red"):
        response = client.get(f"/v1/stores?{query}")
        assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid"), query


def test_a_log_is_read_in_parts(service: Service, client: TestClient) -> None:
    job = client.post("/v1/requests", json=REQUEST).json()["job"]
    assert client.get(f"/v1/jobs/{job}/log").json() == {"text": "", "next": 0, "ended": False}
    log = service.state.log_path(job)
    log.parent.mkdir(exist_ok=True)
    log.write_bytes("héllo\n".encode()[:2])
    first = client.get(f"/v1/jobs/{job}/log").json()
    assert first == {"text": "h", "next": 1, "ended": False}
    log.write_bytes("héllo\n".encode())
    assert client.get(f"/v1/jobs/{job}/log?from=1").json()["text"] == "éllo\n"
    assert client.get(f"/v1/jobs/{job}/log?from=-3").json()["text"] == "lo\n"
    assert client.get(f"/v1/jobs/{job}/log?from=999").json()["text"] == ""
    client.post(f"/v1/jobs/{job}/cancel")
    assert client.get(f"/v1/jobs/{job}/log?from=0").json()["ended"] is True
    log.unlink()
    log.symlink_to("/etc/passwd")
    assert client.get(f"/v1/jobs/{job}/log").json()["text"] == ""


def events(client: TestClient, path: str, headers: dict[str, str] | None = None) -> Iterator[tuple[int, str, Any]]:
    """The events of a stream: id, name, data."""
    with client.stream("GET", path, headers=headers or {}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found: dict[str, str] = {}
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if line == "" and "data" in found:
                yield int(found["id"]), found["event"], json.loads(found["data"])
                found = {}
            elif name in ("id", "event", "data"):
                found[name] = value


def test_an_ended_job_is_one_event_and_no_more(client: TestClient) -> None:
    job = client.post("/v1/requests", json=REQUEST).json()["job"]
    revision = client.post(f"/v1/jobs/{job}/cancel").json()["revision"]
    ((number, name, data),) = events(client, f"/v1/jobs/{job}/events")
    assert (number, name, data["state"]) == (revision, "job", "cancelled")
    again = client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": str(revision)})
    assert again.status_code == 204
    assert client.get("/v1/jobs/99/events").status_code == 404


def test_streams_are_bounded(service: Service, client: TestClient) -> None:
    job = client.post("/v1/requests", json=REQUEST).json()["job"]
    client.post(f"/v1/jobs/{job}/cancel")
    service.counters.streams = MOST_STREAMS
    refused = client.get(f"/v1/jobs/{job}/events")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
    service.counters.streams = 0
    assert len(list(events(client, f"/v1/jobs/{job}/events"))) == 1
    assert service.counters.streams == 0


def test_metrics_are_prometheus_text(service: Service, client: TestClient) -> None:
    fake_store(service.root, "s")
    service.state.scan()
    client.post("/v1/requests", json=REQUEST)
    client.post("/v1/requests", json={**REQUEST, "seed": 3})
    lines = client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['sagsae_requests_total{outcome="hit"}'] == "1"
    assert values['sagsae_requests_total{outcome="queued"}'] == "1"
    assert values['sagsae_jobs{state="queued"}'] == "1"
    assert int(values['sagsae_disk_bytes{kind="used"}']) > 40_000
    assert all(float(value) >= 0 for value in values.values())
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {name.partition("{")[0] for name in values} == typed


def test_ids_that_are_none_are_not_found(client: TestClient) -> None:
    for number in ("0", "99", "x", "-1", "1e3", "9" * 5000, "٣"):
        for path in ("", "/log", "/events"):
            assert client.get(f"/v1/jobs/{number}{path}").status_code == 404
        assert client.post(f"/v1/jobs/{number}/cancel").status_code == 404
    assert client.post("/v1/workers/other/take", json={"name": "box:1"}).status_code == 422
    response = client.put("/v1/plan")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method")
    assert client.get("/v1/nothing").json()["error"]["code"] == "unknown"


def test_a_database_that_cannot_be_written_to_is_said_in_one_sentence(service: Service, client: TestClient) -> None:
    """The server still answers reads. It accepts requests again once the file can be written to."""
    fake_store(service.root, "s")
    service.state.scan()
    connection = service.state.database.connection
    connection.execute("PRAGMA query_only=1")
    response = client.post("/v1/requests", json={**REQUEST, "seed": 5})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "broken")
    assert "Make the file and its folder writable" in response.json()["error"]["message"]
    assert "retry-after" in response.headers
    assert client.get("/v1/stores").json()["stores"][0]["id"] == "s"
    connection.execute("PRAGMA query_only=0")
    assert client.post("/v1/requests", json={**REQUEST, "seed": 5}).status_code == 202
