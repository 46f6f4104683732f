"""Prompt insertion as one operator: checks at the door, Triton or plain PyTorch behind it.

`insert_prompt` is the packed form, `insert_prompt_` fills the gaps of a packed buffer in place,
`insert_prompt_padded` takes [B, S, D] and a mask, `gather_insert_prompt` reads the rows from a
device-resident cache on the way. All four run the same kernels (insertion_ops.py registers them
with PyTorch) or lpt_fast.insertion.reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import exportable, reference
from .checks import (
    DTYPES,
    check_context,
    check_dropout,
    check_lengths,
    check_mask,
    check_tensor,
    check_weights,
    choose_impl,
)
from .ops import run_insertion
from .padded_layout import PromptLayout

if TYPE_CHECKING:
    from lpt_kernels.gather import Store

_NO_SOURCE = (None, None, None)


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
    seed: Tensor | None = None,
    impl: str = "auto",
    validate: bool = True,
) -> Tensor:
    """Packed hidden states with each example's prompt before its tokens (paper section 3.2).

    Differentiable in `hidden` and `weights`, usable in torch.compile(fullgraph=True) and CUDA
    graphs.

    Args:
        hidden: [T, D], fp16, bf16, fp32 (float64 by the reference).
        cu_seqlens: int32 [B+1], the rows of example b are cu_seqlens[b] .. cu_seqlens[b+1].
        kind: "static", "npg", "appg" or "mppg".
        weights: the generator's parameters by their names in files; any float dtype. The kernels
            round them to the dtype of `hidden` and sum in fp32. "static" also takes a prompt for
            each example, [B, m, D].
        num_virtual_tokens: m.
        context: int32 [B, 2], the rows of each example that its prompt is made from (first, end,
            counted from its own first row); None: all.
        last_token: npg reads the last row of the context (decoders) instead of the first.
        dropout_p: probability of dropout on the prompt; the caller passes 0 in evaluation.
        seed: int64 [1] of the dropout mask of the kernels; None: drawn from PyTorch's generator.
        impl: "auto" (kernels on CUDA and in Triton's interpreter, reference on the CPU), "triton"
            or "reference".
        validate: whether the values of `cu_seqlens` and `context` are checked; False saves a few
            launches on a GPU where the caller has made them itself.

    Returns:
        [T + B m, D]; example b's prompt begins at row cu_seqlens[b] + b m.

    Raises:
        ValueError: for wrong shapes, dtypes, devices, lengths and contexts. (On CUDA, values are
            checked by an assertion in the stream.)

    A NaN in a text row makes the prompts of its own example NaN, and may make those of its
    neighbours in the batch NaN too.
    """
    if hidden.dim() != 2:
        raise ValueError(f"`hidden` must have the shape [T, D], got {list(hidden.shape)}.")
    (T, D), m, device = hidden.shape, num_virtual_tokens, hidden.device
    check_tensor("hidden", hidden, (T, D), (*DTYPES, torch.float64), device)
    B = check_lengths(cu_seqlens, T, device, validate)
    found = check_weights(kind, weights, D, m, device, B)
    readable = check_context(context, cu_seqlens, B, validate)
    impl = choose_impl(impl, hidden)
    if impl == "reference":
        mask = _draw_mask(dropout_p, seed, (B, m, D), device)
        return reference.insert_prompt(
            hidden,
            cu_seqlens,
            kind,
            weights,
            m,
            context=context,
            last_token=last_token,
            dropout_p=dropout_p,
            dropout_mask=mask,
        )
    seed = check_dropout(dropout_p, seed, device)
    settings = (kind, m, T, last_token, float(dropout_p))
    places = (cu_seqlens, None, *readable, None)
    return run_insertion(hidden, False, places, _NO_SOURCE, seed, settings, hidden.dtype, found)


def _draw_mask(p, seed, shape, device):
    """The reference's own mask; the kernels' seed means nothing to it."""
    if not 0 <= p < 1:
        raise ValueError(f"`dropout_p` must be in [0, 1), got {p}.")
    if seed is not None:
        raise ValueError(
            "`seed` is that of the kernels' mask, got it with impl='reference'; leave it out, "
            "torch.manual_seed decides."
        )
    return None if p == 0 else torch.rand(shape, device=device) >= p


def insert_prompt_(
    buffer: Tensor,
    cu_seqlens: Tensor,
    kind: str,
    weights: Mapping[str, Tensor],
    num_virtual_tokens: int,
    *,
    context: Tensor | None = None,
    last_token: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    impl: str = "auto",
    validate: bool = True,
) -> Tensor:
    """The in-place form: fills the prompt rows of a packed buffer that has the text in place.

    Example b's text stands in the rows cu_seqlens[b] + (b + 1) m .. cu_seqlens[b+1] + (b + 1) m of
    `buffer` [T + B m, D]; the m rows before it are written, no other is touched. Arguments and
    errors else as `insert_prompt`; `buffer` is a constant, which gets no gradient.

    Returns:
        `buffer`.
    """
    if buffer.dim() != 2:
        raise ValueError(f"`buffer` must have the shape [T + B m, D], got {list(buffer.shape)}.")
    m, device = num_virtual_tokens, buffer.device
    check_tensor("buffer", buffer, tuple(buffer.shape), (*DTYPES, torch.float64), device)
    if not buffer.is_contiguous():
        raise ValueError(f"`buffer` must be contiguous, got strides {buffer.stride()}.")
    found = check_weights(kind, weights, buffer.shape[1], m, device, len(cu_seqlens) - 1)
    D, T = buffer.shape[1], buffer.shape[0] - (len(cu_seqlens) - 1) * m
    B = check_lengths(cu_seqlens, T, device, validate)
    readable = check_context(context, cu_seqlens, B, validate)
    if choose_impl(impl, buffer) == "reference":
        if buffer.requires_grad:
            raise ValueError(
                "`buffer` requires a gradient, expected a constant, since its rows are "
                "overwritten in place; use insert_prompt."
            )
        start = cu_seqlens[:-1].long()
        begin = start + m * torch.arange(B, device=device)
        first, count = begin + m, cu_seqlens[1:].long() - start
        if context is not None:
            first = first + context[:, 0].long()
            count = (context[:, 1] - context[:, 0]).long()
        dtype = torch.promote_types(buffer.dtype, found[0].dtype)
        prompt = reference.make_prompts(
            buffer.to(dtype), first, count, kind, weights, m, last_token=last_token
        )
        prompt = reference.drop(prompt, _draw_mask(dropout_p, seed, (B, m, D), device), dropout_p)
        place = (begin[:, None] + torch.arange(m, device=device)).flatten()
        return buffer.index_copy_(0, place, prompt.to(buffer.dtype).flatten(0, 1))
    seed = check_dropout(dropout_p, seed, device)
    settings = (kind, m, T, last_token, float(dropout_p))
    places = (cu_seqlens, None, *readable, None)
    return run_insertion(buffer, True, places, _NO_SOURCE, seed, settings, buffer.dtype, found)


def insert_prompt_padded(
    hidden: Tensor,
    attention_mask: Tensor | None,
    kind: str,
    weights: Mapping[str, Tensor],
    num_virtual_tokens: int,
    *,
    context_mask: Tensor | None = None,
    last_token: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The padded form, for models that run on [B, S, D] and a mask.

    Args:
        hidden: [B, S, D].
        attention_mask: [B, S], nonzero where there is a token, at least one in each row; None: all.
            Tokens may stand anywhere in the row (left or right padded, with holes).
        context_mask: bool [B, S], the tokens that prompts are made from; None: all tokens.
        kind, weights, num_virtual_tokens, last_token, dropout_p, seed, impl: as `insert_prompt`.

    Returns:
        [B, m + S, D] with the prompt directly before each row's first token, and the mask with ones
        there [B, m + S] (None for None). Padding rows are copied as they are.

    Raises:
        ValueError: as `insert_prompt`.
    """
    if hidden.dim() != 3:
        raise ValueError(f"`hidden` must have the shape [B, S, D], got {list(hidden.shape)}.")
    (B, S, D), m, device = hidden.shape, num_virtual_tokens, hidden.device
    check_tensor("hidden", hidden, (B, S, D), (*DTYPES, torch.float64), device)
    found = check_weights(kind, weights, D, m, device, B)
    tokens = None
    if attention_mask is not None:
        check_mask("attention_mask", attention_mask, B, S, device)
        tokens = attention_mask.bool()
    readable = tokens
    if context_mask is not None:
        check_mask("context_mask", context_mask, B, S, device)
        readable = context_mask.bool()
    layout = PromptLayout.from_mask(tokens, m)
    mask = layout.extend_mask(attention_mask)
    if torch.compiler.is_exporting():
        if dropout_p:
            raise ValueError(
                "A model with a late prompt was exported in training mode, expected evaluation "
                "mode: its dropout would stay. Call eval() first."
            )
        wide = hidden.to(torch.promote_types(hidden.dtype, found[0].dtype))
        prompt = exportable.make_prompts(wide, readable, kind, weights, m, last_token)
        return layout.insert(prompt.to(hidden.dtype), hidden), mask
    start, count, order = _readable_rows(readable, B, S, device)
    impl = choose_impl(impl, hidden)
    if impl == "reference":
        dtype = torch.promote_types(hidden.dtype, found[0].dtype)
        rows = hidden.flatten(0, 1)
        rows = (rows if order is None else rows.index_select(0, order)).to(dtype)
        prompt = reference.make_prompts(rows, start, count, kind, weights, m, last_token=last_token)
        keep = _draw_mask(dropout_p, seed, (B, m, D), device)
        prompt = reference.drop(prompt, keep, dropout_p)
        return layout.insert(prompt.to(hidden.dtype), hidden), mask
    seed = check_dropout(dropout_p, seed, device)
    cu_seqlens = torch.arange(0, (B + 1) * S, S, dtype=torch.int32, device=device)
    insert_at = None
    if layout.starts is not None:
        insert_at = cu_seqlens[:-1] + layout.starts.to(torch.int32)
    settings = (kind, m, B * S, last_token, float(dropout_p))
    order = None if order is None else order.to(torch.int32)
    places = (cu_seqlens, insert_at, start.to(torch.int32), count.to(torch.int32), order)
    flat = hidden.flatten(0, 1)
    out = run_insertion(flat, False, places, _NO_SOURCE, seed, settings, hidden.dtype, found)
    return out.view(B, m + S, D), mask


def _readable_rows(readable: Tensor | None, B: int, S: int, device):
    """First readable row and number of them for each example, int64 [B], counted through the
    batch; and where they have holes the order [B S] in which the readable rows of each come first.
    """
    base = torch.arange(B, device=device) * S
    if readable is None:
        return base, torch.full_like(base, S), None
    count = readable.sum(1)
    first = readable.int().argmax(1)
    last = S - 1 - readable.int().flip(1).argmax(1)
    # (On a GPU looking would wait for it; while compiling there is nothing to look at.)
    looks = not readable.is_cuda and not torch.compiler.is_compiling()
    if looks and bool((last - first + 1 == count).all()):
        return base + first, count, None
    rank = torch.where(readable, readable.cumsum(1) - 1, count[:, None] + (~readable).cumsum(1) - 1)
    place = torch.arange(S, device=device).expand(B, S)
    order = torch.empty_like(rank).scatter_(1, rank, place) + base[:, None]
    return base, count, order.flatten()


def gather_insert_prompt(
    store: Store,
    index: Tensor,
    cu_seqlens: Tensor,
    total: int,
    kind: str,
    weights: Mapping[str, Tensor],
    num_virtual_tokens: int,
    *,
    dtype: torch.dtype | None = None,
    context: Tensor | None = None,
    last_token: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    impl: str = "auto",
    validate: bool = True,
) -> Tensor:
    """Examples of a device-resident cache, packed, with their prompts, in one pass over the rows.

    Args:
        store: the cache, see lpt_kernels.gather.Store (bf16, fp16, fp32, int8 or fp8).
        index: int32 or int64 [B], examples of the cache; may repeat.
        cu_seqlens: int32 [B+1] of the batch, made from the examples' lengths.
        total: T, its last value, known on the host.
        dtype: of the output; default that of the store, bf16 for int8 and fp8.
        kind, weights, num_virtual_tokens, context, last_token, dropout_p, seed, impl, validate:
            as `insert_prompt`.

    Returns:
        [T + B m, D]. The cache is a constant and gets no gradient.

    Raises:
        ValueError: as `insert_prompt`, and for an index or lengths that are not the store's.
    """
    from lpt_kernels.gather import source_rows

    device, m = store.hidden.device, num_virtual_tokens
    store.check()
    if dtype is None:
        dtype = store.hidden.dtype if store.kind == "plain" else torch.bfloat16
    B = check_lengths(cu_seqlens, total, device, validate)
    found = check_weights(kind, weights, store.hidden.shape[1], m, device, B)
    impl = choose_impl(impl, store.codes)
    if impl == "reference":
        packed = reference.gather_rows(
            store.hidden,
            store.cu_seqlens,
            index,
            cu_seqlens,
            total,
            dtype,
            store.token_scale,
            store.channel_scale,
        )
        return insert_prompt(
            packed,
            cu_seqlens,
            kind,
            weights,
            m,
            context=context,
            last_token=last_token,
            dropout_p=dropout_p,
            seed=seed,
            impl="reference",
            validate=validate,
        )
    readable = check_context(context, cu_seqlens, B, validate)
    start = source_rows(store, index, cu_seqlens=cu_seqlens, total=total)
    seed = check_dropout(dropout_p, seed, device)
    settings = (kind, m, total, last_token, float(dropout_p))
    places = (cu_seqlens, None, *readable, None)
    sources = (start, store.token_scale, store.channel_scale)
    rows = store.codes
    return run_insertion(rows, False, places, sources, seed, settings, dtype, found)
