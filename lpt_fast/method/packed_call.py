"""The backbone's forward above the insertion in packed form: rows in, prompts, layers, rows out.

What late_prompt.py does with padded hidden states, on rows without padding; packed/stack.py has
the layers, packed_rows.py the rows, packed_lower.py what comes below the insertion.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)

from ..backbone.arguments import given_cache, set_cache
from ..insertion.padded_layout import check
from ..packed.attention import without_autocast
from ..packed.compute import with_filler
from ..packed.stack import first_updated, run_packed, why_padded
from .cached_call import layer_dtype, outputs_asked, rows_dtype
from .context import Call, attended
from .packed_lower import lower_states
from .packed_rows import Rows, tokens_of
from .readout import head_reads, last_column

logger = logging.getLogger(__name__)


def readout_of(late, call: Call, ids, rows: Rows) -> tuple[str | None, Tensor | None]:
    """What is read of each text.

    Returns:
        None (every token), "first", "last" or "given", and the place of the token among its text's
        own, int64 [B], where it is not the first.
    """
    if call.readout is not None:
        return "given", call.readout
    reads = head_reads(late.root)
    if reads != "last":
        return reads, None
    (B, S), tokens = rows.shape, rows.tokens
    column = last_column(late.root, ids, S, B, rows.buffer.device)
    if tokens is None:
        return "last", column
    # (Where that column is not attended to, a GPU, which is not asked, reads the token before it.)
    return "last", (tokens.long().cumsum(1) - 1).gather(1, column[:, None])[:, 0].clamp(min=0)


def forward_packed(late, call: Call, rows: Rows, ids: Tensor | None):
    """Prompts, the layers above k and what comes after them.

    Args:
        late: the LatePrompt.
        call: what is known of the call.
        rows: the text rows.
        ids: int64 [B, S], which heads of decoders look at, or None.

    Returns:
        The backbone's output. `last_hidden_state` is [B, S, D]; where one token of each text is
        read it is [B, 1, D], or that row at every place for heads that look for it.
    """
    backbone, family, plan = late.backbone, late.family, rows.plan
    name = late.active_adapters[0]
    k = late.lpt_config[name].insertion_layer
    reads, place = readout_of(late, call, ids, rows)
    end, states = context_of(late, name, call, rows)
    out = None
    if late.graphs is not None:
        out = late.graphs.run(rows, end, reads is not None, place)
    if out is None:
        held, updates = rows.held, late.updates(name)
        if held is not None:
            updated = first_updated(backbone, family, k, updates)
            held = held if held.fits(rows.buffer, plan.m, updated) else None
        filled = fill(late, name, rows, end, states)
        positions = rows.rotary_positions() if family.takes_positions else None
        full, at, own = plan, place, late.compute_dtype
        if own is not None:
            filled, full, positions, at, held = with_filler(filled, plan, positions, at, held)
        # (Autocast would cast back and forth between what is in its dtype already.)
        with nullcontext() if own is None else without_autocast(filled):
            out = run_packed(
                late.computing(k),
                family,
                k,
                filled,
                full,
                positions=positions,
                readout=reads is not None,
                place=at,
                held=None if held is None else held.take(full),
                updates=updates,
            )
        if own is not None:
            out = out[: plan.rows if reads is None else rows.shape[0]].to(layer_dtype(late, k))
    return output_of(late, rows, out, reads)


def context_of(late, name: str, call: Call, rows: Rows) -> tuple[Tensor | None, Callable]:
    """What an adapter's prompts are made from.

    Returns:
        Of decoders how many of each text's first tokens, int32 [B]; None: all. And what gives
        `PromptGenerator.fill` its padded form.
    """
    B, S = rows.shape
    device = rows.buffer.device
    readable = end = None
    if late.family.causal:
        tokens = attended(rows.tokens, B, S, device)
        reads_text = late.lpt_generator[name].reads_text
        readable = late.context.of(tokens, call, late.training, reads_text)
        # The context is always the first tokens of a text.
        end = readable.sum(1, dtype=torch.int32)

    def states():
        tokens = rows.tokens if readable is None else readable
        return rows.padded(rows.buffer), attended(tokens, B, S, device)

    return end, states


def fill(late, name: str, rows: Rows, end: Tensor | None, states: Callable) -> Tensor:
    """The rows with an adapter's prompts, [T + B m, D]; arguments as `context_of` gives them."""
    context = None if end is None else torch.stack((torch.zeros_like(end), end), 1)
    return late.lpt_generator[name].fill(rows.buffer, rows.cu_seqlens, context, states)


