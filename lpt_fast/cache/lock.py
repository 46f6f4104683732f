"""One builder at a time: a lock that the operating system takes back from a builder that dies."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CacheBusyError, CacheError, reason
from .folder import LOCK


def _holder(fd: int) -> str:
    """Who holds the lock, as it wrote itself."""
    try:
        who = json.loads(os.pread(fd, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(who["since"])))
        return f"process {int(who['pid'])} on {str(who['host'])[:64]} since {since}"
    except (ValueError, KeyError, TypeError, OSError, OverflowError, RecursionError):
        return "another process"


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Lets SIGTERM end a block as Ctrl-C does, so that it can tidy up. Handlers of others stay."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def building(folder: Path, wait: float = 0) -> Iterator[None]:
    """Holds the lock of a cache while its block runs.

    Args:
        folder: of the cache.
        wait: seconds to wait for a builder that is at work.

    Raises:
        CacheBusyError: somebody else builds, and still does after `wait` seconds; says who.
        CacheError: a folder that cannot be written.
    """
    path = folder / LOCK
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CacheError(
            f"The cache folder {folder} cannot be written: {reason(error)} (at {path.name}); give "
            "a folder that can be written, or a cache that has all the rows already."
        ) from None
    try:
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise CacheBusyError(
                        f"The cache {folder} is being built by {_holder(fd)}; wait for it (--wait "
                        "SECONDS does), or use another folder."
                    ) from None
                time.sleep(min(0.2, max(0.01, end - time.monotonic())))
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps(who).encode(), 0)
        yield
    finally:
        os.close(fd)
