"""The demo's engine without HTTP or settings: what is left to run where neither fastapi nor pydantic is installed."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import torch

from adapters.loader import Loader
from adapters.pages import plan_pages
from adapters.peft_format import read_adapter
from adapters.pool import Pool
from adapters.side_stream import SideStream
from server.engine.blocks import Blocks
from server.engine.engine import Engine
from server.engine.scheduler import Limits, Residency, Scheduler
from server.engine.sequence import Sampling, Submit, Token
from server.model.device_runner import DeviceRunner
from server.model.graphs import GraphSizes
from server.model.kernel_set import plain
from server.model.kv_cache import KVCache
from server.model.load import ModelSource, load_model
from server.model.runner import Runner
from server.model.servable import ServableModel, make_servable
from server.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "demo"
BLOCKS, SEQUENCES = 1024, 8

Ask = Callable[[str, str | None, int], Awaitable[str]]


def demo_engine(
    cache: Path, device: str, pages: int | None = None, fixed: bool = False
) -> tuple[Engine, Ask]:
    """An engine over the demo's base and adapters, not started, and a coroutine that asks it for a greedy text.

    On a GPU it is put together as a server's is: Triton's kernels, captured graphs, adapters copied beside the steps.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source = ModelSource(str(DEMO / "base"), torch.device(device), dtype, "nf4", cache)
    kernels = plain()
    if device == "cuda":
        from server.model.cuda import cuda_kernels  # where there is Triton

        kernels = cuda_kernels(torch.device(device), fixed=fixed)
    servable = make_servable(load_model(source), kernels=kernels)
    room = plan_pages(servable.layout, dtype, 64 << 20)
    pool = Pool(servable.layout, dict.fromkeys(room, pages) if pages else room, dtype, device)
    servable.attach(pool.sites)
    if device == "cuda":
        pool.copy = SideStream(pool.sites, lambda: engine.wake()).copy

    def read(name: str):
        return read_adapter(DEMO / "adapters" / name, name, servable.layout, dtype, max_rank=64)

    loader = Loader(read, 64 << 20, lambda: engine.wake())
    residency = Residency(loader, pool)
    kv = KVCache.allocate(
        servable.attention, blocks=BLOCKS, block_size=16, dtype=dtype, device=torch.device(device)
    )
    scheduler = Scheduler(Limits(SEQUENCES, 512, 128, 16), Blocks(BLOCKS), residency)
    engine = Engine(_runner(servable, kv, fixed), scheduler, max_queued=64)
    tokenizer = Tokenizer.load(str(DEMO / "base"))
    ends = frozenset({int(servable.model.generation_config.eos_token_id)})
    asked = iter(range(1 << 30))

    async def ask(prompt: str, adapter: str | None, max_tokens: int) -> str:
        sampling = Sampling(max_tokens, temperature=0, stop_token_ids=ends)
        submit = Submit(f"ask-{next(asked)}", tokenizer.encode(prompt), sampling, adapter)
        return tokenizer.decode([e.token_id async for e in engine.stream(submit) if isinstance(e, Token)])

    return engine, ask


def _runner(servable: ServableModel, cache: KVCache, fixed: bool) -> Runner | DeviceRunner:
    if not servable.kernels.planned:
        return Runner(servable, cache)
    sizes = GraphSizes(SEQUENCES, length=512, pages=1)
    layouts = sizes.layouts(servable.layout.groups, cache, servable.heads, fixed)
    runner = DeviceRunner(servable, cache, layouts=layouts, fixed=fixed)
    runner.capture(lambda done, total: None)
    return runner
