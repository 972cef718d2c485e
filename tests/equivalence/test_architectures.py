"""Some of the architectures that docs/models.md lists; `python -m tests.equivalence.architectures` tries all."""

import pytest

from tests.equivalence.architectures import outcome


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("gemma3", "served"),  # with a tower for images
        ("mistral3", "served"),  # no causal model to transformers
        ("qwen3_vl", "served"),  # positions in three directions
        ("gemma4_text", "served"),  # layers that share keys
        ("granite_swa", "served"),  # sinks, and a base of rotation for each kind of layer
        ("glm4", "served"),
        ("deepseek_v3", "without quantization"),  # keys wider than values
        ("gpt_oss", "without quantization"),
        ("phimoe", "without quantization"),
        ("qwen3_5_text", "refused"),
        ("roberta", "refused"),
    ],
)
def test_what_becomes_of_an_architecture(kind, status):
    assert outcome(kind).status == status
