"""The OpenAPI document: complete, valid, of use to client generators. The other tests' answers are held to it."""

import json
import re

import jsonschema
import pytest

from server.api.app import create_app
from server.config import Settings
from server.serving import Serving


@pytest.fixture
def document(client):
    return client("GET", "/openapi.json").json()


def operations(document):
    return [
        (path, method, operation)
        for path, of in document["paths"].items()
        for method, operation in of.items()
    ]


def test_every_reference_leads_somewhere(document):
    names = re.findall(r'"\$ref": "([^"]+)"', json.dumps(document))
    assert len(names) > 30
    for name in names:
        found = document
        for part in name.removeprefix("#/").split("/"):
            found = found[part]
        assert found["type"] == "object"
        assert found["properties"]
        assert found["description"]
    assert "$defs" not in json.dumps(document)


def test_every_schema_is_one(document):
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_operation_has_a_name_of_its_own_and_says_what_it_may_answer(document):
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)
    assert {"create_completion", "create_chat_completion", "put_adapter", "roll_back"} <= set(names)
    for _, _, operation in operations(document):
        wrong = operation["responses"]["default"]["content"]["application/json"]["schema"]
        assert wrong == {"$ref": "#/components/schemas/Error"}
        assert "422" not in operation["responses"]
        for status, answer in operation["responses"].items():
            assert status == "204" or all(content["schema"] for content in answer["content"].values())


def test_what_bodies_are(document):
    for path, name in [
        ("/v1/completions", "CompletionRequest"),
        ("/v1/chat/completions", "ChatRequest"),
        ("/v1/adapters/{name}/rollback", "Rollback"),
        ("/tokenize", "TokenizeRequest"),
        ("/detokenize", "DetokenizeRequest"),
    ]:
        body = document["paths"][path]["post"]["requestBody"]
        assert body["required"]
        assert body["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
    upload = document["paths"]["/v1/adapters/{name}"]["put"]
    assert list(upload["requestBody"]["content"]) == ["application/octet-stream"]
    assert [each["name"] for each in upload["parameters"]] == ["name", "If-Match", "Content-Digest"]


@pytest.mark.parametrize(
    ("keys", "asked", "changed"),
    [
        ({}, [], []),
        ({"api_key": ["a"]}, [{"ApiKey": []}], [{"ApiKey": []}]),
        ({"admin_api_key": ["b"]}, [], [{"AdminApiKey": []}]),
        ({"api_key": ["a"], "admin_api_key": ["b"]}, [{"ApiKey": []}], [{"AdminApiKey": []}]),
    ],
)
def test_it_asks_for_the_keys_that_the_server_asks_for(keys, asked, changed):
    paths = create_app(Settings(model="m", **keys), Serving()).openapi()["paths"]
    assert paths["/v1/completions"]["post"]["security"] == asked
    assert paths["/v1/adapters"]["get"]["security"] == asked
    assert paths["/v1/adapters/{name}"]["put"]["security"] == changed
    assert paths["/v1/models/{id}"]["delete"]["security"] == changed
    assert paths["/metrics"]["get"]["security"] == []


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/adapters", "GET, POST"),
        ("/v1/adapters/legal", "DELETE, GET, PUT"),
        ("/v1/models/legal", "DELETE, GET"),
        ("/health", "GET, HEAD"),
        ("/v1/completions", "POST"),
    ],
)
def test_allow_names_every_method_of_a_path(client, path, methods):
    response = client("PATCH", path)
    assert response.status_code == 405
    assert response.headers["allow"] == methods


def test_the_contract_of_these_tests_can_be_broken(client, document):
    answer = client("GET", "/version")
    broken = {**answer.json(), "more": 1}
    answer._content = json.dumps(broken).encode()
    with pytest.raises(jsonschema.ValidationError, match="more"):
        client.contract.check(answer)
