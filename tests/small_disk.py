"""Disks of a few MB, mounted for a test. Needs the right to mount; skipped without."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
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
    """Fills the disk with a file, all but `leave` bytes (whole pages of them)."""
    ballast = path / "ballast"
    with open(ballast, "wb", buffering=0) as f:
        # What the disk says of its room is not exact: written until no page fits.
        with contextlib.suppress(OSError):
            while f.write(bytes(4096)) == 4096:
                pass
        f.truncate(max(f.tell() - leave // 4096 * 4096, 0))
    return ballast
