"""Processes that share a study and are killed at random moments, as one command:

python -m tests.cli.sweep_killed study FOLDER KILLS    trials that sleep, three processes at once
python -m tests.cli.sweep_killed sweep JSON KILLS      whole sweeps, of these settings, one by one
python -m tests.cli.sweep_killed both JSON             two whole sweeps at once

Whoever ends by itself adds a line to ended.txt in the folder. What is imported once is forked.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

POINTS = {"insertion_layer": "1,2,3", "learning_rate": "1e-3,2e-3"}
SEEDS = "1..10"


def fork(run, *args) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run(*args)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code)


def study_of(folder: Path, grid: bool = True, trials: int = 60):
    from lpt_fast.cli.sweep_space import Space, parse_axis, parse_seeds
    from lpt_fast.cli.sweep_study import SweepStudy

    points = POINTS if grid else POINTS | {"learning_rate": "1e-4..1e-2"}
    axes = {name: parse_axis(name, text) for name, text in points.items()}
    space = Space(axes, parse_seeds(SEEDS))
    return SweepStudy(folder, space, trials, grid, None, 2, {"data": "a"})


def work(folder: Path, grid: bool) -> None:
    """Runs trials that do nothing, until none is left."""
    study = study_of(folder, grid)
    draw = random.Random(os.getpid())
    while True:
        claimed = study.claim(4)
        if not claimed and len(study.finished()) >= study.total:
            break
        for trial in claimed:
            study.report(trial, 1, 0.5)
            time.sleep(draw.uniform(0, 0.2))
            study.finish(trial, 0.5 + trial.seed / 10, False, 0.1, 7)
        time.sleep(0.01)
    study.close()
    with open(folder / "ended.txt", "a") as out:
        out.write(f"{os.getpid()}\n")


def kill_some(start, kills: int, at_once: int, longest: float) -> None:
    """Kills processes at random moments, each followed by another; the last ones may end."""
    draw = random.Random(kills)
    alive = [start() for _ in range(at_once)]
    for _ in range(kills):
        time.sleep(draw.uniform(0, longest))
        pid = alive.pop(draw.randrange(len(alive)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        alive.append(start())
    for pid in alive:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def sweep(settings: dict) -> None:
    from lpt_fast import Sweep

    result = Sweep(**settings).run()
    with open(result.folder / "ended.txt", "a") as out:
        out.write(f"{os.getpid()}\n")


def main(what: str, where: str, kills: str = "0") -> None:
    if what == "study":
        import lpt_fast.cli.sweep_study

        for grid in (True, False):
            folder = Path(where) / ("grid" if grid else "tpe")
            folder.mkdir()
            # (Opening a study takes a second: killed sooner, they would have claimed nothing.)
            kill_some(lambda f=folder, g=grid: fork(work, f, g), int(kills), 3, 2.0)
        return
    import lpt_fast.cli.sweep
    import lpt_fast.cli.sweep_output
    import lpt_fast.cli.sweep_trials  # noqa: F401

    settings = json.loads(where)
    at_once = 2 if what == "both" else 1
    kill_some(lambda: fork(sweep, settings), int(kills), at_once, 4.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
