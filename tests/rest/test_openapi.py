"""The OpenAPI document: what it says is what the server does, whatever is sent."""

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support.serving.cache import SHARD, planned, spec_of
from support.serving.rest import ScriptedPlanner, client_of, service_of

from harvest.serve.app import rest_document
from harvest.serve.rest.openapi import rest_page
from harvest.synth import synth
from shared.config import SynthConfig
from shared.request import StoreRequest

DOCUMENT = rest_document()


def plan_of(request: StoreRequest) -> dict[str, Any]:
    return planned(spec_of(min(request.tokens or SHARD, 64 * SHARD), seed=request.seed % 3), request.accept)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server with a store, a job and a lease; its planner knows every model."""
    service = service_of(tmp_path_factory.mktemp("root"), ScriptedPlanner(plan_of))
    synth(SynthConfig(d_in=8, features=12, tokens=2048, out=str(service.root), name="s"))
    service.state.scan()
    with client_of(service) as client:
        client.post("/v1/requests", json={"model": "tiny", "hooks": ["mlp_out"], "tokens": SHARD, "seed": 1})
        client.post("/v1/stores/s/leases", json={"holder": "x"})
        yield client
    service.state.close()


def test_it_is_an_openapi_document(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert document == rest_document()
    assert document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    names = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(names) == len(set(names))
    referred = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert referred <= document["components"]["schemas"].keys()


def test_the_page_of_the_reference_names_every_endpoint_and_object() -> None:
    document, page = rest_document(), rest_page(rest_document())
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"### {method.upper()} {path}\n" in page
    for name in document["components"]["schemas"]:
        assert name == "Error" or f"### {name}\n" in page
    links = set(re.findall(r"\]\(#(\w+)\)", page))
    assert links <= {line[4:].lower() for line in page.splitlines() if line.startswith("### ")}


SKIPPED = ("/v1/events", "/v1/jobs/{job}/events")
"""Streams, which never end."""


def operations() -> list[tuple[str, str]]:
    return [(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods if path not in SKIPPED]


@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")  # schemathesis' own
@pytest.mark.parametrize(("method", "path"), operations())
def test_what_the_document_allows_is_answered_as_it_says(client: TestClient, method: str, path: str) -> None:
    """schemathesis makes requests of the document, valid and not. No answer is a fault of the server, every status is
    in the document, and every body fits its schema."""
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path][method.upper()]
    counted = []

    @settings(
        max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    @given(case=st.one_of(operation.as_strategy(), operation.as_strategy(schemathesis.GenerationMode.NEGATIVE)))
    def fuzz(case: Any) -> None:
        made = case.as_transport_kwargs(base_url="http://127.0.0.1:8642")
        arguments = {name: made[name] for name in ("headers", "params", "json") if made.get(name)}
        if isinstance(made.get("data"), bytes | str):
            arguments["content"] = made["data"]
        try:
            response = client.request(made["method"], made["url"], **arguments)
        except (UnicodeEncodeError, ValueError):  # which the client cannot send
            return
        counted.append(response.status_code)
        assert response.status_code < 500, response.text
        found = DOCUMENT["paths"][path][method]["responses"].get(str(response.status_code))
        assert found is not None or response.status_code in (404, 405), (response.status_code, response.text)
        check_body(response, found)

    fuzz()
    assert counted


def check_body(response: Any, described: Any) -> None:
    """An answer of JSON fits the schema that the document has for it."""
    kind = response.headers.get("content-type", "")
    content = (described or {}).get("content", {})
    if kind == "application/json" and kind in content:
        schema = {**content[kind]["schema"], "components": DOCUMENT["components"]}
        jsonschema.Draft202012Validator(schema).validate(response.json())
    elif response.status_code >= 400:
        assert set(response.json()["error"]) >= {"code", "message"}
