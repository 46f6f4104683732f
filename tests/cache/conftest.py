"""A model to cache, and caches that the tests of damage start from."""

from __future__ import annotations

import shutil

import pytest

from tests.cache.cases import (
    files,
    fill,
    folder_of,
    rows_of,
)
from tests.cache.damage import (
    DATA,
)
from tests.tiny import tiny


@pytest.fixture(scope="module")
def model():
    return tiny("bert")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Store -> a folder with a sound cache, and its rows."""
    out = {}
    for store in ("bf16", "int8c"):
        root = tmp_path_factory.mktemp(store)
        out[store] = root, rows_of(fill(root, DATA, store=store))
    return out


@pytest.fixture
def sound(stores, tmp_path):
    """A copy to damage: root, folder, rows by key, files."""
    root = shutil.copytree(stores["bf16"][0], tmp_path / "cache")
    return root, folder_of(root), stores["bf16"][1], files(folder_of(root))
