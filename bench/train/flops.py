"""How much arithmetic a training step with a late prompt needs at the least, and how much of it a
machine can do.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch


def necessary_flops(
    lengths: np.ndarray,
    *,
    m: int,
    width: int,
    heads: int,
    layers: int,
    k: int,
    cached: bool,
    held: bool = False,
) -> float:
    """Operations (a multiplication and an addition are two) of one step's forward and backward.

    A full layer takes 24 D^2 + 4 S D operations for each of a text's S rows forward (S = its tokens
    and its m prompt rows; the feed-forward part is 4 D wide): 6 D^2 for queries, keys and values, 2
    D^2 for the output projection, 16 D^2 for the feed-forward part, 4 S D for scores and sums.
    Backward takes the same again, for weights are frozen. (Attention's own backward needs twice its
    forward; it is counted once, so the share of the machine is rather given too low.) Of that are
    spared:

    - in the last layer, where one row of each text is read, everything but that row: 24 D^2 for
      each text, and 4 H D for each row that it looks at (keys and values are not needed where
      scores are taken from W_k^T q, lpt_fast/packed/last_layer.py); the same again
      backward;
    - in the first layer above k, whose text rows are constants, the backward of queries, keys,
      values and scores for all but the m prompt rows;
    - with a cache, the layers 1..k: else 24 D^2 + 4 n D for each of a text's n tokens, forward;
    - where projections are held, 6 D^2 for each of those tokens, forward.

    Generator and head are left out; they are well below a hundredth.

    Args:
        lengths: tokens of each text.
        m: prompt rows.
        width, heads, layers: D, H, L.
        k: insertion layer.
        cached: whether the layers 1..k do not run.
        held: whether projections are held (lpt_fast/train/projections.py).
    """
    D, H = width, heads
    n = lengths.astype(np.float64)
    rows = n + m  # [B], S
    texts = len(n)
    full = float((rows * (24 * D**2 + 4 * rows * D)).sum())
    read = float(24 * D**2 * texts + 4 * H * D * rows.sum())
    upper = layers - k
    total = 0.0 if cached else k * float((n * (24 * D**2 + 4 * n * D)).sum())
    total += (upper - 1) * full + read  # forward
    if upper == 1:
        # First and last: the row that is read is a constant before attention.
        return total + float(20 * D**2 * texts + 4 * H * D * m * texts)
    if held:
        total -= float((n * 6 * D**2).sum())
    first = float((rows * 18 * D**2).sum() + (m * (6 * D**2 + 4 * rows * D)).sum())
    return total + first + (upper - 2) * full + read  # backward


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 10) -> float:
    """Operations a second of a square matrix product, the median of some."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    taken = []
    for turn in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 2:
            taken.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(taken)
