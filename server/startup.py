"""From settings to a served model: loads, plans memory, wires the owners together and starts the engine.

The one place where the parts meet. Knows nothing of sockets.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from tqdm import tqdm

from adapters.adapter import Adapter
from adapters.appraiser import Appraiser
from adapters.errors import AdapterError
from adapters.files import FileOps
from adapters.loader import Loader
from adapters.pages import PAGE_RANK
from adapters.peft_format import copied, mapped
from adapters.pool import Pool
from adapters.registry import Registry
from adapters.side_stream import SideStream
from adapters.store import Store
from server import container
from server.config import Settings, SettingsError
from server.config_values import size_text
from server.engine.blocks import Blocks
from server.engine.engine import Engine
from server.engine.scheduler import Limits, Residency, Scheduler
from server.heap import keep_large_blocks, return_free_memory
from server.kernel_choice import choose_kernels, refuse_varying_products
from server.memory_plan import MemoryPlan, plan_memory
from server.model.device_runner import DeviceRunner
from server.model.graphs import GraphSizes
from server.model.kv_cache import KVCache
from server.model.linear import NOT_OURS
from server.model.load import ModelSource, kind_of_weights, load_model
from server.model.runner import Runner
from server.model.servable import ServableModel, make_servable
from server.model.stand_ins import of_every_kind
from server.serving import GenerationDefaults, Served, Serving
from server.start_modules import check_modules, register_modules, warn_of_hidden
from server.text.tokenizer import ChatTemplateError, Tokenizer

logger = logging.getLogger(__name__)

_SMALL = 50_000_000  # weights in the linears


def load(settings: Settings, serving: Serving) -> None:
    """Fill `serving.served` and move its phase to "ready"; raises the reason when the model cannot be served."""
    keep_large_blocks()
    serving.detail, serving.progress = "opening the adapter store", 0.05
    with ExitStack() as on_failure:  # what is wrong with a path is not told after minutes of loading weights
        check_modules(settings)
        store = on_failure.enter_context(closing(open_store(settings)))
        _fill(settings, serving, store)
        on_failure.pop_all()


def open_store(settings: Settings) -> Store:
    """The store, locked. Raises `SettingsError` where there cannot be one, `StoreLockedError` if a server uses it."""
    folder = settings.store_folder
    try:
        return Store(folder, FileOps())
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(
            f"--adapter-store {folder}: cannot be used: {reason}; name another folder"
        ) from error


def _fill(settings: Settings, serving: Serving, store: Store) -> None:
    chat_template = read_chat_template(settings.chat_template)
    serving.detail, serving.progress = "loading weights", 0.1
    source = model_source(settings)
    kernels = choose_kernels(settings, source.device)
    model = load_model(source)
    refuse_varying_products(settings, kernels, model)
    weights = f"{size_text(model.get_memory_footprint())} of {kind_of_weights(model)} weights"
    servable = make_servable(
        model,
        backend=settings.linear_backend,
        kernels=kernels,
        max_model_len=settings.max_model_len,
    )
    return_free_memory()
    serving.detail, serving.progress = "planning memory", 0.7
    plan = plan_memory(settings, servable)
    tokenizer = load_tokenizer(settings, chat_template)
    served = assemble(settings, servable, plan, tokenizer, store)
    serving.detail, serving.progress = "registering adapters", 0.9
    register_modules(settings, served.registry)
    warn_of_hidden(settings, served.registry)
    if isinstance(served.engine.runner, DeviceRunner):
        capture_graphs(served.engine.runner, serving)
    served.engine.start()
    serving.plan = (
        _model_line(servable, weights),
        f"kernels     {_kernels(settings, servable)}",
        *plan.lines(),
        f"served      {_names(served)}",
    )
    serving.served = served
    serving.detail, serving.progress, serving.phase = "ready", 1.0, "ready"


def model_source(settings: Settings) -> ModelSource:
    """What to load, with "auto" decided: CUDA where there is one, in bfloat16; float32 on the CPU."""
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device == "cuda" and automatic == "cpu":
        raise SettingsError(
            "--device cuda: torch sees no GPU here; leave it at auto, or install torch with CUDA and look at nvidia-smi"
        )
    device = torch.device(automatic if settings.device == "auto" else settings.device)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return ModelSource(
        settings.model,
        device,
        torch.bfloat16 if dtype == "bfloat16" else torch.float32,
        settings.quantization,
        settings.quantized_folder,
        settings.trust_remote_code,
        settings.max_model_len,
    )


def assemble(
    settings: Settings, servable: ServableModel, plan: MemoryPlan, tokenizer: Tokenizer, store: Store
) -> Served:
    """Make every owner and connect them: registry, loader, pool, blocks, scheduler, runner, engine."""
    pool = Pool(servable.layout, plan.pages, plan.adapter_dtype, servable.device)
    servable.attach(pool.sites)
    cache = KVCache.allocate(
        servable.attention,
        blocks=plan.kv_blocks,
        block_size=settings.block_size,
        dtype=servable.dtype,
        device=servable.device,
    )

    def forget(generation: str) -> None:
        loader.forget(generation)
        engine.forget(generation)

    registry = make_registry(settings, servable, plan, pool, store, forget)
    loader = Loader(registry.read, plan.host_nbytes, lambda: engine.wake())
    copier = None
    if servable.device.type == "cuda":
        copier = SideStream(pool.sites, lambda: engine.wake())
        pool.copy = copier.copy
    residency = Residency(loader, pool)
    limits = Limits(
        settings.max_num_seqs, settings.max_num_batched_tokens, settings.prefill_chunk, settings.block_size
    )
    scheduler = Scheduler(limits, Blocks(plan.kv_blocks), residency)
    engine = Engine(
        make_runner(settings, servable, cache, plan),
        scheduler,
        max_queued=settings.max_queued_requests,
        threads=settings.threads or default_threads(servable),
    )
    return Served(
        name=settings.base_name,
        created=int(time.time()),
        max_model_len=plan.max_model_len,
        vocab_size=servable.vocab_size,
        eos_token_ids=end_tokens(servable),
        defaults=generation_defaults(servable),
        tokenizer=tokenizer,
        engine=engine,
        registry=registry,
        loader=loader,
        copier=copier,
        seeds=random.SystemRandom() if settings.seed is None else random.Random(settings.seed),
    )


def make_registry(
    settings: Settings,
    servable: ServableModel,
    plan: MemoryPlan,
    pool: Pool,
    store: Store,
    on_stale: Callable[[str], None],
) -> Registry:
    """The names of the store, and what an adapter must be to have one."""

    def fits(adapter: Adapter) -> None:
        pool.fits(adapter)
        if adapter.nbytes > plan.host_nbytes:
            raise AdapterError(
                "adapter_too_large",
                f"the adapter's {adapter.nbytes} bytes are more than the host memory kept for all adapters "
                f"({plan.host_nbytes} bytes); raise --adapter-host-memory-bytes or --max-cpu-loras",
            )

    keep = mapped if servable.device.type == "cpu" else copied  # the CPU's pool is host memory already
    return Registry(
        store,
        Appraiser(servable.layout, plan.adapter_dtype, settings.max_lora_rank, fits, keep),
        max_bytes=settings.max_upload_bytes,
        keep_versions=settings.keep_versions,
        quota=settings.adapter_store_bytes,
        on_stale=on_stale,
    )


def make_runner(
    settings: Settings, servable: ServableModel, cache: KVCache, plan: MemoryPlan
) -> Runner | DeviceRunner:
    """Who runs steps: on a GPU with its kernels, they are replayed from graphs unless --enforce-eager."""
    if not servable.kernels.planned:
        return Runner(servable, cache)
    pages = min(-(-settings.max_lora_rank // PAGE_RANK), max(plan.pages.values()))
    sizes = GraphSizes(settings.max_num_seqs, plan.max_model_len, pages, settings.max_num_batched_tokens)
    groups, fixed = servable.layout.groups, settings.batch_invariant
    layouts = sizes.layouts(groups, cache, servable.heads, fixed)
    stand_ins = of_every_kind(
        sequences=sizes.sequences,
        tokens=sizes.tokens,
        pages=pages,
        groups=groups,
        block_size=cache.block_size,
    )
    return DeviceRunner(
        servable,
        cache,
        layouts=[] if settings.enforce_eager else layouts,
        stand_ins=stand_ins,
        fixed=fixed,
    )


def capture_graphs(runner: DeviceRunner, serving: Serving) -> None:
    """Compile and capture what a GPU runs, and say how far it is, to /ready and to whoever watches the terminal."""
    serving.detail = "compiling kernels and capturing CUDA graphs"
    with tqdm(desc=serving.detail, unit="step", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, serving.progress = total, 0.9 + 0.1 * done / total
            bar.update(done - bar.n)

        runner.capture(progress)


def read_chat_template(path: Path | None) -> str | None:
    """The text of a template, before minutes of loading are spent; also out of a checkpoint's chat_template.json."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--chat-template {path}: cannot be read: {error}") from error
    try:
        found = json.loads(text)
    except ValueError:  # as with every template
        return text
    template = found.get("chat_template") if isinstance(found, dict) else text
    if not isinstance(template, str):
        raise SettingsError(f"--chat-template {path}: is JSON without a template as its chat_template")
    return template


