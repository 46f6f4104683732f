"""The backbone's forward in packed form: rows in, prompts, the layers above the insertion, rows
out.

What late_prompt.py does with padded hidden states, on rows without padding; packed/stack.py has
the layers. `lower_states` has those below the insertion.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)

from ..backbone.arguments import given_cache, set_cache
from ..backbone.lower import run_lower
from ..backbone.watch import spine
from ..insertion.padded_layout import check
from ..packed.attention import without_autocast
from ..packed.compute import with_filler
from ..packed.held import HeldRows
from ..packed.plan import Plan
from ..packed.stack import (
    first_updated,
    run_layers,
    run_packed,
    why_not_its_own,
    why_padded,
)
from ..packing import PackedBatch
from .cached_call import layer_dtype, outputs_asked, rows_dtype
from .context import Call, attended
from .readout import head_reads, last_column

logger = logging.getLogger(__name__)

LITTLE = 1 / 32  # of all places: with less padding nothing is won below the insertion


@dataclass
class Rows:
    """Text rows laid out with room for the prompts, and where they come from.

    Attributes:
        buffer: [T + B m, D], prompt rows not filled yet.
        plan: of the batch.
        cu_seqlens: int32 [B + 1] of the text rows.
        shape: (B, S) of the padded form.
        padded_form: makes `flat`, `tokens` and `positions`, which few heads look at.
        held: projections of the text rows (packed/held.py), or None.
    """

    buffer: Tensor
    plan: Plan
    cu_seqlens: Tensor
    shape: tuple[int, int]
    padded_form: Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]
    held: HeldRows | None = None

    @cached_property
    def _padded_form(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.padded_form()

    @property
    def flat(self) -> Tensor:
        """int64 [T], the place of each text row in the padded form [B S]."""
        return self._padded_form[0]

    @property
    def tokens(self) -> Tensor | None:
        """bool [B, S], or None: all."""
        return self._padded_form[1]

    @property
    def positions(self) -> Tensor | None:
        """int64 [B, S] or [1, S], or None: the columns."""
        return self._padded_form[2]

    @classmethod
    def of_text(cls, hidden: Tensor, tokens: Tensor | None, positions, m: int) -> Rows:
        """From padded hidden states [B, S, D]."""
        B, S, D = hidden.shape
        device = hidden.device
        mask = attended(tokens, B, S, device)
        lengths = mask.sum(1)
        cu_seqlens = torch.zeros(B + 1, dtype=torch.int32, device=device)
        cu_seqlens[1:] = lengths.cumsum(0)
        flat = mask.flatten().nonzero()[:, 0]  # (A GPU is waited for here: T is not known.)
        longest = S if hidden.is_cuda else int(lengths.max())
        plan = Plan(cu_seqlens, longest, m, len(flat) + B * m)
        source = flat.new_zeros(plan.rows)
        source[plan.text_rows] = flat
        buffer = hidden.reshape(-1, D).index_select(0, source)
        return cls(buffer, plan, cu_seqlens, (B, S), lambda: (flat, tokens, positions))

    @classmethod
    def of_batch(cls, batch: PackedBatch, dtype: torch.dtype, m: int) -> Rows:
        """From hidden states of a cache; in place where the batch has room for m rows."""
        B, S, T = len(batch), batch.max_seqlen, batch.num_tokens
        plan = Plan(batch.cu_seqlens, S, m, T + B * m)
        hidden = batch.hidden
        if batch.room == m:
            # An alias: the batch itself stays a constant when its free rows get a gradient.
            buffer = hidden.to(dtype).detach()
        else:
            buffer = hidden.new_empty(plan.rows, hidden.shape[1], dtype=dtype)
            buffer.index_copy_(0, plan.text_rows, batch.text().to(dtype))

        def padded_form():
            text, place = batch.places
            positions = None if batch.position_ids is None else batch.pad(batch.position_ids)
            return text * S + place, batch.mask(), positions

        return cls(buffer, plan, batch.cu_seqlens, (B, S), padded_form, batch.held)

    def padded(self, rows: Tensor) -> Tensor:
        """Text rows of [N, D] in their padded places, [B, S, D]; zeros elsewhere."""
        B, S = self.shape
        out = rows.new_zeros(B * S, rows.shape[1])
        text = rows.index_select(0, self.plan.text_rows)
        return out.index_copy(0, self.flat, text).view(B, S, -1)

    def rotary_positions(self) -> Tensor:
        """int64 [N]: the prompt takes the places of the first m tokens, the text moves up by m."""
        B, S = self.shape
        plan, m = self.plan, self.plan.m
        if self.positions is None:
            return plan.places_in_text
        own = self.positions.expand(B, S).reshape(-1).index_select(0, self.flat)  # [T]
        out = own.new_empty(plan.rows)
        out[plan.text_rows] = own + m
        first = own[plan.text_starts]
        place = torch.arange(m, device=plan.device)
        out[plan.prompt_rows] = (first[:, None] + place).flatten()
        return out


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
        states = lower_states(late, k, {**inputs, **kwargs})
        tokens, positions = tokens_of(late, inputs)
        rows = Rows.of_text(states.to(late.compute_dtype or states.dtype), tokens, positions, m)
    return forward_packed(late, call, rows, ids)


@torch.no_grad()
def lower_states(late, k: int, inputs: dict) -> Tensor:
    """Output of layer k, [B, S, D], of texts that run packed above it. On a CPU plain layers below
    it run packed too where that saves something, and what stands at padding is zero then.

    Args:
        late: the LatePrompt.
        k: number of layers to run.
        inputs: keyword arguments of the backbone's forward.
    """
    backbone, family = late.backbone, late.family
    tokens, positions = tokens_of(late, inputs)
    if not _packs_below(late, tokens):
        return run_lower(backbone, family, k, inputs).last_hidden_state
    embedded = run_lower(backbone, family, 0, inputs).last_hidden_state
    rows = Rows.of_text(embedded, tokens, positions, 0)
    out = run_layers(
        backbone,
        family,
        range(k),
        rows.buffer,
        rows.plan,
        positions=rows.rotary_positions() if family.takes_positions else None,
        readout=False,
        place=None,
        first=False,
    )
    return rows.padded(out)


def _packs_below(late, tokens: Tensor | None) -> bool:
    """Whether all layers are plain, what they hang in too, and there is padding."""
    # (On a GPU it was not tried.)
    if tokens is None or tokens.device.type != "cpu":
        return False
    if int(tokens.sum()) > (1 - LITTLE) * tokens.numel():
        return False
    backbone, family = late.backbone, late.family
    holders = spine(backbone, family)[1:]  # whose forward would run on embeddings
    return all(why_not_its_own(holder) is None for holder in holders) and (
        why_padded(backbone, family, 0, tokens.shape[1], False, late.plain) is None
    )


def tokens_of(late, inputs: dict) -> tuple[Tensor | None, Tensor | None]:
    """The tokens of a call's texts, bool [B, S], None: all; and their positions, int64 [B, S] or
    [1, S], None: the columns.
    """
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    tokens = None if mask is None else mask.bool()
    if positions is None and tokens is not None and late.family.takes_positions:
        # Columns from the first token's on, as the model's own code turns them: over a hole in
        # the mask too.
        column = torch.arange(tokens.shape[1], device=tokens.device)
        positions = column - tokens.int().argmax(1, keepdim=True)
    return tokens, positions
