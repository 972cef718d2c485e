"""Which model answers: the base, or one generation of one adapter. Never a fall-back between them."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

from adapters.errors import AdapterError
from server.errors import AdapterRejectedError, InvalidRequestError, ModelNotFoundError
from server.serving import Served


@dataclass(frozen=True)
class Target:
    """Who answers a request. It holds a reference to the generation until `release`."""

    model: str  # the name the answer carries
    adapter: str | None
    generation: str | None
    release: Callable[[], None]

    @property
    def labels(self) -> dict[str, str | None]:
        """The fields of an answer that say who gave it."""
        return {"model": self.model, "adapter": self.adapter, "adapter_generation": self.generation}

    @property
    def headers(self) -> dict[str, str]:
        return {"x-adapter-generation": self.generation} if self.generation is not None else {}


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter's name and the request's field that named it."""

    adapter: str
    param: str


def select(served: Served, base_names: Set[str], model: str | None, adapter: str | None) -> Target:
    """Resolve a request's `model` and `adapter`; the caller releases the result."""
    chosen = _named_by_model(served, base_names, model)
    if adapter is not None:
        if chosen is not None and chosen.adapter != adapter:
            raise InvalidRequestError(
                f"model names the adapter {chosen.adapter!r} and adapter names {adapter!r}; name one",
                param="adapter",
            )
        chosen = NamedAdapter(adapter, "adapter")
    if chosen is None:
        return Target(served.name, None, None, _nothing)
    try:
        reference = served.registry.resolve(chosen.adapter)
    except AdapterError as error:
        raise AdapterRejectedError(error, param=chosen.param) from None
    return Target(chosen.adapter, chosen.adapter, reference.generation, reference.release)


def _named_by_model(served: Served, base_names: Set[str], model: str | None) -> NamedAdapter | None:
    """The adapter that `model` names, if it is not the base: `legal` or `base:legal`."""
    if model is None or model in base_names:
        return None
    base, colon, adapter = model.rpartition(":")
    if colon and base in base_names and adapter:
        return NamedAdapter(adapter, "model")
    if model in served.registry:
        return NamedAdapter(model, "model")
    raise ModelNotFoundError(
        f"no model {model!r}; GET /v1/models lists the base and its adapters", param="model"
    )


def _nothing() -> None:
    """The base needs no reference."""
