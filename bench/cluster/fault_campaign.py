"""Faults at random moments of precompute and training on two processes; what became of the rows and
of the training.

    python -m bench.cluster.fault_campaign --faults 100 --seed 0 --stop 20 \\
        --out bench/results/faults.jsonl

After each fault the processes have to end by themselves or go on; they are started again until all
is done. Then every row is compared with that of an undisturbed build on one process, and the end of
the training with that of an undisturbed one.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import typer

from .fault_pair import Pair, mend, rows_of, served
from .two_machines import Machines, NoMachines, two_machines

JOBS = ("precompute", "training")
KINDS = ("killed", "stopped", "full disk", "deleted shard", "flipped bit", "cut link")
PATIENCE = 3.0  # seconds that processes wait for each other, where none is stopped
DISK = 8 << 20  # bytes of the small disk
ATTEMPTS = 4  # starts after a fault, at most


@dataclass(frozen=True)
class Fault:
    """What happens, when and to whom.

    Attributes:
        kind, job: of KINDS and JOBS.
        share: moment, as a share of an undisturbed run.
        rank: whom it meets.
        seed: of what else is random.
    """

    kind: str
    job: str
    share: float
    rank: int
    seed: int


@dataclass
class Outcome:
    """What became of a fault: a line of the table."""

    fault: Fault
    moment: float = 0.0
    told: list[str] = field(default_factory=list)
    starts: int = 0
    rows_lost: int = 0
    wrong_rows: int = 0
    refused: int = 0
    hung: int = 0
    repaired: bool = False
    same_end: bool = True
    noticed: float = 0.0
    recovery: float = 0.0

    @property
    def sound(self) -> bool:
        return not (self.rows_lost or self.wrong_rows or self.hung) and self.same_end

    def to_json(self) -> dict:
        """A line of the results file."""
        return {
            "fault": self.fault.kind,
            "job": self.fault.job,
            "rank": self.fault.rank,
            "seed": self.fault.seed,
            "moment_s": round(self.moment, 2),
            "outcome": self.told,
            "starts": self.starts,
            "rows_lost": self.rows_lost,
            "wrong_rows": self.wrong_rows,
            "refused_rows": self.refused,
            "repaired": self.repaired,
            "hung": self.hung,
            "same_end": self.same_end,
            "noticed_s": round(self.noticed, 2),
            "recovery_s": round(self.recovery, 2),
        }

    def __str__(self) -> str:
        told = "; ".join(dict.fromkeys(text[:60] for text in self.told))
        return (
            f"{self.fault.kind:13} {self.fault.job:10} {self.moment:5.2f} s  lost {self.rows_lost} "
            f"wrong {self.wrong_rows} refused {self.refused:3} starts {self.starts} "
            f"noticed {self.noticed:5.1f} s recovery {self.recovery:5.1f} s "
            f"{'ok ' if self.sound else 'NOT OK'} {told}"
        )


# -- faults ----------------------------------------------------------------------------------------


def _fill_up(file: int, root: Path, leave: int) -> None:
    """Takes all of a disk but a few bytes, while others write to it."""
    for _ in range(20):
        try:
            os.posix_fallocate(file, 0, max(1, shutil.disk_usage(root).free - leave))
            return
        except OSError as error:  # somebody has taken a part of it since it was asked for
            if error.errno != errno.ENOSPC:
                raise


def strike(fault: Fault, pair: Pair, root: Path, machines: Machines | None, stop: float):
    """Makes it happen now; returns what undoes it after the processes have ended."""
    dice = random.Random(fault.seed)
    if fault.kind == "killed":
        pair.signal(fault.rank, signal.SIGKILL)
    elif fault.kind == "stopped":
        pair.signal(fault.rank, signal.SIGSTOP)
        time.sleep(stop)
        pair.signal(fault.rank, signal.SIGCONT)
    elif fault.kind == "full disk":
        ballast = root / "ballast"
        leave = dice.choice((0, 3000, 20_000))
        with open(ballast, "wb") as f:
            os.posix_fallocate(f.fileno(), 0, max(1, shutil.disk_usage(root).free - leave))
        return lambda: ballast.unlink()
    elif fault.kind == "cut link":
        machines.cut()
        return machines.mend
    else:
        shard = _some_shard(root, dice, pair)
        if shard is not None and fault.kind == "deleted shard":
            shard.unlink(missing_ok=True)
        elif shard is not None:
            with suppress(FileNotFoundError), open(shard, "r+b") as f:
                place = dice.randrange(shard.stat().st_size)
                byte = os.pread(f.fileno(), 1, place)[0]
                os.pwrite(f.fileno(), bytes([byte ^ 1 << dice.randrange(8)]), place)
    return lambda: None


def _some_shard(root: Path, dice: random.Random, pair: Pair) -> Path | None:
    """Waits for one where there is none yet."""
    while True:
        shards = sorted(root.glob("cache/*/*.safetensors"))
        if shards or not pair.alive():
            return dice.choice(shards) if shards else None
        time.sleep(0.005)


@dataclass
class Campaign:
    """What is the same for all faults: the undisturbed ends, and where things happen.

    Attributes:
        place: folder for everything.
        machines: two machines, or None where there are none.
        stop: seconds that a stopped process stands still.
    """

    place: Path
    machines: Machines | None
    stop: float
    rows: dict[bytes, np.ndarray] = field(default_factory=dict)
    end: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def prepare(self) -> None:
        """The undisturbed runs: rows on one process, the training on two."""
        alone, together = self.place / "alone", self.place / "together"
        for root, what, world in (
            (alone, "precompute", 1),
            (together, "precompute", 2),
            (together, "training", 2),
        ):
            root.mkdir(exist_ok=True)
            pair = Pair(root, what, world, 60.0)
            told, results, _ = pair.end()
            if told != ["done"] * world:
                raise RuntimeError(f"An undisturbed {what} ended with {told}.")
            self.seconds[what] = time.monotonic() - pair.begun
        self.rows, self.end = rows_of(alone), results[0]
        if served(together, self.rows)["equal"] != len(self.rows):
            raise RuntimeError("Two processes build other rows than one.")
        shutil.copytree(together / "cache", self.place / "filled")

    def suffer(self, fault: Fault) -> Outcome:
        """One fault, and everything until all is done again. (Where the processes had ended before
        its moment, once more with an earlier one.)
        """
        while True:
            with _room(self.place / "work", fault.kind == "full disk") as root:
                if fault.job == "training":
                    shutil.copytree(self.place / "filled", root / "cache")
                out = self._suffer(fault, root)
            if out is not None:
                return out
            fault = replace(fault, share=fault.share * 0.7)

    def _suffer(self, fault: Fault, root: Path) -> Outcome | None:
        out = Outcome(fault)
        machines = self.machines if fault.kind == "cut link" else None
        patience = 2 * self.stop + 5 if fault.kind == "stopped" else PATIENCE
        pair = Pair(root, fault.job, 2, patience, machines)
        moment = fault.share * self.seconds[fault.job]
        while pair.alive() and time.monotonic() - pair.begun < moment:
            time.sleep(0.002)
        struck = time.monotonic()
        out.moment = struck - pair.begun
        at_work = pair.alive()
        undo = strike(fault, pair, root, machines, self.stop)
        out.told, results, out.hung = pair.end()
        ended = time.monotonic()
        out.noticed = ended - struck
        undo()
        if not at_work or (fault.kind == "killed" and "SIGKILL" not in out.told):
            return None
        while True:
            seen = served(root, self.rows)
            out.wrong_rows += seen["wrong"]
            out.refused += seen["refused"]
            damaged = mend(root)
            out.repaired = out.repaired or damaged
            done = all(result is not None for result in results)
            if done and seen["equal"] == len(self.rows) and not damaged:
                break
            if out.starts == ATTEMPTS:
                out.told.append("not done after all starts")
                break
            out.starts += 1
            told, results, hung = Pair(root, fault.job, 2, 60.0).end()
            out.hung += hung
            if told != ["done"] * 2:
                out.told += told
        out.recovery = time.monotonic() - ended
        out.rows_lost = len(self.rows) - seen["equal"] - seen["wrong"]
        out.same_end = results[0] is not None and self._same(results[0])
        return out

    def _same(self, result: dict) -> bool:
        """Whether a training came to the undisturbed end, to 1e-5."""
        if not result:
            return True  # precompute
        if len(result["losses"]) != len(self.end["losses"]):
            return False
        close = np.allclose(result["losses"], self.end["losses"], rtol=1e-5, atol=0)
        return close and all(
            np.allclose(result["weights"][name], values, rtol=1e-4, atol=1e-6)
            for name, values in self.end["weights"].items()
        )


@contextmanager
def _room(path: Path, small: bool):
    """A fresh folder; a small disk of its own where it has to get full."""
    path.mkdir()
    try:
        if small:
            command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)]
            subprocess.run(command, check=True, capture_output=True)
        yield path
    finally:
        if small:
            subprocess.run(["umount", "-l", str(path)], capture_output=True)
        shutil.rmtree(path, ignore_errors=True)


def planned(count: int, seed: int, kinds: list[str]) -> list[Fault]:
    """Faults by seed: all kinds in turn over both jobs, at random moments."""
    dice = random.Random(seed)
    return [
        Fault(
            kinds[i % len(kinds)],
            JOBS[(i + i // len(kinds)) % 2],
            dice.random(),
            dice.randrange(2),
            dice.randrange(1 << 30),
        )
        for i in range(count)
    ]


def can_mount() -> bool:
    """Whether this process may make a small disk."""
    with tempfile.TemporaryDirectory() as path:
        command = ["mount", "-t", "tmpfs", "-o", "size=65536", "tmpfs", path]
        made = shutil.which("mount") and not subprocess.run(command, capture_output=True).returncode
        if made:
            subprocess.run(["umount", "-l", path], capture_output=True)
        return bool(made)


def campaign(
    count: int, seed: int, stop: float, tell: Callable[[Outcome], None]
) -> tuple[list[Outcome], list[str]]:
    """Runs the faults.

    Returns:
        What became of each, and the kinds that cannot happen on this machine.
    """
    kinds, outcomes = list(KINDS), []
    with ExitStack() as stack:
        memory = Path("/dev/shm")
        where = str(memory) if os.access(memory, os.W_OK) else None
        place = Path(stack.enter_context(tempfile.TemporaryDirectory("lpt-faults", dir=where)))
        machines = None
        try:
            machines = stack.enter_context(two_machines())
        except NoMachines:
            kinds.remove("cut link")
        if not can_mount():
            kinds.remove("full disk")
        runs = Campaign(place, machines, stop)
        runs.prepare()
        for fault in planned(count, seed, kinds):
            outcomes.append(runs.suffer(fault))
            tell(outcomes[-1])
    return outcomes, [kind for kind in KINDS if kind not in kinds]


def table(outcomes: list[Outcome]) -> list[str]:
    """Lines that sum up, kind by kind."""
    lines = ["fault         job        faults  rows lost  wrong rows  refused  hung  other end"]
    lines[0] += "  median recovery s  longest"
    for kind in KINDS:
        for job in JOBS:
            own = [o for o in outcomes if (o.fault.kind, o.fault.job) == (kind, job)]
            if not own:
                continue
            seconds = [o.recovery for o in own]
            lines.append(
                f"{kind:13} {job:10} {len(own):6} {sum(o.rows_lost for o in own):10} "
                f"{sum(o.wrong_rows for o in own):11} {sum(o.refused for o in own):8} "
                f"{sum(o.hung for o in own):5} {sum(not o.same_end for o in own):10} "
                f"{statistics.median(seconds):18.1f} {max(seconds):8.1f}"
            )
    return lines


def main(
    faults: int = typer.Option(100, "--faults", min=1),
    seed: int = typer.Option(0, "--seed"),
    stop: float = typer.Option(20.0, "--stop", help="Seconds that a stopped process stands still."),
    out: str = typer.Option(None, "--out", help="JSON lines are appended to it."),
) -> None:
    """Faults at random moments of precompute and training; ends with 1 where one did harm."""
    from ..machine import describe

    machine = describe()

    def tell(outcome: Outcome) -> None:
        typer.echo(str(outcome))
        if out is not None:
            line = json.dumps({**outcome.to_json(), "stop_s": stop, **machine})
            with open(out, "a", encoding="utf-8") as f:
                f.write(line + "\n")

    outcomes, impossible = campaign(faults, seed, stop, tell)
    for line in table(outcomes):
        typer.echo(line)
    if impossible:
        typer.echo(f"Not on this machine: {', '.join(impossible)}.")
    if not all(outcome.sound for outcome in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
