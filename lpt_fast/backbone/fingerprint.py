"""Whether the tensors below a cut are still those that were seen before."""

from __future__ import annotations

from torch import nn


def tensors_of(lower: nn.Module):
    """Names, parameters and buffers of everything that acts at or below the cut, in a fixed
    order.
    """
    yield from sorted(lower.named_parameters(remove_duplicate=False), key=lambda item: item[0])
    yield from sorted(lower.named_buffers(remove_duplicate=False), key=lambda item: item[0])


def fingerprint(lower: nn.Module) -> tuple:
    """Changes when a tensor below the cut is changed in place or replaced; cheap enough for every
    step. (Not seen: writing through `.data`, which hides from PyTorch's version counters.)
    """
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version, t.requires_grad)
        for _, t in tensors_of(lower)
    )
