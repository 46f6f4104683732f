"""Files of a cache that are damaged, exchanged or gone."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from lpt_fast.cache.folder import Folder
from tests.cache.cases import (
    forged,
    texts,
)

DATA = texts(60)


def shards(folder: Path) -> list[Path]:
    """Those in the middle of the folder first."""
    found = sorted(folder.glob("*.safetensors"))
    return found[3:] + found[:3]


def keys_of(folder: Path, *paths: Path) -> set[bytes]:
    read = Folder.read(folder)
    return {key.tobytes() for path in paths for key in read.read_shard(path.name).row_key}


# -- whole files -----------------------------------------------------------------------------------


def cut(path: Path, size: int) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def append(path: Path) -> None:
    with open(path, "ab") as f:
        f.write(b"\0")


def exchange(folder: Path, a: Path, b: Path) -> None:
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


def in_place_of(path: Path, make) -> None:
    path.unlink()
    make(path)


def link_to_copy(path: Path) -> None:
    copy = path.parent.parent.parent / path.name
    path.rename(copy)
    path.symlink_to(copy)


def other_generation(path: Path) -> None:
    """A sound shard of the same rows that holds other numbers."""
    path.write_bytes(forged(path, hidden=lambda a: a ^ 1))


def make_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(before)


DAMAGES = {
    "one byte less": (lambda p: cut(p, -1), r"has \d+ bytes, expected \d+ by the index"),
    "half": (lambda p: cut(p, 4300), r"has 4300 bytes, expected \d+ by the index"),
    "in the header": (lambda p: cut(p, 100), r"has 100 bytes"),
    "empty": (lambda p: cut(p, 0), r"has 0 bytes"),
    "one byte more": (append, r"has \d+ bytes, expected \d+ by the index"),
    "missing": (Path.unlink, "is missing, expected a file that the cache's index names"),
    "folder": (lambda p: in_place_of(p, Path.mkdir), "is no plain file"),
    "pipe": (lambda p: in_place_of(p, os.mkfifo), "is no plain file"),
    "socket": (lambda p: in_place_of(p, make_socket), "is no plain file"),
    "link": (link_to_copy, "is a symbolic link, expected a plain file"),
    "dangling link": (lambda p: in_place_of(p, lambda q: q.symlink_to("no")), "a symbolic link"),
    "link to itself": (lambda p: in_place_of(p, lambda q: q.symlink_to(q)), "a symbolic link"),
    "other bits": (other_generation, "is sound but not the shard that the index names"),
}
