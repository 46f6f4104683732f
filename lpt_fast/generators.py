"""The prompt generators (paper section 3.2; DESIGN section 1): hidden states of layer k ->
prompt rows.

Every generator maps `hidden` [B, S, D] and a boolean `tokens` [B, S] (which positions it may read:
the example's own tokens, in decoders those of the context) to the prompt [B, m, D]. Nothing loops
over examples, and where the tokens stand in the row (left or right padded, with gaps) does not
matter: only their order does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import GENERATORS, LPTConfig


def first_token(tokens: Tensor) -> Tensor:
    """Index of the first readable position of each row. tokens: bool [B, S] -> int64 [B]."""
    return tokens.int().argmax(dim=1)


def last_token(tokens: Tensor) -> Tensor:
    """Index of the last readable position of each row. tokens: bool [B, S] -> int64 [B]."""
    return tokens.shape[1] - 1 - tokens.int().flip(1).argmax(dim=1)


def pooling_bins(num_tokens: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Adaptive pooling bins over n tokens: bin j covers floor(j n / m) .. ceil((j+1) n / m) (end
    excluded).

    Bins overlap where m does not divide n, and repeat tokens where n < m, as in
    `torch.nn.AdaptiveAvgPool1d`.

    Args:
        num_tokens: int64 [B].
        m: number of bins.

    Returns:
        start, end: int64 [B, m].
    """
    j = torch.arange(m, device=num_tokens.device)
    n = num_tokens[:, None]
    start = torch.div(j * n, m, rounding_mode="floor")
    end = torch.div((j + 1) * n + m - 1, m, rounding_mode="floor")
    return start, end


def adaptive_avg_pool(hidden: Tensor, tokens: Tensor, m: int) -> Tensor:
    """Mean of the readable rows of each bin. hidden [B, S, D], tokens bool [B, S] -> [B, m, D]."""
    rank = tokens.long().cumsum(1) - 1  # [B, S], the place of each token among the readable ones
    start, end = pooling_bins(tokens.sum(1), m)
    member = (
        (rank[:, None] >= start[..., None]) & (rank[:, None] < end[..., None]) & tokens[:, None]
    )
    # In the dtype of `hidden`: an integer quotient would be rounded to fp32 first.
    weight = member.to(hidden.dtype) / (end - start).clamp(min=1).to(hidden.dtype)[..., None]
    # Positions that may not be read can hold anything, NaN included, and 0 * NaN is not 0.
    return weight @ hidden.masked_fill(~tokens[..., None], 0)


