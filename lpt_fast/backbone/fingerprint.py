"""Whether the tensors below a cut are still those that were seen before."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def tensors_of(lower: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names, parameters and buffers of everything that acts at or below the cut, in a fixed
    order; of a quantised one (a tensor subclass) the tensors that it keeps, under names that say
    how.

    Raises:
        ValueError: for a weight whose parts are not known.
    """
    for found in (lower.named_parameters, lower.named_buffers):
        for name, tensor in sorted(found(remove_duplicate=False), key=lambda item: item[0]):
            yield from _kept(name, tensor)


def _kept(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    cls = type(tensor)
    if not is_quantised(tensor):
        yield name, tensor
    elif hasattr(tensor, "__tensor_flatten__"):
        parts, how = tensor.__tensor_flatten__()
        said = repr(how)  # block sizes, quantisation of activations
        for part in parts:
            inner = f"{name}.{part}|{cls.__name__}|{said if ' at 0x' not in said else ''}"
            yield from _kept(inner, getattr(tensor, part))
    else:
        raise ValueError(
            f"The weight {name} is a {cls.__name__}, expected a plain tensor or one that says what "
            "it keeps (__tensor_flatten__): a cache could not tell its values from others. Run "
            "without a cache, or quantise in another way."
        )


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight is a tensor of a class of its own that keeps other tensors."""
    # (What FSDP spreads over processes is one plain tensor all the same.)
    if type(tensor) in (Tensor, nn.Parameter) or hasattr(tensor, "full_tensor"):
        return False
    return hasattr(tensor, "__tensor_flatten__") or any(
        isinstance(value, Tensor) or hasattr(value, "absmax") for value in vars(tensor).values()
    )


def packed_weights(lower: nn.Module) -> Iterator[tuple[str, torch.ScriptObject]]:
    """Weights that are neither parameters nor buffers: those of torch.ao's quantised modules."""
    for name, module in lower.named_modules():
        for key, value in sorted(vars(module).items()):
            if isinstance(value, torch.ScriptObject):
                yield f"{name}.{key}", value


def fingerprint(lower: nn.Module) -> tuple:
    """Changes when a tensor below the cut is changed in place or replaced; cheap enough for every
    step. (Not seen: writing through `.data`, which hides from PyTorch's version counters.)
    """
    return (
        *(
            (t.data_ptr(), 0 if t.is_inference() else t._version, t.requires_grad)
            for _, t in tensors_of(lower)
        ),
        *(id(value) for _, value in packed_weights(lower)),
    )
