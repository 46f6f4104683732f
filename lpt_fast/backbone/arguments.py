"""The arguments of a backbone's forward: what a KV cache is called, and which are known.

The one place that knows these names. A backbone's forward ends in **kwargs, so a name that nobody
reads would be ignored, and a result be wrong without an error.
"""

from __future__ import annotations

import inspect

from torch import nn

# Transformers 5.24 calls it "cache", those before "past_key_values". The newest name comes first.
CACHE_NAMES = ("cache", "past_key_values")
# What the lower half needs to make its input; the upper half gets that as `inputs_embeds`.
TEXT = ("input_ids", "inputs_embeds", "token_type_ids", "attention_mask", "position_ids")
_OUTPUTS = ("use_cache", "output_hidden_states", "output_attentions", "return_dict")
# Heads hand these on to the backbone, but they are the loss's.
_OF_LOSS = ("labels", "shift_labels", "num_items_in_batch")
# They say that several texts are packed into one row.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# Known, and refused by a sentence of their own (method/call_inputs.py).
_REFUSED = (
    *("encoder_hidden_states", "encoder_attention_mask"),
    *(*PACKED, "max_length_q", "max_length_k"),
)
_KNOWN = {*CACHE_NAMES, *TEXT, *_OUTPUTS, *_OF_LOSS, *_REFUSED}


# (A dict and no lru_cache, through which torch.compile would trace.)
_NAMES: dict[type, str | None] = {}


def _cache_name(cls: type) -> str | None:
    for base in cls.__mro__:  # (a user's own forward may take *args and hand them on)
        forward = vars(base).get("forward")
        parameters = inspect.signature(forward).parameters if forward is not None else ()
        for name in CACHE_NAMES:
            if name in parameters:
                return name
    return None


def cache_name(backbone: nn.Module) -> str | None:
    """What the backbone's forward calls its KV cache; None: it takes none."""
    cls = type(backbone)
    if cls not in _NAMES:
        _NAMES[cls] = _cache_name(cls)
    return _NAMES[cls]


def given_cache(arguments: dict):
    """The KV cache among arguments, whatever it is called there; None: there is none."""
    return next((c for n in CACHE_NAMES if (c := arguments.get(n)) is not None), None)


def set_cache(backbone: nn.Module, arguments: dict, cache) -> None:
    """Puts a KV cache, or None, among the arguments under the backbone's own name for it."""
    for name in CACHE_NAMES:
        arguments.pop(name, None)
    if cache is not None and (name := cache_name(backbone)) is not None:
        arguments[name] = cache


def check_known(backbone: nn.Module, causal: bool, arguments: dict) -> None:
    """Refuses what would be ignored, and gives the KV cache the backbone's own name.

    Args:
        backbone: whose forward is called.
        causal: whether it is a decoder, which alone has a KV cache.
        arguments: of the forward, by name, without those that are None; changed.

    Raises:
        ValueError: for an argument that nobody here knows, for a KV cache under two names, and for
            that of an encoder.
    """
    model = type(backbone).__name__
    unknown = [name for name in arguments if name not in _KNOWN]
    if unknown:
        raise ValueError(
            f"{model} with a late prompt got `{unknown[0][:60]}`, expected arguments of its "
            "forward that Late Prompt Tuning knows (lpt_fast/backbone/arguments.py): it would be "
            "ignored by some layers. Leave it out."
        )
    names = [name for name in CACHE_NAMES if name in arguments]
    if names and not causal:
        raise ValueError(
            f"{model} with a late prompt got `{names[0]}`, expected no KV cache: an encoder "
            "reads a text in one go. Leave it out."
        )
    if len(names) > 1:
        raise ValueError(
            f"{model} got a KV cache as `{names[0]}` and as `{names[1]}`, expected one of them. "
            f"Leave out `{names[1]}`."
        )
    if names:
        set_cache(backbone, arguments, arguments[names[0]])