def load_tokenizer(settings: Settings, chat_template: str | None) -> Tokenizer:
    """The base's tokenizer, with the chat template that was asked for in place of its own."""
    tokenizer = _with_template(settings, chat_template, settings.chat_template)
    file = None if tokenizer.has_chat_template else _template_of_processor(settings.model)
    if file is None:
        return tokenizer
    try:
        return _with_template(settings, read_chat_template(file), file)
    except SettingsError as error:  # nobody asked for it
        logger.warning("there will be no chat without --chat-template FILE: %s", error)
        return tokenizer


def _with_template(settings: Settings, chat_template: str | None, file: Path | None) -> Tokenizer:
    try:
        return Tokenizer.load(
            settings.model, trust_remote_code=settings.trust_remote_code, chat_template=chat_template
        )
    except ChatTemplateError as error:
        raise SettingsError(f"--chat-template {file}: {error}") from error


def _template_of_processor(model: str) -> Path | None:
    """The file in which older models for images keep their chat template, and no tokenizer looks for it."""
    folder, name = Path(model), "chat_template.json"
    found = folder / name if folder.is_dir() else try_to_load_from_cache(model, name)
    return Path(found) if isinstance(found, str | Path) and Path(found).is_file() else None


def default_threads(servable: ServableModel) -> int:
    """One thread for a model whose products are so short that sharing them costs more than it brings; else torch's.

    A step is thousands of parallel regions, and each waits for its slowest thread: beside two other busy processes, a
    step of a 5 M parameter model on two threads took more than a second, where one thread alone needs 50 ms. For the
    same reason there are no more threads than CPUs that a container may keep busy.
    """
    weights = sum(site.in_features * site.out_features for site in servable.layout.sites)
    if servable.device.type == "cpu" and weights < _SMALL:
        return 1
    threads = torch.get_num_threads()
    return min(threads, container.cpus() or threads)


