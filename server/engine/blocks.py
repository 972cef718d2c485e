"""Owner of KV blocks: which are free, and which come next. Knows ids only, neither tensors nor tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from server.model.kv_cache import PADDING_BLOCK


class Blocks:
    """Hands out block ids, side by side where it can: attention reads a contiguous run without copying it."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = np.ones(total, dtype=bool)
        self._free[PADDING_BLOCK] = False
        self._free_count = total - 1

    @property
    def free(self) -> int:
        return self._free_count

    @property
    def used(self) -> int:
        return self.total - 1 - self._free_count

    def extend(self, table: list[int], count: int) -> bool:
        """Append `count` blocks to a block table; False, and nothing changed, when so many are not free."""
        if count > self._free_count:
            return False
        for left in range(count, 0, -1):
            block = self._next(table[-1] if table else None, left)
            self._free[block] = False
            table.append(block)
        self._free_count -= count
        return True

    def release(self, table: list[int]) -> None:
        """Take back a table's blocks and empty it."""
        assert not self._free[table].any() if table else True, "a block was released twice"
        self._free[table] = True
        self._free_count += len(table)
        table.clear()

    def check(self, tables: Iterable[list[int]]) -> None:
        """Assert that every block is free or in exactly one of `tables`."""
        held = [block for table in tables for block in table]
        assert len(held) == len(set(held)), "a block is in two tables"
        assert PADDING_BLOCK not in held
        assert not self._free[held].any() if held else True
        assert int(self._free.sum()) == self._free_count == self.total - 1 - len(held)

    def _next(self, last: int | None, wanted: int) -> int:
        """The block after `last` if it is free, else the middle of the longest free run: room to grow on both sides."""
        if last is not None and last + 1 < self.total and self._free[last + 1]:
            return last + 1
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self._free.view(np.int8), [0]))))
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        longest = int(lengths.argmax())
        return int(starts[longest]) + max(0, (int(lengths[longest]) - wanted) // 2)
