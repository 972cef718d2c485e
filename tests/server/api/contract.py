"""Whether an answer is what the OpenAPI document promises, to the last key."""

import copy
import re
from functools import cached_property

import jsonschema
import orjson


class Contract:
    """Of one app."""

    def __init__(self, app):
        self._app = app

    @cached_property
    def _document(self):
        """As promised, but that an answer may hold nothing else."""
        found = copy.deepcopy(self._app.openapi())
        for schema in found["components"]["schemas"].values():
            schema["additionalProperties"] = False
        return found

    def check(self, response):
        """Raise `jsonschema.ValidationError`, or `AssertionError`, if the answer is another than was promised."""
        content = self._promised(response)
        if content is None:
            return
        kind = response.headers["content-type"].partition(";")[0]
        assert kind in content, f"{kind} is not among {list(content)}"
        if kind == "application/json":
            self._validate(response.json(), content[kind]["schema"])
        elif kind == "text/event-stream":
            *events, done, rest = response.text.split("\n\n")
            assert (done, rest) == ("data: [DONE]", "")
            for event in events:
                data = orjson.loads(event.removeprefix("data: "))
                error = {"$ref": "#/components/schemas/Error"}
                self._validate(data, error if "error" in data else content[kind]["schema"])

    def _promised(self, response):
        """The kinds of content that there may be; None where nothing is sent, or the path is no route."""
        for path, operations in self._document["paths"].items():
            pattern = re.sub(r"\{\w+\}", "[^/]+", path)
            operation = operations.get(response.request.method.lower())
            if operation and re.fullmatch(pattern, response.request.url.path):
                answers = operation["responses"]
                answer = answers.get(str(response.status_code), answers["default"])
                return answer.get("content") if response.content else None
        return None

    def _validate(self, data, schema):
        jsonschema.validate(
            data,
            {**schema, "components": self._document["components"]},
            cls=jsonschema.Draft202012Validator,
        )
