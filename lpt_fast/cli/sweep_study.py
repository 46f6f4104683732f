"""The study of a sweep: an Optuna study in a SQLite file that several processes share.

Who takes which trial is decided under one lock (a file that the operating system unlocks when its
holder dies), and each process holds a lock of its own for as long as it lives. So a running trial
whose owner's lock is free is that of a process that died: it is marked as failed, and its place is
free again. What is finished says so in one transaction. Hence each trial is finished once, whoever
is killed when.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import URL

from .sweep_space import KINDS, Axis, Space, key_of

STUDY = "study.db"
NAME = "sweep"
STARTUP = 5  # finished trials before any is pruned
DRAWS = 10  # of a sampler that gives what is known, before a setting is taken that is not
_BUSY = 120.0  # seconds that a process waits for another's transaction
_OVER = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class SweepTrial:
    """One training: a setting with a seed, taken by this process.

    Attributes:
        number: in the study.
        setting: values of the axes.
        seed: of the training.
        handle: Optuna's trial.
    """

    number: int
    setting: dict[str, Any]
    seed: int
    handle: optuna.Trial = field(compare=False, repr=False)

    @property
    def layer(self) -> int:
        return self.setting["insertion_layer"]


@dataclass(frozen=True)
class Finished:
    """A trial that is done.

    Attributes:
        number, setting, seed: as of SweepTrial.
        accuracy: of the last epoch that it ran, in [0, 1].
        pruned: whether it was stopped early.
        curve: accuracy by epoch.
        seconds: of training, without evaluations.
        parameters: that were trained.
    """

    number: int
    setting: dict[str, Any]
    seed: int
    accuracy: float
    pruned: bool
    curve: list[float]
    seconds: float
    parameters: int


class _Given(BaseSampler):
    """Gives the values that were chosen already."""

    def __init__(self, params: dict[str, Any]):
        self.params = params

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        return self.params[param_name]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file while its block runs; waits for whoever has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class Owner:
    """A name for this process, and a lock that says whether it lives.

    Args:
        folder: of all owners of a study.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, uuid.uuid4().hex
        self._fd = os.open(self._path(self.name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.lock"

    def lives(self, name: str | None) -> bool:
        """Whether the process of that name does."""
        if name == self.name:
            return True
        try:
            fd = os.open(self._path(name or ""), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        self._path(name).unlink(missing_ok=True)
        return False

    def close(self) -> None:
        self._path(self.name).unlink(missing_ok=True)
        os.close(self._fd)


class SweepStudy:
    """The study in a folder, made where there is none.

    Args:
        folder: of the sweep.
        space: of the sweep, with the layer in it.
        trials: most trainings.
        grid: each setting once; else Optuna's TPE.
        prune_after: first epochs, in which nothing is pruned; None: no pruning.
        epochs: of a training; in the last one nothing is pruned.
        facts: what all trials of a study have in common, as text.

    Raises:
        ValueError: the study there is one of other facts.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        trials: int,
        grid: bool,
        prune_after: int | None,
        epochs: float,
        facts: dict[str, str],
    ):
        self.folder, self.space, self.grid, self.epochs = folder, space, grid, epochs
        self._lock = folder / "study.lock"
        self._distributions = {axis.name: distribution(axis) for axis in space.varying}
        self._all = space.settings()
        most = trials // len(space.seeds)
        self.wanted = most if self._all is None else min(most, len(self._all))
        pruner = optuna.pruners.NopPruner()
        if prune_after is not None:
            pruner = optuna.pruners.MedianPruner(STARTUP, n_warmup_steps=prune_after + 1)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with locked(self._lock):
            self._storage = _storage(folder / STUDY)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=NAME,
                direction="maximize",
                load_if_exists=True,
                pruner=pruner,
            )
            self._check(facts)
        self._owner = Owner(folder / "running")

    def _check(self, facts: dict[str, str]) -> None:
        known = self._study.user_attrs.get("facts")
        if known is None:  # it is new
            self._study.set_user_attr("facts", facts)
            return
        for name in {**facts, **known}:
            there, here = known.get(name), facts.get(name)
            if there != here:
                raise ValueError(
                    f"The study {self.folder / STUDY} is of other {name}, got "
                    f"{_short(here)}, expected {_short(there)} as there; name another "
                    "--output_dir, or take that one."
                )

    # -- taking ------------------------------------------------------------------------------------

    def claim(self, most: int) -> list[SweepTrial]:
        """Takes trials that nobody has: of one layer and seed where they are known already, new
        ones of a sampler as they come.

        Args:
            most: so many at most.

        Returns:
            None where all are done or taken.
        """
        with locked(self._lock):
            trials = self._look()
            taken = {_key(t) for t in trials if t.state != TrialState.FAIL}
            settings = self._settings(trials)
            free = [
                (setting, seed)
                for seed in self.space.seeds
                for setting in settings.values()
                if (key_of(setting), seed) not in taken
            ]
            if free:
                first, seed = free[0]
                layer = first["insertion_layer"]
                alike = [s for s, of in free if of == seed and s["insertion_layer"] == layer]
                return [self._ask(setting, seed) for setting in alike[:most]]
            new = min(most, self.wanted - len(settings))
            return [self._suggest(settings) for _ in range(new)]

    def _look(self) -> list[optuna.trial.FrozenTrial]:
        """All trials, after those of processes that died were given back."""
        trials = self._study.get_trials(deepcopy=False)
        dead = [
            t
            for t in trials
            # (One without an owner: killed while it was asked for, for nobody else is in here.)
            if t.state == TrialState.RUNNING
            and not self._owner.lives(t.user_attrs.get("claim", {}).get("owner"))
        ]
        for trial in dead:
            self._study.tell(trial.number, state=TrialState.FAIL)
        return self._study.get_trials(deepcopy=False) if dead else trials

    def _settings(self, trials: list[optuna.trial.FrozenTrial]) -> dict[str, dict[str, Any]]:
        """Those that are to be run, by key."""
        known = [t.user_attrs["claim"]["setting"] for t in trials if "claim" in t.user_attrs]
        if self.grid:
            known = self._all
        return {key_of(setting): setting for setting in known}

    def _ask(self, setting: dict[str, Any], seed: int) -> SweepTrial:
        self._study.sampler = _Given(self.space.params_of(setting))
        return self._own(self._study.ask(self._distributions), setting, seed)

    def _suggest(self, settings: dict[str, dict[str, Any]]) -> SweepTrial:
        """A setting of the sampler's that is new; it is added to `settings`."""
        # (With the same numbers, a sweep that goes on would draw again what it drew before.)
        self._study.sampler = TPESampler(seed=len(settings))
        draws = 0
        while True:
            trial = self._study.ask(self._distributions)
            setting = self.space.setting_of(trial.params)
            if setting is not None and key_of(setting) not in settings:
                found = self._own(trial, setting, self.space.seeds[0])
                break
            self._study.tell(trial, state=TrialState.FAIL)
            draws += 1
            if draws == DRAWS:  # (It may like nothing but what cannot be.)
                self._study.sampler = RandomSampler(seed=len(settings))
            if draws >= DRAWS and self._all is not None:
                setting = next(s for s in self._all if key_of(s) not in settings)
                found = self._ask(setting, self.space.seeds[0])
                break
        settings[key_of(setting)] = setting
        return found

    def _own(self, trial: optuna.Trial, setting: dict[str, Any], seed: int) -> SweepTrial:
        claim = {"owner": self._owner.name, "setting": setting, "seed": seed}
        trial.set_user_attr("claim", claim)  # at once, so that there is no half a claim
        return SweepTrial(trial.number, setting, seed, trial)

    # -- while they run ----------------------------------------------------------------------------

    def report(self, trial: SweepTrial, step: int, accuracy: float) -> bool:
        """Notes the accuracy after an epoch; whether the training should stop."""
        trial.handle.report(accuracy, step)
        return step < self.epochs and trial.handle.should_prune()

    def finish(
        self, trial: SweepTrial, accuracy: float, pruned: bool, seconds: float, parameters: int
    ) -> None:
        """Notes the end of a trial."""
        trial.handle.set_user_attr("seconds", round(seconds, 2))
        trial.handle.set_user_attr("parameters", parameters)
        if pruned:
            self._study.tell(trial.handle, state=TrialState.PRUNED)
        else:
            self._study.tell(trial.handle, accuracy)

    def give_back(self, trials: list[SweepTrial]) -> None:
        """Lets others run what this process did not finish."""
        for trial in trials:
            with suppress(ValueError):  # it is finished
                self._study.tell(trial.handle, state=TrialState.FAIL)

    # -- after -------------------------------------------------------------------------------------

    def finished(self) -> list[Finished]:
        """What is done, by whomever, in the order of the trials."""
        out = []
        for t in self._study.get_trials(deepcopy=False, states=_OVER):
            claim, curve = t.user_attrs["claim"], t.intermediate_values
            out.append(
                Finished(
                    number=t.number,
                    setting=claim["setting"],
                    seed=claim["seed"],
                    accuracy=t.value,
                    pruned=t.state == TrialState.PRUNED,
                    curve=[curve[step] for step in sorted(curve)],
                    seconds=t.user_attrs["seconds"],
                    parameters=t.user_attrs["parameters"],
                )
            )
        return out

    @property
    def total(self) -> int:
        """Trials in all."""
        settings = len(self._all) if self.grid else self.wanted
        return settings * len(self.space.seeds)

    def close(self) -> None:
        """Lets go of the study."""
        self._owner.close()
        self._storage.remove_session()
        self._storage.engine.dispose()


def distribution(axis: Axis) -> optuna.distributions.BaseDistribution:
    """Optuna's, of an axis."""
    if axis.values is not None:
        return CategoricalDistribution(axis.values)
    if axis.whole:
        return IntDistribution(axis.low, axis.high)
    return FloatDistribution(axis.low, axis.high, log=KINDS[axis.name].log)


def _storage(path: Path) -> RDBStorage:
    url = URL.create("sqlite", database=str(path.absolute())).render_as_string(False)
    try:
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _BUSY}})
    except ImportError:  # An incomplete installation: the file is none the worse for it.
        raise
    except Exception as error:
        # (SQLAlchemy and Optuna have several, of classes of their own.)
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} cannot be opened as a study ({_short(said)}), expected that of a sweep or "
            "nothing; name another --output_dir, or take the file away."
        ) from None


def _key(trial: optuna.trial.FrozenTrial) -> tuple[str, int] | None:
    claim = trial.user_attrs.get("claim")
    return None if claim is None else (key_of(claim["setting"]), claim["seed"])


def _short(text: str | None) -> str:
    text = "nothing" if text is None else str(text)
    return text if len(text) <= 60 else f"{text[:57]}..."
