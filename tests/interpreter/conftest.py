"""Tests of the Triton kernels: the same ones run in the interpreter (a process of its own with
TRITON_INTERPRET=1, started by ../test_interpreter.py) and, marked `gpu`, on a CUDA device.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    if INTERPRETED:
        return
    missing = not torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                why = "no CUDA device; tests/test_interpreter.py runs it in Triton's interpreter"
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
