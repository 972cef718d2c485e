"""Flags that vLLM or SGLang have and we spell otherwise, need not be told, or cannot honour; here by their field names.

Data only: `server/config_sources.py` reads them, wherever a setting may stand.
"""

from __future__ import annotations

from collections.abc import Mapping

# Another name of one of our settings.
ALIASES: Mapping[str, str] = {
    "model_path": "model",
    "context_length": "max_model_len",
    "max_running_requests": "max_num_seqs",
    "mem_fraction_static": "gpu_memory_utilization",
    "lora_paths": "lora_modules",
    "lora_dtype": "adapter_dtype",
    "max_loras_per_batch": "max_loras",
    "max_loaded_loras": "max_cpu_loras",
}

# True is how it is in any case; false is refused.
ALWAYS: Mapping[str, str] = {
    "enable_lora": "adapters are always served",
    "enable_prefix_caching": "prefixes are always reused",
    "enable_chunked_prefill": "prompts are always computed in chunks",
}

_ONE_DEVICE = "a server runs on one device; start one for each and put a balancer before them"
_NO_SWAP = (
    "nothing of a sequence is moved to the host; lower --max-num-seqs or --max-model-len if memory is short"
)
_NO_TOOLS = "tool calls are not served"

# What it means here instead, and what to do.
REFUSED: Mapping[str, str] = {
    "tensor_parallel_size": _ONE_DEVICE,
    "pipeline_parallel_size": _ONE_DEVICE,
    "data_parallel_size": _ONE_DEVICE,
    "tp_size": _ONE_DEVICE,
    "tp": _ONE_DEVICE,
    "cpu_offload_gb": "weights stay on the device; choose a smaller base, or --quantization nf4",
    "swap_space": _NO_SWAP,
    "kv_cache_dtype": "the KV cache has the type of the activations; --dtype sets both",
    "load_format": "a checkpoint's own format is read, and --quantization says how weights are held; leave it out",
    "tokenizer": "the base's own tokenizer is used; put another into the checkpoint's folder",
    "revision": "fetch that revision with `hf download --revision`, and give its folder as MODEL",
    "download_dir": "the hub's own variable HF_HOME says where checkpoints are kept",
    "fully_sharded_loras": _ONE_DEVICE,
    "lora_extra_vocab_size": "adapters that add tokens are not served",
    "lora_eviction_policy": "the adapter that was used the longest ago makes room; leave it out",
    "enable_auto_tool_choice": _NO_TOOLS,
    "tool_call_parser": _NO_TOOLS,
    "reasoning_parser": "reasoning is not told apart from the answer; it comes as the model writes it",
    "disable_log_requests": "requests are not logged unless --enable-log-requests asks for it; leave it out",
    "disable_log_stats": "nothing is logged by the clock, /metrics has the figures; leave it out",
    "disable_uvicorn_access_log": "there is no access log; --enable-log-requests logs requests",
    "disable_access_log_for_endpoints": "--enable-log-requests leaves out probes and /metrics; leave it out",
    "uvicorn_log_level": "--log-level says it for everything",
    "allowed_origins": "let the proxy before it add CORS headers",
}

KNOWN = frozenset({*ALIASES, *ALWAYS, *REFUSED})
