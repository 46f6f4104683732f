"""Runs tests/interpreter in Triton's interpreter, file by file in processes of their own: whether
Triton interprets is decided at import, and other tests need it not to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "interpreter"
FILES = sorted(path.name for path in HERE.glob("test_*.py"))


def run(name: str) -> subprocess.CompletedProcess:
    # One thread: the interpreter is numpy on small blocks, where more only get in the way.
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parents[1])


@pytest.fixture(scope="module")
def processes():
    """One process a core; all are started by the first test."""
    pytest.importorskip("triton")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run, name) for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name, processes):
    done = processes[name].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
