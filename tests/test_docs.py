"""The documents agree with the code: tables are fresh, every route and every error is spoken of."""

import re
import shlex

import pytest

from adapters.errors import AdapterError
from server.api.app import create_app
from server.api.envelope import CODES
from server.api.schemas.generation import ChatRequest, CompletionRequest
from server.cli import build_parser
from server.config import Settings
from server.config_sources import load_settings
from server.errors import ADAPTER_STATUS, AdapterRejectedError, LoraplexError
from server.serving import Serving
from tests.generate_docs import DOCS, GENERATED, renewed

HTTP_API = (DOCS / "http-api.md").read_text(encoding="utf-8")


def kinds(root: type[LoraplexError]) -> list[type[LoraplexError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in kinds(child))]


@pytest.mark.parametrize("name", GENERATED)
def test_tables_are_fresh(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    assert text == renewed(text, GENERATED[name]()), "stale: run `python -m tests.generate_docs`"


def test_every_error_is_in_the_table_and_no_other():
    errors = {(kind.http_status, kind.code, kind.type) for kind in kinds(LoraplexError)}
    for code, status in ADAPTER_STATUS.items():
        errors.add((status, code, AdapterRejectedError(AdapterError(code, "")).type))
    errors |= {(status, code, "invalid_request_error") for status, code in CODES.items()}
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \| `(\w+)` \|", HTTP_API, re.MULTILINE)
    assert {(int(status), code, kind) for status, code, kind in rows} == errors
    assert len(rows) == len(errors)


def test_every_route_is_in_the_table_and_no_other():
    app = create_app(Settings(model="m"), Serving())
    routes = {f"{method.upper()} {path}" for path, of in app.openapi()["paths"].items() for method in of}
    routes |= {f"GET {path}" for path in (app.openapi_url, app.docs_url, app.redoc_url)}
    table = HTTP_API.partition("\n\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`((?:GET|PUT|POST|DELETE) /[^`]*)`", table)) == routes


@pytest.mark.parametrize("shape", [CompletionRequest, ChatRequest])
def test_every_field_of_a_body_is_spoken_of(shape):
    for name in shape.model_fields:
        assert f"`{name}`" in HTTP_API


def test_the_operators_page_names_what_there_is():
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    metrics = (DOCS / "metrics.md").read_text(encoding="utf-8")
    serve, client = set(flags_of("serve")), {"--url", "--api-key", "--admin-api-key", "--if-match", "--json"}
    found = re.findall(r"`(loraplex_\w+)`", text)
    assert found
    assert not [name for name in found if f"`{name}`" not in metrics]
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= serve | client
    for name in re.findall(r"^loraplex adapters (\w+)", text, re.MULTILINE):
        assert flags_of("adapters", name)


def test_the_readme_asks_for_what_its_server_serves():
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Serve your own")[2].partition("\n## ")[0]
    line = re.search(r"^loraplex (serve .*)$", section, re.MULTILINE)[1]
    given = vars(build_parser().parse_args(shlex.split(line)))
    settings = load_settings({name: given[name] for name in ("model", "served_model_name", "lora_modules")})
    names = re.findall(r'model="([^"]+)"', section)
    assert len(names) == 3
    adapters = {module.name for module in settings.lora_modules}
    assert set(names) <= {
        *settings.base_names,
        *adapters,
        *(f"{settings.base_name}:{name}" for name in adapters),
    }


def flags_of(*path: str) -> list[str]:
    parser = build_parser()
    for name in path:
        parser = parser._subparsers._group_actions[0].choices[name]
    return list(parser._option_string_actions)
