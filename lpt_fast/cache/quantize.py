"""Hidden states as a store keeps them: floats, or 8 bits with scales.

Hidden states have a few channels that are far larger than the rest. One scale a token would leave
those of the others no digits, so "int8c" divides each channel by a scale of its own first, which is
fixed when the cache is begun, and "fp8" (e4m3, one scale a token) has an exponent for each value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import CacheError

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INT8_MAX = 127.0
E4M3_MAX = 448.0


def torch_dtype(store: str) -> torch.dtype:
    """Of the hidden states in the file."""
    if store == "int8c":
        return torch.int8
    return torch.float8_e4m3fn if store == "fp8" else FLOATS[store]


def exact_for(store: str, dtype: torch.dtype | None) -> bool:
    """Whether a store keeps every bit of hidden states of `dtype`; None: not known which."""
    if dtype is None:
        return False
    return FLOATS.get(store) == dtype or (store == "fp32" and dtype.itemsize < 4)


def calibrate(hidden: Tensor) -> Tensor:
    """The channel scales of an int8c store, float32 [D], from hidden states [T, D] of some texts.

    The root mean square of each channel: largest values would be those of single tokens, which
    the token's own scale takes care of (bench/results has both).
    """
    scale = hidden.float().square().mean(0).sqrt()
    # A channel that is silent in the sample may speak later.
    return scale.clamp(min=1e-3 * float(scale.mean()) + 1e-30)


def _round_up_to_bf16(scale: Tensor) -> Tensor:
    """float32 -> the next bf16 that is not smaller, as float32: half the bytes in the file, and
    nothing is clipped.
    """
    bits = scale.view(torch.int32)
    rounded = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
    # (The bits of some NaNs, those of GPUs among them, would run over and come out as zero.)
    return torch.where(scale.isfinite(), rounded, scale)


def encode(hidden: Tensor, store: str, channel_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the file holds.

    Args:
        hidden: [T, D] in any float dtype.
        store: of shard.STORES.
        channel_scale: float32 [D], for int8c.

    Returns:
        codes [T, D] in the store's dtype; and float32 [T]: the token scales (exact in bf16), which
        are not finite where a value of the token is not. For float stores the largest magnitude of
        each token as stored, to be looked at in the same way.
    """
    if store in FLOATS:
        codes = hidden.to(FLOATS[store])
        return codes, codes.abs().amax(1).float()
    x = hidden.float()
    top = E4M3_MAX
    if store == "int8c":
        x, top = x / channel_scale, INT8_MAX
    scale = _round_up_to_bf16(x.abs().amax(1) / top)
    scale = torch.where(scale == 0, 1.0, scale)
    x = x / scale[:, None]
    if store == "int8c":
        # (NaN has no integer; its token is refused by its scale.)
        return x.nan_to_num().round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def decode(
    codes: Tensor,
    dtype: torch.dtype,
    token_scale: Tensor | None = None,
    channel_scale: Tensor | None = None,
) -> Tensor:
    """Hidden states [T, D] from what the file holds, in float32 and in the order of
    lpt_kernels.gather.Store, rounded once to `dtype`.
    """
    if token_scale is None:
        return codes.to(dtype)
    x = codes.float()
    if channel_scale is not None:
        x = x * channel_scale
    return (x * token_scale[:, None]).to(dtype)


def check_finite(magnitudes: Tensor, store: str, name_of) -> None:
    """Raises CacheError with the row's name for a token that is not finite.

    Args:
        magnitudes: float32 [T], second result of `encode`.
        store: for the message.
        name_of: token number -> name of its text.
    """
    finite = magnitudes.isfinite()
    if not bool(finite.all()):
        token = int((~finite).nonzero()[0])
        raise CacheError(
            f"The hidden states of {name_of(token)} are not finite as {store}, expected finite "
            "numbers, so nothing of it was kept; check the model's weights, or compute and store "
            "in a wider dtype (fp16 ends at 65,504)."
        )
