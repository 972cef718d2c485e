"""The exceptions that reach a client, each with its HTTP status and stable code.

    LoraplexError                     500 server_error
    ├── InvalidRequestError           400 invalid_value          a field is wrong: `param` names it
    │   ├── UnsupportedParameterError 400 unsupported_parameter
    │   └── ContextLengthError        400 context_length_exceeded
    ├── KeyRequiredError              401 invalid_api_key        no key, or one that nobody has
    ├── ScopeError                    403 insufficient_scope     this key, or this server, does not allow it
    ├── ModelNotFoundError            404 model_not_found
    ├── AdapterRejectedError          from `ADAPTER_STATUS`      an `AdapterError` on its way out
    ├── BodyTimeoutError              408 request_timeout        the body has stopped arriving
    ├── BodyTooLargeError             413 request_too_large
    ├── ContentTypeError              415 unsupported_media_type
    ├── QueueFullError                429 queue_full
    ├── HeadersTooLargeError          431 headers_too_large
    ├── NotReadyError                 503 not_ready              loading or draining
    └── EngineDeadError               503 engine_dead
    UnsupportedModelError             at start only: the base cannot be served, and why

Knows nothing of how an error is written to a socket: `server/api/envelope.py` does that.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.errors import AdapterCode, AdapterError, Finding

ADAPTER_STATUS: Mapping[AdapterCode, int] = {
    "invalid_adapter_name": 400,
    "adapter_not_found": 404,
    "invalid_archive": 400,
    "adapter_upload_too_large": 413,
    "invalid_adapter": 400,
    "unsupported_adapter_feature": 400,
    "adapter_incompatible": 409,
    "adapter_too_large": 400,
    "adapter_load_failed": 500,
    "store_full": 507,
    "precondition_failed": 412,
}


class LoraplexError(Exception):
    """The root: anything a client is told about."""

    http_status: int = 500
    type: str = "server_error"
    code: str = "server_error"
    details: tuple[Finding, ...] = ()

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(LoraplexError):
    """A field of the request is malformed, out of range or in conflict with another."""

    http_status, type, code = 400, "invalid_request_error", "invalid_value"


class UnsupportedParameterError(InvalidRequestError):
    """A parameter that other servers know and this one does not serve."""

    code = "unsupported_parameter"


class ContextLengthError(InvalidRequestError):
    """Prompt and completion together pass the model's length."""

    code = "context_length_exceeded"


class KeyRequiredError(LoraplexError):
    """The request carries no key that this server knows."""

    http_status, type, code = 401, "invalid_request_error", "invalid_api_key"


class ScopeError(LoraplexError):
    """Whoever asks is not allowed to change what they want to change."""

    http_status, type, code = 403, "permission_error", "insufficient_scope"


class ModelNotFoundError(LoraplexError):
    """`model` names neither the base nor an adapter."""

    http_status, type, code = 404, "invalid_request_error", "model_not_found"


class AdapterRejectedError(LoraplexError):
    """An `AdapterError` seen from HTTP; the status comes from the table, and the type from the status."""

    def __init__(self, error: AdapterError, *, param: str | None = None) -> None:
        super().__init__(error.message, param=param)
        self.http_status = ADAPTER_STATUS[error.code]
        self.type = _type_of(self.http_status)
        self.code = error.code
        self.details = error.findings


class BodyTimeoutError(LoraplexError):
    """The request's body has stopped arriving."""

    http_status, type, code = 408, "invalid_request_error", "request_timeout"


class BodyTooLargeError(LoraplexError):
    """The request's body passes the bound of its route."""

    http_status, type, code = 413, "invalid_request_error", "request_too_large"


class ContentTypeError(LoraplexError):
    """The request's body is of a kind that its route does not read."""

    http_status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class QueueFullError(LoraplexError):
    """As many requests wait as are allowed to; the client should come back."""

    http_status, type, code = 429, "rate_limit_error", "queue_full"


class HeadersTooLargeError(LoraplexError):
    """The request's line and headers pass their bound; what it asks for is not known."""

    http_status, type, code = 431, "invalid_request_error", "headers_too_large"


class NotReadyError(LoraplexError):
    """The server is loading or draining."""

    http_status, type, code = 503, "service_unavailable", "not_ready"


class EngineDeadError(LoraplexError):
    """The engine stopped on an error it could not contain."""

    http_status, type, code = 503, "service_unavailable", "engine_dead"


def _type_of(status: int) -> str:
    if status == 409:
        return "conflict_error"
    return "server_error" if status >= 500 else "invalid_request_error"


class UnsupportedModelError(Exception):
    """This base cannot be served; the message names the architecture and the reason."""
