"""From settings to a served model: loads, plans memory, wires the owners together and starts the engine.

The one place where the parts meet. Knows nothing of sockets.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import random
import sys
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

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
from adapters.sources import folder_files
from adapters.store import Store, hash_folder
from kernels.cpu.library import load as load_library
from server import container
from server.config import Settings, SettingsError
from server.config_values import size_text
from server.engine.blocks import Blocks
from server.engine.engine import Engine
from server.engine.scheduler import Limits, Residency, Scheduler
from server.memory_plan import MemoryPlan, plan_memory
from server.model.device_runner import DeviceRunner
from server.model.graphs import GraphSizes
from server.model.kernel_set import Kernels, compiled, plain
from server.model.kv_cache import KVCache
from server.model.linear import NOT_OURS
from server.model.load import ModelSource, experts_of, kind_of_weights, load_model
from server.model.runner import Runner
from server.model.servable import ServableModel, make_servable
from server.model.stand_ins import of_every_kind
from server.serving import GenerationDefaults, Served, Serving
from server.text.tokenizer import ChatTemplateError, Tokenizer

logger = logging.getLogger(__name__)

_SMALL = 50_000_000  # weights in the linears
_TRITON_NEEDS = "(it compiles C when it runs: install gcc and Python's headers, python3-dev on Debian)"
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def load(settings: Settings, serving: Serving) -> None:
    """Fill `serving.served` and move its phase to "ready"; raises the reason when the model cannot be served."""
    keep_large_blocks()
    serving.detail, serving.progress = "opening the adapter store", 0.05
    with ExitStack() as on_failure:  # what is wrong with a path is not told after minutes of loading weights
        check_modules(settings)
        store = on_failure.enter_context(closing(open_store(settings)))
        _fill(settings, serving, store)
        on_failure.pop_all()


def check_modules(settings: Settings) -> None:
    """Refuse `--lora-modules` that lead nowhere; what is in them can be judged with the base at hand only."""
    for module in settings.lora_modules:
        if not module.path.is_dir():
            raise SettingsError(f"--lora-modules {module.name}={module.path}: there is no such folder")


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


def register_modules(settings: Settings, registry: Registry) -> None:
    """Give the names of `--lora-modules` their folders' content. What a client has made of a name since then stands."""
    for name, folder, _ in settings.lora_modules:
        try:
            folder_files(folder)
            entry = registry.entry(name) if name in registry else None
            if entry and entry.mover == "client" and entry.generation != (asked := hash_folder(folder)):
                logger.warning(
                    "--lora-modules is not followed, since a client has moved the name; put the folder's adapter to "
                    "have it: name=%s generation=%s folder_generation=%s",
                    *(name, entry.generation, asked),
                )
            else:
                registry.put_folder(name, folder, mover="start")
        except AdapterError as error:
            raise SettingsError(f"--lora-modules {name}={folder}: {error}") from error


def warn_of_hidden(settings: Settings, registry: Registry) -> None:
    """Name stored adapters that cannot be asked for as `model`, since the base has come to have their name."""
    for name in sorted(settings.base_names):
        if name in registry:
            logger.warning(
                "the base has the name of a stored adapter, which `model` does not reach any more; choose another "
                "--served-model-name, or put the adapter under another name: name=%s",
                name,
            )


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
    )


def choose_kernels(settings: Settings, device: torch.device) -> Kernels:
    """The device's own kernels; their absence is said once, and plain PyTorch serves.

    With `--linear-backend bitsandbytes` they do all but the products of quantized weights. Raises `SettingsError`
    where `--cpu-math int8` cannot be had: it is never exchanged for something else.
    """
    if settings.cpu_math == "int8" and not (
        device.type == "cpu" and settings.linear_backend == "exact" and settings.quantization == "nf4"
    ):
        raise SettingsError(
            "--cpu-math int8 cannot be served: it is for NF4 weights on the CPU's own kernels"
        )
    if settings.batch_invariant and settings.linear_backend == "bitsandbytes":
        raise SettingsError(
            "--batch-invariant cannot be had with --linear-backend bitsandbytes: its products depend on the batch"
        )
    return _cuda_kernels(settings, device) if device.type == "cuda" else _cpu_kernels(settings)


def refuse_varying_products(settings: Settings, kernels: Kernels, model: PreTrainedModel) -> None:
    """Raise `SettingsError` where a GPU's batch-invariant kernels would not have all of the model's products."""
    if settings.batch_invariant and kernels.planned and (experts := experts_of(model)):
        raise SettingsError(
            f"--batch-invariant cannot be had on a GPU with {type(model).__name__}: how its experts' products "
            f"({experts[0]} and {len(experts) - 1} more) are summed depends on the rows of each expert"
        )


