"""Tensors against a layout: what is served is read exactly, and everything else is a finding."""

from __future__ import annotations

import gc
import json
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from adapters.errors import AdapterError
from adapters.peft_format import copied, inspect_adapter, mapped, read_adapter
from adapters.pool import Pool
from tests.adapters.samples import (
    make_config,
    make_layout,
    make_tensors,
    problems,
    write_folder,
)

LAYOUT = make_layout()
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def read(folder, dtype=torch.float32, layout=LAYOUT, max_rank=64):
    return read_adapter(folder, "g", layout, dtype, max_rank)


def refused(folder, code="invalid_adapter", **options) -> str:
    with pytest.raises(AdapterError) as caught:
        read(folder, **options)
    assert caught.value.code == code, str(caught.value)
    assert caught.value.findings
    return problems(caught.value)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_read_rank_major_and_contiguous(tmp_path, stored, dtype):
    tensors = {name: values.to(stored) for name, values in make_tensors(("q_proj", "down_proj")).items()}
    adapter = read(write_folder(tmp_path, tensors=tensors), dtype)
    assert len(adapter.deltas) == 4
    for delta in adapter.deltas:
        module = LAYOUT.sites[delta.site].members[delta.member].module
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        assert torch.equal(delta.a, a.to(dtype))
        assert torch.equal(delta.b, b.t().to(dtype))
        assert delta.a.is_contiguous()
        assert delta.b.is_contiguous()
        assert delta.scale == 2.0
    assert adapter.rank == 4


def test_inspect_tells_the_same_without_reading_values(tmp_path):
    folder = write_folder(tmp_path)
    whole, outline = read(folder), inspect_adapter(folder, "g", LAYOUT, torch.float32, 64, copied)
    assert outline.base_model == "some/base"
    assert outline.adapter.nbytes == whole.nbytes
    for seen, delta in zip(outline.adapter.deltas, whole.deltas, strict=True):
        assert seen.a.is_meta
        assert (seen.site, seen.member, seen.scale) == (delta.site, delta.member, delta.scale)
        assert (seen.a.shape, seen.b.shape) == (delta.a.shape, delta.b.shape)


def test_a_raw_state_dict_and_a_multimodal_base_are_read(tmp_path):
    tensors = {
        name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"): values
        for name, values in make_tensors().items()
    }
    folder = write_folder(tmp_path, tensors=tensors)
    plain = read(folder)
    other = read(folder, layout=make_layout(home="model.language_model."))
    assert [delta.site for delta in plain.deltas] == [delta.site for delta in other.deltas]


def test_the_patterns_are_matched_on_the_name_in_training(tmp_path):
    config = make_config(alpha_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 40})
    adapter = read(write_folder(tmp_path, config), layout=make_layout(home="model.language_model."))
    assert sorted({delta.scale for delta in adapter.deltas}) == [2.0, 10.0]


def test_a_missing_half(tmp_path):
    tensors = make_tensors()
    del tensors[f"{Q0}.lora_B.weight"]
    said = refused(write_folder(tmp_path, tensors=tensors))
    assert f"{Q0}.lora_A.weight: has no lora_B beside it" in said


def test_two_adapters_in_one_file(tmp_path):
    tensors = make_tensors()
    tensors |= {name.replace(".weight", ".other.weight"): values.clone() for name, values in tensors.items()}
    assert "is the same factor as" in refused(write_folder(tmp_path, tensors=tensors))


def test_two_names_of_one_module(tmp_path):
    tensors = make_tensors(("0.self_attn.q_proj",))
    tensors |= {
        name.replace("model.layers", "model.language_model.layers"): values.clone()
        for name, values in tensors.items()
    }
    assert "is the module model.layers.0.self_attn.q_proj, and so is" in refused(
        write_folder(tmp_path, tensors=tensors)
    )


def test_transposed(tmp_path):
    tensors = {name: values.t().contiguous() for name, values in make_tensors().items()}
    said = refused(write_folder(tmp_path, tensors=tensors))
    assert "its factors are transposed" in said
    assert "[r, 16]" in said


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4, 17), (16, 4)),
        ((4, 16), (15, 4)),
        ((4, 16), (16, 3)),
        ((4,), (16, 4)),
        ((4, 16, 1), (16, 4)),
        ((), ()),
    ],
)
def test_wrong_shapes(tmp_path, a, b):
    tensors = make_tensors()
    tensors[f"{Q0}.lora_A.weight"], tensors[f"{Q0}.lora_B.weight"] = torch.ones(a), torch.ones(b)
    said = refused(write_folder(tmp_path, tensors=tensors))
    assert f"lora_A is {list(a)} and lora_B {list(b)}, this base needs [r, 16] and [16, r]" in said


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30, -1e6])
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_infinity_and_absurd_sizes(tmp_path, bad, part, dtype):
    tensors = make_tensors()
    tensors[f"{Q0}.lora_{part}.weight"][1, 2] = bad
    said = refused(write_folder(tmp_path, tensors={name: value.to(dtype) for name, value in tensors.items()}))
    assert f"{Q0}.lora_{part}.weight: holds" in said


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_other_dtypes(tmp_path, dtype):
    tensors = {name: values.to(dtype) for name, values in make_tensors().items()}
    assert "is of dtype" in refused(write_folder(tmp_path, tensors=tensors))


