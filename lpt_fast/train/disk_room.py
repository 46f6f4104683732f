"""A full disk while a training saves: each library has an error of its own for it, users get one
sentence.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from .cursor import last_checkpoint

# What safetensors, tokenizers and torch.save say of a disk without room.
_SIGNS = (
    "No space left on device",
    "PytorchStreamWriter failed writing file",
    "file write failed",
    "unexpected pos",
)


@contextmanager
def saving_to(folder: str | Path, resumed: str | None = None) -> Iterator[None]:
    """Around what saves checkpoints in a folder.

    Args:
        folder: of the training.
        resumed: the checkpoint that it goes on from, or None.

    Raises:
        OSError: there was no room; names the last checkpoint of this training that was written to
            its end.
    """
    before = _newest(folder)
    try:
        yield
    except Exception as error:  # (tokenizers raises no narrower one)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(sign in str(error) for sign in _SIGNS):
            raise
        # What was there before may be another training's.
        kept = _newest(folder)
        kept = resumed if kept is None or kept == before else kept[0]
        way = "start again" if kept is None else f"go on with --resume_from_checkpoint {kept}"
        said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise OSError(
            f"There is no room left to save the training in {folder} ({said}), expected some for "
            f"checkpoints and the adapter; make room, or name another --output_dir, and {way}."
        ) from error


def _newest(folder: str | Path) -> tuple[Path, int] | None:
    """The last whole checkpoint, and when it was written."""
    found = last_checkpoint(folder)
    return None if found is None else (found, (found / TRAINER_STATE_NAME).stat().st_mtime_ns)
