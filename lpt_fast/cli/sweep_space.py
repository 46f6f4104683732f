"""The space of a sweep: which values each setting may have, and what a setting is. Imports nothing
heavy.

`2,3,4` is a list to choose from, `5e-4..5e-3` a range, one value is fixed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

GENERATORS = ("static", "npg", "appg", "mppg", "attention", "residual", "none")
ENUMERATED = 100_000  # points, at most, of a space that is looked at one by one


@dataclass(frozen=True)
class Kind:
    """What the values of a setting are.

    Attributes:
        number: int, float or str.
        least, below: bounds of a number; `least` itself is allowed where `closed`.
        log: a range is drawn on a logarithmic scale.
        none: whether "none" may stand among the values.
    """

    number: type
    least: float = 0
    below: float = math.inf
    closed: bool = True
    log: bool = False
    none: bool = False

    def parse(self, name: str, text: str, whole: str) -> Any:
        """One value.

        Raises:
            ValueError: it is none of this kind.
        """
        if self.number is str:
            if text not in GENERATORS:
                raise _wrong(name, repr(text), f"one of {', '.join(GENERATORS)}", "correct it")
            return text
        if self.none and text.lower() == "none":
            return None
        try:
            value = self.number(text)
        except ValueError:
            value = math.nan
        if not (self.least < value or (self.closed and value == self.least)) or value >= self.below:
            what = "whole numbers" if self.number is int else "numbers"
            least = "from" if self.closed else "above"
            limit = "" if self.below == math.inf else f" and below {self.below:g}"
            raise _wrong(
                name,
                f"{text!r} in {whole!r}",
                f"{what} {least} {self.least:g}{limit}",
                "give a list such as A,B, a range A..B, or one value",
            )
        return value


RATE = Kind(float, closed=False, log=True)
SHARE = Kind(float, below=1)
KINDS = {
    "insertion_layer": Kind(int, 1),
    "generator": Kind(str),
    "num_virtual_tokens": Kind(int, 1),
    "bottleneck_size": Kind(int, 1),
    "prompt_dropout": SHARE,
    "learning_rate": RATE,
    "lora_r": Kind(int, 1, none=True),
    "lora_alpha": Kind(float, closed=False),
    "lora_dropout": SHARE,
    "lora_learning_rate": RATE,
}
SEED = Kind(int)
OF_LORA = ("lora_alpha", "lora_dropout", "lora_learning_rate")


@dataclass(frozen=True)
class Axis:
    """The values of one setting.

    Attributes:
        name: of the setting.
        values: to choose from; None for a range.
        low, high: of a range, both within.
    """

    name: str
    values: tuple | None = None
    low: float = 0
    high: float = 0

    @property
    def whole(self) -> bool:
        return KINDS[self.name].number is int

    @property
    def choices(self) -> list | None:
        """All its values; None for a range of fractions."""
        if self.values is not None:
            return list(self.values)
        return list(range(self.low, self.high + 1)) if self.whole else None

    @property
    def varies(self) -> bool:
        return self.values is None or len(self.values) > 1

    @property
    def first(self) -> Any:
        return self.low if self.values is None else self.values[0]

    def __str__(self) -> str:
        if self.values is None:
            return f"{self.low}..{self.high}"
        return ",".join("none" if value is None else str(value) for value in self.values)


def parse_axis(name: str, text: str, kind: Kind | None = None) -> Axis:
    """A setting's values as they are typed.

    Args:
        name: of the setting.
        text: a list with commas, a range with two points, or one value.
        kind: of its values; default: by its name.

    Raises:
        ValueError: values that it cannot have, an empty range, a value that is there twice.
    """
    kind = kind or KINDS[name]
    text = str(text).strip()
    low, points, high = text.partition("..")
    if points and kind.number is not str:
        exact = replace(kind, none=False)
        ends = [exact.parse(name, part.strip(), text) for part in (low, high)]
        if not ends[0] < ends[1]:
            way = f"swap them ({high}..{low})" if ends[0] > ends[1] else f"give {low} alone"
            raise _wrong(name, f"the empty range {text}", "its smaller end first", way)
        return Axis(name, None, *ends)
    values = tuple(kind.parse(name, part.strip(), text) for part in text.split(","))
    if len(set(values)) != len(values):
        raise _wrong(name, text, "different values", "leave out what is there twice")
    return Axis(name, values)


def parse_seeds(text: str) -> list[int]:
    """The seeds; `1..3` are 1, 2 and 3.

    Raises:
        ValueError: as of `parse_axis`.
    """
    axis = parse_axis("seed", text, SEED)
    return list(axis.values or range(axis.low, axis.high + 1))


@dataclass(frozen=True)
class Space:
    """The settings of a sweep.

    Attributes:
        axes: by name.
        seeds: that each setting is run with.
    """

    axes: dict[str, Axis]
    seeds: list[int]

    @property
    def varying(self) -> list[Axis]:
        return [axis for axis in self.axes.values() if axis.varies]

    @property
    def ranges(self) -> list[Axis]:
        return [axis for axis in self.axes.values() if axis.values is None]

    def setting_of(self, params: dict[str, Any]) -> dict[str, Any] | None:
        """The setting that values of the varying axes make, without those that do nothing in it;
        None where it would train nothing (no prompt and no late LoRA).
        """
        setting = {name: params.get(name, axis.first) for name, axis in self.axes.items()}
        generator = setting.get("generator")
        idle = []
        if setting.get("lora_r") is None:
            if generator == "none":
                return None
            idle += OF_LORA
        if generator == "none":
            idle += ["num_virtual_tokens", "bottleneck_size", "prompt_dropout"]
        if generator == "static":
            idle.append("bottleneck_size")
        return {name: value for name, value in setting.items() if name not in idle}

    def params_of(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Values of the varying axes that make a setting."""
        return {axis.name: setting.get(axis.name, axis.first) for axis in self.varying}

    def settings(self) -> list[dict[str, Any]] | None:
        """All different ones, in the order of the axes; None where they are too many, or a range of
        fractions is among the axes.
        """
        choices = [axis.choices for axis in self.varying]
        if None in choices or math.prod(map(len, choices)) > ENUMERATED:
            return None
        return list(self._enumerated(choices))

    def _enumerated(self, choices: list[list]) -> Iterator[dict[str, Any]]:
        seen = set()
        names = [axis.name for axis in self.varying]
        for values in product(*choices):
            setting = self.setting_of(dict(zip(names, values, strict=True)))
            if setting is not None and key_of(setting) not in seen:
                seen.add(key_of(setting))
                yield setting


def key_of(setting: dict[str, Any]) -> str:
    """What two equal settings have in common."""
    return json.dumps(setting, sort_keys=True)


def _wrong(name: str, got: str, expected: str, way: str) -> ValueError:
    return ValueError(f"`--{name}` got {got}, expected {expected}; {way}.")
