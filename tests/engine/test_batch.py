"""A step's rows: where each token goes, what each sequence reads, and which rows give logits."""

from array import array

from server.engine import batch as batches
from server.engine.scheduler import Scheduled
from tests.engine.fakes import GROUP, Parts, make_adapter, sequence, step_inputs_rows


def started(parts, asked, blocks, computed=0):
    asked.blocks, asked.computed = array("i", blocks), computed
    if asked.generation is not None:
        if not parts.pool.resident(asked.generation):
            assert parts.pool.admit(parts.adapters[asked.generation])
        parts.pool.pin(asked.generation)
    return asked


def test_rows_of_a_mixed_step():
    parts = Parts([make_adapter("a", rank=20), make_adapter("b")])
    decode = started(parts, sequence((5, 6, 7), output=(8,), generation="a"), [9], computed=3)
    whole = started(parts, sequence((10, 11, 12, 13, 14), generation="a"), [3, 2])
    chunk = started(parts, sequence(range(1, 12), generation="b"), [5, 7, 6], computed=4)
    base = started(parts, sequence((20, 21)), [4])
    batch = [Scheduled(base, 2), Scheduled(decode, 1), Scheduled(whole, 5), Scheduled(chunk, 4)]
    inputs = batches.build(batch, parts.residency, 4)
    assert step_inputs_rows(inputs).tolist() == [
        [20, 0, 16], [21, 1, 17],
        [8, 3, 39],
        [10, 0, 12], [11, 1, 13], [12, 2, 14], [13, 3, 15], [14, 4, 8],
        [5, 4, 28], [6, 5, 29], [7, 6, 30], [8, 7, 31],
    ]  # fmt: skip
    spans = [(span.start, span.end, span.kv_length, tuple(map(int, span.blocks))) for span in inputs.spans]
    assert spans == [(0, 2, 2, (4,)), (2, 3, 4, (9,)), (3, 8, 5, (3, 2)), (8, 12, 8, (5, 7, 6))]
    assert inputs.logits_rows.tolist() == [1, 2, 7]
    segments = [(s.start, s.end, s.pages, s.weights) for s in inputs.segments[GROUP]]
    a, b = parts.pool.pages("a")[GROUP], parts.pool.pages("b")[GROUP]
    assert len(a) == 2
    assert segments == [(2, 8, a, (1.0, 1.0)), (8, 12, b, (1.0,))]
    assert set(inputs.segments) == {GROUP}


def test_a_step_of_the_base_alone_has_no_segments():
    parts = Parts([])
    inputs = batches.build([Scheduled(started(parts, sequence(), [1]), 3)], parts.residency, 4)
    assert not inputs.segments
    assert inputs.logits_rows.tolist() == [2]


def test_a_chunk_in_the_middle_asks_for_no_logits():
    parts = Parts([])
    inputs = batches.build([Scheduled(started(parts, sequence(range(9)), [1, 2, 3]), 8)], parts.residency, 4)
    assert inputs.logits_rows.tolist() == []


def test_rows_of_prompts_come_after_those_that_are_drawn_from():
    parts = Parts([])
    known = sequence(range(7), prompt_logprobs=1)
    known.prompt_logprobs = [None] * 4  # it gave way after its fifth token
    batch = [
        Scheduled(started(parts, sequence(range(9), prompt_logprobs=0), [1, 2, 3]), 4),
        Scheduled(started(parts, sequence((5,), prompt_logprobs=0), [4]), 1),
        Scheduled(started(parts, known, [5, 6], computed=2), 5),
        Scheduled(started(parts, sequence((1, 2), output=(3,)), [7]), 3),
    ]
    inputs = batches.build(batch, parts.residency, 4)
    assert inputs.logits_rows.tolist() == [4, 9, 12, 0, 1, 2, 3, 7, 8]
    assert [list(item.scores) for item in batch] == [[0, 1, 2, 3], [], [4, 5], []]


def test_blocks_is_a_copy():
    """A sequence that is retired before the step's end does not change what the step reads."""
    parts = Parts([])
    asked = started(parts, sequence(), [1])
    inputs = batches.build([Scheduled(asked, 3)], parts.residency, 4)
    del asked.blocks[:]
    assert inputs.spans[0].blocks.tolist() == [1]


def test_equal_adapters_stand_side_by_side_in_order_of_arrival():
    names = ["b", None, "a", "b", None, "a"]
    batch = [Scheduled(sequence(generation=name, name=str(i)), 1) for i, name in enumerate(names)]
    ordered = [item.sequence.request_id for item in batches.in_row_order(batch)]
    assert ordered == ["1", "4", "2", "5", "0", "3"]
