"""KV blocks under random use: every block is free or in one table, and neighbours stay side by side."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.blocks import Blocks
from server.model.kv_cache import PADDING_BLOCK

TOTAL = 12


class BlocksMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.blocks = Blocks(TOTAL)
        self.tables = []

    @rule(count=st.integers(1, TOTAL))
    def open(self, count):
        table = []
        free = self.blocks.free
        assert self.blocks.extend(table, count) == (count <= free)
        assert len(table) == (count if count <= free else 0)
        assert self.blocks.free == free - len(table)
        if table:
            self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0), count=st.integers(1, 4))
    def grow(self, which, count):
        table = self.tables[which % len(self.tables)]
        before, free = list(table), self.blocks.free
        assert self.blocks.extend(table, count) == (count <= free)
        assert table[: len(before)] == before
        assert len(table) == len(before) + (count if count <= free else 0)

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0))
    def close(self, which):
        table = self.tables.pop(which % len(self.tables))
        free, held = self.blocks.free, len(table)
        self.blocks.release(table)
        assert table == []
        assert self.blocks.free == free + held

    @invariant()
    def books_agree(self):
        self.blocks.check(self.tables)
        assert self.blocks.used == sum(map(len, self.tables))


BlocksMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBlocks = BlocksMachine.TestCase


def test_a_table_is_contiguous_while_there_is_room():
    blocks = Blocks(64)
    tables = [[], []]
    for _ in range(4):
        for table in tables:
            assert blocks.extend(table, 3)
    for table in tables:
        assert table == list(range(table[0], table[0] + 12))


def test_every_block_but_the_padding_is_handed_out():
    blocks, table = Blocks(TOTAL), []
    assert blocks.extend(table, TOTAL - 1)
    assert sorted(table) == [block for block in range(TOTAL) if block != PADDING_BLOCK]
    assert not blocks.extend(table, 1)


def test_check_sees_a_lost_and_a_shared_block():
    blocks, table = Blocks(TOTAL), []
    blocks.extend(table, 2)
    with pytest.raises(AssertionError):
        blocks.check([table[:1]])
    with pytest.raises(AssertionError):
        blocks.check([table, table[:1]])


def test_releasing_twice_is_noticed():
    blocks, table = Blocks(TOTAL), []
    blocks.extend(table, 2)
    again = list(table)
    blocks.release(table)
    with pytest.raises(AssertionError, match="twice"):
        blocks.release(again)
