"""Two machines on one computer: network namespaces with addresses of their own and a cable between
them that can be cut. Needs root and iproute2; where they lack, `two_machines` says why.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..paths import ROOT

PORT = 29400
CLONE_NEWNET = 0x40000000


class NoMachines(Exception):
    """Namespaces cannot be made here; says why."""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise NoMachines(f"`ip {' '.join(words)}` says: {done.stderr.strip()}")


@dataclass(frozen=True)
class Machines:
    """Names of the namespaces, and the addresses of their ends of the cable."""

    names: tuple[str, str]
    addresses: tuple[str, str]

    def cut(self) -> None:
        """Takes the cable out: packets get lost in both directions, nobody is told."""
        _ip("-n", self.names[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        """Puts it back."""
        _ip("-n", self.names[1], "link", "set", "cable", "up")

    def start(self, machine: int, command: list[str], log: Path, **variables) -> subprocess.Popen:
        """Runs a command on a machine, with its output in a file, in a process group of its own."""
        own = {
            "GLOO_SOCKET_IFNAME": "cable",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        }
        env = {**os.environ, **own, **{name: str(value) for name, value in variables.items()}}
        inside = ["ip", "netns", "exec", self.names[machine], *command]
        with open(log, "w") as out:
            return subprocess.Popen(inside, env=env, stdout=out, stderr=out, start_new_session=True)

    def torchrun(self, machine: int, what: list[str], log: Path, **variables) -> subprocess.Popen:
        """`torchrun --nnodes 2 --nproc_per_node 1` with the first machine as the master."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        launcher += ["--nproc_per_node", "1", "--node_rank", str(machine)]
        launcher += ["--master_addr", self.addresses[0], "--master_port", str(PORT)]
        return self.start(machine, [*launcher, *what], log, **variables)


@contextmanager
def two_machines() -> Iterator[Machines]:
    """Two namespaces with a cable between them, taken down at the end."""
    if not shutil.which("ip"):
        raise NoMachines("iproute2 is not installed")
    tag = f"lpt{os.getpid() % 100000}"
    names = (f"{tag}a", f"{tag}b")
    block = 1 + os.getpid() % 250
    addresses = (f"10.201.{block}.1", f"10.201.{block}.2")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip(
            "-n",
            names[0],
            "link",
            "add",
            "cable",
            "type",
            "veth",
            "peer",
            "cable",
            "netns",
            names[1],
        )
        for name, address in zip(names, addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        yield Machines(names, addresses)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def enter(name: str) -> None:
    """Moves this process onto a machine; before it has threads or sockets."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, CLONE_NEWNET):
            raise NoMachines(f"setns says: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)


def end(processes: list[subprocess.Popen]) -> None:
    """Kills what is left of processes that `start` started, and of what they started."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in descendants(process.pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.wait(10)


def descendants(pid: int) -> list[int]:
    """Processes below one, those that torchrun put into groups of their own included."""
    found = []
    with suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def until(true, what: str, seconds: float = 60.0) -> None:
    """Waits for something that must come."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, f"{what} did not come in {seconds:.0f} s"
        time.sleep(0.01)
