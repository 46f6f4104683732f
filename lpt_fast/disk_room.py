"""A full disk while a training saves: each library has an error of its own for it, users get one
sentence.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cursor import last_checkpoint

# What safetensors, tokenizers and torch.save say of a disk without room.
_SIGNS = (
    "No space left on device",
    "PytorchStreamWriter failed writing file",
    "file write failed",
    "unexpected pos",
)


@contextmanager
def saving_to(folder: str | Path) -> Iterator[None]:
    """Around what saves checkpoints in a folder.

    Raises:
        OSError: there was no room; names the last checkpoint that was written to its end.
    """
    try:
        yield
    except Exception as error:  # (tokenizers raises no narrower one)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(sign in str(error) for sign in _SIGNS):
            raise
        kept = last_checkpoint(folder)
        way = "start again" if kept is None else f"go on with --resume_from_checkpoint {kept}"
        raise OSError(
            f"There is no room left to save the training in {folder}, expected some for "
            f"checkpoints and the adapter; make room, or name another --output_dir, and {way}."
        ) from error
