"""The prompt generators (paper section 3.2; DESIGN section 1): parameters, and which formula.

The paper's formulas are not here but in the one operator that makes prompts and puts them before
the text (insertion.py: Triton kernels, or reference.py in plain PyTorch). Where the tokens stand in
a padded row (left or right padded, with gaps) does not matter: only their order does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbone.families import Family
from ..backbone.lower import run_lower
from ..insertion.api import insert_prompt_, insert_prompt_padded
from .config import GENERATORS, NO_PROMPT, LPTConfig


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

    kind: str
    """Which formula of the operator makes the prompt."""

    def weights(self, hidden: Tensor, readable: Tensor) -> dict[str, Tensor]:
        """The operator's weights by name. hidden [B, S, D], readable bool [B, S]: what generators
        beyond the paper make their prompt from themselves.

        Raises:
            ValueError: something has replaced this module's layers by such without parameters.
        """
        own = dict(self.named_parameters())
        if not own:
            now = {type(module) for module in self.children() if module is not self.dropout}
            names = ", ".join(sorted(f"{cls.__module__}.{cls.__name__}" for cls in now))
            raise ValueError(
                f"The prompt generator has lost its weights (it holds {names}), expected its own "
                "layers; quantise the base model alone, before get_peft_model."
            )
        return own

    reads_states = False
    """Whether `weights` looks at its arguments."""

    @property
    def reads_text(self) -> bool:
        """Whether the prompt depends on the text, so that it matters where its context ends."""
        return self.reads_states or self.kind != "static"

    def fill(
        self,
        buffer: Tensor,
        cu_seqlens: Tensor,
        context: Tensor | None,
        padded: Callable[[], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The packed form: writes each text's prompt into the m free rows before it, in place.

        Args:
            buffer: [T + B m, D], text b in rows cu_seqlens[b] + (b + 1) m ..; a constant.
            cu_seqlens: int32 [B + 1] of the text rows.
            context: int32 [B, 2], the rows of each text that its prompt is made from; None: all.
            padded: gives the arguments of `weights`, for generators that look at them.

        Returns:
            `buffer`, with a gradient to the generator's parameters.
        """
        hidden, readable = padded() if self.reads_states else (None, None)
        return insert_prompt_(
            buffer,
            cu_seqlens,
            self.kind,
            self.weights(hidden, readable),
            self.num_virtual_tokens,
            context=context,
            last_token=self.causal,
            dropout_p=self.dropout.p if self.training else 0.0,
            validate=False,
        )

    def forward(
        self, hidden: Tensor, attention_mask: Tensor | None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Padded hidden states with the prompt directly before each row's first token.

        The weights are fp32 masters, whatever the dtype of the hidden states (see
        insertion.insert_prompt for the rounding).

        Args:
            hidden: [B, S, D] in any float dtype.
            attention_mask: bool [B, S], the tokens of each row; None: all.
            context_mask: bool [B, S], the tokens that the prompt is made from; None: all tokens.

        Returns:
            [B, m + S, D] in the dtype of `hidden`.
        """
        readable = attention_mask if context_mask is None else context_mask
        if readable is None:
            readable = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        rows, _ = insert_prompt_padded(
            hidden,
            attention_mask,
            self.kind,
            self.weights(hidden, readable),
            self.num_virtual_tokens,
            context_mask=context_mask,
            last_token=self.causal,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return rows


class StaticGenerator(PromptGenerator):
    """One learned prompt for all examples ("w/o PG" in the paper's tables)."""

    kind = "static"

    def __init__(self, hidden_size, num_virtual_tokens, bottleneck_size, dropout, causal):
        super().__init__(hidden_size, num_virtual_tokens, dropout, causal)
        self.prompt_embedding = nn.Embedding(num_virtual_tokens, hidden_size)


class NPGenerator(PromptGenerator):
    """Naive prompt generator: reshape(W_u relu(W_d h + b_d) + b_u), h the first or last readable
    token's state.
    """

    kind = "npg"

    def __init__(self, hidden_size, num_virtual_tokens, bottleneck_size, dropout, causal):
        super().__init__(hidden_size, num_virtual_tokens, dropout, causal)
        self.proj_down = nn.Linear(hidden_size, bottleneck_size)
        self.proj_up = nn.Linear(bottleneck_size, num_virtual_tokens * hidden_size)


class APPGenerator(PromptGenerator):
    """Average-pooling prompt generator: W_u relu(Pool_m(H W_d^T + b_d)) + b_u."""

    kind = "appg"

    def __init__(self, hidden_size, num_virtual_tokens, bottleneck_size, dropout, causal):
        super().__init__(hidden_size, num_virtual_tokens, dropout, causal)
        self.proj_down = nn.Linear(hidden_size, bottleneck_size)
        self.proj_up = nn.Linear(bottleneck_size, hidden_size)


class MPPGenerator(APPGenerator):
    """Maximum-pooling prompt generator: the maximum is taken after the down-projection, over
    each channel.
    """

    kind = "mppg"


class AttentionGenerator(PromptGenerator):
    """Beyond the paper: m learned queries attend over the tokens, then the bottleneck.

    prompt = W_u relu(W_d (softmax_tokens(H W_a)^T H) + b_d) + b_u, W_a = `queries.weight`^T [D, m].
    The scores are divided by sqrt(D), so that the softmax starts out soft for every model size.
    """

    kind = "static"
    reads_states = True

    def __init__(self, hidden_size, num_virtual_tokens, bottleneck_size, dropout, causal):
        super().__init__(hidden_size, num_virtual_tokens, dropout, causal)
        self.queries = nn.Linear(hidden_size, num_virtual_tokens, bias=False)
        self.proj_down = nn.Linear(hidden_size, bottleneck_size)
        self.proj_up = nn.Linear(bottleneck_size, hidden_size)

    def weights(self, hidden, readable):
        """As of PromptGenerator."""
        hidden = hidden.to(self.queries.weight.dtype)
        # Positions that may not be read can hold anything, NaN included, and 0 * NaN is not 0.
        hidden = hidden.masked_fill(~readable[..., None], 0)
        scores = self.queries(hidden) / self.hidden_size**0.5  # [B, S, m]
        scores = scores.masked_fill(~readable[..., None], float("-inf"))
        pooled = scores.softmax(dim=1).transpose(1, 2) @ hidden  # [B, m, D]
        return {"prompt_embedding.weight": self.proj_up(F.relu(self.proj_down(pooled)))}


class ResidualGenerator(PromptGenerator):
    """Beyond the paper: a learned prompt E plus bottleneck branches on it: E +
    sum_i W_u^i relu(W_d^i E).

    The branches have the widths r, r/2, r/4 (at least 1). They reparameterise one prompt, as
    residual prompt tuning does (Razdaibiedina et al., Findings of ACL 2023): the same for all
    examples, so it folds to `static`.
    """

    kind = "static"

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

    def weights(self, hidden, readable):
        """As of PromptGenerator."""
        return {"prompt_embedding.weight": self.prompt()}

    @torch.no_grad()
    def fold(self) -> StaticGenerator:
        """The `static` generator that gives the same prompt, for use after training."""
        prompt = self.prompt()
        static = StaticGenerator(
            self.hidden_size, self.num_virtual_tokens, 1, self.dropout.p, self.causal
        ).to(device=prompt.device, dtype=prompt.dtype)
        static.prompt_embedding.weight.copy_(prompt)
        return static.train(self.training)


class NoPrompt(PromptGenerator):
    """No prompt (m = 0): late LoRA alone."""

    kind = "static"

    def __init__(self, hidden_size, num_virtual_tokens, bottleneck_size, dropout, causal):
        super().__init__(hidden_size, num_virtual_tokens, dropout, causal)

    def fill(self, buffer, cu_seqlens, context, padded):
        """The rows as they are."""
        return buffer

    def forward(self, hidden, attention_mask, context_mask=None):
        """The hidden states as they are."""
        return hidden


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
    cls = NoPrompt if config.generator == NO_PROMPT else _CLASSES[config.generator]
    return cls(hidden_size, config.num_virtual_tokens, config.bottleneck_size, dropout, causal)


@torch.no_grad()
def init_from_vocab(
    generator: PromptGenerator, backbone: nn.Module, family: Family, config: LPTConfig
) -> None:
    """Starts a static prompt from the states of m random tokens after layer k, read as one short
    text.

    Args:
        generator: with a `prompt_embedding`.
        backbone, family: as for `run_lower`.
        config: `insertion_layer` and `num_virtual_tokens` are read.
    """
    ids = torch.randint(backbone.config.vocab_size, (1, config.num_virtual_tokens))
    inputs = {"input_ids": ids.to(next(backbone.parameters()).device), "return_dict": True}
    out = run_lower(backbone, family, config.insertion_layer, inputs)
    generator.prompt_embedding.weight.copy_(out.last_hidden_state[0])
