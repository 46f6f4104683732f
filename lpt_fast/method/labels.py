"""The label space of a model, which changes with the adapter that runs."""

from __future__ import annotations

from torch import nn

Labels = tuple[int, dict[int, str] | None]


def get_labels(model: nn.Module) -> Labels | None:
    """Number and names of the labels in the model's config; None where it has none."""
    config = getattr(model, "config", None)
    if getattr(config, "num_labels", None) is None:
        return None
    return config.num_labels, dict(config.id2label)


def set_labels(model: nn.Module, labels: Labels | None) -> None:
    """Gives the model a label space: heads read `num_labels` for the loss, users
    `config.id2label`.
    """
    if labels is None or getattr(model, "config", None) is None:
        return
    num_labels, names = labels
    if hasattr(model, "num_labels"):
        model.num_labels = num_labels
    if names is None:
        model.config.num_labels = num_labels
    else:
        model.config.id2label = dict(names)
        model.config.label2id = {name: i for i, name in names.items()}
