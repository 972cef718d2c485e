"""Owner of KV blocks: which are free, which hold what, and which come next. Knows ids and hashes, not tensors.

A full block is remembered under a hash of its tokens, of all before them and of the adapter's generation; when its last
sequence lets go it stays as it is, free for anybody, until its room is needed. A later sequence with the same beginning
takes it up again instead of computing it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, MutableSequence, Sequence

import numpy as np

from server.model.kv_cache import PADDING_BLOCK

Table = MutableSequence[int]  # a sequence's block ids, in order


def block_hash(before: bytes, tokens: Sequence[int], key: str | None) -> bytes:
    """The hash of one full block: of the block before it, of its tokens, and of the adapter it was computed with.

    The key is per block, so that blocks computed without an adapter may be shared by sequences that have one later.
    """
    content = np.asarray(tokens, dtype=np.int64).tobytes()
    return hashlib.blake2b(before + (key or "").encode() + b"\0" + content, digest_size=16).digest()


class Blocks:
    """Hands out block ids, side by side where it can: attention reads a contiguous run without copying it."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._blank = np.ones(total, dtype=bool)  # free, and nothing worth keeping in them
        self._blank[PADDING_BLOCK] = False
        self._idle: OrderedDict[int, None] = OrderedDict()  # free, but remembered; longest unused first
        self._holders: Counter[int] = Counter()
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that no sequence holds, remembered ones among them."""
        return self.total - 1 - len(self._holders)

    @property
    def used(self) -> int:
        return len(self._holders)

    def extend(self, table: Table, count: int) -> bool:
        """Append `count` blocks to a block table; False, and nothing changed, when so many are not free."""
        if count > self.free:
            return False
        for left in range(count, 0, -1):
            block = self._next(table[-1] if table else None, left)
            self._blank[block] = False
            self._holders[block] = 1
            table.append(block)
        return True

    def reuse(self, table: Table, hashes: Iterable[bytes]) -> int:
        """Append the blocks remembered under the first of `hashes`, up to the first unknown; returns how many."""
        taken = 0
        for each in hashes:
            block = self._block_of.get(each)
            if block is None:
                break
            self._idle.pop(block, None)
            self._holders[block] += 1
            table.append(block)
            taken += 1
        return taken

    def knows(self, content: bytes) -> bool:
        """Whether a block is remembered under this hash."""
        return content in self._block_of

    def remember(self, block: int, content: bytes) -> None:
        """A held block is full and computed; of two with the same content the first is kept in mind."""
        assert self._holders[block], "a block that nobody holds cannot have been computed"
        if content not in self._block_of and block not in self._hash_of:
            self._block_of[content] = block
            self._hash_of[block] = content

    def release(self, table: Table) -> None:
        """Let go of a table's blocks and empty it; its end is forgotten before its beginning."""
        for block in reversed(table):
            assert self._holders[block] > 0, "a block was released twice"
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                if block in self._hash_of:
                    self._idle[block] = None
                else:
                    self._blank[block] = True
        del table[:]

    def check(self, tables: Iterable[Table]) -> None:
        """Assert that every block is blank, idle or held, and held as often as it stands in `tables`."""
        assert Counter(block for table in tables for block in table) == self._holders
        blank = set(np.flatnonzero(self._blank).tolist())
        states = [blank, set(self._idle), set(self._holders), {PADDING_BLOCK}]
        assert sum(map(len, states)) == self.total
        assert set().union(*states) == set(range(self.total))
        assert {block: content for content, block in self._block_of.items()} == self._hash_of
        assert set(self._idle) <= set(self._hash_of)
        assert not blank & set(self._hash_of)

    def _next(self, last: int | None, wanted: int) -> int:
        """The block after `last` if it is blank, else the middle of the longest blank run: room to grow on both sides.

        With no blank block left, the one that has been idle for longest, and what it held is forgotten.
        """
        if last is not None and last + 1 < self.total and self._blank[last + 1]:
            return last + 1
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self._blank.view(np.int8), [0]))))
        if not len(edges):
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
            return block
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        longest = int(lengths.argmax())
        return int(starts[longest]) + max(0, (int(lengths[longest]) - wanted) // 2)
