"""Inputs for the tests of prompt insertion: lengths, weights, and what the answer has to be."""

from __future__ import annotations

import itertools

import torch

from tests.oracle import prompt_by_hand

KINDS = ("static", "npg", "appg", "mppg")


def lengths_to_cu(lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def make_weights(kind, D, r, m, dtype=torch.float64, seed=0, device="cpu"):
    """Random weights of a generator by their names in files."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5).to(
            device, dtype
        )

    if kind == "static":
        return {"prompt_embedding.weight": random(m, D)}
    rows = m * D if kind == "npg" else D
    return {
        "proj_down.weight": random(r, D),
        "proj_down.bias": random(r),
        "proj_up.weight": random(rows, r),
        "proj_up.bias": random(rows),
    }


def make_hidden(lengths, D, dtype=torch.float64, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed + 1)
    return torch.randn(sum(lengths), D, generator=g, dtype=torch.float64).to(device, dtype)


def by_hand(hidden, lengths, kind, weights, m, context=None, last=False):
    """The packed output example by example, with PyTorch's own adaptive pooling."""
    rows, at = [], 0
    for b, n in enumerate(lengths):
        text = hidden[at : at + n]
        low, high = (0, n) if context is None else context[b]
        rows += [prompt_by_hand(kind, weights, text[low:high], m, last), text]
        at += n
    return torch.cat(rows) if rows else hidden
