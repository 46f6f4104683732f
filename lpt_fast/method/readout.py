"""Which token of each text a model's head reads: what is not read need not be computed in the last
layer (DESIGN section 4).

Heads of sequence classification say it by their class. For language models the caller says it:
`model(..., readout=places)`, for cloze tasks the mask, for classification by the next token the
last token of the context.
"""

from __future__ import annotations

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..insertion.padded_layout import check

READOUT = "readout"
# What the loss of causal language models takes in place of labels that it would shift.
SHIFTED = "shift_labels"
# Class of the whole model -> its module that looks at the first token, of transformers' own class.
_FIRST = {
    "BertForSequenceClassification": "bert.pooler",
    "RobertaForSequenceClassification": "classifier",
    "XLMRobertaForSequenceClassification": "classifier",
    "ElectraForSequenceClassification": "classifier",
    "MPNetForSequenceClassification": "classifier",
}
_CASTS = "lpt_fast.method.tuner"
_LAST = {
    f"{name}ForSequenceClassification" for name in ("GPT2", "Llama", "Mistral", "Qwen2", "Qwen3")
}


def _own(module: nn.Module) -> bool:
    """Whether a module is transformers' own, also where PEFT trains a copy of it, unhooked."""
    if isinstance(module, ModulesToSaveWrapper):
        return all(_own(m) for m in (module.original_module, *module.modules_to_save.values()))
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # (One of our own casts the input of heads that are kept in fp32.)
    if "forward" in module.__dict__ or not all(
        getattr(h, "__module__", "") == _CASTS for h in hooks
    ):
        return False
    return type(module).__module__.startswith(("transformers.", "torch."))


def head_reads(root: nn.Module) -> str | None:
    """ "first" or "last": the one token of each text that a classification head reads; None: more
    than one, or not known.
    """
    name = type(root).__name__
    if not type(root).__module__.startswith("transformers.") or "forward" in root.__dict__:
        return None
    if name in _FIRST:
        module = root
        for part in _FIRST[name].split("."):
            module = getattr(module, part)
        return "first" if module is not None and _own(module) else None
    return "last" if name in _LAST else None


def last_column(root: nn.Module, ids: Tensor | None, width: int, batch: int, device) -> Tensor:
    """Where transformers' heads of decoders look: the last id that is not padding, int64 [B]."""
    pad = root.config.get_text_config().pad_token_id
    if pad is None or ids is None:
        return torch.full((batch,), width - 1, device=device)
    return (torch.arange(width, device=device) * (ids != pad).int()).argmax(-1)


def columns_of(place: Tensor, tokens: Tensor | None) -> Tensor:
    """Columns of padded texts from places counted among each text's own tokens, int64 [B].

    Args:
        place: int64 [B].
        tokens: bool [B, S]; None: all.
    """
    if tokens is None:
        return place
    # Places behind a token that are no tokens count as much; the first one is the token.
    return (tokens.long().cumsum(1) - 1 == place[:, None]).int().argmax(1)


def checked_places(place, tokens: Tensor | None, batch: int, width: int, device) -> Tensor:
    """`readout` as given in a call, int64 [B].

    Raises:
        ValueError: for another shape or dtype, or places outside of the texts.
    """
    place = torch.as_tensor(place, device=device)
    if place.shape != (batch,) or place.is_floating_point() or place.dtype == torch.bool:
        raise ValueError(
            f"`{READOUT}` has the shape {list(place.shape)} and is {place.dtype}, expected a whole "
            f"number for each of the {batch} texts: which of its own tokens is read, from 0."
        )
    place = place.long()
    count = torch.full_like(place, width) if tokens is None else tokens.sum(1)
    check(
        (place >= 0) & (place < count),
        lambda: (
            f"`{READOUT}` must be between 0 and the number of tokens less 1, got "
            f"{place.tolist()[:8]} for texts of {count.tolist()[:8]} tokens; count without padding."
        ),
    )
    return place


def narrow_labels(kwargs: dict, place: Tensor, tokens: Tensor | None, causal: bool) -> None:
    """Labels [B, S] of the call become those of the token that is read, [B, 1]: the label there
    (masked language models), or the one after it (causal ones).
    """
    labels = kwargs.get("labels")
    if labels is None or labels.dim() != 2 or labels.shape[1] == 1:
        return
    column = columns_of(place, tokens)[:, None]
    if not causal:
        kwargs["labels"] = labels.gather(1, column)
        return
    none = labels.new_full((len(labels), 1), -100)
    kwargs["labels"] = kwargs[SHIFTED] = torch.cat((labels, none), 1).gather(1, column + 1)
