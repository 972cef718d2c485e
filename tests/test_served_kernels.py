"""Which kernels a server on a CPU runs, that it says so, and what it refuses."""

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from server import kernel_choice, startup
from server.config import Settings, SettingsError
from server.kernel_choice import choose_kernels
from server.model.linear import FourBitLinear, LoRALinear, ModuleLinear, PackedLinear
from server.model.steady import CompiledMLP, CompiledRMSNorm
from server.serving import Serving

DEMO = Path(__file__).parents[1] / "demo"
needs_a_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None and shutil.which("cc") is None,
    reason="no compiler here: plain PyTorch serves",
)


def best_instruction_set():
    """Of this processor, by its own word."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512" if "avx512vl" in flags else "avx2" if " avx2 " in flags else "portable"


@pytest.fixture
def serve_demo(tmp_path):
    """Loads the demo's base, and ends what it loaded with the test."""
    started = []

    def serve(**given):
        serving = Serving()
        started.append(serving)
        asked_for = Settings(
            model=str(DEMO / "base"), device="cpu",
            adapter_store=tmp_path / "store", quantized_cache=tmp_path / "quantized",
            adapter_memory_bytes="16MiB", kv_cache_memory_bytes="16MiB", **given,
        )  # fmt: skip
        startup.load(asked_for, serving)
        return serving

    yield serve
    for serving in started:
        if serving.served is not None:
            serving.served.engine.stop(30)
            serving.served.loader.close()
            serving.served.registry.store.close()


def asked(**given):
    return Settings(model="base", device="cpu", **given)


def test_the_absence_of_compiled_kernels_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr("kernels.cpu.library.library_path", lambda: None)
    assert choose_kernels(asked(), torch.device("cpu")).name is None
    (record,) = caplog.records
    assert "install with a C compiler" in record.message


def test_without_triton_a_gpu_is_served_in_plain_pytorch_and_that_is_said_once(monkeypatch, caplog):
    for name in ("triton", "kernels.portable"):
        monkeypatch.setitem(sys.modules, name, None)
    assert choose_kernels(asked(), torch.device("cuda")).name is None
    (record,) = caplog.records
    assert "no Triton kernels" in record.message
    with pytest.raises(SettingsError, match="without Triton"):
        choose_kernels(asked(batch_invariant=True), torch.device("cuda"))


def test_a_mistake_in_our_kernels_is_not_taken_for_the_absence_of_triton(monkeypatch):
    launches = ModuleType("kernels.portable")
    launches.check_launches = lambda: None
    monkeypatch.setitem(sys.modules, "kernels.portable", launches)
    monkeypatch.setitem(sys.modules, "server.model.cuda", None)
    with pytest.raises(ImportError, match=r"server\.model\.cuda"):
        choose_kernels(asked(), torch.device("cuda"))


def test_bitsandbytes_products_are_not_batch_invariant():
    with pytest.raises(SettingsError, match="its products depend on the batch"):
        choose_kernels(asked(batch_invariant=True, linear_backend="bitsandbytes"), torch.device("cuda"))


@needs_a_compiler
@pytest.mark.parametrize("given", [{}, {"linear_backend": "bitsandbytes"}, {"quantization": "none"}])
def test_every_way_to_hold_weights_has_the_same_engine_around_it(given):
    kernels = choose_kernels(asked(**given), torch.device("cpu"))
    assert kernels.name == f"{best_instruction_set()}, fp32"


@needs_a_compiler
def test_where_there_is_a_compiler_the_server_runs_what_it_made(serve_demo):
    """Each product of the demo, its norms and its gates, with the widest instructions that the processor has."""
    serving = serve_demo()
    model, best = serving.ready().engine.runner.model, best_instruction_set()
    linears = [module for module in model.modules() if isinstance(module, LoRALinear)]
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    assert len(linears) == 42
    for held in [linear.group.base for linear in linears] + [model.get_output_embeddings().base]:
        assert isinstance(held, PackedLinear)
        assert held.library.instruction_set == best
    assert {linear.group.base.weight.kind for linear in linears} == {"nf4"}
    assert {type(module) for module in norms} == {CompiledRMSNorm}
    assert sum(isinstance(module, CompiledMLP) for module in model.modules()) == 6
    assert f"kernels     {best}, fp32" in serving.plan


@needs_a_compiler
def test_bitsandbytes_multiplies_in_the_same_engine(serve_demo):
    """Only the quantized products are left to it: what stands around them is what ours has."""
    serving = serve_demo(linear_backend="bitsandbytes")
    runner = serving.ready().engine.runner
    bases = {type(m.group.base) for m in runner.model.modules() if isinstance(m, LoRALinear)}
    assert bases == {ModuleLinear}
    assert isinstance(runner.model.get_output_embeddings().base, PackedLinear)
    assert runner.kernels.name == f"{best_instruction_set()}, fp32"
    assert runner.kernels.row_tile == 1
    assert any(isinstance(module, CompiledMLP) for module in runner.model.modules())
    assert (
        f"kernels     {best_instruction_set()}, fp32; 24 of 24 products of the base by bitsandbytes"
        in serving.plan
    )


@needs_a_compiler
def test_products_that_no_kernel_makes_are_said(serve_demo):
    serving = serve_demo(quantization="int8")
    assert (
        f"kernels     {best_instruction_set()}, fp32; 24 of 24 products of the base by plain PyTorch"
        in serving.plan
    )


def test_without_compiled_kernels_plain_pytorch_serves_and_says_so(serve_demo, monkeypatch, caplog):
    monkeypatch.setattr("kernels.cpu.library.library_path", lambda: None)
    serving = serve_demo()
    model = serving.ready().engine.runner.model
    assert {type(m.group.base) for m in model.modules() if isinstance(m, LoRALinear)} == {FourBitLinear}
    assert "kernels     plain PyTorch" in serving.plan
    assert sum("install with a C compiler" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"linear_backend": "bitsandbytes"}, "NF4 weights"),
        ({"quantization": "int8"}, "NF4 weights"),
        ({}, "not compiled"),
    ],
)
def test_byte_arithmetic_is_served_or_refused(given, reason, monkeypatch):
    monkeypatch.setattr("kernels.cpu.library.library_path", lambda: None)
    with pytest.raises(SettingsError, match=f"--cpu-math int8 cannot be served: .*{reason}"):
        choose_kernels(asked(cpu_math="int8", **given), torch.device("cpu"))


def test_byte_arithmetic_is_refused_where_the_processor_lacks_it(monkeypatch):
    def lacking(math):
        raise ValueError("this processor has no dot product of bytes")

    monkeypatch.setattr(kernel_choice, "load_library", lacking)
    with pytest.raises(SettingsError, match="no dot product of bytes"):
        choose_kernels(asked(cpu_math="int8"), torch.device("cpu"))
