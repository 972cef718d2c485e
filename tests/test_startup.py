"""From settings to a served model: memory, defaults, and a server that says what transformers and peft say."""

import asyncio
import copy
import json
import shutil
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig

from adapters.lock import StoreLockedError
from adapters.pages import page_nbytes
from adapters.store import hash_folder
from server import kernel_choice, startup
from server.config import Settings, SettingsError
from server.config_values import GIB
from server.engine.sequence import Finished, Sampling, Submit, Token
from server.errors import UnsupportedModelError
from server.memory_plan import Free, plan_memory
from server.model.kernel_set import plain
from server.model.kv_cache import position_nbytes
from server.model.servable import ServableModel, make_servable
from server.serving import GenerationDefaults, Serving
from tests.model.tiny import SIZES, make_model
from tests.server.text import samples

PROMPTS = ["the patient has a fever", "the court", "naïve café"]
NEW = 12
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def servable():
    torch.manual_seed(0)
    return make_servable(make_model())


def settings(**given):
    return Settings(model="/models/tiny", **given)


def test_a_small_model_runs_on_one_thread_and_a_large_one_on_all(servable, monkeypatch):
    assert startup.default_threads(servable) == 1
    monkeypatch.setattr("server.startup._SMALL", 1)
    monkeypatch.setattr("server.container.cpus", lambda: None)
    assert startup.default_threads(servable) == torch.get_num_threads()
    monkeypatch.setattr("server.container.cpus", lambda: 1)
    assert startup.default_threads(servable) == 1
    monkeypatch.setattr("server.container.cpus", lambda: 10**6)
    assert startup.default_threads(servable) == torch.get_num_threads()


def test_a_device_is_asked_what_is_free_when_loading_has_given_back_what_it_took(monkeypatch, tmp_path):
    """And torch is told to only when no cycle of modules and weights holds anything any more."""
    done = []

    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            done.append("let go")

    class PlannedError(Exception):
        pass

    def plan(*given):
        raise PlannedError

    def load(source):
        Cycle()
        return make_model()

    monkeypatch.setattr(startup, "load_model", load)
    monkeypatch.setattr(startup, "plan_memory", plan)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("given back"))
    with pytest.raises(PlannedError):
        startup.load(settings(adapter_store=tmp_path / "store"), Serving())
    assert done == ["let go", "given back"]


def test_experts_are_not_served_batch_invariant_on_a_gpu():
    """Their products are torch's, of as many rows as chose an expert."""
    experts, dense = make_model(MixtralConfig(num_local_experts=4, **SIZES)), make_model()
    on_a_gpu, asked = replace(plain(), planned=True), settings(batch_invariant=True)
    with pytest.raises(SettingsError, match=r"cannot be had on a GPU with MixtralForCausalLM: .*experts"):
        kernel_choice.refuse_varying_products(asked, on_a_gpu, experts)
    kernel_choice.refuse_varying_products(asked, on_a_gpu, dense)
    kernel_choice.refuse_varying_products(settings(), on_a_gpu, experts)
    kernel_choice.refuse_varying_products(asked, plain(), experts)


