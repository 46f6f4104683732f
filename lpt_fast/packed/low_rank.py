"""Low-rank updates (backbone/low_rank.py) in the packed blocks: added to what the frozen products
gave, in their memory, with a backward of their own.

Frozen products stay what they are without updates. An update of rank r costs 2 r (D + D')
operations a row beside their 2 D D'; its backward twice that, and nothing for x where that is a
constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backbone.low_rank import LowRank
from .attention import plainly, without_autocast


@dataclass(frozen=True)
class Part:
    """An update of one product x -> x W^T.

    Attributes:
        update: its module.
        rows: which output features of it, where one matrix holds queries, keys and values; None:
            all.
    """

    update: LowRank
    rows: slice | None = None

    @property
    def drops(self) -> bool:
        """Whether dropout is active."""
        return self.update.drops

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [r, D] and B [D', r], cast from their masters."""
        a, b = self.update.lora_A.weight, self.update.lora_B.weight
        return a.to(dtype), (b if self.rows is None else b[self.rows]).to(dtype)


def adapt(x: Tensor, outs: list[Tensor], parts: list[Part | None]) -> list[Tensor]:
    """Adds updates to what frozen products made of rows.

    Args:
        x: [n, D], the rows.
        outs: [n, D'] each; fresh memory, which is written to.
        parts: the update of each, or None.

    Returns:
        [n, D'] each.
    """
    chosen = [i for i, part in enumerate(parts) if part is not None]
    if not chosen:
        return outs
    outs = list(outs)
    dropped = [i for i in chosen if parts[i].drops]
    for i in dropped:  # Each update has a mask of its own, as PEFT's.
        made = parts[i].update(x.to(outs[i].dtype))
        outs[i] = outs[i] + (made if parts[i].rows is None else made[:, parts[i].rows])
    plain = [i for i in chosen if i not in dropped]
    if plain:
        dtype = outs[plain[0]].dtype
        weights = [parts[i].weights(dtype) for i in plain]
        scales = [parts[i].update.scaling for i in plain]
        flat = (*(outs[i] for i in plain), *(a for a, _ in weights), *(b for _, b in weights))
        with without_autocast(x):
            made = _Adapt.apply(x.to(dtype), scales, *flat)
        for i, out in zip(plain, made, strict=True):
            outs[i] = out
    return outs


class _Adapt(torch.autograd.Function):
    """out_i + scale_i (x A_i^T) B_i^T, in the memory of out_i, for products of one x."""

    @staticmethod
    def forward(ctx, x, scales, *tensors):
        n = len(scales)
        outs, downs, ups = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        inner = []
        for out, a, b, scale in zip(outs, downs, ups, scales, strict=True):
            u = torch.mm(x, a.t())  # [n, r]
            out.addmm_(u, b.t(), alpha=scale)
            inner.append(u)
        ctx.scales = scales
        ctx.mark_dirty(*outs)
        ctx.save_for_backward(x, *inner, *downs, *ups)
        return outs

    @staticmethod
    @once_differentiable
    @plainly
    def backward(ctx, *grads):
        n = len(ctx.scales)
        x, *rest = ctx.saved_tensors
        inner, downs, ups = rest[:n], rest[n : 2 * n], rest[2 * n :]
        dx, d_downs, d_ups = None, [], []
        for grad, u, a, b, scale in zip(grads, inner, downs, ups, ctx.scales, strict=True):
            h = torch.mm(grad, b).mul_(scale)  # [n, r]
            d_ups.append(torch.mm(grad.t(), u).mul_(scale))
            d_downs.append(torch.mm(h.t(), x))
            if ctx.needs_input_grad[0]:
                dx = torch.mm(h, a) if dx is None else dx.addmm_(h, a)
        return dx, None, *grads, *d_downs, *d_ups


def add_by_heads(out: Tensor, x: Tensor, part: Part | None, transposed: bool = False) -> Tensor:
    """Adds an update to a product that each head makes with its own rows of the matrix.

    Args:
        out: [B, H, d] what the frozen rows made of x [B, H, D]; or transposed, [B, H, D] of
            [B, H, d].
        x: what they made it of.
        part: the update, without dropout, or None.
        transposed: which.
    """
    if part is None:
        return out
    a, b = part.weights(out.dtype)
    texts, heads = out.shape[:2]
    b = b.view(heads, -1, b.shape[1]) * part.update.scaling  # [H, d, r]
    # (By `mm`: how `matmul` computes these depends on whether A trains, and so would the bits.)
    if transposed:
        inner = torch.bmm(x.transpose(0, 1), b)  # [H, B, r]
        more = torch.mm(inner.flatten(0, 1), a).view(heads, texts, -1)
        return out + more.transpose(0, 1)
    inner = torch.mm(x.flatten(0, 1), a.t()).view(texts, heads, -1)  # [B, H, r]
    return out + torch.bmm(inner.transpose(0, 1), b.transpose(1, 2)).transpose(0, 1)
