"""lpt-fast: Late Prompt Tuning as a PEFT method.

`import lpt_fast` makes PEFT know the method "LPT", so that saved adapters load by PEFT's and
Transformers' own classes. It costs nothing: what is heavy (torch, transformers, peft) is imported
when it is first used.

Rooms, each of which knows only those before it: `insertion` (the operator), `backbone` (a model cut
in two), `packed` (the upper layers without padding), `method` (the PEFT method), `cache` (lower
layers on disk), `train` (LPTTrainer), `cli` (the command line). `packing` and `tasks` are leaves.
"""

from __future__ import annotations

import importlib

from .method.register import register, register_with_peft

__version__ = "0.1.0"

_EXPORTS = {
    "ActivationCache": "cache",
    "LPTConfig": "method.config",
    "LPTModel": "method.tuner",
    "LPTTrainer": "train.trainer",
    "LatePrompt": "method.late_prompt",
    "ManyTrainer": "train.many",
    "PackedBatch": "packing",
    "Sweep": "cli.sweep",
    "last_checkpoint": "train.cursor",
    "predict_all": "cli.all_tasks",
    "shard_frozen": "train.fsdp",
}
__all__ = [
    "ActivationCache",
    "LPTConfig",
    "LPTModel",
    "LPTTrainer",
    "LatePrompt",
    "ManyTrainer",
    "PackedBatch",
    "Sweep",
    "__version__",
    "last_checkpoint",
    "predict_all",
    "shard_frozen",
]


def __getattr__(name: str):
    if name in _EXPORTS:
        import peft  # noqa: F401

        register()
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


register_with_peft()