def end_tokens(servable: ServableModel) -> frozenset[int]:
    """The tokens that end a text, from generation_config.json, else from the model's configuration.

    Only those that the model can say: the configuration of a small vocabulary may hold its class' default, or -1.
    """
    found = servable.model.generation_config.eos_token_id
    if found is None:
        config = servable.model.config.get_text_config(decoder=True)
        found = getattr(config, "eos_token_id", None)  # Qwen3-VL's has none, not even None
    given = found if isinstance(found, list) else [] if found is None else [found]
    return frozenset(id for id in given if 0 <= id < servable.vocab_size)


def generation_defaults(servable: ServableModel) -> GenerationDefaults:
    """What generation_config.json sets; the API's own defaults where it says nothing."""
    given = servable.model.generation_config.to_diff_dict()
    fallback = GenerationDefaults()
    return GenerationDefaults(
        temperature=float(given.get("temperature", fallback.temperature)),
        top_p=float(given.get("top_p", fallback.top_p)),
        top_k=int(given.get("top_k", fallback.top_k)),
        min_p=float(given.get("min_p", fallback.min_p)),
        repetition_penalty=float(given.get("repetition_penalty", fallback.repetition_penalty)),
    )


def _model_line(servable: ServableModel, weights: str) -> str:
    dtype = str(servable.dtype).removeprefix("torch.")
    return (
        f"model       {type(servable.model).__name__}, {weights}, "
        f"{dtype} on {servable.device.type}, {len(servable.layout.modules)} adaptable linears"
    )


def _kernels(settings: Settings, servable: ServableModel) -> str:
    """Which kernels run, and what of the base's products they leave to others."""
    said = servable.kernels.name
    others = sum(isinstance(group.base, NOT_OURS) for group in servable.groups)
    if said is None or not others:
        return said or "plain PyTorch"
    who = "bitsandbytes" if settings.linear_backend == "bitsandbytes" else "plain PyTorch"
    return f"{said}; {others} of {len(servable.groups)} products of the base by {who}"


def _names(served: Served) -> str:
    entries = served.registry.entries()
    return f"{served.name} and {len(entries)} adapter{'s' if len(entries) != 1 else ''}"