def output_of(late, rows: Rows, out: Tensor, reads: str | None):
    """The backbone's output from what the last layer gave, [N, D], or [B, D] where one token of
    each text is read.
    """
    backbone, family = late.backbone, late.family
    B, S = rows.shape
    if reads is None:
        last = rows.padded(out)
    else:
        last = out[:, None]
        if reads == "last":
            last = last.expand(B, S, -1)
    pooler = getattr(backbone, family.pooler, None) if family.pooler else None
    if pooler is not None:
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last, pooler_output=pooler(last)
        )
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last)


def takes_packed(late, call: Call, inputs: dict, kwargs: dict) -> bool:
    """Whether the layers above the insertion run packed in this call (packed/stack.py);
    says so once, and why not.

    Args:
        late: the LatePrompt.
        call: what is known of the call.
        inputs: the text's arguments of the backbone's forward.
        kwargs: its others.

    Raises:
        ValueError: for a model that cannot, when `upper` is "packed".
    """
    if late.upper == "padded":
        return False
    text = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if text is None and call.cached is None:
        return False  # the model's own code says what is missing
    reason = _why_padded_call(late, call, inputs, kwargs)
    if reason is None or late.upper == "packed":
        length = text.shape[1] if call.cached is None else call.cached.max_seqlen
        config = late.active_config
        k, longest = config.insertion_layer, length + config.num_virtual_tokens
        never = why_padded(late.backbone, late.family, k, longest, late.training, late.plain)
        if never is not None and late.upper == "packed":
            raise ValueError(
                "Late Prompt Tuning got upper='packed', expected a model that can run so: "
                f"{never}. Use upper='auto' or 'padded'."
            )
        reason = reason or never
    if reason not in late._said:
        late._said.add(reason)
        way = "packed, without padding" if reason is None else f"padded: {reason}"
        logger.info("The layers above the insertion run %s.", way)
    return reason is None


def _why_padded_call(late, call: Call, inputs: dict, kwargs: dict) -> str | None:
    """What this call asks for that only the padded way gives."""
    config = late.backbone.config
    for name in outputs_asked(config, kwargs):
        return f"{name} is asked for"
    if late.family.causal and call.cached is None:
        cache = given_cache(kwargs) is not None
        # Nobody reads a KV cache that only the config asks for in training, beside labels, and
        # behind heads that generate nothing.
        unread = late.training or call.labels is not None or call.readout is not None
        unread = unread or not (late.causal_lm or late.root is late.backbone)
        default = bool(getattr(config, "use_cache", False)) and not unread
        if cache or kwargs.get("use_cache", default):
            return "a KV cache is asked for"
    mask = inputs.get("attention_mask")
    looks = mask is not None and not mask.is_cuda and not torch.compiler.is_compiling()
    if call.cached is None and mask is not None and late.family.relative_bias:
        # Distances are those of columns, and packed rows have closed ranks.
        whole = ~_has_gap(mask.bool())
        if looks and not whole.all():
            return "an attention mask has gaps, over which distances count"
        check(whole, lambda: "")  # (on CUDA, which is not looked at)
    if call.cached is None and looks:
        # Heads look at a column, whatever is there.
        reads = head_reads(late.root)
        if reads == "first" and not bool(mask[:, 0].all()):
            return "the head reads padding on the left"
        if reads == "last":
            column = last_column(late.root, inputs.get("input_ids"), *mask.shape[::-1], mask.device)
            if not bool(mask.gather(1, column[:, None]).all()):
                return "the head reads tokens that are not attended to"
    return None


def _has_gap(mask: Tensor) -> Tensor:
    """Whether tokens of a text stand apart, bool [B] of bool [B, S]."""
    begins = mask.clone()
    begins[:, 1:] &= ~mask[:, :-1]
    return begins.sum(1) > 1


def run_call(late, call: Call, inputs: dict, kwargs: dict):
    """The backbone's forward, packed; arguments as of `takes_packed`, which said yes."""
    config = late.active_config
    k, m = config.insertion_layer, config.num_virtual_tokens
    ids = inputs.get("input_ids")
    if call.cached is not None:
        dtype = rows_dtype(late, k) or call.cached.hidden.dtype
        rows = Rows.of_batch(call.cached, dtype, m)
    else:
        kwargs = {**kwargs, "return_dict": True}
        if late.family.causal:
            kwargs["use_cache"] = False
            set_cache(late.backbone, kwargs, None)
        tokens, positions = tokens_of(late, inputs)
        states = lower_states(late, k, {**inputs, **kwargs}, tokens, positions)
        rows = Rows.of_text(states.to(late.compute_dtype or states.dtype), tokens, positions, m)
    return forward_packed(late, call, rows, ids)
