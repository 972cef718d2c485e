"""One forward pass: a step's rows in, the logits of the rows asked for out. Holds no state between steps but the cache.

Knows nothing of sequences, of scheduling or of how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.segments import AnySpans, Segment, Spans
from server.model.context import ForwardContext, forward_context
from server.model.kv_cache import PADDING_BLOCK, KVCache
from server.model.servable import ServableModel


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The flattened rows of one step; what is prepared beforehand gets its token ids last."""

    token_ids: NDArray[np.int64]  # [rows]
    positions: NDArray[np.int64]  # [rows] place in the text, for rotary embeddings
    kv_index: NDArray[np.int64]  # [rows] place in the cache
    logits_rows: NDArray[np.int64]  # [wanted] rows whose logits are asked for
    spans: AnySpans
    segments: Mapping[str, tuple[Segment, ...]]


class Runner:
    """Runs steps of a servable model over one KV cache."""

    def __init__(self, servable: ServableModel, cache: KVCache) -> None:
        self.model = servable.model
        self.device = servable.device
        self.cache = cache
        self.kernels = servable.kernels

    def prepare(self, inputs: StepInputs) -> bool:
        """Nothing can be done for a step before its time: whoever computes it is who would prepare it."""
        return False

    @torch.inference_mode()
    def forward(self, inputs: StepInputs) -> Tensor:  # [wanted, vocabulary] float32
        """Logits of `inputs.logits_rows`, in that order, on the model's device."""
        device = self.device
        tile = self.kernels.row_tile
        rows, wanted = len(inputs.token_ids), len(inputs.logits_rows)
        padded, padded_wanted = (-(-count // tile) * tile for count in (rows, wanted))
        host = np.zeros(3 * padded + padded_wanted, np.int64)
        host[:rows] = inputs.token_ids
        host[padded : padded + rows] = inputs.positions
        host[2 * padded : 3 * padded] = PADDING_BLOCK
        host[2 * padded : 2 * padded + rows] = inputs.kv_index
        host[3 * padded : 3 * padded + wanted] = inputs.logits_rows
        sizes = [padded, padded, padded, padded_wanted]
        token_ids, positions, kv_index, logits_rows = torch.split(torch.from_numpy(host).to(device), sizes)
        context = ForwardContext(
            kv_index=kv_index,
            spans=Spans(inputs.spans, self.cache.block_size, device),
            segments=inputs.segments,
            kv_caches=self.cache.layers,
            kernels=self.kernels,
        )
        with forward_context(context):
            output = self.model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=logits_rows,
            )
        logits: Tensor = output.logits[0, :wanted]
        return logits.float()
