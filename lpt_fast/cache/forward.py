"""From texts to the hidden states of one or several cuts, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from ..backbone.lower import run_between, run_lower_at
from .identity import Place, own_dtype, plain_dtype
from .rows import Text

# Tokens of a batch, padding counted: large enough to keep the device busy, small enough that the
# three batches that the writer may hold are no matter; on a CPU, that a batch stays in its caches
# (bench/results/cluster.md has what it is worth).
BATCH_TOKENS = {"cuda": 32768, "cpu": 1024}


def device_of(place: Place) -> torch.device:
    """Where the layers below the cut are."""
    return next(place.lower.parameters()).device


def batches_of(lengths: np.ndarray, budget: int) -> Iterator[slice]:
    """Cuts texts, in the given order, into batches of at most `budget` tokens when padded (one text
    at least).
    """
    start = longest = 0
    for i, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if i > start and longest * (i - start + 1) > budget:
            yield slice(start, i)
            start, longest = i, length
    if start < len(lengths):
        yield slice(start, len(lengths))


def collate(texts: Sequence[Text], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs of a backbone, padded on the right: input_ids, attention_mask and, where the texts
    have them, token_type_ids and position_ids, int64 [B, S].
    """
    lengths = np.array([len(text) for text in texts])
    mask = np.arange(lengths.max()) < lengths[:, None]

    def padded(name: str, fill: int) -> np.ndarray:
        out = np.full(mask.shape, fill, np.int64)
        out[mask] = np.concatenate([getattr(text, name) for text in texts])
        return out

    inputs = {"input_ids": padded("input_ids", pad_id), "attention_mask": mask.astype(np.int64)}
    for name in ("token_type_ids", "position_ids"):
        if getattr(texts[0], name) is not None:
            inputs[name] = padded(name, 0)
    return {
        name: torch.from_numpy(value).to(device, non_blocking=True)
        for name, value in inputs.items()
    }


class Runner:
    """Runs the layers below one or several cuts of a model.

    Args:
        place: the model; its own cut does not matter.
        layers: the cuts.
        compute_dtype: of the identity.
    """

    def __init__(self, place: Place, layers: Sequence[int], compute_dtype: str):
        self.place, self.layers = place, sorted(set(layers))
        self.device = device_of(place)
        self.pad_id = getattr(place.backbone.config, "pad_token_id", None) or 0
        own = own_dtype(place.lower)
        self._autocast = None if compute_dtype == own else getattr(torch, compute_dtype)
        # What hidden states are in. Under autocast, or with weights of several dtypes, that is for
        # each layer to say.
        self.dtype = plain_dtype(place.lower) if self._autocast is None else None

    def budget(self, asked: int | None) -> int:
        """Tokens of a batch: what was asked for, else what suits the device."""
        return asked or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])

    def _precision(self):
        """Under a caller's autocast, rows would depend on who asked for them."""
        if self._autocast is not None:
            return torch.autocast(self.device.type, self._autocast)
        if torch.is_autocast_enabled(self.device.type):
            return torch.autocast(self.device.type, enabled=False)
        return nullcontext()

    @torch.no_grad()
    def run(self, texts: Sequence[Text], below: int = 0, hidden=None) -> dict[int, Tensor]:
        """Hidden states of each cut, layer -> [T, D] packed in the order of the texts.

        Args:
            texts: of the batch, of one kind.
            below, hidden: where an exact cache of a lower cut has them: the layer and its output,
                [B, S, D].
        """
        inputs = collate(texts, self.pad_id, self.device)
        backbone, family = self.place.backbone, self.place.family
        mask = inputs["attention_mask"].bool()
        more = {"return_dict": True}
        if family.causal:  # nobody goes on from here with keys and values
            more["use_cache"] = False
        with self._precision():
            if hidden is None:
                states = run_lower_at(backbone, family, self.layers, {**inputs, **more})
            else:
                kept = {n: inputs[n] for n in ("attention_mask", "position_ids") if n in inputs}
                hidden = hidden.to(self.device, self.dtype)
                states = run_between(backbone, family, below, self.layers, hidden, {**kept, **more})
        full = mask.numel() == sum(len(text) for text in texts)
        return {
            layer: state.reshape(-1, state.shape[-1]) if full else state[mask]
            for layer, state in states.items()
        }
