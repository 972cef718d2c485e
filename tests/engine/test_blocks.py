"""KV blocks under random use: every block is free or in one table, and neighbours stay side by side."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.blocks import Blocks, block_hash
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
        alone = len([block for block in set(table) if not any(block in other for other in self.tables)])
        self.blocks.release(table)
        assert table == []
        assert held >= alone == self.blocks.free - free

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0), at=st.integers(0), content=st.integers(0, 5))
    def fill(self, which, at, content):
        table = self.tables[which % len(self.tables)]
        self.blocks.remember(table[at % len(table)], bytes([content]))

    @rule(contents=st.lists(st.integers(0, 5), min_size=1, max_size=3))
    def take_up(self, contents):
        """What is taken up stays what it was: nobody else gets it while it is held."""
        table = []
        hashes = [bytes([content]) for content in contents]
        taken = self.blocks.reuse(table, hashes)
        assert taken == len(table) <= len(hashes)
        again = []
        assert self.blocks.reuse(again, hashes) == taken
        assert again == table
        self.blocks.release(again)
        if table:
            self.tables.append(table)

    @invariant()
    def books_agree(self):
        self.blocks.check(self.tables)
        assert self.blocks.used == len({block for table in self.tables for block in table})
        assert self.blocks.free == TOTAL - 1 - self.blocks.used


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


def hashes(tokens, key, size=4):
    found = []
    for start in range(0, len(tokens) - size + 1, size):
        found.append(block_hash(found[-1] if found else b"", tokens[start : start + size], key))
    return found


def test_a_hash_is_of_all_before_it_and_of_the_adapter():
    text = list(range(8))
    assert hashes(text, "a") == hashes(text, "a")
    assert hashes(text, "a")[1] != hashes([9, *text[1:]], "a")[1]
    assert not set(hashes(text, "a")) & set(hashes(text, "b"))
    assert not set(hashes(text, "a")) & set(hashes(text, None))


def test_idle_blocks_are_taken_up_until_their_room_is_needed():
    blocks, first = Blocks(5), []
    blocks.extend(first, 2)
    for block, content in zip(first, (b"one", b"two"), strict=True):
        blocks.remember(block, content)
    held = list(first)
    blocks.release(first)
    again = []
    assert blocks.reuse(again, [b"one", b"two", b"three"]) == 2
    assert again == held
    blocks.release(again)
    other = []
    assert blocks.extend(other, 3)  # two blank ones, then the end of what was idle
    assert held[1] in other
    assert blocks.reuse([], [b"two"]) == 0
    assert blocks.reuse(again, [b"one"]) == 1
    blocks.check([other, again])
