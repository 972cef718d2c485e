"""The registry against a model of it: puts, moves, references and restarts at random."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters.errors import AdapterError
from adapters.store import hash_folder
from tests.adapters.test_registry import Shop

KEEP = 2
ROOM = 3  # contents that the store's quota holds


class RegistryMachine(RuleBasedStateMachine):
    names = st.sampled_from(["a", "b", "c"])
    seeds = st.integers(0, 3)

    @initialize()
    def start(self):
        self.root = Path(tempfile.mkdtemp(prefix="registry"))
        self.shop = Shop(self.root, keep_versions=KEEP)
        self.folders = [self.shop.folder(seed) for seed in range(4)]
        self.generations = [hash_folder(folder) for folder in self.folders]
        self.shop.quota = ROOM * sum(path.stat().st_size for path in self.folders[0].iterdir())
        self.shop.reopen()
        self.versions: dict[str, list[tuple[int, str]]] = {}  # oldest first, the present one last
        self.held = []

    def _moved(self, name, generation):
        past = self.versions.get(name, [])
        revision = past[-1][0] + 1 if past else 1
        self.versions[name] = [*past, (revision, generation)][-KEEP - 1 :]

    def _needed(self):
        """What may not be dropped: every version that is kept, and what is held."""
        kept = {generation for past in self.versions.values() for _, generation in past}
        return kept | {reference.generation for reference in self.held}

    def _full(self, name, generation):
        """Whether the content is one too many, with the version that the move would drop gone."""
        before, past = self._needed(), self.versions.get(name)
        self._moved(name, generation)
        after = self._needed()
        self.versions[name] = past or []
        if not past:
            del self.versions[name]
        return generation not in before and len(after) > ROOM

    @rule(name=names, seed=seeds)
    def put(self, name, seed):
        generation = self.generations[seed]
        if self._full(name, generation):
            with pytest.raises(AdapterError) as caught:
                self.shop.registry.put_folder(name, self.folders[seed])
            assert caught.value.code == "store_full"
            return
        same = name in self.versions and self.versions[name][-1][1] == generation
        put = self.shop.registry.put_folder(name, self.folders[seed])
        assert put.created is not same
        if put.created:
            self._moved(name, generation)
        assert (put.entry.revision, put.entry.generation) == self.versions[name][-1]

    @rule(name=names, seed=seeds, expected=seeds)
    def put_if_match(self, name, seed, expected):
        current = self.versions[name][-1][1] if name in self.versions else None
        if current == self.generations[expected] and not self._full(name, self.generations[seed]):
            self.shop.registry.put_folder(name, self.folders[seed], current)
            if current != self.generations[seed]:
                self._moved(name, self.generations[seed])
            return
        with pytest.raises(AdapterError):
            self.shop.registry.put_folder(name, self.folders[seed], self.generations[expected])

    @rule(name=names, back=st.integers(0, KEEP))
    def rollback(self, name, back):
        past = self.versions.get(name, [])
        if back >= len(past):
            with pytest.raises(AdapterError):
                self.shop.registry.rollback(name, 10_000)
            return
        revision, generation = past[-1 - back]
        entry = self.shop.registry.rollback(name, revision)
        if generation != past[-1][1]:
            self._moved(name, generation)
        assert (entry.revision, entry.generation) == self.versions[name][-1]

    @rule(name=names)
    def delete(self, name):
        if self.versions.pop(name, None) is None:
            with pytest.raises(AdapterError):
                self.shop.registry.delete(name)
        else:
            self.shop.registry.delete(name)

    @rule(name=names)
    def resolve(self, name):
        if name not in self.versions:
            with pytest.raises(AdapterError):
                self.shop.registry.resolve(name)
            return
        reference = self.shop.registry.resolve(name)
        assert reference.generation == self.versions[name][-1][1]
        self.held.append(reference)

    @rule(which=st.integers(0, 20))
    def release(self, which):
        if self.held:
            reference = self.held.pop(which % len(self.held))
            self.shop.gone.clear()
            reference.release()
            reference.release()
            current = {past[-1][1] for past in self.versions.values()}
            others = {other.generation for other in self.held}
            alone = reference.generation not in current | others
            assert self.shop.gone == ([reference.generation] if alone else [])

    @rule()
    def restart(self):
        self.held.clear()
        self.shop.reopen()

    @invariant()
    def books_agree(self):
        if not hasattr(self, "shop"):
            return
        registry = self.shop.registry
        registry.check()
        entries = {entry.name: entry for entry in registry.entries()}
        assert entries.keys() == self.versions.keys()
        for name, past in self.versions.items():
            entry = entries[name]
            assert entry.state == "ready"
            assert entry.references == sum(held.generation == entry.generation for held in self.held)
            found = [(version.revision, version.generation) for version in registry.versions(name)]
            assert found == past[::-1]
        needed = self._needed()
        assert needed <= self.shop.store.generations()
        assert registry.stored_bytes <= self.shop.quota
        registry.sweep()
        assert needed == self.shop.store.generations()

    def teardown(self):
        if hasattr(self, "shop"):
            self.shop.store.close()
            shutil.rmtree(self.root)


RegistryMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=12, deadline=None)
TestRegistryMachine = RegistryMachine.TestCase
