"""Prompts of padded hidden states in operations that torch.export and ONNX know, whatever the sizes
of the batch: what a model that is exported makes its prompts by. Slower than reference.py, which
they equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import WEIGHTS, pooling_bins


def make_prompts(
    hidden: Tensor,
    readable: Tensor | None,
    kind: str,
    weights: Mapping[str, Tensor],
    m: int,
    last_token: bool,
) -> Tensor:
    """The prompts by themselves.

    Args:
        hidden: [B, S, D], in the dtype to compute in.
        readable: bool [B, S], the tokens that a prompt is made from, at least one in each row;
            None: all.
        kind, weights, m, last_token: as of `reference.make_prompts`.

    Returns:
        [B, m, D].
    """
    B, S, D = hidden.shape
    if kind == "static":
        return weights["prompt_embedding.weight"].to(hidden.dtype).expand(B, m, D)
    w_down, b_down, w_up, b_up = (weights[name].to(hidden.dtype) for name in WEIGHTS[kind])
    if readable is None:
        readable = torch.ones(B, S, dtype=torch.bool, device=hidden.device)
    if kind == "npg":
        place = torch.arange(S, device=hidden.device)
        # One place of each row; padding never comes first.
        place = torch.where(readable, place, -1 if last_token else S)
        row = place.amax(1) if last_token else place.amin(1)
        first = hidden.gather(1, row[:, None, None].expand(B, 1, D))[:, 0]
        return F.linear(F.relu(F.linear(first, w_down, b_down)), w_up, b_up).view(B, m, D)
    begin, end = pooling_bins(readable.sum(1), m)
    rank = (readable.cumsum(1) - 1)[:, None]  # [B, 1, S]
    member = readable[:, None] & (rank >= begin[..., None]) & (rank < end[..., None])  # [B, m, S]
    if kind == "appg":
        # (What padding holds, NaN included, does not count.)
        hidden = hidden.masked_fill(~readable[..., None], 0)
        share = member.to(hidden.dtype) / (end - begin)[..., None].to(hidden.dtype)
        z = F.linear(share @ hidden, w_down, b_down)
    else:
        z = F.linear(hidden, w_down, b_down)[:, None]  # [B, 1, S, r]
        z = z.masked_fill(~member[..., None], float("-inf")).amax(2)
    return F.linear(F.relu(z), w_up, b_up)
