"""What a call of the backbone brings: its KV cache and its masks, checked."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..backbone.arguments import PACKED, given_cache, set_cache
from ..backbone.families import Family, get_layers


def kv_cache(backbone: nn.Module, family: Family, k: int, m: int, training: bool, kwargs: dict):
    """The KV cache of the whole model, made here where the caller wants one and brought none.

    Args:
        backbone, family, k: as for `run_lower`.
        m: prompt rows per example.
        training: whether the model trains.
        kwargs: of the backbone's forward; `use_cache` and the KV cache are set in them.

    Returns:
        The cache or None, and the number of tokens that it holds below the insertion.

    Raises:
        ValueError: for one that something else has filled.
    """
    if not family.causal:
        return None, 0
    cache = given_cache(kwargs)
    use_cache = kwargs.get("use_cache", getattr(backbone.config, "use_cache", False))
    checkpointing = any(
        getattr(layer, "gradient_checkpointing", False) for layer in get_layers(backbone, family)
    )
    if training and checkpointing:
        use_cache = False
    kwargs["use_cache"] = use_cache
    if not use_cache and cache is None:
        return None, 0
    if cache is None:
        cache = DynamicCache(config=backbone.config)
    set_cache(backbone, kwargs, cache)
    past = cache.get_seq_length()
    if past and cache.get_seq_length(k) != past + m:
        raise ValueError(
            f"The KV cache holds {past} entries below the insertion and "
            f"{cache.get_seq_length(k)} above, expected {past + m} (the prompt takes {m}): it "
            "was filled by another adapter or by the base model, or it was cropped. Start with "
            "an empty cache."
        )
    return cache, past


def attended_of(kwargs: dict) -> tuple[Tensor | None, tuple[int, int], torch.device]:
    """Of a call of the whole model: which tokens are attended to, bool [B, S] (None: all), (B, S)
    and the device.

    Raises:
        ValueError: for a call without text.
    """
    text = kwargs.get("input_ids")
    text = kwargs.get("inputs_embeds") if text is None else text
    if text is None:
        raise ValueError("The model got neither text nor hidden states, expected one; give them.")
    mask = kwargs.get("attention_mask")
    tokens = None if mask is None else mask.to(text.device).bool()
    return tokens, tuple(text.shape[:2]), text.device


def check_inputs(inputs: dict, kwargs: dict) -> None:
    """Refuses static KV caches, masks that prompt rows cannot be added to, and texts packed into
    one row.

    Args:
        inputs: what the lower half needs to make its input, by name.
        kwargs: the other arguments of the backbone's forward.

    Raises:
        ValueError: for such a cache, such a mask, for packed texts and for cross-attention.
    """
    # (First: masks for a static cache are made in another shape.)
    layers = getattr(given_cache(kwargs), "layers", ())
    if any("Static" in type(layer).__name__ for layer in layers):
        raise ValueError(
            "Late Prompt Tuning got a static KV cache, expected a dynamic one "
            "(cache_implementation='dynamic'): it has no room for the prompt rows of the layers "
            "above the insertion."
        )
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        got = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "Late Prompt Tuning needs the 2-D attention_mask [B, S] of the tokenizer, got "
            f"{got}: the prompt rows have to be added to it."
        )
    if kwargs.get("encoder_hidden_states") is not None:
        raise ValueError(
            "Late Prompt Tuning got encoder_hidden_states; cross-attention in the adapted "
            "backbone is not known."
        )
    packed = [name for name in PACKED if kwargs.get(name) is not None]
    if not packed and mask is None and positions is not None and positions.shape[1] > 1:
        packed = ["position_ids that restart"] if (positions.diff(dim=1) != 1).any() else []
    if packed:
        raise ValueError(
            f"Late Prompt Tuning got several texts packed into one row ({packed[0]}), expected one "
            "text a row, padded, with an attention_mask (TRL: packing=False, padding_free=False; "
            "lpt_fast/train/README.md says why)."
        )


def give_each_a_token(inputs: dict) -> None:
    """Rows of the mask without a token get their first place as one.

    The model's own attention spreads over padding there: that row's output means nothing, but it is
    finite, and the others of the batch are what they are without it. A prompt needs a token to
    stand before and, but for "static", to be made from.

    Args:
        inputs: of the backbone's forward; `attention_mask` [B, S] is replaced in it.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[1]:
        first = torch.zeros_like(mask)
        first[:, 0] = 1
        inputs["attention_mask"] = torch.where(mask.bool().any(1, keepdim=True), mask, first)