@pytest.mark.parametrize("part", ["A", "B"])
def test_an_untrained_adapter_changes_nothing(tmp_path, part):
    tensors = make_tensors()
    for name, values in tensors.items():
        if f"lora_{part}" in name:
            values.zero_()
    assert "a fresh adapter with B = 0 changes nothing" in refused(write_folder(tmp_path, tensors=tensors))
    tensors[f"{Q0}.lora_{part}.weight"][0, 0] = 1
    read(write_folder(tmp_path / "trained", tensors=tensors))


def test_alpha_zero_changes_nothing(tmp_path):
    assert "changes nothing" in refused(write_folder(tmp_path, make_config(lora_alpha=0)))


def test_a_rank_that_disagrees_with_the_config(tmp_path):
    said = refused(write_folder(tmp_path, make_config(r=8)))
    assert "model.layers.0.self_attn.q_proj: has rank 4, and adapter_config.json says 8" in said
    read(write_folder(tmp_path / "other", make_config(r=8, rank_pattern={"q_proj": 4, "v_proj": 4})))


@pytest.mark.parametrize(
    "settings",
    [{"rank_pattern": {"(.*)*": 8}}, {"rank_pattern": {"(": 8}}, {"r": 0}, {"alpha_pattern": {"q": "x"}}],
)
def test_a_config_that_cannot_be_read_accuses_no_tensor(tmp_path, settings):
    folder = write_folder(tmp_path, make_config(**{"r": 9} | settings))
    with pytest.raises(AdapterError) as caught:
        read(folder)
    (finding,) = caught.value.findings
    assert finding.where.startswith("adapter_config.json")


def test_a_name_of_any_length_is_refused_before_a_pattern_sees_it(tmp_path):
    long = {f"{Q0}{'x' * 20_000}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    config = make_config(rank_pattern={".*.*.*": 4})
    said = refused(write_folder(tmp_path, config, tensors=make_tensors() | long))
    assert "has a name of more than 512 characters" in said
    assert len(said) < 1000


def test_rank_zero_and_rank_over_the_cap(tmp_path):
    assert "has rank 0" in refused(write_folder(tmp_path / "zero", tensors=make_tensors(rank=0)))
    folder = write_folder(tmp_path / "high", make_config(r=9), make_tensors(rank=9))
    assert "has rank 9, this server takes up to 8" in refused(folder, max_rank=8)
    read(folder, max_rank=9)


def test_a_module_that_the_base_does_not_adapt(tmp_path):
    tensors = make_tensors()
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 16)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.ones(99, 4)
    said = refused(write_folder(tmp_path, tensors=tensors))
    assert "lm_head: is not a module that this base adapts" in said
    assert "model.layers.0.self_attn.q_proj" in said


def test_strangers_are_listed_to_five_with_a_near_name(tmp_path):
    tensors = make_tensors(layout=make_layout(9))
    said = refused(write_folder(tmp_path, tensors=tensors | make_tensors(("gate_proj",))))
    assert said.count("is not a module that this base adapts") == 5
    assert "9 more" in said
    tensors = make_tensors() | {
        name.replace("q_proj", "query_proj"): values for name, values in make_tensors(("q_proj",)).items()
    }
    said = refused(write_folder(tmp_path / "near", tensors=tensors))
    assert "this base has model.layers.0.self_attn.q_proj" in said


def test_an_adapter_of_another_base(tmp_path):
    tensors = {
        name.replace("model.layers", "transformer.h"): values for name, values in make_tensors().items()
    }
    said = refused(write_folder(tmp_path, tensors=tensors))
    assert "none of its 4 modules is in this base, which adapts model.layers.0.self_attn.q_proj" in said