class TestPlan:
    def test_the_default_is_what_the_sequences_can_use(self, servable):
        plan = plan_memory(settings(), servable)
        assert plan.kv_blocks == 64 * (64 // 16) + 1
        assert plan.block_nbytes == 16 * position_nbytes(servable.attention, torch.float32)
        assert plan.max_model_len == 64
        assert plan.adapter_dtype is torch.float32
        assert set(plan.pages.values()) == {GIB // sum(page_nbytes(servable.layout, torch.float32).values())}

    def test_a_budget_bounds_the_blocks_and_the_longest_text(self, servable):
        block = plan_memory(settings(), servable).block_nbytes
        plan = plan_memory(settings(kv_cache_memory_bytes=3 * block + 5), servable)
        assert (plan.kv_blocks, plan.max_model_len) == (4, 48)

    def test_the_plan_keeps_its_budgets(self, servable):
        plan = plan_memory(settings(kv_cache_memory_bytes=40_000, adapter_memory_bytes=300_000), servable)
        assert (plan.kv_blocks - 1) * plan.block_nbytes <= 40_000
        assert sum(plan.page_nbytes[group] * count for group, count in plan.pages.items()) <= 300_000

    def test_bfloat16_adapters_get_about_twice_the_pages(self, servable):
        counts = [
            max(
                plan_memory(
                    settings(adapter_memory_bytes=10**6, adapter_dtype=dtype), servable
                ).pages.values()
            )
            for dtype in ("float32", "bfloat16")
        ]
        assert 1.8 * counts[0] <= counts[1] <= 2.2 * counts[0]

    def test_max_loras_is_a_number_of_pages(self, servable):
        plan = plan_memory(settings(max_loras=5), servable)
        assert plan.pages == dict.fromkeys(servable.layout.groups, 5)

    def test_too_little_for_one_block(self, servable):
        with pytest.raises(
            SettingsError, match=r"--kv-cache-memory-bytes: .* hold 0 tokens.*give .* or more"
        ):
            plan_memory(settings(kv_cache_memory_bytes=100), servable)

    def test_too_little_for_the_text_that_was_asked_for(self, servable):
        block = plan_memory(settings(), servable).block_nbytes
        short = settings(kv_cache_memory_bytes=2 * block, max_model_len=50)
        with pytest.raises(SettingsError, match=r"one sequence of 50; .*or lower --max-model-len"):
            plan_memory(short, servable)
        assert plan_memory(
            settings(kv_cache_memory_bytes=4 * block, max_model_len=50), servable
        ).max_model_len

    def test_too_little_for_one_adapter(self, servable):
        need = sum(page_nbytes(servable.layout, torch.float32).values())
        with pytest.raises(SettingsError, match=f"--adapter-memory-bytes: .* at least {need} bytes"):
            plan_memory(settings(adapter_memory_bytes=need - 1), servable)
        assert set(plan_memory(settings(adapter_memory_bytes=need), servable).pages.values()) == {1}

    def test_the_lines_are_for_people(self, servable, monkeypatch):
        monkeypatch.setattr("server.memory_plan.free_memory", lambda device: (Free(12 * GIB), 16 * GIB))
        memory, cache, adapters, host = plan_memory(settings(max_loras=5), servable).lines()
        assert memory == "memory      12.0 GiB free before what follows is taken"
        assert "all that 64 sequences (--max-num-seqs) can fill; 256 blocks of 16 tokens" in cache
        assert "up to 64 tokens (--kv-cache-memory-bytes)" in cache
        assert "5 pages of rank 16 in float32 (--adapter-memory-bytes or --max-loras)" in adapters
        assert "up to 4.0 GiB" in host
        assert "(--adapter-host-memory-bytes or --max-cpu-loras)" in host

    def test_a_containers_limit_is_said_where_it_binds(self, servable, monkeypatch):
        free = Free(3 * GIB, " within the container's limit")
        monkeypatch.setattr("server.memory_plan.free_memory", lambda device: (free, 64 * GIB))
        memory, *_ = plan_memory(settings(), servable).lines()
        assert memory == "memory      3.0 GiB free within the container's limit before what follows is taken"

    @pytest.mark.parametrize(
        ("free", "share", "reason"),
        [
            (8 * GIB, 2 * GIB, "25% of the memory that is free"),
            (40 * GIB, 4 * GIB, "the most that is taken unasked"),
        ],
    )
    def test_a_quarter_of_what_is_free_and_four_gigabytes_at_most(
        self, servable, monkeypatch, free, share, reason
    ):
        monkeypatch.setattr("server.memory_plan.free_memory", lambda device: (Free(free), 64 * GIB))
        plan = plan_memory(settings(max_num_seqs=10**6), servable)
        assert plan.kv_blocks - 1 == share // plan.block_nbytes
        assert plan.kv_reason == reason

    def test_a_share_of_the_gpu_is_of_all_of_it(self, servable, monkeypatch):
        """Weights and adapters are paid out of it; without the flag the cache takes most of what they leave."""
        monkeypatch.setattr("server.memory_plan.free_memory", lambda device: (Free(70 * GIB), 80 * GIB))
        monkeypatch.setattr(ServableModel, "device", torch.device("cuda"))
        given = {"max_num_seqs": 10**8, "adapter_memory_bytes": GIB}
        plan = plan_memory(settings(gpu_memory_utilization=0.5, **given), servable)
        adapters = sum(plan.page_nbytes[group] * count for group, count in plan.pages.items())
        assert plan.kv_blocks - 1 == (40 * GIB - 10 * GIB - adapters) // plan.block_nbytes
        assert "--gpu-memory-utilization 0.5" in plan.kv_reason
        plan = plan_memory(settings(**given), servable)
        assert plan.kv_blocks - 1 == int((70 * GIB - adapters) * 0.85) // plan.block_nbytes
        with pytest.raises(SettingsError, match=r"--gpu-memory-utilization 0.1: .* hold 0 tokens"):
            plan_memory(settings(gpu_memory_utilization=0.1, **given), servable)

    def test_a_share_of_a_gpu_means_nothing_on_the_cpu(self, servable):
        with pytest.raises(SettingsError, match="runs on the CPU; give --kv-cache-memory-bytes"):
            plan_memory(settings(gpu_memory_utilization=0.9), servable)

    def test_room_on_the_host_in_adapters(self, servable):
        plan = plan_memory(settings(max_cpu_loras=7), servable)
        assert plan.host_nbytes == 7 * sum(plan.page_nbytes.values())


class TestChatTemplate:
    def test_a_file_in_place_of_the_models_own(self, checkpoint, tmp_path):
        file = tmp_path / "template.jinja"
        file.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
        asked = Settings(model=str(checkpoint[0] / "base"), chat_template=file)
        tokenizer = startup.load_tokenizer(asked, startup.read_chat_template(file))
        assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "hi"}])) == "<hi>"

    def test_one_in_json_is_taken_out_of_it(self, tmp_path):
        """As checkpoints of several modalities have it; rendered as it stands it would be a prompt of JSON."""
        file = tmp_path / "chat_template.json"
        file.write_text(json.dumps({"chat_template": "{{ messages }}"}))
        assert startup.read_chat_template(file) == "{{ messages }}"
        for other in ({"chat_template": [{"name": "default"}]}, {}):
            file.write_text(json.dumps(other))
            with pytest.raises(SettingsError, match=r"--chat-template .*: is JSON without"):
                startup.read_chat_template(file)
        file.write_text("5")
        assert startup.read_chat_template(file) == "5"

    def test_a_processors_template_serves_where_there_is_no_other(self, checkpoint, tmp_path, caplog):
        """Older models for images keep it in a file that no tokenizer looks for."""
        base = tmp_path / "base"
        shutil.copytree(checkpoint[0] / "base", base)
        asked, file = Settings(model=str(base)), base / "chat_template.json"
        assert not startup.load_tokenizer(asked, None).has_chat_template
        file.write_text(json.dumps({"chat_template": "{% for m in messages %}<{{ m.content }}>{% endfor %}"}))
        tokenizer = startup.load_tokenizer(asked, None)
        assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "hi"}])) == "<hi>"
        (base / "chat_template.jinja").write_text("its own")
        tokenizer = startup.load_tokenizer(asked, None)
        assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "hi"}])) == "its own"
        (base / "chat_template.jinja").unlink()
        file.write_text("{}")
        assert not startup.load_tokenizer(asked, None).has_chat_template
        assert "no chat without --chat-template FILE" in caplog.text

    def test_what_is_no_template(self, checkpoint, tmp_path):
        file = tmp_path / "template.jinja"
        with pytest.raises(SettingsError, match=r"--chat-template .*: cannot be read: .*No such file"):
            startup.read_chat_template(file)
        file.write_text("line one\n{% for m in messages %}")
        asked = Settings(model=str(checkpoint[0] / "base"), chat_template=file)
        with pytest.raises(SettingsError, match=r"--chat-template .*: line 2: "):
            startup.load_tokenizer(asked, startup.read_chat_template(file))


