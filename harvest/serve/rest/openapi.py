"""The OpenAPI document of the server, and the page of the reference that is made from it. Both follow from the list of
endpoints."""

import re
import textwrap
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from harvest.serve.rest.endpoint import BODY_BYTES, Endpoint, Level
from shared.request import LogFile

ERROR: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string", "description": "For programs."},
                "message": {"type": "string", "description": "One sentence for people."},
                "fields": {"type": "object", "additionalProperties": {"type": "string"}},
                "held_by": {"type": "array", "items": {"type": "object"}},
            },
        }
    },
}
REF: Final = "#/components/schemas/{model}"
WIDTH: Final = 120
"""Columns of a line of Markdown."""
EVERYWHERE: Final = (405, 421)
"""Statuses of every path: a method that it does not have, a Host that is not the server's."""


def openapi_document(endpoints: Iterable[Endpoint], version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, dict[str, Any]] = {}
    endpoints = tuple(endpoints)
    for one in endpoints:
        path = re.sub(r":\w+\}", "}", one.path)
        paths.setdefault(path, {})[one.method.lower()] = operation(one)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "sagsae: the activation cache",
            "version": version,
            "description": "Ask for a language model's activations; they are harvested once and served to everybody.",
        },
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": {**schemas_of(endpoints), "Error": dict(ERROR)},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def schemas_of(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The JSON schema of every class that an endpoint takes or returns."""
    models: dict[str, type[BaseModel]] = {"LogFile": LogFile}
    for one in endpoints:
        for kind in (one.body, *one.answers.values()):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                models[kind.__name__] = kind
    modes: list[tuple[type[BaseModel], Any]] = [(models[name], "validation") for name in sorted(models)]
    _, document = models_json_schema(modes, ref_template=REF)
    found: dict[str, Any] = document["$defs"]
    return found


def operation(one: Endpoint) -> dict[str, Any]:
    """One method of one path."""
    found: dict[str, Any] = {
        "operationId": one.handler.__name__,
        "summary": one.summary,
        "description": f"Level: {one.level.name.lower()}.",
        "parameters": [*map(path_parameter, re.findall(r"\{(\w+)", one.path)), *map(query_parameter, one.queries)],
        "responses": responses(one),
    }
    if one.level is Level.OPEN:
        found["security"] = []
    if one.body is not None:
        content = {"application/json": {"schema": {"$ref": REF.format(model=one.body.__name__)}}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def path_parameter(name: str) -> dict[str, Any]:
    kind = {"type": "integer", "minimum": 0} if name == "job" else {"type": "string"}
    return {"name": name, "in": "path", "required": True, "schema": kind}


def query_parameter(query: Any) -> dict[str, Any]:
    schema = dict(query.schema)
    schema.pop("default", None)
    return {"name": query.name, "in": "query", "required": False, "schema": schema, "description": query.text}


def responses(one: Endpoint) -> dict[str, Any]:
    found = {str(status): response(status, kind) for status, kind in one.answers.items()}
    error = {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}
    for status in sorted({*one.errors, *EVERYWHERE}):
        found[str(status)] = {"description": HTTPStatus(status).phrase, "content": error}
    return found


def response(status: int, kind: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if kind is None:
        return found
    if isinstance(kind, str):
        found["content"] = {kind: {"schema": {"type": "string"}}}
    else:
        schema = {"$ref": REF.format(model=kind.__name__)} if isinstance(kind, type) else dict(kind)
        found["content"] = {"application/json": {"schema": schema}}
    return found


# the page of the reference

HEAD: Final = f"""# REST API

*Generated from the endpoints by `make reference`; edit harvest/serve/rest, not this page.*

`sagsae serve` answers these requests. Bodies and answers are JSON, and a body has at most {BODY_BYTES // 1024} KiB.
`GET /openapi.json` returns the same as an OpenAPI document. From Python, use
[`shared.service.Client`](python.md).

A server that other machines reach needs a token in every request: `Authorization: Bearer TOKEN`. A token has one of
three levels. *read* sees the catalog, the queue and the bytes of stores. *ask* may also ask for activations, cancel
jobs, and pin, lease and delete stores. *admin* may also work on jobs and delete what is pinned or leased.

## Errors

Every error is `{{"error": {{"code", "message", "fields"?, "held_by"?}}}}`. `message` is the sentence that the command
line prints, `fields` names wrong members of a body, and `held_by` names what holds the space.

| status | when |
|---|---|
| 400 | the body is no JSON object |
| 401, 403 | the token is missing, wrong, or of too low a level; a page of another site asks; a name is a path |
| 404 | there is no such store, file, job or path |
| 408, 413 | the body arrives too slowly, or is too long |
| 409, 410 | the job is not yours or in another state; the store is held; the lease has lapsed |
| 416 | the file has no such range, or the range has more than 8 MiB |
| 421 | the Host header is no name of this server |
| 422 | a member of the body or of the query is wrong, or what was asked for does not exist |
| 429 | too many jobs or event streams are open |
| 503, 507 | try again later; the quota is used up by what may not be deleted |
"""


def rest_page(document: Mapping[str, Any]) -> str:
    """docs/reference/rest-api.md: every endpoint, then the members of every object."""
    lines = [HEAD, "## Endpoints", ""]
    for path, methods in document["paths"].items():
        for method, one in methods.items():
            lines += endpoint_lines(method.upper(), path, one)
    lines += ["## Objects", ""]
    for name, schema in document["components"]["schemas"].items():
        if name != "Error":
            lines += schema_lines(name, schema)
    return "\n".join(lines).rstrip("\n") + "\n"


def endpoint_lines(method: str, path: str, one: Mapping[str, Any]) -> list[str]:
    lines = [f"### {method} {path}", "", one["summary"], "", f"* {one['description'].replace('.', '')}"]
    for parameter in one["parameters"]:
        if parameter["in"] == "query":
            lines.append(f"* `?{parameter['name']}=` {kind_of(parameter['schema'])}: {parameter['description']}")
    if body := one.get("requestBody"):
        lines.append(f"* Body: {kind_of(body['content']['application/json']['schema'])}")
    good = [f"{status} {content_of(each)}".strip() for status, each in one["responses"].items() if int(status) < 400]
    bad = [status for status in one["responses"] if int(status) >= 400 and int(status) not in EVERYWHERE]
    lines.append(f"* Answers: {'; '.join(good)}" + (f". Errors: {', '.join(bad)}" if bad else ""))
    return [part for line in lines for part in wrapped(line)] + [""]


def wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) or [""]


def content_of(answer: Mapping[str, Any]) -> str:
    for kind, content in answer.get("content", {}).items():
        return kind_of(content["schema"]) if kind == "application/json" else f"`{kind}`"
    return ""


def schema_lines(name: str, schema: Mapping[str, Any]) -> list[str]:
    """The members of an object as a table."""
    text = " ".join(str(schema.get("description", "")).split())
    lines = [f"### {name}", "", *([text, ""] if text else []), "| member | type | needed |", "|---|---|---|"]
    needed = schema.get("required", [])
    for member, kind in schema.get("properties", {}).items():
        lines.append(f"| `{member}` | {kind_of(kind)} | {'yes' if member in needed else ''} |".replace("|  |", "| |"))
    return [*lines, ""]


def kind_of(schema: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(kind_of, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {kind_of(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {kind_of(schema['additionalProperties'])}"
    return f"{kind}{bounds_of(schema)}"


def bounds_of(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" from {low:,} to {high:,}"
    if low is not None:
        return f", {low:,} or more"
    return f", at most {high:,}" if high is not None else ""