@pytest.mark.parametrize(
    ("name", "said", "cure"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA", "use_dora"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", "lora_bias", "without lora_bias"),
        ("base_model.model.model.layers.0.self_attn.q_proj.bias", "trained bias", 'bias="none"'),
        ("base_model.model.lm_head.weight", "modules_to_save", "save_embedding_layers=False"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "adapts an embedding", "target_modules"),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            "single tokens",
            "trainable_token_indices",
        ),
        (
            "base_model.model.model.embed_tokens.base_layer.weight",
            "adapted embedding or output head",
            "without embed_tokens",
        ),
        (
            "base_model.model.lm_head.base_layer.weight",
            "belongs to an adapted embedding or output head",
            "target_modules",
        ),
        ("model.layers.0.self_attn.q_proj.lora_a", "mlx", "convert the adapter"),
        ("lora_unet_mid_block.lora_down.weight", "image", ""),
        ("blk.0.attn_q.weight.lora_a", "GGUF", "peft adapter it was made from"),
    ],
)
def test_tensors_of_features_that_are_not_served(tmp_path, name, said, cure):
    folder = write_folder(tmp_path, tensors=make_tensors() | {name: torch.ones(16)})
    told = refused(folder, "unsupported_adapter_feature")
    assert said in told
    assert cure in told.partition("which is not served; ")[2]


@pytest.mark.parametrize(
    ("a", "b"), [((0,), (0,)), ((0, 16), (16, 0)), ((64,), (64,)), ((2, 16), (0,)), ((0, 16), (0,))]
)
def test_shards_that_were_not_gathered(tmp_path, a, b):
    """What DeepSpeed's ZeRO-3 and FSDP leave in a process are parts of each tensor, flat or empty."""
    tensors = make_tensors()
    tensors[f"{Q0}.lora_A.weight"], tensors[f"{Q0}.lora_B.weight"] = torch.ones(a), torch.ones(b)
    assert "; gather the shards" in refused(write_folder(tmp_path, tensors=tensors))


def test_what_no_text_passes_through_is_left_out(tmp_path):
    """A tower for images, however the release of transformers that the adapter was trained with calls it."""
    layout = replace(make_layout(home="model.language_model."), idle=("model.vision_tower",))
    tensors = make_tensors(layout=layout)
    plain = read(write_folder(tmp_path / "plain", tensors=tensors), layout=layout)
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    for home in ("base_model.model.", "base_model.model.model."):
        extra = {f"{home}{tower}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
        adapter = read(write_folder(tmp_path / home, tensors=tensors | extra), layout=layout)
        assert [delta.site for delta in adapter.deltas] == [delta.site for delta in plain.deltas]
        assert "is not a module that this base adapts" in refused(tmp_path / home)
    said = refused(write_folder(tmp_path / "only", tensors=extra), layout=layout)
    assert f"model.{tower}: is, like all that it adapts, in a part of the base that no text passes" in said


def test_unknown_tensors_are_refused(tmp_path):
    assert "is not a tensor that peft writes" in refused(
        write_folder(tmp_path, tensors=make_tensors() | {"something": torch.ones(1)})
    )


@pytest.mark.parametrize("shape", [(8, 16), (9, 16)])
def test_a_copy_of_the_bases_own_matrix_is_refused(tmp_path, shape):
    """peft loads it into the base: were it left out, a trained one would be missed without a word."""
    copy = "base_model.model.model.layers.0.self_attn.k_proj.base_layer.weight"
    said = refused(
        write_folder(tmp_path, tensors=make_tensors() | {copy: torch.ones(shape)}),
        "unsupported_adapter_feature",
    )
    assert f"{copy}: is a matrix of the base as it was in training" in said
    assert "if it was not trained, delete it" in said


def test_everything_is_told_at_once(tmp_path):
    tensors = make_tensors()
    del tensors[f"{Q0}.lora_B.weight"]
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)
    said = refused(write_folder(tmp_path, make_config(use_dora=True), tensors), "unsupported_adapter_feature")
    for part in ("use_dora", "modules_to_save", "has no lora_B", "holds NaN"):
        assert part in said


def test_missing_and_oversized_files(tmp_path):
    assert "adapter_config.json: cannot be read" in refused(tmp_path)
    assert "adapter_model.safetensors: cannot be read" in refused(tmp_path)
    folder = write_folder(tmp_path / "large")
    (folder / "adapter_config.json").write_bytes(b" " * (8 * 1024 * 1024 + 1))
    assert "has more than 8388608 bytes" in refused(folder)


def test_an_empty_file_of_tensors(tmp_path):
    assert "holds no lora_A and lora_B" in refused(write_folder(tmp_path, tensors={}))


