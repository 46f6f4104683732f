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
from torch.nn import functional as F

from ..backbone.low_rank import LowRank
from .attention import plainly, without_autocast
from .plan import Plan


@dataclass(frozen=True)
class Part:
    """An update of one product x -> x W^T.

    Attributes:
        update: its module.
        rows: which output features of it, where one matrix holds queries, keys and values; None:
            all.
        among: the texts that it is for, where a batch has several adapters; None: all.
    """

    update: LowRank
    rows: slice | None = None
    among: Among | None = None

    @property
    def drops(self) -> bool:
        """Whether dropout is active."""
        return self.update.drops

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [r, D] and B [D', r], cast from their masters."""
        a, b = self.update.lora_A.weight, self.update.lora_B.weight
        return a.to(dtype), (b if self.rows is None else b[self.rows]).to(dtype)

    def place(self, count: int) -> slice:
        """Which of x's rows are its own; `count`: how many x has."""
        return slice(0, count) if self.among is None else self.among.place(count)


@dataclass(frozen=True)
class Among:
    """Texts that stand one after another in a batch.

    Attributes:
        rows: theirs with their prompts.
        texts: their numbers.
        count: rows of the batch.
    """

    rows: slice
    texts: slice
    count: int

    def place(self, count: int) -> slice:
        """Theirs among all rows of the batch, or, of another number, among one row of each text."""
        return self.rows if count == self.count else self.texts


def adapt(x: Tensor, outs: list[Tensor], parts: list[list[Part]]) -> list[Tensor]:
    """Adds updates to what frozen products made of rows.

    Args:
        x: [n, D], the rows.
        outs: [n, D'] each; fresh memory, which is written to.
        parts: the updates of each: none, one, or one for each of several adapters.

    Returns:
        [n, D'] each.
    """
    outs, plain = list(outs), []
    for i, own in enumerate(parts):
        for part in own:
            place = part.place(len(x))
            if place.start >= place.stop:
                continue
            if not part.drops:
                plain.append((i, part, place))
                continue
            # Each update has a mask of its own, as PEFT's.
            made = part.update(x[place].to(outs[i].dtype))
            made = made if part.rows is None else made[:, part.rows]
            outs[i] = outs[i] + F.pad(made, (0, 0, place.start, len(x) - place.stop))
    if not plain:
        return outs
    chosen = sorted({i for i, _, _ in plain})
    dtype = outs[chosen[0]].dtype
    items, downs, ups = [], [], []
    for run in _runs(plain):
        (i, part, first), last = run[0], run[-1][2]
        own = [part.weights(dtype) for _, part, _ in run]
        place = slice(first.start, last.stop)
        items.append((chosen.index(i), part.update.scaling, place))
        for kept, matrices in ((downs, [a for a, _ in own]), (ups, [b for _, b in own])):
            kept.append(matrices[0] if len(run) == 1 else torch.stack(matrices))
    with without_autocast(x):
        flat = (*(outs[i] for i in chosen), *downs, *ups)
        made = _Adapt.apply(x.to(dtype), items, len(chosen), *flat)
    for i, out in zip(chosen, made, strict=True):
        outs[i] = out
    return outs


def _runs(items: list[tuple[int, Part, slice]]) -> list[list[tuple[int, Part, slice]]]:
    """Updates of one product whose rows stand one after another and are as many, of one rank and
    scale: their products are made at once.
    """
    runs: list[list] = []
    for i, part, place in items:
        if runs:
            before, other, end = runs[-1][-1]
            alike = (
                before == i
                and end.stop == place.start
                and end.stop - end.start == place.stop - place.start
                and other.update.scaling == part.update.scaling
                and other.update.lora_A.weight.shape == part.update.lora_A.weight.shape
            )
            if alike:
                runs[-1].append((i, part, place))
                continue
        runs.append([(i, part, place)])
    return runs


def _by_adapter(x: Tensor, like: Tensor) -> Tensor:
    """Rows [n, D] as the products with a matrix take them, or with one for each adapter,
    [adapters, n / adapters, D].
    """
    return x if like.dim() == 2 else x.view(len(like), -1, x.shape[1])


class _Adapt(torch.autograd.Function):
    """out + scale (x A^T) B^T, in the memory of out, for products of one x. Each item has the
    number of its out, its scale and the rows that are meant; A and B are matrices, or one for each
    of several adapters, which have the same number of these rows.
    """

    @staticmethod
    def forward(ctx, x, items, count, *tensors):
        n = len(items)
        outs, downs, ups = tensors[:count], tensors[count : count + n], tensors[count + n :]
        inner = []
        for (i, scale, place), a, b in zip(items, downs, ups, strict=True):
            u = torch.matmul(_by_adapter(x[place], a), a.mT)  # [n, r]
            out = _by_adapter(outs[i][place], a)
            (out.addmm_ if a.dim() == 2 else out.baddbmm_)(u, b.mT, alpha=scale)
            inner.append(u)
        ctx.items = items
        ctx.mark_dirty(*outs)
        ctx.save_for_backward(x, *inner, *downs, *ups)
        return outs

    @staticmethod
    @once_differentiable
    @plainly
    def backward(ctx, *grads):
        n = len(ctx.items)
        x, *rest = ctx.saved_tensors
        inner, downs, ups = rest[:n], rest[n : 2 * n], rest[2 * n :]
        whole = all(place.stop - place.start == len(x) for _, _, place in ctx.items)
        dx, d_downs, d_ups = None, [], []
        if ctx.needs_input_grad[0] and not whole:
            dx = torch.zeros_like(x)
        for (i, scale, place), u, a, b in zip(ctx.items, inner, downs, ups, strict=True):
            grad = _by_adapter(grads[i][place], a)
            h = torch.matmul(grad, b).mul_(scale)  # [n, r]
            d_ups.append(torch.matmul(grad.mT, u).mul_(scale))
            d_downs.append(torch.matmul(h.mT, _by_adapter(x[place], a)))
            if ctx.needs_input_grad[0]:
                if dx is None:
                    dx = torch.matmul(h, a).view(x.shape)
                else:
                    own = _by_adapter(dx[place], a)
                    (own.addmm_ if a.dim() == 2 else own.baddbmm_)(h, a)
        return dx, None, None, *grads, *d_downs, *d_ups


def add_by_heads(
    out: Tensor, x: Tensor, parts: list[Part], plan: Plan, transposed: bool = False
) -> Tensor:
    """Adds updates to a product that each head makes with its own rows of the matrix.

    Args:
        out: [B, H, d] what the frozen rows made of x [B, H, D]; or transposed, [B, H, D] of
            [B, H, d]. In the order of the plan's groups.
        x: what they made it of.
        parts: the updates, without dropout.
        plan: of the batch.
        transposed: which.
    """
    for part in parts:
        if part.among is None:
            out = out + _by_heads(out, x, part, transposed)
            continue
        texts = plan.inverse_order[part.among.texts]
        more = _by_heads(out, x.index_select(0, texts), part, transposed)
        out = out.index_add(0, texts, more)
    return out


def _by_heads(out: Tensor, x: Tensor, part: Part, transposed: bool) -> Tensor:
    a, b = part.weights(out.dtype)
    texts, heads = x.shape[:2]
    b = b.view(heads, -1, b.shape[1]) * part.update.scaling  # [H, d, r]
    # (By `mm`: how `matmul` computes these depends on whether A trains, and so would the bits.)
    if transposed:
        inner = torch.bmm(x.transpose(0, 1), b)  # [H, B, r]
        return torch.mm(inner.flatten(0, 1), a).view(heads, texts, -1).transpose(0, 1)
    inner = torch.mm(x.flatten(0, 1), a.t()).view(texts, heads, -1)  # [B, H, r]
    return torch.bmm(inner.transpose(0, 1), b.transpose(1, 2)).transpose(0, 1)
