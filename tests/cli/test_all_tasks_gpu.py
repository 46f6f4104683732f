"""Several adapters' labels in one pass on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpt_fast.cli.all_tasks import Classifiers
from tests.cli.test_all_tasks import TEXTS, single, trained  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_each_adapter_gives_what_it_gives_alone(trained, tmp_path):  # noqa: F811
    """On the CPU, in fp32; from the text and from a cache, whose rows are bf16."""
    found = Classifiers(list(trained.values())).probabilities({"text": TEXTS})
    folders = {name: trained[name] for name in ("films", "letters", "updated")}
    loaded = Classifiers(folders, activation_cache=str(tmp_path / "cache"))
    assert loaded.device.type == "cuda"
    first = loaded.probabilities({"text": TEXTS[:7]})
    again = loaded.probabilities({"text": TEXTS})
    for name, folder in trained.items():
        expected = single(folder, compute_dtype="float32")
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
        assert np.ptp(expected[:, 0]) > 1e-3
        if name in folders:
            np.testing.assert_allclose(again[name], expected, atol=3e-2)
            np.testing.assert_allclose(again[name][:7], first[name], atol=1e-2)
