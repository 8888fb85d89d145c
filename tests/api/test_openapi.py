"""The OpenAPI document behind /docs: every operation is explained, and all examples match their schemas."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator

from api.main import create_app
from api.schemas.jobs import CREATE_EXAMPLES, CreateJob
from api.web import docs
from tunery.local.bases import SMOLLM2
from tunery.settings import Settings

PUBLIC = {"healthz"}


@pytest.fixture
def client(settings: Settings) -> TestClient:
    return TestClient(create_app(settings))


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()


def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = document["components"]["schemas"][name] if name else schema
    return found


def _examples(content: dict[str, Any], document: dict[str, Any]) -> list[Any]:
    """The examples of a media type, of its schema, or of a list's items."""
    if "example" in content:
        return [content["example"]]
    if "examples" in content:
        return [example["value"] for example in content["examples"].values()]
    schema = _resolved(content["schema"], document)
    if "anyOf" in schema:
        schema = _resolved(schema["anyOf"][0], document)
    items = schema.get("properties", {}).get("data", {}).get("items")
    if items:
        return [{"object": "list", "data": [one]} for one in _items(_resolved(items, document))]
    found: list[Any] = schema.get("examples", [schema["example"]] if "example" in schema else [])
    return found


def _items(schema: dict[str, Any]) -> list[Any]:
    return ["fine_tuning.job.succeeded"] if schema.get("type") == "string" else schema["examples"]


def test_every_operation_is_explained(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    for operation in _operations(document):
        name = operation["operationId"]
        assert operation["summary"], name
        assert operation["tags"], name
        if name in PUBLIC:
            assert "security" not in operation
            continue
        assert operation["security"] == [{"API key": []}], name
        assert {"400", "401", "503"} <= set(operation["responses"]), name
        assert "422" not in operation["responses"], name
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Error"), name


def test_every_operation_has_worked_examples(document: dict[str, Any]) -> None:
    missing, wrong = [], []
    for operation in _operations(document):
        places = [operation["requestBody"]] if "requestBody" in operation else []
        for place in [*places, operation["responses"]["200"]]:
            for kind, content in place["content"].items():
                examples = _examples(content, document)
                if not examples:
                    missing.append((operation["operationId"], kind))
                if "schema" not in content or kind.startswith("multipart/"):
                    continue
                schema = {**content["schema"], "components": document["components"]}
                check = Draft202012Validator(schema)
                wrong += [(operation["operationId"], e.message) for one in examples for e in check.iter_errors(one)]
    assert missing == []
    assert wrong == []


def test_the_create_examples_are_legal_requests() -> None:
    for example in CREATE_EXAMPLES.values():
        CreateJob.model_validate(example["value"])


def test_the_examples_of_requests_name_the_base_that_up_registers(document: dict[str, Any]) -> None:
    bodies = [operation["requestBody"]["content"] for operation in _operations(document) if "requestBody" in operation]
    given = [one for body in bodies for content in body.values() for one in _examples(content, document)]
    named = [one["model"] for one in given if isinstance(one, dict) and "model" in one]
    assert len(named) >= 5
    assert set(named) == {SMOLLM2.id}


def test_the_files_of_the_create_examples_are_those_that_the_page_replaces(client: TestClient) -> None:
    files = {value for one in CREATE_EXAMPLES.values() for value in one["value"].values() if "file-" in str(value)}
    assert files == set(re.findall(r'"(file-\w+)"', client.get("/docs/docs.js").text))


def test_the_first_page_is_the_documentation(client: TestClient) -> None:
    answer = client.get("/", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")
    assert "swagger" in client.get("/").text


def test_tools_can_name_operations(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for operation in _operations(document)]
    assert len(names) == len(set(names))
    assert all(name.isidentifier() for name in names)


def test_the_page_asks_nobody_else(client: TestClient) -> None:
    """It works in a closed network: we serve every script and style, and the policy makes browsers refuse others."""
    page = client.get("/docs")
    assert "://" not in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in docs.ASSETS:
        if name in page.text:
            assert client.get(f"/docs/{name}").status_code == 200


def test_swagger_ui_is_new_enough_for_this_document(client: TestClient) -> None:
    """Swagger UI 4 shows OpenAPI 3.1 as an error."""
    script = client.get("/docs/swagger-ui-bundle.js").text
    assert "openapi31" in script.lower() or "OpenAPI 3.1" in script
