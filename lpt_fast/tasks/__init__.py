"""Text tasks for Late Prompt Tuning: templates, label words, readers, few-shot samples, metrics.

Names are imported on first use, so that `import lpt_fast.tasks` costs nothing: no torch, no
transformers, no datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "TASKS": "templates",
    "TaskSpec": "spec",
    "load_task": "templates",
    "encode_cloze": "cloze",
    "encode_texts": "cloze",
    "label_word_ids": "cloze",
    "encode_labels": "readers",
    "label_names": "readers",
    "read_split": "readers",
    "FEW_SHOT_SEEDS": "fewshot",
    "few_shot_split": "fewshot",
    "classification_metrics": "metrics",
}

__all__ = [
    "FEW_SHOT_SEEDS",
    "TASKS",
    "TaskSpec",
    "classification_metrics",
    "encode_cloze",
    "encode_labels",
    "encode_texts",
    "few_shot_split",
    "label_names",
    "label_word_ids",
    "load_task",
    "read_split",
]

if TYPE_CHECKING:
    from .cloze import encode_cloze, encode_texts, label_word_ids
    from .fewshot import FEW_SHOT_SEEDS, few_shot_split
    from .metrics import classification_metrics
    from .readers import encode_labels, label_names, read_split
    from .spec import TaskSpec
    from .templates import TASKS, load_task


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
