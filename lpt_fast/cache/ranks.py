"""Several processes that fill one cache: who they are, how they agree, how they wait.

One short collective at the start, so that all work by the same plan; after that they look at files,
so that no process hangs in a collective for another that died.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from .errors import CacheError

DEADLINE = 600.0  # seconds without any progress of the others
VARIABLE = "LPT_DEADLINE"  # of the environment: another number of seconds


def deadline_seconds() -> float:
    """Seconds that a process waits for others that make no progress.

    Raises:
        CacheError: the variable holds no such number.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text) if text else DEADLINE
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e8:
        raise CacheError(
            f"{VARIABLE} is {text!r}, expected a number of seconds above 0; unset it for "
            f"{DEADLINE:.0f}."
        )
    return seconds


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun or accelerate started.

    Attributes:
        rank, world: number of this process, and of all.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Ranks:
        """From torch.distributed where it runs, else from torchrun's variables."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        try:
            ranks = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        except ValueError:
            ranks = cls(-1, 0)
        if not 0 <= ranks.rank < ranks.world:
            raise CacheError(
                f"RANK={os.environ.get('RANK')} and WORLD_SIZE={os.environ.get('WORLD_SIZE')} do "
                "not fit, expected 0 <= RANK < WORLD_SIZE; start with torchrun, or unset both."
            )
        return ranks

    def agree(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives on rank 0 (a JSON object), on every rank; its CacheError likewise."""
        if self.world == 1:
            return make()
        message = b""
        if self.rank == 0:
            try:
                message = json.dumps({"value": make()}).encode()
            except (CacheError, OSError) as error:
                message = json.dumps({"error": str(error)}).encode()
                with suppress(CacheError):
                    self._share_in_time(message)  # the error itself counts for more
                raise
        message = self._share_in_time(message)
        content = json.loads(message)
        if "error" in content:
            raise CacheError(content["error"])
        return content["value"]

    def _share_in_time(self, message: bytes) -> bytes:
        """`_share`, which on a thread of its own can be left alone: a client of torch's store waits
        for ever, whatever its timeout, for a host that a cut network no longer reaches.
        """
        answer: Queue = Queue()

        def share():
            try:
                answer.put(self._share(message))
            except BaseException as error:
                answer.put(error)

        patience = deadline_seconds()
        Thread(target=share, name="lpt-fast agreement", daemon=True).start()
        # (The store has two deadlines, to find its host and to get an answer.)
        whole = 2 * patience + 1
        try:
            got = answer.get(timeout=whole)
        except Empty:
            got = RuntimeError(f"the network did not answer for {whole:.0f} s")
        if isinstance(got, bytes):
            return got
        if not isinstance(got, RuntimeError):
            raise got
        others = "process 0" if self.rank else "the other processes"
        reason = (str(got).splitlines() or [type(got).__name__])[0].rstrip(".")
        raise CacheError(
            f"Process {self.rank} of {self.world} could not agree with {others} on what to "
            f"compute, expected an answer within {patience:.0f} s ({VARIABLE}): "
            f"{reason}; see whether they run and the network holds, then start again."
        ) from got

    def _share(self, message: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        import torch
        import torch.distributed as dist

        patience = timedelta(seconds=deadline_seconds())
        if not dist.is_initialized():
            # The store that torchrun keeps for its processes, else one that rank 0 keeps. (A
            # process group of our own would be in the way of the Trainer's.)
            global _calls, _store
            _calls += 1
            if _store is None:
                _store, _, _ = next(dist.rendezvous("env://", timeout=patience))
            key = f"lpt_fast/cache/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{_calls}"
            seen = [f"{key}/{rank}" for rank in range(self.world)]
            if self.rank == 0:
                _store.set(key, message)
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                    _store.wait(seen[1:], patience)  # it ends with this process
                return message
            _store.wait([key], patience)
            message = _store.get(key)
            _store.set(seen[self.rank], "")
            return message
        group = dist.new_group(backend="gloo", timeout=patience)
        try:
            size = torch.tensor([len(message)])
            dist.broadcast(size, src=0, group=group)
            data = torch.empty(int(size), dtype=torch.uint8)
            if self.rank == 0:
                data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            dist.broadcast(data, src=0, group=group)
            return data.numpy().tobytes()
        finally:
            dist.destroy_process_group(group)


_calls = 0  # every rank counts alike
_store = None


def wait_until(
    done: Callable[[], bool], folders: Iterable[Path], what: str, deadline: float | None = None
) -> None:
    """Waits for `done`, as long as files in `folders` change.

    Args:
        done: whether it is there.
        folders: whose files show progress.
        what: is waited for, in words.
        deadline: seconds without a change; default: deadline_seconds().

    Raises:
        CacheError: nothing changed for so long; says what was waited for.
    """
    folders = list(folders)
    deadline = deadline_seconds() if deadline is None else deadline
    state, since = None, time.monotonic()
    while not done():
        now = [_state(folder) for folder in folders]
        if now != state:
            state, since = now, time.monotonic()
        elif time.monotonic() - since > deadline:
            raise CacheError(
                f"Nothing happened for {deadline:.0f} s while waiting for {what}, so a process "
                "seems to have died; what is finished stays, start again."
            )
        time.sleep(0.05)


def _state(folder: Path) -> list[tuple]:
    out = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                info = entry.stat(follow_symlinks=False)
                out.append((entry.name, info.st_size, info.st_mtime_ns))
            except FileNotFoundError:
                continue
    return sorted(out)
