"""What several tests of the store begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters.samples import adapter_files, write_zip
from tests.adapters.test_registry import Shop


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store, to be copied: `legal` in two versions, `other`, an archive and a folder that are to come."""
    root = tmp_path_factory.mktemp("original")
    shop = Shop(root, keep_versions=1)
    for seed in (1, 2):
        shop.put("legal", seed)
    shop.put("other", 1)
    write_zip(root / "archive", adapter_files(shop.folder(9)))
    shop.store.close()
    return root
