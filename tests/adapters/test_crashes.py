"""A process that dies at any file operation of a change: what is on disk is whole, and what was acknowledged stands."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys

import pytest

from adapters.store import hash_folder
from tests.adapters.doomed import ACKNOWLEDGED, CHANGES
from tests.adapters.test_registry import Shop

KILLED = -signal.SIGKILL


def state(shop: Shop) -> dict[str, str]:
    return {entry.name: entry.generation for entry in shop.registry.entries()}


@pytest.mark.parametrize("moment", ["before", "half way", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_killed_at_every_operation(original, tmp_path, name, moment):
    whole = tmp_path / "whole"
    shutil.copytree(original, whole)
    before_shop = Shop(whole, keep_versions=1)
    before = state(before_shop)
    CHANGES[name](whole, before_shop.registry)
    after = state(before_shop)
    before_shop.store.close()
    assert after != before

    seen = set()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.adapters.doomed", name, moment],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as doomed:
        for number in range(100):
            root = tmp_path / str(number)
            shutil.copytree(original, root)
            print(number, root, file=doomed.stdin, flush=True)
            ended = int(doomed.stdout.readline())
            assert ended in (ACKNOWLEDGED, KILLED)
            shop = Shop(root, keep_versions=1)
            found = state(shop)
            assert found in (before, after), f"operation {number} left neither the old state nor the new"
            if ended == ACKNOWLEDGED:
                assert found == after, "an acknowledged change is gone"
            for entry in shop.registry.entries():
                assert entry.state == "ready"
                assert hash_folder(shop.store.folder(entry.generation)) == entry.generation
                shop.registry.read(entry.generation)
            assert shop.store.files.names(shop.store.root / "incoming") == []
            shop.registry.check()
            shop.store.close()
            seen.add(found == after)
            if ended == ACKNOWLEDGED:
                break
    assert ended == ACKNOWLEDGED, "the change has more operations than were tried"
    assert number >= 3
    assert True in seen
    assert False in seen or (name, moment) == ("delete", "after"), "a delete begins with what makes it so"