def test_a_seed_for_those_who_bring_none(load):
    draws = [load(seed=5).ready().seeds.getrandbits(63)]
    load.end()
    draws.append(load(seed=5).ready().seeds.getrandbits(63))
    load.end()
    assert draws[0] == draws[1] != load().ready().seeds.getrandbits(63)


@pytest.fixture
def generation(servable):
    """Lets a test set the model's generation config, and puts the old one back."""
    model = servable.model
    before = model.generation_config, model.config.eos_token_id

    def give(**values):
        model.generation_config = GenerationConfig(**values)
        return servable

    yield give
    model.generation_config, model.config.eos_token_id = before


class TestGenerationConfig:
    @pytest.mark.parametrize(("given", "want"), [(7, {7}), ([7, 9], {7, 9})])
    def test_end_tokens(self, generation, given, want):
        assert startup.end_tokens(generation(eos_token_id=given)) == want

    def test_end_tokens_that_the_model_does_not_have(self, generation):
        """They are forbidden before `min_tokens`, and there is no such logit."""
        servable = generation(eos_token_id=[7, 50256, -1])
        assert servable.vocab_size <= 50256
        assert startup.end_tokens(servable) == {7}

    def test_end_tokens_of_the_models_own_configuration(self, generation):
        assert startup.end_tokens(generation()) == {2}

    def test_no_end_tokens_at_all(self, generation):
        servable = generation()
        servable.model.config.eos_token_id = None
        assert startup.end_tokens(servable) == frozenset()

    def test_a_configuration_that_does_not_know_the_word(self):
        config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
        model = SimpleNamespace(generation_config=GenerationConfig(), config=config)
        assert startup.end_tokens(SimpleNamespace(model=model, vocab_size=9)) == frozenset()

    def test_defaults_of_the_authors(self, generation):
        servable = generation(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
        assert startup.generation_defaults(servable) == GenerationDefaults(0.6, 0.9, 20, 0.0, 1.0)
        servable = generation(do_sample=True, min_p=0.05, repetition_penalty=1.1)
        assert startup.generation_defaults(servable) == GenerationDefaults(1.0, 1.0, 0, 0.05, 1.1)

    def test_defaults_of_the_api_where_the_authors_say_nothing(self, generation):
        """transformers' own default of top_k = 50 is not the authors' word."""
        assert startup.generation_defaults(generation()) == GenerationDefaults(1.0, 1.0, 0)


class TestModelSource:
    def test_automatic_on_the_cpu_is_float32(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        source = startup.model_source(settings())
        assert (source.device.type, source.dtype, source.quantization) == ("cpu", torch.float32, "nf4")

    def test_automatic_on_cuda_is_bfloat16(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        source = startup.model_source(settings())
        assert (source.device.type, source.dtype) == ("cuda", torch.bfloat16)

    def test_what_was_asked_for(self):
        source = startup.model_source(settings(device="cpu", dtype="bfloat16", quantization="int8"))
        assert (source.device.type, source.dtype, source.quantization) == ("cpu", torch.bfloat16, "int8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random llama with a tokenizer of its own, a peft adapter for it, and what both say greedily."""
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("startup")
    tokenizer = samples.byte_level()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=1, pad_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "down_proj"], **LORA)
    ).eval()
    adapted.save_pretrained(root / "legal")
    want = {None: greedy(model, tokenizer), "legal": greedy(adapted, tokenizer)}
    assert want[None] != want["legal"]
    return root, want


def greedy(model, tokenizer):
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(out[0, ids.shape[1] :].tolist())
    return found


@pytest.fixture
def load(checkpoint, tmp_path):
    """Loads servers, and ends them with the test."""
    root, _ = checkpoint
    started = []

    def load(**given):
        serving = Serving()
        given = {"quantization": "none", "device": "cpu", "lora_modules": {"legal": root / "legal"}} | given
        asked = Settings(
            model=str(root / "base"), adapter_store=tmp_path / "store", quantized_cache=tmp_path / "quantized",
            adapter_memory_bytes="4MiB", kv_cache_memory_bytes="4MiB", **given,
        )  # fmt: skip
        startup.load(asked, serving)
        started.append(serving.served)
        return serving

    def end():
        while started:
            served = started.pop()
            served.engine.stop(30)
            served.loader.close()
            served.registry.store.close()

    load.end = end
    yield load
    end()


async def generate(served, prompt, adapter):
    reference = served.registry.resolve(adapter) if adapter else None
    submit = Submit(
        f"{prompt} {adapter}",
        served.tokenizer.encode(prompt),
        Sampling(NEW, temperature=0, stop_token_ids=served.eos_token_ids),
        reference.generation if reference else None,
    )
    events = [event async for event in served.engine.stream(submit)]
    if reference:
        reference.release()
    assert isinstance(events.pop(), Finished)
    assert all(isinstance(event, Token) for event in events)
    return [event.token_id for event in events]


def generate_all(served):
    """Every prompt with the base and the adapter, all at once."""

    async def together():
        return await asyncio.gather(*[generate(served, p, a) for a in (None, "legal") for p in PROMPTS])

    texts = asyncio.run(asyncio.wait_for(together(), 60))
    return {None: texts[: len(PROMPTS)], "legal": texts[len(PROMPTS) :]}


def test_a_loaded_server_says_what_transformers_and_peft_say(load, checkpoint):
    serving = load()
    assert (serving.phase, serving.progress) == ("ready", 1.0)
    served = serving.ready()
    assert generate_all(served) == checkpoint[1]
    assert (served.name, served.max_model_len, served.eos_token_ids) == ("base", 128, {1})
    assert served.vocab_size == served.tokenizer.vocab_size
    assert served.defaults == GenerationDefaults()
    assert [entry.name for entry in served.registry.entries()] == ["legal"]
    assert "base and 1 adapter" in serving.plan[-1]
    served.engine.stop(30)
    served.engine.check()
    assert served.engine.stats().kv_blocks_used == 0


def test_the_quantized_default_is_the_same_from_its_copy(load, tmp_path):
    """nf4 of the whole base: made once, read back the second time."""
    first = load(quantization="nf4").ready()
    texts = generate_all(first)
    (copied,) = (tmp_path / "quantized").iterdir()
    stamp = (copied / "config.json").stat().st_mtime_ns
    first.engine.stop(30)
    first.registry.store.close()
    assert generate_all(load(quantization="nf4").ready()) == texts
    assert (copied / "config.json").stat().st_mtime_ns == stamp


def test_what_nobody_refers_to_leaves_every_tier(load):
    served = load().ready()
    generate_all(served)
    assert served.loader.nbytes > 0
    served.registry.delete("legal")
    asyncio.run(generate(served, PROMPTS[0], None))  # the engine has seen the word by now
    assert served.loader.nbytes == 0
    assert served.engine.stats().resident == ()


def test_an_adapter_that_host_memory_cannot_hold_is_refused(load):
    with pytest.raises(Exception, match="raise --adapter-host-memory-bytes"):
        load(adapter_host_memory_bytes="1KB")


@pytest.mark.parametrize("what", ["file", "lost", "hub", "archive", "locked"])
def test_a_path_that_cannot_be_used_is_told_before_the_weights_are_read(tmp_path, what):
    (tmp_path / "file").write_text("")
    given, said = {
        "file": (
            {"adapter_store": tmp_path / "file" / "store"},
            "--adapter-store .*/file/store: cannot be used",
        ),
        "lost": (
            {"lora_modules": {"legal": tmp_path / "no"}},
            "--lora-modules legal=.*/no: there is no such",
        ),
        "hub": (
            {"lora_modules": {"legal": "somebody/legal"}},
            "=somebody/legal: there is no such folder; an adapter of a model hub has to be downloaded",
        ),
        "archive": (
            {"lora_modules": {"legal": tmp_path / "file"}},
            "--lora-modules legal=.*/file: is a file, and a folder is asked for; unpack it",
        ),
        "locked": ({}, "is in use by process"),
    }[what]
    with closing(startup.open_store(settings(adapter_store=tmp_path / "store"))):
        asked = Settings(**{"model": str(tmp_path / "nothing"), "adapter_store": tmp_path / "store"} | given)
        with pytest.raises((SettingsError, StoreLockedError), match=said):
            startup.load(asked, Serving())


def test_a_load_that_fails_leaves_the_store_to_others(tmp_path):
    asked = Settings(model=str(tmp_path / "nothing"), adapter_store=tmp_path / "store")
    with pytest.raises(UnsupportedModelError):
        startup.load(asked, Serving())
    startup.open_store(asked).close()


def changed(folder, into, alpha):
    """The same adapter with another scale."""
    config = json.loads((folder / "adapter_config.json").read_text()) | {"lora_alpha": alpha}
    shutil.copytree(folder, into, dirs_exist_ok=True)
    (into / "adapter_config.json").write_text(json.dumps(config))
    return into


def test_the_command_lines_folder_is_taken_up_when_it_has_changed(load, checkpoint, tmp_path):
    for revision, alpha in enumerate((3, 5), start=1):
        folder = changed(checkpoint[0] / "legal", tmp_path / "folder", alpha)
        for _ in range(2):
            entry = load(lora_modules={"legal": folder}).ready().registry.entry("legal")
            assert (entry.revision, entry.generation) == (revision, hash_folder(folder))
            load.end()


def test_what_clients_made_of_a_name_outlives_the_same_command(load, checkpoint, tmp_path, caplog):
    registry = load().ready().registry
    first = registry.entry("legal").generation
    uploaded = registry.put_folder("legal", changed(checkpoint[0] / "legal", tmp_path / "upload", 3)).entry
    load.end()
    caplog.clear()
    registry = load().ready().registry
    assert registry.entry("legal") == uploaded
    (warned,) = [record.getMessage() for record in caplog.records if record.name == "server.start_modules"]
    for part in ("name=legal", uploaded.generation, first):
        assert part in warned
    registry.rollback("legal", first)
    load.end()
    caplog.clear()
    registry = load().ready().registry
    assert registry.entry("legal").revision == 3
    assert not caplog.records, "the name is where the flag would have it"
    registry.delete("legal")
    load.end()
    assert load().ready().registry.entry("legal").revision == 1


def test_an_adapter_whose_name_the_base_has_taken_is_told_of(load, caplog):
    load()
    load.end()
    caplog.clear()
    load(lora_modules={}, served_model_name="other,legal")
    (warned,) = [record.getMessage() for record in caplog.records if record.name == "server.start_modules"]
    assert "name=legal" in warned
    assert "--served-model-name" in warned


def test_an_adapter_of_the_command_line_that_is_refused_is_named(load, checkpoint):
    root, _ = checkpoint
    with pytest.raises(SettingsError, match=r"--lora-modules legal=.*/base: .*adapter_config.json"):
        load(lora_modules={"legal": root / "base"})


def test_a_model_that_is_not_there_ends_the_load(tmp_path):
    serving = Serving()
    with pytest.raises(UnsupportedModelError):
        startup.load(Settings(model=str(tmp_path / "nothing"), adapter_store=tmp_path), serving)
    assert (serving.phase, serving.served) == ("loading", None)
