"""The test that matters most: a mixed batch of adapters gives, row by row, what transformers + peft give alone."""

import pytest

from tests.equivalence.case import Case, assert_as_good_as_peft, assert_exact
from tests.equivalence.models import CONFIGS, MULTIMODAL


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("how", ["fp32", "nf4"])
def test_exact_paths_agree_with_peft(architecture, how, tmp_path):
    assert_exact(Case(architecture, how, tmp_path))


@pytest.mark.parametrize("architecture", MULTIMODAL)
@pytest.mark.parametrize("how", ["fp32", "nf4"])
def test_a_multimodal_base_agrees_with_peft_on_text(architecture, how, tmp_path):
    """Its adapters have factors for the tower too: peft's targets are the ends of names."""
    case = Case(architecture, how, tmp_path)
    trained = {name.rpartition(".lora_A")[0] for name in case.peft.state_dict() if ".lora_A." in name}
    assert any("vision_tower" in name for name in trained)
    assert_exact(case)


@pytest.mark.parametrize("how", ["fp32", "nf4"])
def test_plain_products_agree_with_peft(how, tmp_path):
    """What serves where no compiler was found."""
    assert_exact(Case("llama", how, tmp_path, compiled=False))


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(
    ("how", "backend"),
    [("bf16", "exact"), ("int8", "exact"), ("nf4-bf16", "bitsandbytes"), ("nf4", "bitsandbytes")],
)
def test_rounding_paths_are_as_good_as_pefts(architecture, how, backend, tmp_path):
    assert_as_good_as_peft(Case(architecture, how, tmp_path, backend=backend))


@pytest.mark.parametrize("how", ["nf4", "nf4-bf16"])
def test_bitsandbytes_without_avx512_bf16(how, tmp_path):
    assert_as_good_as_peft(Case("llama", how, tmp_path, backend="bitsandbytes", avx512_bf16=False))


def test_exact_nf4_without_avx512_bf16(tmp_path):
    assert_exact(Case("llama", "nf4", tmp_path, avx512_bf16=False))
