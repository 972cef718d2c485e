"""A step as one buffer of numbers: what goes in comes out, and what a bucket adds reads and writes nobody's."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kernels.plans import AttentionPlan, DeltaPlan, Heads
from kernels.segments import Segment, Span
from server.model.kv_cache import PADDING_BLOCK
from server.model.runner import StepInputs
from server.model.step_tables import StepLayout

BLOCK, ENOUGH = 16, 4
SEGMENTS = (Segment(0, 1, (4,), (1.0,)), Segment(1, 3, (2, 0), (0.5, 1.0)))


def step(segments) -> StepInputs:
    spans = tuple(Span(row, row + 1, 20 + row, (1 + 2 * row, 2 + 2 * row)) for row in range(3))
    at = np.array([19, 20, 21])
    kv_index = np.array([35, 68, 101])
    return StepInputs(np.array([7, 8, 9]), at, kv_index, np.arange(3), spans, segments)


def filled(layout, inputs):
    """The buffer, every place that nobody wrote marked."""
    out = np.full(layout.size, -(2**30), np.int32)
    return out, layout.fill(out, inputs)


def bucket(groups, pages=2, rows=8):
    return StepLayout(rows, None, dict.fromkeys(groups, pages), 40, BLOCK, 1, ENOUGH, False)


def test_a_step_as_large_as_its_layout():
    inputs = step({"qkv": SEGMENTS, "o": ()})
    layout = StepLayout.of(inputs, BLOCK, Heads(4, 64), fixed=False)
    assert (layout.rows, layout.wanted, layout.most_pages, layout.most_blocks) == (3, 3, {"qkv": 2}, 6)
    out, used = filled(layout, inputs)
    tensors = layout.view(torch.from_numpy(out), used)
    assert tensors.token_ids.tolist() == [7, 8, 9]
    assert tensors.positions.tolist() == [19, 20, 21]
    assert tensors.kv_index.tolist() == [35, 68, 101]
    assert tensors.logits_rows.tolist() == [0, 1, 2]
    assert tensors.token_ids.dtype is torch.int64
    assert used.size <= layout.size


def test_the_rows_that_pad_a_bucket_are_nobodys():
    layout = bucket(["qkv"])
    out, _ = filled(layout, step({"qkv": SEGMENTS}))
    tensors = layout.view(torch.from_numpy(out))
    assert tensors.token_ids.tolist() == [7, 8, 9, 0, 0, 0, 0, 0]
    assert tensors.kv_index.tolist()[3:] == [PADDING_BLOCK * BLOCK] * 5
    assert tensors.logits_rows is None
    plans = tensors.plans
    assert (plans.attention.rows, plans.attention.records) == (8, 8 + ENOUGH)
    assert (plans.deltas["qkv"].rows, plans.deltas["qkv"].most_pages) == (8, 2)


@pytest.mark.parametrize("shared", [True, False])
def test_each_group_has_the_plan_of_its_segments(shared):
    """One that shares its segments with another has a copy of its plan; one without any an empty plan."""
    other = SEGMENTS if shared else (Segment(2, 3, (5,), (1.0,)),)
    layout = bucket(["qkv", "o", "down"])
    out, _ = filled(layout, step({"qkv": SEGMENTS, "o": other}))
    plans = layout.view(torch.from_numpy(out)).plans.deltas
    for group, segments in (("qkv", SEGMENTS), ("o", other), ("down", ())):
        want = np.zeros(DeltaPlan.sizes(8, 2), np.int32)
        used = DeltaPlan.fill(want, segments, 8)
        assert plans[group].buffer[:used].tolist() == want[:used].tolist(), group


def test_plans_of_the_same_segments_are_left_as_they_are():
    """And of others written anew: what is read is what a buffer filled for the first time holds."""
    layout, other = bucket(["qkv", "o"]), (Segment(0, 2, (5,), (1.0,)),)
    kept = {"qkv": SEGMENTS, "o": other}
    out, used = filled(layout, step(kept))
    out[layout._places["o"]] = -7
    again = layout.fill(out, step(kept), used)
    assert out[layout._places["o"]] == -7, "written again for the same segments"
    assert (again.size, again.deltas) == (used.size, used.deltas)
    for segments in ({"qkv": other, "o": SEGMENTS}, {"qkv": (), "o": other}, {"qkv": SEGMENTS}):
        used = layout.fill(out, step(segments), used)
        want, _ = filled(layout, step(segments))
        plans = [layout.view(torch.from_numpy(each)).plans.deltas for each in (out, want)]
        for group, size in used.deltas.items():
            assert plans[0][group].buffer[:size].tolist() == plans[1][group].buffer[:size].tolist()


@given(
    st.integers(1, 300),
    st.one_of(st.none(), st.integers(1, 64)),
    st.lists(st.integers(1, 16), max_size=4),
)
def test_plans_begin_where_16_bytes_do(rows, wanted, pages):
    """On a device a buffer does; Triton would compile kernels again for other addresses."""
    layout = StepLayout(
        rows, wanted, {f"g{n}": most for n, most in enumerate(pages)}, 40, BLOCK, 1, ENOUGH, False
    )
    assert len(layout._places) == len(pages) + 1
    assert all(place % 4 == 0 for place in layout._places.values())


def test_attention_comes_last_for_its_end_varies_most():
    layout = bucket(["qkv"])
    inputs = step({"qkv": SEGMENTS})
    out, used = filled(layout, inputs)
    want = np.full(AttentionPlan.sizes(8, 40, ENOUGH), -(2**30), np.int32)
    count, size = AttentionPlan.fill(want, inputs.spans, 8, 1, ENOUGH)
    assert out[used.size - count : used.size].tolist() == want[:count].tolist()
    assert used.attention == size


def test_what_is_not_asked_for_is_the_first_row():
    layout = StepLayout(8, 5, {}, 40, BLOCK, 1, ENOUGH, False)
    inputs = step({})
    out = np.full(layout.size, -7, np.int32)
    layout.fill(out, inputs)
    wanted = layout.view(torch.from_numpy(out)).logits_rows.tolist()
    assert wanted == [*inputs.logits_rows.tolist(), *[0] * (5 - len(inputs.logits_rows))]
    assert (layout.logits, StepLayout(8, None, {}, 40, BLOCK, 1, ENOUGH, False).logits) == (5, 8)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5000)), min_size=1, max_size=9),
    st.integers(0, 30),
    st.sampled_from([1, 8, 32]),
    st.integers(0, 40),
    st.booleans(),
)
@example([(1, 256)] * 15, 0, 1, 32, False)  # which has as many lines as there can be
def test_a_bucket_has_room_for_every_share(chunks, padding, queries, enough, fixed):
    if fixed:  # of which decodes alone are captured
        chunks = [(1, before) for _, before in chunks]
    ends = np.cumsum([count for count, _ in chunks]).tolist()
    held = [-(-(count + before) // BLOCK) for count, before in chunks]
    spans = [
        Span(end - count, end, count + before, range(blocks))
        for (count, before), end, blocks in zip(chunks, ends, held, strict=True)
    ]
    rows, wanted, zeros = ends[-1] + padding, len(chunks), np.zeros(ends[-1], np.int64)
    layout = StepLayout(rows, wanted, {}, sum(held) + padding, BLOCK, queries, enough, fixed)
    inputs = StepInputs(zeros, zeros, zeros, np.arange(wanted), spans, {})
    used, most = filled(layout, inputs)[1].attention, layout.most_attention
    assert used.tiles <= most.tiles == layout.most_tiles <= rows
    assert used.records <= most.records
    assert used.lines <= most.lines


def test_which_graphs_may_share_keys():
    """All of decodes, and those of prompts that are no more than fill two devices."""
    heads = Heads(4, 8)

    def shared(rows, wanted):
        layout = StepLayout.bucket(
            rows, wanted, groups=(), pages=0, most_blocks=rows, block_size=BLOCK, heads=heads, fixed=False
        )
        return layout.view(torch.zeros(layout.size, dtype=torch.int32)).plans.attention.shared

    assert all(shared(rows, None) for rows in (1, 32, 256))
    assert [shared(rows, 64) for rows in (16, 512, 513, 2048)] == [True, True, False, False]
