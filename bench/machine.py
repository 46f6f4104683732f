"""What a result has to say about where it came from."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def _commit() -> str:
    """Of the tree, as it is when first asked; LPT_COMMIT where that is set, for a copy of the tree
    on a lent machine may have another history or none.
    """
    if given := os.environ.get("LPT_COMMIT"):
        return given
    try:
        run = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(
            run, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str | None:
    """Of a package; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict:
    """Machine, threads, versions and commit of a measurement."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    names = ("torch", "triton", "transformers", "peft")
    return {
        "machine": device,
        "versions": {name: _version(name) for name in names}
        | {"python": platform.python_version()},
        "commit": _commit(),
    }
