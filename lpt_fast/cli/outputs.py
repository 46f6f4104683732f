"""Files and folders that a command will write: looked at before it works, written whole or not at
all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


def check_folder(path: str | Path, flag: str, *files: str) -> None:
    """Looks whether a folder can be made, or written to where there is one already.

    Args:
        path: of the folder.
        flag: the setting that names it, for the message.
        files: names of files that will be written to it.

    Raises:
        ValueError: something else has its name, or it cannot be written to.
    """
    path = Path(path).absolute()
    there = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not there.is_dir():
        what = "a link that leads nowhere" if there.is_symlink() else "a file"
        where = f"is {path}" if there == path else f"is {path} below {there}"
        raise ValueError(f"`{flag}` {where}, which is {what}, expected a folder; name another.")
    _check_writable(there, path, flag)
    for name in files:
        if (path / name).is_dir():
            raise ValueError(
                f"`{flag}` is {path}, in which {name} is a folder, expected a file or nothing of "
                "that name; name another, or take it away."
            )


def check_file(path: str | Path, flag: str) -> None:
    """Looks whether a file can be written; one of that name will be replaced.

    Args:
        path: of the file.
        flag: the setting that names it, for the message.

    Raises:
        FileNotFoundError: there is no folder to write it to.
        ValueError: it is a folder, or its folder cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"`{flag}` is {path}, which is a folder, expected a file; name one in it, such as "
            f"{path / 'labels.tsv'}."
        )
    if path.exists() and not path.is_file():  # a pipe, a device
        return
    target = path.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {target.parent} to write {path.name} to (`{flag}`); make it, or "
            "name another."
        )
    _check_writable(target.parent, path, flag)


def _check_writable(folder: Path, path: Path, flag: str) -> None:
    try:
        # (Asking for permissions would not see a disk that is mounted for reading alone.)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`{flag}` is {path}, and {folder} cannot be written to ({error.strerror}), expected a "
            "place where files can be made; name another, or change its permissions."
        ) from None


@contextmanager
def whole_file(path: str | Path) -> Iterator[TextIO]:
    """A text file, UTF-8, that has its name when all of it is written. Whatever goes wrong before,
    what was there stays, and nothing beside it.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe or a device is written to as it is
        with open(path, "w", encoding="utf-8") as out:
            yield out
        return
    target = path.resolve()  # a link stays one
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as out:
            yield out
        os.replace(part, target)
    except BaseException:
        with suppress(FileNotFoundError):
            part.unlink()
        raise
