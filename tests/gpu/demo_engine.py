"""The demo's engine without HTTP or settings: what is left to run where neither fastapi nor pydantic is installed."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import torch

from adapters.loader import Loader
from adapters.pages import plan_pages
from adapters.peft_format import read_adapter
from adapters.pool import Pool
from server.engine.blocks import Blocks
from server.engine.engine import Engine
from server.engine.scheduler import Limits, Residency, Scheduler
from server.engine.sequence import Sampling, Submit, Token
from server.model.kv_cache import KVCache
from server.model.load import ModelSource, load_model
from server.model.runner import Runner
from server.model.servable import make_servable
from server.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "demo"
BLOCKS = 1024

Ask = Callable[[str, str | None, int], Awaitable[str]]


def demo_engine(cache: Path, device: str) -> tuple[Engine, Ask]:
    """An engine over the demo's base and adapters, not started, and a coroutine that asks it for a greedy text."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source = ModelSource(str(DEMO / "base"), torch.device(device), dtype, "nf4", cache)
    servable = make_servable(load_model(source))
    pool = Pool(servable.layout, plan_pages(servable.layout, dtype, 64 << 20), dtype, device)
    servable.attach(pool.sites)

    def read(name: str):
        return read_adapter(DEMO / "adapters" / name, name, servable.layout, dtype, max_rank=64)

    loader = Loader(read, 64 << 20, lambda: engine.wake())
    residency = Residency(loader, pool)
    kv = KVCache.allocate(
        servable.attention, blocks=BLOCKS, block_size=16, dtype=dtype, device=torch.device(device)
    )
    scheduler = Scheduler(Limits(32, 512, 128, 16), Blocks(BLOCKS), residency)
    engine = Engine(Runner(servable, kv), scheduler, residency, max_queued=64)
    tokenizer = Tokenizer.load(str(DEMO / "base"))
    ends = frozenset({int(servable.model.generation_config.eos_token_id)})
    asked = iter(range(1 << 30))

    async def ask(prompt: str, adapter: str | None, max_tokens: int) -> str:
        sampling = Sampling(max_tokens, temperature=0, stop_token_ids=ends)
        submit = Submit(f"ask-{next(asked)}", tokenizer.encode(prompt), sampling, adapter)
        return tokenizer.decode([e.token_id async for e in engine.stream(submit) if isinstance(e, Token)])

    return engine, ask
