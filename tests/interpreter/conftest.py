"""Tests of the Triton kernels: the same ones run in the interpreter (a process of its own with
TRITON_INTERPRET=1, started by ../test_interpreter.py) and, marked `gpu`, on a CUDA device.
"""

from __future__ import annotations

import os
from functools import cache
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


@pytest.fixture
def ordered_sums(monkeypatch):
    """PyTorch's own index_add and scatter_add on a GPU sum in any order; not here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=INTERPRETED)
def patched_once_a_launch():
    """Triton's interpreter patches its language anew for each helper that a kernel calls, which is
    a third of its time; the patch of the launch is still there. And it looks dtypes up in a table
    that it makes each time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    class Nothing:
        def restore(self):
            pass

    original, patched = interpreter._patch_lang, set()

    def patch(fn):
        values = fn.__globals__.values()
        languages = {x for x in values if x is tl or x is tl.core}
        if languages <= patched:
            return Nothing()
        scope = original(fn)
        undo = scope.restore
        patched.update(languages)
        scope.restore = lambda: (patched.clear(), undo())
        return scope

    with pytest.MonkeyPatch.context() as own:
        own.setattr(interpreter, "_patch_lang", patch)
        known = cache(interpreter._get_np_dtype)
        pointer = interpreter._get_np_dtype(tl.pointer_type(tl.int8))
        of = lambda x: pointer if isinstance(x.scalar, tl.pointer_type) else known(x.scalar)  # noqa: E731
        own.setattr(interpreter, "_get_np_dtype", of)
        yield
