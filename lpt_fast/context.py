"""Which tokens a prompt may be made from: all of an encoder's, of a decoder's the context and
never the answer.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .backbone.layout import check


def attended(tokens: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """The tokens of each example, bool [B, S].

    Args:
        tokens: which positions hold tokens, bool [B, at least S] (the last S count), or None for
            all.
        batch, length, device: of the hidden states.

    Raises:
        ValueError: for an example without any.
    """
    if tokens is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    tokens = tokens[:, -length:]
    check(
        tokens.any(1),
        lambda: (
            "An example of the batch has no attended token; every row of attention_mask needs at "
            "least one 1."
        ),
    )
    return tokens


def first_tokens(tokens: Tensor, context_lengths) -> Tensor:
    """The first `context_lengths[b]` tokens of each example, bool [B, S].

    Args:
        tokens: bool [B, S].
        context_lengths: whole numbers [B]; or [B / beams], as `generate` repeats its inputs.

    Raises:
        ValueError: for a length below 1 or above the number of tokens, or another shape.
    """
    batch = len(tokens)
    context = torch.as_tensor(context_lengths, device=tokens.device)
    if context.dim() != 1 or len(context) == 0 or batch % len(context):
        raise ValueError(
            f"`context_lengths` must hold one number for each of the {batch} examples, got the "
            f"shape {tuple(context.shape)}."
        )
    context = context.repeat_interleave(batch // len(context))
    count = tokens.sum(1)
    check(
        (context >= 1) & (context <= count),
        lambda: (
            "`context_lengths` must be between 1 and the number of attended tokens of each "
            f"example, got {_short(context)} for {_short(count)} tokens."
        ),
    )
    return tokens & (tokens.long().cumsum(1) <= context[:, None])


def before_answer(tokens: Tensor, labels: Tensor) -> Tensor:
    """The tokens before the first label that is not -100, bool [B, S]; all of an example without
    labels.

    Args:
        tokens: bool [B, S].
        labels: int64 [B, S], the tokens to generate.

    Raises:
        ValueError: for an example whose labels begin at its first token.
    """
    context = tokens & ((labels != -100).long().cumsum(1) == 0).to(tokens.device)
    check(
        context.any(1),
        lambda: (
            "An example's labels begin at its first token, which leaves no context to make the "
            "prompt from; set the labels of the context to -100, or give `context_lengths`."
        ),
    )
    return context


def warn_of_leak() -> None:
    """For a causal language model in training whose forward is told nothing of where the answer
    begins.
    """
    warnings.warn(
        "A causal language model trains without labels or context_lengths in its forward, so the "
        "prompt is made from every attended token, the answer included. (With label smoothing or a "
        "loss function of its own, Trainer takes the labels away: pass context_lengths.)",
        stacklevel=2,
    )


def _short(values: Tensor) -> str:
    return str(values.tolist() if len(values) <= 8 else [*values[:8].tolist(), "..."])
