"""What transformers + peft say a row's logits are, one sequence at a time."""

import torch
from torch import Tensor, nn


@torch.inference_mode()
def peft_logits(
    peft_model: nn.Module, tokens: list[int], adapter: str | None
) -> Tensor:  # [tokens, vocab] float64
    ids = torch.tensor([tokens], device=peft_model.device)
    if adapter is None:
        with peft_model.disable_adapter():
            return peft_model(input_ids=ids, use_cache=False).logits[0].double().cpu()
    peft_model.set_adapter(adapter)
    return peft_model(input_ids=ids, use_cache=False).logits[0].double().cpu()


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude of `want`."""
    return float((got.double() - want).abs().max() / want.abs().max())


def divergence(got: Tensor, want: Tensor) -> float:
    """KL(want || got) of one row's next-token distributions."""
    return float(
        nn.functional.kl_div(
            got.double().log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="sum"
        )
    )
