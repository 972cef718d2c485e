"""Models small enough to make in every test, by architecture."""

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def make_model(config=None, **changes) -> PreTrainedModel:
    """Random weights in float32; a llama unless told otherwise."""
    config = config or LlamaConfig(**(SIZES | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
