"""Prompt insertion in plain PyTorch: the one oracle of every fast way, and the way on the CPU.

Rows are packed: `hidden` [T, D] holds the text rows of B examples one after another, example b in
rows cu_seqlens[b] .. cu_seqlens[b+1]. Everything works in any float dtype, float64 included, is
differentiable, loops over no example and looks at no value (shapes are known from shapes alone).
Formulas: paper section 3.2, DESIGN section 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .padded_layout import check


def pooling_bins(num_tokens: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Adaptive pooling bins over n tokens: bin j covers floor(j n / m) .. ceil((j+1) n / m) (end
    excluded).

    Bins overlap where m does not divide n, and repeat tokens where n < m, as in
    `torch.nn.AdaptiveAvgPool1d`.

    Args:
        num_tokens: int64 [B].
        m: number of bins.

    Returns:
        start, end: int64 [B, m].
    """
    j = torch.arange(m, device=num_tokens.device)
    n = num_tokens[:, None]
    start = torch.div(j * n, m, rounding_mode="floor")
    end = torch.div((j + 1) * n + m - 1, m, rounding_mode="floor")
    return start, end


def _members(start: Tensor, count: Tensor, m: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of a pooling bin and a token in it, bin by bin.

    The bins of an example hold n + m - gcd(n, m) tokens in all, so rows + B m pairs are room
    enough; what is left over belongs to bin B m, which nobody reads.

    Args:
        start, count: int64 [B], first readable token and number of them.
        m: bins of an example.
        rows: an upper bound of the sum of `count`.

    Returns:
        bin, token: int64 [rows + B m]; size: int64 [B m], the number of tokens in each bin.
    """
    begin, end = pooling_bins(count, m)
    size = (end - begin).flatten()
    end = (end + start[:, None]).flatten()
    stop = size.cumsum(0)
    pair = torch.arange(rows + len(stop), device=start.device)
    of = torch.searchsorted(stop, pair, right=True)
    last = of.clamp(max=len(stop) - 1)
    return of, (end[last] - (stop[last] - pair)).clamp(max=rows - 1), size


def _mean_of_bins(hidden: Tensor, of: Tensor, token: Tensor, size: Tensor) -> Tensor:
    """[bins, D], the mean of each bin's rows of `hidden`; sums in at least fp32."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.index_select(0, token).to(dtype)
    total = rows.new_zeros(len(size) + 1, hidden.shape[1]).index_add(0, of, rows)
    return (total[:-1] / size[:, None].to(dtype)).to(hidden.dtype)


def _max_of_bins(values: Tensor, of: Tensor, token: Tensor, bins: int) -> Tensor:
    """[bins, R], the maximum of each bin and channel; of equals the first one gets the gradient."""
    with torch.no_grad():
        dtype = torch.promote_types(values.dtype, torch.float32)
        rows = values.index_select(0, token).to(dtype)  # [pairs, R]
        index = of[:, None].expand_as(rows)
        best = rows.new_full((bins + 1, rows.shape[1]), float("-inf"))
        best = best.scatter_reduce(0, index, rows, "amax")
        top = (rows == best.gather(0, index)) | rows.isnan()
        place = torch.where(top, token[:, None], len(values))
        first = torch.full_like(best, len(values), dtype=torch.int64)
        first = first.scatter_reduce(0, index, place, "amin")[:-1]
    return values.gather(0, first)


def make_prompts(
    hidden: Tensor,
    start: Tensor,
    count: Tensor,
    kind: str,
    weights: Mapping[str, Tensor],
    num_virtual_tokens: int,
    *,
    last_token: bool = False,
) -> Tensor:
    """The prompts by themselves, before dropout.

    Args:
        hidden: [T, D], in the dtype to compute in.
        start, count: int64 [B]: example b's prompt is made from rows start[b] .. start[b] +
            count[b], at least one.
        kind, weights, num_virtual_tokens, last_token: as for `insert_prompt`.

    Returns:
        [B, m, D].
    """
    B, m, (T, D) = start.shape[0], num_virtual_tokens, hidden.shape
    if kind == "static":
        prompt = weights["prompt_embedding.weight"].to(hidden.dtype)
        return prompt.expand(B, m, D)
    w_down, b_down, w_up, b_up = (weights[name].to(hidden.dtype) for name in WEIGHTS[kind])
    if kind == "npg":
        row = start + count - 1 if last_token else start
        z = F.linear(hidden.index_select(0, row), w_down, b_down)
        return F.linear(F.relu(z), w_up, b_up).view(B, m, D)
    of, token, size = _members(start, count, m, T)
    if kind == "appg":
        # Mean and projection are both linear and a bin's shares sum to one: pooling first gives the
        # same for m projected rows instead of n.
        z = F.linear(_mean_of_bins(hidden, of, token, size), w_down, b_down)
    else:
        # Rows outside the readable ones can hold anything, NaN included; their gradient is zero,
        # but zero times NaN in the weight gradient is not.
        unused = torch.ones(T + 1, dtype=torch.bool, device=hidden.device)
        unused = unused.index_fill(0, token.masked_fill(of >= B * m, T), False)[:T, None]
        projected = F.linear(hidden.masked_fill(unused, 0), w_down, b_down)
        z = _max_of_bins(projected, of, token, B * m)
    return F.linear(F.relu(z), w_up, b_up).view(B, m, D)


def drop(prompt: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Dropout with a given mask (True: kept and scaled by 1 / (1 - p)); None: no dropout."""
    return prompt if mask is None else torch.where(mask, prompt / (1 - p), 0)


WEIGHTS = {
    "static": ("prompt_embedding.weight",),
    **dict.fromkeys(
        ("npg", "appg", "mppg"),
        ("proj_down.weight", "proj_down.bias", "proj_up.weight", "proj_up.bias"),
    ),
}


def insert_prompt(
    hidden: Tensor,
    cu_seqlens: Tensor,
    kind: str,
    weights: Mapping[str, Tensor],
    num_virtual_tokens: int,
    *,
    context: Tensor | None = None,
    last_token: bool = False,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Packed rows with each example's prompt before its tokens.

    Args:
        hidden: [T, D], any float dtype.
        cu_seqlens: int32 [B+1], 0 = cu_seqlens[0] < cu_seqlens[1] < ... = T.
        kind: "static", "npg", "appg" or "mppg".
        weights: the generator's parameters by their names in files (DESIGN section 1). Weights
            wider than `hidden` are not narrowed: it is computed in the wider dtype and the prompt
            is rounded once. "static" also takes a prompt for each example, [B, m, D].
        num_virtual_tokens: m.
        context: int [B, 2], which of its rows an example's prompt is made from, first and end
            counted from its own first row; None: all.
        last_token: npg reads the last row of the context (decoders) instead of the first.
        dropout_p, dropout_mask: bool [B, m, D], True where the prompt is kept, scaled by
            1 / (1 - p); None: no dropout.

    Returns:
        [T + B m, D] in the dtype of `hidden`; example b's prompt begins at cu_seqlens[b] + b m.
    """
    (T, D), B, m = hidden.shape, len(cu_seqlens) - 1, num_virtual_tokens
    start = cu_seqlens[:-1].long()
    if context is None:
        first, count = start, cu_seqlens[1:].long() - start
    else:
        first = start + context[:, 0].long()
        count = (context[:, 1] - context[:, 0]).long()
    dtype = torch.promote_types(hidden.dtype, weights[WEIGHTS[kind][0]].dtype)
    prompt = make_prompts(hidden.to(dtype), first, count, kind, weights, m, last_token=last_token)
    prompt = drop(prompt, dropout_mask, dropout_p)
    b = torch.arange(B, device=hidden.device)
    prompt_rows = (start + b * m)[:, None] + torch.arange(m, device=hidden.device)
    row = torch.arange(T, device=hidden.device)
    text_rows = row + m * torch.searchsorted(start, row, right=True)
    out = hidden.new_empty(T + B * m, D)
    out = out.index_copy_(0, text_rows, hidden)
    return out.index_copy_(0, prompt_rows.flatten(), prompt.to(hidden.dtype).flatten(0, 1))


def gather_rows(
    hidden: Tensor,
    store_cu_seqlens: Tensor,
    index: Tensor,
    cu_seqlens: Tensor,
    total: int,
    dtype: torch.dtype,
    token_scale: Tensor | None = None,
    channel_scale: Tensor | None = None,
) -> Tensor:
    """Examples of a cache, packed: the oracle of lpt_kernels.gather.

    Args:
        hidden: [N, D], floats, int8, or fp8 e4m3 (as such or as uint8).
        store_cu_seqlens: [E+1], where the examples of the cache are.
        index: [B], the examples wanted.
        cu_seqlens: int32 [B+1] of the batch, with total = cu_seqlens[B].
        dtype: of the result.
        token_scale, channel_scale: fp32 [N] and [D], of int8 and (the first) of fp8.

    Returns:
        [total, D].

    Raises:
        ValueError: for an index outside of the cache, or lengths that are not the cache's.
    """
    index = index.long()
    examples = len(store_cu_seqlens) - 1
    check(
        (index >= 0) & (index < examples),
        lambda: f"`index` must be in 0 .. {examples - 1}, got {index.tolist()[:12]}.",
    )
    start = store_cu_seqlens.long()[index]
    lengths = store_cu_seqlens.long()[index + 1] - start
    check(
        cu_seqlens.long().diff() == lengths,
        lambda: (
            f"`cu_seqlens` must hold the lengths of the examples, {lengths.tolist()[:12]}, got "
            f"{cu_seqlens.diff().tolist()[:12]}."
        ),
    )
    row = torch.arange(total, device=hidden.device)
    begin = cu_seqlens[:-1].long()
    b = torch.searchsorted(begin, row, right=True) - 1
    source = start[b] + row - begin[b]
    if hidden.dtype == torch.uint8:
        hidden = hidden.view(torch.float8_e4m3fn)
    rows = hidden[source]
    if token_scale is None:
        return rows.to(dtype)
    rows = rows.float()
    if channel_scale is not None:
        rows = rows * channel_scale
    return (rows * token_scale[source, None]).to(dtype)