def adaptive_max_pool(hidden: Tensor, tokens: Tensor, m: int) -> Tensor:
    """Maximum of the readable rows of each bin. hidden [B, S, D], tokens bool [B, S] -> [B, m, D].

    Gathers the rows bin by bin, so that memory grows with S + 2 m rows an example and not with
    S * m.
    """
    batch, length, width = hidden.shape
    # The readable positions of each row in order, then the others.
    order = torch.argsort(~tokens, dim=1, stable=True)
    start, end = pooling_bins(tokens.sum(1), m)
    widest = -(-length // m) + 1
    place = start[..., None] + torch.arange(widest, device=hidden.device)  # [B, m, widest]
    inside = place < end[..., None]
    index = order.gather(1, place.clamp(max=length - 1).flatten(1))  # [B, m * widest]
    rows = hidden.gather(1, index[..., None].expand(-1, -1, width)).view(batch, m, widest, width)
    return rows.masked_fill(~inside[..., None], float("-inf")).amax(dim=2)


class PromptGenerator(nn.Module):
    """What all generators share: m, D and dropout on the prompt.

    Args:
        hidden_size: D of the backbone.
        num_virtual_tokens: m.
        dropout: probability, applied to the prompt alone.
        causal: whether the backbone is a decoder. Then the one token that `npg` reads is the last
            of the context, for only that one has seen all of it.
    """

    def __init__(self, hidden_size: int, num_virtual_tokens: int, dropout: float, causal: bool):
        super().__init__()
        self.hidden_size = hidden_size
        self.num_virtual_tokens = num_virtual_tokens
        self.causal = causal
        self.dropout = nn.Dropout(dropout)

    def generate(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [B, S, D] in any float dtype, tokens bool [B, S] -> prompt [B, m, D] in the dtype
        of `hidden`.

        The weights are fp32 masters: half-precision hidden states are cast up, the prompt is cast
        down at the end.
        """
        dtype = next(self.parameters()).dtype
        return self.dropout(self.generate(hidden.to(dtype), tokens)).to(hidden.dtype)


class StaticGenerator(PromptGenerator):
    """One learned prompt for all examples ("w/o PG" in the paper's tables)."""

    def __init__(self, hidden_size, num_virtual_tokens, bottleneck_size, dropout, causal):
        super().__init__(hidden_size, num_virtual_tokens, dropout, causal)
        self.prompt_embedding = nn.Embedding(num_virtual_tokens, hidden_size)

    def generate(self, hidden, tokens):
        return self.prompt_embedding.weight.expand(hidden.shape[0], -1, -1)


class NPGenerator(PromptGenerator):
    """Naive prompt generator: reshape(W_u relu(W_d h + b_d) + b_u), h the first or last readable
    token's state.
    """

    def __init__(self, hidden_size, num_virtual_tokens, bottleneck_size, dropout, causal):
        super().__init__(hidden_size, num_virtual_tokens, dropout, causal)
        self.proj_down = nn.Linear(hidden_size, bottleneck_size)
        self.proj_up = nn.Linear(bottleneck_size, num_virtual_tokens * hidden_size)

    def generate(self, hidden, tokens):
        position = last_token(tokens) if self.causal else first_token(tokens)
        h = hidden[torch.arange(len(hidden), device=hidden.device), position]  # [B, D]
        prompt = self.proj_up(F.relu(self.proj_down(h)))
        return prompt.view(-1, self.num_virtual_tokens, self.hidden_size)


class APPGenerator(PromptGenerator):
    """Average-pooling prompt generator: W_u relu(Pool_m(H W_d^T + b_d)) + b_u.

    Mean and projection are both linear, and the weights of a bin sum to one, so pooling first gives
    the same prompt for m projected rows instead of n.
    """

    def __init__(self, hidden_size, num_virtual_tokens, bottleneck_size, dropout, causal):
        super().__init__(hidden_size, num_virtual_tokens, dropout, causal)
        self.proj_down = nn.Linear(hidden_size, bottleneck_size)
        self.proj_up = nn.Linear(bottleneck_size, hidden_size)

    def generate(self, hidden, tokens):
        pooled = adaptive_avg_pool(hidden, tokens, self.num_virtual_tokens)
        return self.proj_up(F.relu(self.proj_down(pooled)))


class MPPGenerator(APPGenerator):
    """Maximum-pooling prompt generator: the maximum is taken after the down-projection, over
    each channel.
    """

    def generate(self, hidden, tokens):
        # Padding may hold NaN; its gradient is zero, but zero times NaN in the weight gradient is
        # not.
        projected = self.proj_down(hidden.masked_fill(~tokens[..., None], 0))
        pooled = adaptive_max_pool(projected, tokens, self.num_virtual_tokens)
        return self.proj_up(F.relu(pooled))


class AttentionGenerator(PromptGenerator):
    """Beyond the paper: m learned queries attend over the tokens, then the bottleneck.

    prompt = W_u relu(W_d (softmax_tokens(H W_a)^T H) + b_d) + b_u, W_a = `queries.weight`^T [D, m].
    The scores are divided by sqrt(D), so that the softmax starts out soft for every model size.
    """

    def __init__(self, hidden_size, num_virtual_tokens, bottleneck_size, dropout, causal):
        super().__init__(hidden_size, num_virtual_tokens, dropout, causal)
        self.queries = nn.Linear(hidden_size, num_virtual_tokens, bias=False)
        self.proj_down = nn.Linear(hidden_size, bottleneck_size)
        self.proj_up = nn.Linear(bottleneck_size, hidden_size)

    def generate(self, hidden, tokens):
        hidden = hidden.masked_fill(~tokens[..., None], 0)
        scores = self.queries(hidden) / self.hidden_size**0.5  # [B, S, m]
        scores = scores.masked_fill(~tokens[..., None], float("-inf"))
        pooled = scores.softmax(dim=1).transpose(1, 2) @ hidden  # [B, m, D]
        return self.proj_up(F.relu(self.proj_down(pooled)))


class ResidualGenerator(PromptGenerator):
    """Beyond the paper: a learned prompt E plus bottleneck branches on it: E +
    sum_i W_u^i relu(W_d^i E).

    The branches have the widths r, r/2, r/4 (at least 1). They reparameterise one prompt, as
    residual prompt tuning does (Razdaibiedina et al., Findings of ACL 2023): the same for all
    examples, so it folds to `static`.
    """

    def __init__(self, hidden_size, num_virtual_tokens, bottleneck_size, dropout, causal):
        super().__init__(hidden_size, num_virtual_tokens, dropout, causal)
        widths = [max(1, bottleneck_size // 2**i) for i in range(3)]
        self.prompt_embedding = nn.Embedding(num_virtual_tokens, hidden_size)
        self.proj_down = nn.ModuleList([nn.Linear(hidden_size, r) for r in widths])
        self.proj_up = nn.ModuleList([nn.Linear(r, hidden_size) for r in widths])

    def prompt(self) -> Tensor:
        """The prompt that all examples share, [m, D]."""
        embedding = self.prompt_embedding.weight
        branches = zip(self.proj_down, self.proj_up, strict=True)
        return embedding + sum(up(F.relu(down(embedding))) for down, up in branches)

    def generate(self, hidden, tokens):
        return self.prompt().expand(hidden.shape[0], -1, -1)

    @torch.no_grad()
    def fold(self) -> StaticGenerator:
        """The `static` generator that gives the same prompt, for use after training."""
        prompt = self.prompt()
        static = StaticGenerator(
            self.hidden_size, self.num_virtual_tokens, 1, self.dropout.p, self.causal
        ).to(device=prompt.device, dtype=prompt.dtype)
        static.prompt_embedding.weight.copy_(prompt)
        return static.train(self.training)


_CLASSES = dict(
    zip(
        GENERATORS,
        (
            StaticGenerator,
            NPGenerator,
            APPGenerator,
            MPPGenerator,
            AttentionGenerator,
            ResidualGenerator,
        ),
        strict=True,
    )
)


def build_generator(
    config: LPTConfig, hidden_size: int, dropout: float, causal: bool
) -> PromptGenerator:
    """The generator that `config` names, with PyTorch's default initialisation (the method's own).

    Args:
        config: `generator`, `num_virtual_tokens` and `bottleneck_size` are read.
        hidden_size: D.
        dropout: probability on the prompt.
        causal: whether the backbone is a decoder.
    """
    cls = _CLASSES[config.generator]
    return cls(hidden_size, config.num_virtual_tokens, config.bottleneck_size, dropout, causal)