def header(entries: object, body: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is cut short"),
        (b"\x10\0\0\0\0\0\0\0", "is cut short"),
        (struct.pack("<Q", 1000) + b"{}", "is cut short: its header takes 1000 bytes"),
        (struct.pack("<Q", 10 * 2**30) + b"{" * 100, "is not a safetensors file"),
        (struct.pack("<Q", 2**64 - 1) + b"{" * 100, "is not a safetensors file"),
        (header({"x": F4}, b"abc"), "is damaged"),
        (header({"x": F4}, b"abcdefgh"), "is damaged"),
        (header({"x": F4, "y": F4}, b"abcd"), "is damaged"),
        (header({"x": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}}, b"abcd"), "is damaged"),
        (header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"abcd"), "is damaged"),
        (header({"x": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, b"abcd"), "is damaged"),
        (header(b"{" + b" " * 20), "is damaged"),
        (header(b'{"x": "y"}'), "is damaged"),
        (header(b"{\xff\xff\xff\xff}"), "is damaged"),
        (b"PK\x03\x04" + b"\x14" * 40, "is a PyTorch pickle"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00abcde", "is a PyTorch pickle"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "is a GGUF file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "is not a safetensors file but the pointer that Git LFS keeps in its place; fetch the file itself",
        ),
        (b"<!DOCTYPE html><html>", "is not a safetensors file"),
    ],
)
def test_hostile_tensor_files(tmp_path, data, said):
    folder = write_folder(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(data)
    assert said in refused(folder)


@pytest.mark.parametrize("spaces", [0, 1, 2, 3])
def test_tensors_need_not_lie_at_multiples_of_their_size(tmp_path, spaces):
    file = write_folder(tmp_path) / "adapter_model.safetensors"
    aligned, data = read(tmp_path), file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    file.write_bytes(
        struct.pack("<Q", length + spaces) + data[8 : 8 + length] + b" " * spaces + data[8 + length :]
    )
    for one, other in zip(aligned.deltas, read(tmp_path).deltas, strict=True):
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)


def test_a_name_that_a_header_has_twice(tmp_path):
    file = write_folder(tmp_path) / "adapter_model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    told = data[8 : 8 + length].rstrip()
    name = next(name for name in json.loads(told) if name != "__metadata__")
    twice = told[:-1] + b"," + json.dumps({name: F4})[1:].encode()
    file.write_bytes(struct.pack("<Q", len(twice)) + twice + data[8 + length :])
    assert "is damaged" in refused(tmp_path)


def test_reading_leaves_nothing_in_memory(tmp_path):
    """The library's `get_tensor` leaves two numbers for each tensor."""
    reads, tensors = 100, make_tensors(("q_proj", "k_proj", "v_proj", "down_proj"))
    write_folder(tmp_path, tensors=tensors)

    def blocks_after_reads():
        for _ in range(reads):
            read(tmp_path)
        gc.collect()
        return sys.getallocatedblocks()

    before = blocks_after_reads()
    assert (blocks_after_reads() - before) / (reads * len(tensors)) < 0.5


def test_too_many_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("adapters.tensor_file.TENSORS", 7)
    assert "has more than 7 tensors" in refused(write_folder(tmp_path))


def _assert_tells(error: AdapterError) -> None:
    assert error.findings


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_never_breaks(tmp_path, data):
    folder = write_folder(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        whole = bytearray((folder / name).read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.one_of(st.none(), st.integers(0, len(whole))))
        (folder / name).write_bytes(bytes(whole[:cut]))
    try:
        assert read(folder).deltas
    except AdapterError as error:
        _assert_tells(error)


def test_nothing_keeps_the_file_mapped(tmp_path):
    folder = write_folder(tmp_path)
    adapter = read(folder)
    before = adapter.deltas[0].a.clone()
    size = (folder / "adapter_model.safetensors").stat().st_size
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.seek(size - 4096 if size > 4096 else 8)
        file.write(b"\0" * 512)
    assert torch.equal(adapter.deltas[0].a, before)
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_mapped_adapter_is_the_file_itself(tmp_path, stored):
    """No copy and no descriptor; the pool gets the very values, though the file and its name are gone."""
    tensors = {name: tensor.to(stored) for name, tensor in make_tensors(rank=20).items()}
    folder = write_folder(tmp_path / "a", make_config(r=20), tensors)
    copy = read_adapter(folder, "g", LAYOUT, torch.float32, 64)
    descriptors = psutil.Process().num_fds()
    adapter = read_adapter(folder, "g", LAYOUT, torch.float32, 64, mapped)
    assert psutil.Process().num_fds() == descriptors
    home = str(folder / "adapter_model.safetensors")
    spans = [
        tuple(int(bound, 16) for bound in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(home)
    ]
    for delta in adapter.deltas:
        for factor in (delta.a, delta.b):
            assert any(low <= factor.data_ptr() < high for low, high in spans)
    assert adapter.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    shutil.rmtree(folder)
    pools = [Pool(LAYOUT, dict.fromkeys(LAYOUT.groups, 2), torch.float32, "cpu") for _ in range(2)]
    for pool, one in zip(pools, (adapter, copy), strict=True):
        assert pool.admit(one)
    for left, right in zip(pools[0].sites, pools[1].sites, strict=True):
        assert torch.equal(left.a, right.a)
        assert torch.equal(left.b, right.b)
        assert torch.equal(left.scale, right.scale)
    del adapter, delta, factor, one
    gc.collect()
    assert home not in Path("/proc/self/maps").read_text()
