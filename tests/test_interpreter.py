"""Runs tests/interpreter in Triton's interpreter, file by file in processes of their own: whether
Triton interprets is decided at import, and other tests need it not to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "interpreter"
QUICK = "test_traffic.py"
FILES = [
    pytest.param(path.name, marks=[] if path.name == QUICK else [pytest.mark.slow])
    for path in sorted(HERE.glob("test_*.py"))
]


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name):
    pytest.importorskip("triton")
    # One thread: the interpreter is numpy on small blocks, where more only get in the way.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    command += [str(HERE / name)]
    run = dict(capture_output=True, text=True, env=env, cwd=HERE.parents[1])
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
