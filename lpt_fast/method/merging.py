"""Outputs of several adapters' texts as one output of a Hugging Face model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backbone.arguments import CACHE_NAMES


def merged(outputs: list, texts: list[tuple[int, ...]], calls: list[dict], causal: bool):
    """One output in the order of the call's texts.

    Args:
        outputs: the model's own, one a group; at least one.
        texts: the numbers of each group's texts.
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
    order = torch.tensor([number for own in texts for number in own])
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    fields = {}
    for name in dict.fromkeys(name for out in outputs for name in out):
        if name in CACHE_NAMES:
            continue  # (by default, of a model that generates)
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
    raise _no_common_form(name)


def _no_common_form(name: str) -> ValueError:
    return ValueError(
        f"The model gives `{name}` in another form for each adapter of the batch, expected one "
        "form to put together; call it for each adapter by itself, or do not ask for it."
    )


def generated(outputs: list, texts: list[tuple[int, ...]], pad: int):
    """What `generate` gave to each group as one, in the order of the call's texts.

    Args:
        outputs: int64 [n c, S] each, or outputs that hold them as `sequences`.
        texts: as of `merged`; c rows a text.
        pad: the padding token.

    Returns:
        As one of them; `sequences` are padded on the right, scores of steps that a group did not
        need are -inf.

    Raises:
        ValueError: as of `merged`.
    """
    order = torch.tensor([number for own in texts for number in own])

    def joined(parts: list[Tensor], fill: float) -> Tensor:
        width = max(x.shape[-1] for x in parts)
        parts = [
            F.pad(x, (0, width - x.shape[-1]), value=fill).view(len(own), -1, width)
            for x, own in zip(parts, texts, strict=True)
        ]
        whole = torch.cat(parts)
        return torch.empty_like(whole).index_copy_(0, order.to(whole.device), whole).flatten(0, 1)

    if isinstance(outputs[0], Tensor):
        return joined(outputs, pad)
    fields = {"sequences": joined([out.sequences for out in outputs], pad)}
    for name in outputs[0]:
        values = [out[name] for out in outputs]
        if name in ("scores", "logits"):
            steps = range(max(map(len, values)))
            none = [torch.full_like(v[0], float("-inf")) for v in values]
            fields[name] = tuple(
                joined([v[i] if i < len(v) else x for v, x in zip(values, none, strict=True)], 0.0)
                for i in steps
            )
        elif name == "sequences_scores":
            fields[name] = joined([v[:, None] for v in values], 0.0).flatten()
        elif name == "beam_indices":
            continue  # (of each group's own rows)
        elif name not in ("sequences", *CACHE_NAMES):
            raise _no_common_form(name)
    return type(outputs[0])(**fields)
