"""What a model fills into the config that a user gave: in place, as PEFT's methods do.

One object may serve several models and adapters. Each starts from what the user gave, not from what
another model filled in; where that comes out otherwise, the later one works on a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from .config import LPTConfig

FIELDS = (
    "insertion_layer",
    "target_modules",
    "lora_alpha",
    "lora_target_modules",
    "num_labels",
    "id2label",
    "modules_to_save",
)
# An attribute of the config: field -> (what the user gave, what a model filled in). It is no field
# of the dataclass, so it is not saved.
_FILLED = "_filled"


def fill_in(config: LPTConfig, fill: Callable[[LPTConfig], None]) -> LPTConfig:
    """Fills in what depends on the model.

    Args:
        config: of the adapter; unchanged if `fill` raises.
        fill: sets FIELDS of a config, or raises ValueError.

    Returns:
        `config` itself, or a copy where it serves a model already that it was filled otherwise for.
    """
    before = config.__dict__.get(_FILLED, {})
    own = copy.copy(config)
    for name, (given, filled) in before.items():
        if _same(getattr(own, name), filled):  # else the user has changed it since
            setattr(own, name, given)
    given = {name: copy.copy(getattr(own, name)) for name in FIELDS}
    fill(own)
    if own.modules_to_save is not None:  # (PEFT adds its own names each time)
        own.modules_to_save = list(dict.fromkeys(own.modules_to_save))
    made = {name: (given[name], getattr(own, name)) for name in FIELDS}
    if before and not all(_same(made[name][1], before[name][1]) for name in FIELDS):
        config = copy.deepcopy(own)
    for name, (_, filled) in made.items():
        setattr(config, name, filled)
    config.__dict__[_FILLED] = copy.deepcopy(made)
    return config


def _same(a, b) -> bool:
    return set(a) == set(b) if isinstance(a, list) and isinstance(b, list) else a == b
