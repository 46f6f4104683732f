"""Outputs of several adapters' texts as one output of a Hugging Face model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def merged(outputs: list, texts: list[Tensor], calls: list[dict], causal: bool):
    """One output in the order of the call's texts.

    Args:
        outputs: the model's own, one a group; at least one.
        texts: int64 [n] each, the numbers of the group's texts.
        calls: each group's arguments, of which the labels count.
        causal: whether labels are those of the next token.

    Returns:
        An output of their class. Logits of fewer classes than others' end in -inf; the loss is the
        mean over all texts, or over all labels where each token has one.

    Raises:
        ValueError: an output has not the same form for all groups.
    """
    if len(outputs) == 1:  # whose texts are all of the call's, in their order
        return outputs[0]
    order = torch.cat(texts)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    fields = {}
    for name in dict.fromkeys(name for out in outputs for name in out):
        values = [out.get(name) for out in outputs]
        if name == "loss":
            sums = calls[0].get("num_items_in_batch") is not None  # (divided by it already)
            counts = [_labels(c, len(own), causal) for c, own in zip(calls, texts, strict=True)]
            fields[name] = sum(values) if sums else _mean(values, counts)
        else:
            fields[name] = _joined(name, values, back)
    return type(outputs[0])(**fields)


def _labels(call: dict, count: int, causal: bool) -> int:
    """Over how many labels a group's loss is the mean."""
    labels = call.get("labels")
    if labels is None or labels.dim() < 2 or labels.is_floating_point():
        return count
    labels = labels[:, 1:] if causal else labels
    return int((labels != -100).sum())


def _mean(losses: list[Tensor], counts: list[int]) -> Tensor:
    parts = [n * loss for loss, n in zip(losses, counts, strict=True) if n]
    return sum(parts) / sum(counts) if parts else losses[0]


def _joined(name: str, values: list, back: Tensor):
    first = values[0]
    if isinstance(first, tuple | list):
        if all(isinstance(v, tuple | list) and len(v) == len(first) for v in values):
            return tuple(_joined(name, list(parts), back) for parts in zip(*values, strict=True))
    elif all(isinstance(v, Tensor) for v in values):
        if name == "logits":
            width = max(v.shape[-1] for v in values)
            values = [F.pad(v, (0, width - v.shape[-1]), value=float("-inf")) for v in values]
        if len({v.shape[1:] for v in values}) == 1:
            return torch.cat(values).index_select(0, back.to(values[0].device))
    elif all(v is None for v in values):
        return None
    raise ValueError(
        f"The model gives `{name}` in another form for each adapter of the batch, expected one "
        "form to put together; call it for each adapter by itself, or do not ask for it."
    )
