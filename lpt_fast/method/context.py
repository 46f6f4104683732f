"""Which tokens a prompt may be made from: all of an encoder's, of a decoder's the context and
never the answer.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..insertion.padded_layout import check
from ..packing import PackedBatch


def attended(tokens: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """The tokens of each example, bool [B, S].

    Args:
        tokens: which positions hold tokens, bool [B, at least S] (the last S count), or None for
            all.
        batch, length, device: of the hidden states.
    """
    if tokens is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    return tokens[:, -length:]


def first_tokens(tokens: Tensor, context_lengths, repeat: bool = False) -> Tensor:
    """The first `context_lengths[b]` tokens of each example, bool [B, S].

    Args:
        tokens: bool [B, S].
        context_lengths: whole numbers [B].
        repeat: allows [B / n] for n copies of each example, as beam search makes them.

    Raises:
        ValueError: for a length below 1 or above the number of tokens, or another shape.
    """
    batch = len(tokens)
    context = torch.as_tensor(context_lengths, device=tokens.device)
    fits = context.dim() == 1 and len(context) > 0 and batch % len(context) == 0
    if not fits or (len(context) != batch and not repeat):
        raise ValueError(
            f"`context_lengths` must hold one number for each of the {batch} examples, got the "
            f"shape {tuple(context.shape)}."
        )
    if context.is_floating_point() or context.dtype == torch.bool:
        raise ValueError(f"`context_lengths` must be whole numbers, got {context.dtype}.")
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
            "An example's labels begin at its first token, expected a context before them that "
            "the prompt is made from; set its labels to -100 (TRL: completion_only_loss or "
            "assistant_only_loss), give `context_lengths`, or train generator='static', which "
            "reads no text (lpt_fast/train/README.md)."
        ),
    )
    return context


def _short(values: Tensor) -> str:
    return str(values.tolist() if len(values) <= 8 else [*values[:8].tolist(), "..."])


@lru_cache(maxsize=64)
def parameter_names(forward) -> tuple[str, ...]:
    """Names of the arguments of a class's `forward`, without self."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _thread() -> int:
    # (Dynamo cannot trace get_ident, and compiled models are not shared between threads.)
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


@dataclass
class Call:
    """What one call of the whole model says beyond what reaches the backbone."""

    context_lengths: Tensor | None = None
    labels: Tensor | None = None
    cached: PackedBatch | None = None
    readout: Tensor | None = None
    given: Callable | None = None  # makes the backbone's output, which is known already (mixed.py)


class Context:
    """Carries context lengths and labels from the call of a whole model to its backbone.

    Kept per thread, for servers run one model from several.

    Args:
        causal_lm: whether labels are the tokens to generate, so that the context ends before them.
    """

    def __init__(self, causal_lm: bool):
        self.causal_lm = causal_lm
        self._calls: dict[int, Call] = {}
        # While generate() runs: the context lengths, once they are known.
        self._generations: dict[int, list] = {}
        self._given: dict[int, Callable] = {}
        # Of a call for several adapters (mixed.py) that is about to run: (names, what ends it).
        self.names: dict[int, tuple] = {}

    def note(self, model: nn.Module, args: tuple, kwargs: dict, cached=None, readout=None):
        """Before the forward of the whole model: takes what the backbone will not be given.

        Args:
            model: the whole model.
            args, kwargs: of its forward.
            cached: the PackedBatch that stands in for the text, if any.
            readout: int64 [B], the one token of each text that is wanted; None: all.
        """
        labels = kwargs.get("labels")
        if args and labels is None:
            names = parameter_names(type(model).forward)
            labels = dict(zip(names, args, strict=False)).get("labels")
        given = self._given.pop(_thread(), None) if self._given else None
        lengths = kwargs.pop("context_lengths", None)
        self._calls[_thread()] = Call(lengths, labels, cached, readout, given)
        return args, kwargs

    def names_of_call(self) -> tuple | None:
        """Of this thread."""
        return self.names.get(_thread()) if self.names else None

    def give(self, output: Callable) -> None:
        """What the backbone gives in the next call of the whole model, as a function."""
        self._given[_thread()] = output

    def forget(self, model: nn.Module, args: tuple, output) -> None:
        """Forward hook: nothing of a call, not of a failed one either, is left for the next."""
        self._calls.pop(_thread(), None)

    def take(self) -> Call:
        """What was noted of the running call."""
        return self._calls.pop(_thread(), Call())

    @contextmanager
    def generating(self, context_lengths: Tensor | None):
        """While generating, the context is the prompt text, also without a cache that knows it."""
        self._generations[_thread()] = [context_lengths]
        try:
            yield
        finally:
            del self._generations[_thread()]

    def of(self, tokens: Tensor, call: Call, training: bool, reads_text: bool) -> Tensor:
        """The context of each example of a decoder, bool [B, S].

        Args:
            tokens: the attended tokens, bool [B, S].
            call: what was noted of the call.
            training: whether the model trains.
            reads_text: whether the generator does; to one that does not, a context means nothing
                (but one that is given has to be sound).
        """
        if call.context_lengths is not None:
            return first_tokens(tokens, call.context_lengths)
        generation = self._generations.get(_thread())
        if generation is not None:
            if generation[0] is None:
                generation[0] = tokens.sum(1)
            return first_tokens(tokens, generation[0], repeat=True)
        if not reads_text:
            return tokens
        if self.causal_lm and call.labels is not None:
            return before_answer(tokens, call.labels)
        if self.causal_lm and training and torch.is_grad_enabled():
            warnings.warn(
                "A causal language model trains without labels or context_lengths in its forward, "
                "so the prompt is made from every attended token, the answer included. (With label "
                "smoothing or a loss function of its own, Trainer takes the labels away: pass "
                "context_lengths.)",
                stacklevel=2,
            )
        return tokens
