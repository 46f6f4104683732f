"""The backbone's forward above the insertion by the model's own code, on padded hidden states."""

from __future__ import annotations

import dataclasses

import torch

from ..backbone.arguments import CACHE_NAMES, set_cache
from ..backbone.lower import run_lower
from ..backbone.upper import run_upper
from ..insertion.padded_layout import PromptLayout
from . import cached_call as cached
from .call_inputs import kv_cache
from .context import Call, attended
from .readout import columns_of

# The place is internal to transformers; without it, hidden states are still captured, but maybe
# twice.
try:
    from transformers.utils.output_capturing import maybe_install_capturing_hooks
except ImportError:  # pragma: no cover
    maybe_install_capturing_hooks = None


def run_padded(late, call: Call, inputs: dict, kwargs: dict, wanted):
    """The backbone's forward: lower half -> prompt -> upper half -> strip.

    Args:
        late: the LatePrompt.
        call: what is known of the call.
        inputs: the text's arguments of the backbone's forward.
        kwargs: its others, changed.
        wanted: hidden states that are asked for, of `capture`.

    Returns:
        The backbone's output as a mapping.
    """
    backbone, family, config = late.backbone, late.family, late.active_config
    k, m = config.insertion_layer, config.num_virtual_tokens
    lower = cache = None
    past = 0
    if call.cached is not None:
        hidden, inputs = cached.hidden_states(late, call.cached, k)
        if family.causal:
            kwargs["use_cache"] = False
            set_cache(backbone, kwargs, None)
    else:
        cache, past = kv_cache(backbone, family, k, m, late.training, kwargs)
        lower = run_lower(backbone, family, k, {**inputs, **kwargs, "return_dict": True})
        hidden = lower.last_hidden_state  # [B, S, D]
    kwargs["return_dict"] = True
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    tokens = None if mask is None else mask.bool()
    layout = PromptLayout.from_mask(tokens, m)
    if past:
        rows = hidden
        positions = None if positions is None else positions + m
    else:
        readable = attended(tokens, *hidden.shape[:2], hidden.device)
        generator = late.lpt_generator[late.active_adapters[0]]
        if family.causal:
            readable = late.context.of(readable, call, late.training, generator.reads_text)
        rows = generator(hidden, tokens, readable)
        positions = layout.extend_positions(positions, hidden.shape[0])
    upper = run_upper(
        backbone,
        family,
        k,
        rows,
        layout,
        training=late.training,
        updates=late.updates(late.active_adapters[0]),
        attention_mask=layout.extend_mask(mask),
        position_ids=positions,
        **kwargs,
    )
    strip = (lambda rows: rows) if past else layout.strip
    output = _assemble(late, lower, upper, strip, cache, wanted)
    if call.readout is not None:
        column = columns_of(call.readout, tokens)
        at = torch.arange(len(column), device=column.device)
        output["last_hidden_state"] = output.last_hidden_state[at, column][:, None]
    return output


def capture(late, kwargs: dict):
    """Which hidden states are asked for: False, True or a selection of indices; asks the
    halves for all.
    """
    wanted = kwargs.get("output_hidden_states", late.backbone.config.output_hidden_states)
    if wanted is not None and wanted is not False:
        kwargs["output_hidden_states"] = True
    attentions = kwargs.get("output_attentions", late.backbone.config.output_attentions)
    # The hooks go on the layers, which the halves share. Installed by each half, each would
    # report twice.
    known = hasattr(type(late.backbone), "_can_record_outputs") and maybe_install_capturing_hooks
    if (wanted or attentions) and known:
        maybe_install_capturing_hooks(late.backbone)
    return wanted


def _assemble(late, lower, upper, strip, cache, wanted):
    """The backbone's usual output from those of the two halves."""
    fields = {f.name: upper.get(f.name) for f in dataclasses.fields(upper)}
    last = strip(upper.last_hidden_state)
    fields["last_hidden_state"] = last
    pooler = getattr(late.backbone, late.family.pooler, None) if late.family.pooler else None
    if pooler is not None:
        fields["pooler_output"] = pooler(last)
    if wanted is not None and wanted is not False:
        states = (*lower.hidden_states, *(strip(rows) for rows in upper.hidden_states[1:]))
        if wanted is not True:
            chosen = {wanted} if isinstance(wanted, int) else set(wanted)
            chosen = {i % len(states) for i in chosen}
            states = tuple(s if i in chosen else None for i, s in enumerate(states))
        fields["hidden_states"] = states
    if fields.get("attentions") is not None:
        # Maps of the upper layers have m more rows and columns: the prompt's.
        fields["attentions"] = (*lower.attentions, *upper.attentions)
    for name in CACHE_NAMES:
        if fields.get(name) is not None:
            fields[name] = cache
    return type(upper)(**fields)
