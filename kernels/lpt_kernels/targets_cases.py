"""What lpt_kernels.targets compiles.

A case is a function that calls the public wrappers on tensors of the device "meta" in the shapes of
real models. Nothing runs; `launch.record` notes the launches. So a case meets the same heuristic,
and a kernel the same specialisation, as in use. A new wrapper needs a function here:

    @case("my_op", ALL)
    def _my_op(width: int, dtype: torch.dtype):
        my_op(meta(TOKENS, width, dtype=dtype), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from . import attention, frozen, gather, insert

CASES: dict[str, Callable[[], object]] = {}

# Shapes of the hidden states: name -> (width, dtype). Other dtypes at one width only, to save time.
BF16 = {
    "MiniLM bf16": (384, torch.bfloat16),
    "RoBERTa-base bf16": (768, torch.bfloat16),
    "RoBERTa-large bf16": (1024, torch.bfloat16),
    "Llama bf16": (4096, torch.bfloat16),
}
ONE = {"RoBERTa-large bf16": BF16["RoBERTa-large bf16"]}
FP16 = {"RoBERTa-large fp16": (1024, torch.float16)}
FP32 = {"RoBERTa-large fp32": (1024, torch.float32)}
ALL = BF16 | FP16 | FP32
# Not divisible by 16, as they come in use.
EXAMPLES, TOKENS = 33, 2049
PROMPT, BOTTLENECK = 20, 128
# What `python -m bench kernels` times first: texts as long as those of SST-2, 32,768 tokens in all.
HEADLINE = dict(tokens=32768, examples=1270)


def case(name: str, shapes: Mapping[str, tuple] = ALL, **more):
    """Adds function(*shape, **more) to CASES for each of `shapes`, named "name, shape"."""

    def add(function):
        for shape, args in shapes.items():
            CASES[f"{name}, {shape}"] = partial(function, *args, **more)
        return function

    return add


def meta(*size: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    """A tensor of a size and dtype without memory."""
    return torch.empty(size, dtype=dtype, device="meta", requires_grad=grad)


def lengths() -> torch.Tensor:
    """cu_seqlens of the batch."""
    return meta(EXAMPLES + 1, dtype=torch.int32)


def backward(*outputs: torch.Tensor) -> None:
    """Backward through outputs, with gradients of their dtypes."""
    torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


@case("gather_rows")
@case("gather_rows int8", ONE, stored=torch.int8)
@case("gather_rows fp8", ONE, stored=torch.uint8)
def _gather(width, dtype, stored=None):
    store = gather.Store(
        meta(10 * TOKENS, width, dtype=stored or dtype),
        meta(10 * EXAMPLES + 1, dtype=torch.int64),
        meta(10 * TOKENS) if stored else None,
        meta(width) if stored == torch.int8 else None,
    )
    index = meta(EXAMPLES, dtype=torch.int64)
    gather.gather_rows(store, index, PROMPT, total=TOKENS, dtype=dtype)


# Decoders share keys and values between heads.
HEADS = {
    "MiniLM bf16": (12, 12, 32, torch.bfloat16),
    "RoBERTa-large bf16": (16, 16, 64, torch.bfloat16),
    "RoBERTa-large fp16": (16, 16, 64, torch.float16),
    "Llama of 1B bf16": (32, 8, 64, torch.bfloat16),
}


@case("attention", HEADS)
def _attention(heads, kv_heads, size, dtype):
    q, k, v = (meta(TOKENS, n * size, dtype=dtype, grad=True) for n in (heads, kv_heads, kv_heads))
    how = dict(heads=heads, kv_heads=kv_heads, scale=size**-0.5, causal=heads != kv_heads)
    backward(attention.attend(q, k, v, lengths(), 173, **how))


@case("layer_norm after a linear layer")
def _post_norm(width, dtype):
    x, residual = (meta(TOKENS, width, dtype=dtype, grad=True) for _ in range(2))
    weight, norm_bias, bias = (meta(width, dtype=dtype) for _ in range(3))
    backward(frozen.layer_norm(x, weight, norm_bias, bias=bias, residual=residual))


@case("layer_norm before a linear layer", ONE, norm=frozen.layer_norm)
@case("rms_norm before a linear layer", norm=frozen.rms_norm)
def _pre_norm(width, dtype, norm):
    x, residual = (meta(TOKENS, width, dtype=dtype, grad=True) for _ in range(2))
    backward(*norm(x, meta(width, dtype=dtype), residual=residual, return_sum=True))


@case("gelu", activation="gelu")
@case("gelu_tanh", ONE, activation="gelu_tanh")
@case("silu", ONE, activation="silu")
def _activate(width, dtype, activation):
    x, bias = meta(TOKENS, 4 * width, dtype=dtype, grad=True), meta(4 * width, dtype=dtype)
    backward(frozen.activate(x, bias, activation=activation))


@case("gated silu")
def _gated(width, dtype):
    gate, up = (meta(TOKENS, 4 * width, dtype=dtype, grad=True) for _ in range(2))
    backward(frozen.gated(gate, up))


@case("insert static", BF16 | FP32, kind="static")
@case("insert npg", BF16 | FP32, kind="npg")
@case("insert appg", BF16 | FP32, kind="appg")
@case("insert mppg", kind="mppg")  # fp16 here alone: these take longest to compile
@case("insert npg without dropout", ONE, kind="npg", p_drop=0.0)
@case("insert appg without dropout", ONE, kind="appg", p_drop=0.0)
@case("insert mppg with holes", ONE, kind="mppg", holes=True)
@case("insert static, headline", ONE, kind="static", p_drop=0.0, **HEADLINE)
@case("insert npg, headline", ONE, kind="npg", p_drop=0.0, **HEADLINE)
@case("insert appg, headline", ONE, kind="appg", p_drop=0.0, **HEADLINE)
@case("insert mppg, headline", ONE, kind="mppg", p_drop=0.0, **HEADLINE)
@case("insert npg, 32 texts", ONE, kind="npg", tokens=975, examples=32)
@case("insert mppg, 32 texts", ONE, kind="mppg", tokens=975, examples=32)
def _insert(width, dtype, kind, p_drop=0.1, holes=False, tokens=TOKENS, examples=EXAMPLES):
    """Forward and backward of a training step, weights as the operator gives them.

    holes: a padded batch whose mask has holes, some rows that may not be read, prompts anywhere.
    """
    weights = _insert_weights(kind, width, dtype)
    per_example = ("insert_at", "readable_start", "readable_count") if holes else ()
    places = {name: meta(examples, dtype=torch.int32) for name in per_example}
    if holes:
        places["order"] = meta(tokens, dtype=torch.int32)
    layout = insert.Layout(meta(examples + 1, dtype=torch.int32), PROMPT, **places)
    hidden = meta(tokens, width, dtype=dtype)
    step = dict(T=tokens, p_drop=p_drop, seed=meta(1, dtype=torch.int64))
    out, *kept = insert.insert_fwd(kind, hidden, layout, weights, dtype=dtype, **step)
    grad = torch.empty_like(out)
    needs = dict(need_weights=True, need_hidden=True)
    insert.insert_bwd(kind, grad, out, layout, weights, *kept, **step, **needs)


@case("insert npg in place", ONE, kind="npg")
@case("insert appg in place", ONE, kind="appg")
def _insert_in_place(width, dtype, kind):
    out = meta(TOKENS + EXAMPLES * PROMPT, width, dtype=dtype)
    layout, weights = insert.Layout(lengths(), PROMPT), _insert_weights(kind, width, dtype)
    insert.insert_fwd(kind, None, layout, weights, T=TOKENS, dtype=dtype, out=out)


@case("insert npg from an int8 cache", ONE, kind="npg")
def _insert_from_cache(width, dtype, kind):
    cache = meta(10 * TOKENS, width, dtype=torch.int8)
    layout = insert.Layout(
        lengths(),
        PROMPT,
        source_start=meta(EXAMPLES, dtype=torch.int64),
        token_scale=meta(10 * TOKENS),
        channel_scale=meta(width),
    )
    insert.insert_fwd(
        kind, cache, layout, _insert_weights(kind, width, dtype), T=TOKENS, dtype=dtype
    )


def _insert_weights(kind, width, dtype):
    """fp32 masters, of which the operator rounds those that are read more than once."""
    if kind == "static":
        return [meta(PROMPT, width)]
    rows = PROMPT * width if kind == "npg" else width
    matrix = torch.float32 if kind == "npg" else dtype
    sizes = ((BOTTLENECK, width), (BOTTLENECK,), (rows, BOTTLENECK), (rows,))
    return [meta(*size, dtype=matrix if len(size) > 1 else dtype) for size in sizes]
