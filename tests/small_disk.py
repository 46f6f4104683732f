"""Disks of a few MB, mounted for a test. Needs the right to mount; skipped without."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(path: Path, size: int):
    """A small disk at `path`."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a disk here")
    try:
        yield path
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(path)], capture_output=True)
        subprocess.run(["umount", "-l", str(path)], check=True)


def stuff(path: Path, leave: int = 0) -> Path:
    """Fills the disk with a file, all but `leave` bytes."""
    ballast = path / "ballast"
    with open(ballast, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, max(1, shutil.disk_usage(path).free - leave))
    return ballast
