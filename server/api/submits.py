"""From a checked request and its prompts' ids to what the engine runs: lengths, seeds, defaults, stop tokens.

Knows nothing of text, of adapters' names or of answers.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from server.api.schemas.generation import GenerationRequest
from server.engine.messages import Sampling, Submit
from server.errors import ContextLengthError, InvalidRequestError
from server.serving import Served

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Lengths:
    """How many tokens may be generated: what was asked for, and what it is if nothing was."""

    asked: int | None
    default: int | None  # None: all the room there is


def submits_for(
    body: GenerationRequest, lengths: Lengths, prompts: Sequence[Ids], served: Served, generation: str | None
) -> list[Submit]:
    """One `Submit` per choice, those of one prompt side by side; choice k of a prompt draws with seed + k."""
    unique = secrets.token_hex(
        8
    )  # the client may send one request id twice, the engine must not see it twice
    stop_ids = _stop_ids(body, served)
    found: list[Submit] = []
    for prompt in prompts:
        max_tokens = _max_tokens(lengths, len(prompt), served.max_model_len)
        seed = secrets.randbits(63) if body.seed is None else body.seed
        for k in range(body.n):
            sampling = Sampling(
                max_tokens=max_tokens,
                temperature=served.defaults.temperature if body.temperature is None else body.temperature,
                top_p=served.defaults.top_p if body.top_p is None else body.top_p,
                top_k=served.defaults.top_k if body.top_k is None else max(0, body.top_k),
                seed=_int64(seed + k),
                stop_token_ids=stop_ids,
            )
            found.append(Submit(f"{unique}-{len(found)}", prompt, sampling, generation))
    return found


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> Ids:
    """Token ids that the model has."""
    for id in ids:
        if not 0 <= id < vocab_size:
            raise InvalidRequestError(
                f"{param}: token id {str(id)[:24]} is not in the vocabulary of {vocab_size}", param=param
            )
    return tuple(ids)


def _stop_ids(body: GenerationRequest, served: Served) -> frozenset[int]:
    given = check_ids(body.stop_token_ids or (), served.vocab_size, "stop_token_ids")
    return frozenset(given) if body.ignore_eos else frozenset(given) | served.eos_token_ids


def _max_tokens(lengths: Lengths, prompt: int, limit: int) -> int:
    room = limit - prompt
    asked = lengths.asked
    if room < max(1, asked or 1):
        wanted = f" and {asked} are asked for" if asked is not None else ""
        raise ContextLengthError(
            f"the model takes {limit} tokens; the prompt has {prompt}{wanted}; shorten one of them",
            param="prompt",
        )
    return asked or min(room, lengths.default or room)


def _int64(value: int) -> int:
    """`value` wrapped into 64 signed bits."""
    return (value + 2**63) % 2**64 - 2**63