def _cuda_kernels(settings: Settings, device: torch.device) -> Kernels:
    """Triton's; with `--linear-backend bitsandbytes` for all but the products with quantized weights."""
    try:
        from kernels.portable import check_launches

        check_launches()
    except Exception as error:  # no Triton, or whatever it misses: it compiles at run time
        why = str(error) if isinstance(error, ImportError) else f"{error} {_TRITON_NEEDS}"
        if settings.batch_invariant:
            raise SettingsError(f"--batch-invariant cannot be had on a GPU without Triton: {why}") from error
        logger.warning("no Triton kernels, so plain PyTorch serves, much slower: %s", why)
        return plain()
    from server.model.cuda import cuda_kernels

    return cuda_kernels(device, fixed=settings.batch_invariant)


def _cpu_kernels(settings: Settings) -> Kernels:
    try:
        library = load_library(math=settings.cpu_math)
    except ValueError as error:
        raise SettingsError(f"--cpu-math int8 cannot be served: {error}; leave it at fp32") from error
    if library is None and settings.cpu_math == "int8":
        raise SettingsError(
            "--cpu-math int8 cannot be served: the kernels were not compiled; install with a C compiler to have them"
        )
    if library is None:
        logger.warning(
            "no compiled CPU kernels, so plain PyTorch serves; install with a C compiler to have them"
        )
        return plain()
    return compiled(library)


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

    def fits(adapter: Adapter) -> None:
        pool.fits(adapter)
        if adapter.nbytes > plan.host_nbytes:
            raise AdapterError(
                "adapter_too_large",
                f"the adapter's {adapter.nbytes} bytes are more than the host memory kept for all adapters "
                f"({plan.host_nbytes} bytes); raise --adapter-host-memory-bytes or --max-cpu-loras",
            )

    def forget(generation: str) -> None:
        loader.forget(generation)
        engine.forget(generation)

    keep = mapped if servable.device.type == "cpu" else copied  # the CPU's pool is host memory already
    registry = Registry(
        store,
        Appraiser(servable.layout, plan.adapter_dtype, settings.max_lora_rank, fits, keep),
        max_bytes=settings.max_upload_bytes,
        keep_versions=settings.keep_versions,
        quota=settings.adapter_store_bytes,
        on_stale=forget,
    )
    loader = Loader(registry.read, plan.host_nbytes, lambda: engine.wake())
    if servable.device.type == "cuda":
        pool.copy = SideStream(pool.sites, lambda: engine.wake()).copy
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
        seeds=random.SystemRandom() if settings.seed is None else random.Random(settings.seed),
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
    layouts = sizes.layouts(groups, cache, servable.query_group, fixed)
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
    """The text of a template, before minutes of loading are spent."""
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--chat-template {path}: cannot be read: {error}") from error


def load_tokenizer(settings: Settings, chat_template: str | None) -> Tokenizer:
    """The base's tokenizer, with the chat template that was asked for in place of its own."""
    try:
        return Tokenizer.load(
            settings.model, trust_remote_code=settings.trust_remote_code, chat_template=chat_template
        )
    except ChatTemplateError as error:
        raise SettingsError(f"--chat-template {settings.chat_template}: {error}") from error


def default_threads(servable: ServableModel) -> int:
    """One thread for a model whose products are so short that sharing them costs more than it brings; else torch's.

    A step is thousands of parallel regions, and each waits for its slowest thread: beside two other busy processes, a
    step of a 5 M parameter model on two threads took more than a second, where one thread alone needs 50 ms. For the
    same reason there are no more threads than CPUs that a container may keep busy.
    """
    weights = sum(site.in_features * site.out_features for site in servable.layout.sites)
    if servable.device.type == "cpu" and weights < _SMALL:
        return 1
    return min(torch.get_num_threads(), container.cpus() or torch.get_num_threads())


def end_tokens(servable: ServableModel) -> frozenset[int]:
    """The tokens that end a text, from generation_config.json, else from the model's configuration."""
    found = servable.model.generation_config.eos_token_id
    if found is None:
        found = servable.model.config.get_text_config(decoder=True).eos_token_id
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


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


def keep_large_blocks() -> None:
    """Tell glibc to reuse large blocks: returned to the system, each one page-faults again at every step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):  # another C library; its allocator has habits of its own
        logger.debug("no mallopt here")


def return_free_memory() -> None:
    """Give back what loading needed and serving does not: neither the limits above nor torch's own cache do it unasked.

    A memory plan asks a device what is free, and is not told of what torch keeps. Quantized weights that were joined
    are cycles (of module and weight), which only a collection ends.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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
