"""The fast stack: layers k+1..L without padding (DESIGN section 4).

Only real tokens exist. Linear layers, norms and activations run on [T + B m, D] rows; attention is
text by text. Beyond that, four exact savings:

1. the first layer above k projects text rows that are constants: queries, keys and values get a
   backward for the prompt rows alone, and so does its attention; what they are may be held, once
   computed (projections.py);
2. where the head reads one row of each text, the last layer computes that row alone (readout
   pruning), and without rotary positions needs no keys and values either (last_layer.py);
3. frozen weights get no gradient, so nothing is kept for one;
4. batches from the cache bring free rows, and prompts are written there: no concatenation.

Which families: `blocks.BLOCKS`. Everything else runs the padded way (upper.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..backbone.copies import LATE_PROMPT
from ..backbone.families import Family, frozen_above, get_layers, shared_by_layers
from ..backbone.fingerprint import is_quantised
from ..backbone.low_rank import LowRank
from ..backbone.watch import HOOKS, Watch, descendants, spine
from .attention import autocast_dtype, without_autocast
from .blocks import BLOCKS, Block, LlamaBlock
from .low_rank import Among
from .ops import fused, layer_norm, rms_norm
from .plan import Plan

# Rotary angles of these depend on the longest text of a call, padding included.
_MOVING_ROTARY = ("dynamic", "longrope")


def block_type(backbone: nn.Module) -> type[Block] | None:
    """The block of a backbone's layers; None for a family without one. Users' subclasses may
    compute something else, so the class itself counts.
    """
    cls = type(backbone)
    return BLOCKS.get(cls.__name__) if _is_transformers(cls) else None


def _is_transformers(cls: type) -> bool:
    return cls.__module__.startswith("transformers.")


def why_padded(
    backbone: nn.Module,
    family: Family,
    k: int,
    longest: int,
    training: bool,
    plain: dict[int, Watch | None] | None = None,
) -> str | None:
    """Why the layers above k of a backbone cannot run packed, in words; None: they can.

    Args:
        backbone, family, k: as for `run_lower`.
        longest: most rows that a text may have, prompt included.
        training: whether the model trains.
        plain: by k, the modules above it as they were when they were found to be plain; they are
            looked at again when they have changed.
    """
    block = block_type(backbone)
    if block is None:
        return f"{type(backbone).__name__} is not among {', '.join(BLOCKS)}"
    if torch.compiler.is_compiling():
        return "torch.compile runs the model's own code"
    config = backbone.config
    if getattr(config, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn computes scores in another way"
    if getattr(config, "is_decoder", False) and not family.causal:
        return "the encoder is set up as a decoder"
    layers = list(get_layers(backbone, family))[k:]
    if issubclass(block, LlamaBlock):
        kind = getattr(backbone.rotary_emb, "rope_type", "default")
        if kind in _MOVING_ROTARY:
            return f"rotary positions of the type {kind!r} depend on the batch"
        usual = getattr(config, "sliding_window", None)
        windows = [_window(layer, usual) for layer in layers]
        window = min((w for w in windows if w is not None), default=None)
        if window is not None and window < longest:
            return f"texts of up to {longest} rows are longer than the sliding window of {window}"
    if training and any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        return "gradient checkpointing runs the model's own layers"
    watch = None if plain is None else plain.get(k)
    if watch is not None and watch.unchanged() and not watch.any_training():
        return None
    parts = [*frozen_above(backbone, family, k), *shared_by_layers(backbone, family)]
    reason = _why_changed(block, layers, parts)
    if plain is not None:
        plain[k] = None if reason is not None else _watch(spine(backbone, family), parts)
    return reason


def _watch(holders: list[nn.Module], parts: list[nn.Module]) -> Watch:
    """Of all that `_why_changed` looks at but modes and numbers that count in training mode."""
    modules = descendants(parts)
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    fields = ("_modules", "_parameters", *HOOKS)
    return Watch(modules, fields, code=True, frozen=parameters, holders=holders)


def _window(layer: nn.Module, config_window: int | None) -> int | None:
    """(Mistral's layers have none of their own.)"""
    return getattr(layer.self_attn, "sliding_window", config_window)


def _why_changed(block, layers, modules) -> str | None:
    """Why these layers are not the plain frozen ones that the packed stack computes."""
    for layer in layers:
        try:
            wrong = [m for m, cls in block.parts(layer) if type(m) is not cls]
        except AttributeError as error:
            return f"a layer has other parts than known ({error})"
        if wrong:
            return f"a layer has a {type(wrong[0]).__name__} in place of its own module"
    for part in modules:
        for module in part.modules():
            reason = why_not_its_own(module)
            if reason is not None:
                return reason
            if module.training and isinstance(module, nn.Dropout) and module.p > 0:
                return "the layers above the insertion have active dropout (upper_dropout)"
            if _attention_drops(module):
                return "attention above the insertion has active dropout (upper_dropout)"
            for p in module._parameters.values():
                if p is not None and is_quantised(p):
                    kind = f"{type(module).__name__} above the insertion is a {type(p).__name__}"
                    return f"a weight of {kind} (quantised)"
                if p is not None and p.requires_grad:
                    return f"a weight of {type(module).__name__} above the insertion trains"
    return None


def why_not_its_own(module: nn.Module) -> str | None:
    """Why a module runs more than the code of a class of Transformers or PyTorch; None: it does
    not.
    """
    own, name = module.__dict__, type(module).__name__
    if not (_is_transformers(type(module)) or type(module).__module__[:6] == "torch."):
        return f"{name} stands in a layer above the insertion"
    hooks = [*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]
    if "forward" in own or not all(map(_is_capturing, hooks)):
        return f"a {name} above the insertion has a hook"
    if own["_backward_hooks"] or own.get("_backward_pre_hooks"):
        return f"a {name} above the insertion has a backward hook"
    return None


def _is_capturing(hook) -> bool:
    """Whether a hook is transformers' own that hands out hidden states where a call asks for them;
    such a call runs padded, and the hook stays.
    """
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _attention_drops(module: nn.Module) -> bool:
    p = module.__dict__.get("attention_dropout", 0.0)
    return module.training and isinstance(p, float) and p > 0


def own_half(backbone: nn.Module, family: Family, k: int, rows: Tensor) -> bool:
    """Whether rows and all frozen weights above k have one half dtype, and kernels of ours run
    them: then autocast to it changes no number, and costs the host a look at every operation.

    Args:
        backbone, family, k: as for `run_lower`.
        rows: [N, D].
    """
    half = rows.dtype in (torch.float16, torch.bfloat16) and fused(rows)
    if not half or autocast_dtype(rows) not in (None, rows.dtype):
        return False
    late = backbone._modules.get(LATE_PROMPT)
    watch = None if late is None else late.plain.get(k)
    if watch is not None:
        weights = watch.frozen
    else:
        weights = (p for part in frozen_above(backbone, family, k) for p in part.parameters())
    return all(p.dtype == rows.dtype for p in weights)


def run_packed(
    backbone: nn.Module,
    family: Family,
    k: int,
    rows: Tensor,
    plan: Plan,
    *,
    positions: Tensor | None,
    readout: bool,
    place: Tensor | None,
    held: list[Tensor] | None = None,
    updates: dict[int, dict[str, LowRank]] | None = None,
) -> Tensor:
    """Layers k+1..L and the final norm over packed rows with their prompts.

    Args:
        backbone, family, k: as for `run_lower`.
        rows: [N, D]; only prompt rows may have a gradient, and get theirs alone.
        plan: of the batch.
        positions: int64 [N] for rotary models, else None.
        readout: whether one token of each text is wanted.
        place: int64 [B], which (None: the first of each).
        held: what `project_first` gives for text rows, where it is known; prompt rows are
            overwritten.
        updates: low-rank updates by the number of their layer, counted from 0, and the name of the
            linear layer in it.

    Returns:
        [N, D], or [B, D] for a readout.
    """
    off = autocast_dtype(rows) is not None and own_half(backbone, family, k, rows)
    with without_autocast(rows) if off else nullcontext():
        x = run_layers(
            backbone,
            family,
            range(k, len(get_layers(backbone, family))),
            rows,
            plan,
            positions=positions,
            readout=readout,
            place=place,
            held=held,
            updates=[(updates, None)] if updates else (),
        )
        return final_norms(backbone, family, x)


def run_layers(
    backbone: nn.Module,
    family: Family,
    numbers: range,
    rows: Tensor,
    plan: Plan,
    *,
    positions: Tensor | None,
    readout: bool,
    place: Tensor | None,
    held: list[Tensor] | None = None,
    updates: Sequence[tuple[dict[int, dict[str, LowRank]], Among | None]] = (),
    first: bool = True,
) -> Tensor:
    """Some of the layers of `run_packed`, whose arguments these are.

    Args:
        numbers: which layers, counted from 0, one after another.
        updates: those of each adapter of the batch, and for which of its texts.
        first: whether of the rows only prompt rows may have a gradient.
    """
    make, layers = block_type(backbone), get_layers(backbone, family)
    rotary = _rotary(backbone, family, rows, positions)
    bias = _position_bias(backbone, family, rows, plan)
    x = rows
    for i in numbers:
        block = make(layers[i])
        block.rotary, block.bias = rotary, bias
        for own, among in updates:
            if i in own:
                block.update(own[i], among)
        starts = first and i == numbers.start
        if readout and i == len(layers) - 1:
            x = block.run_last(x, plan, place, starts)
        else:
            x = block.run(x, plan, starts, held if starts else None)
    return x


def final_norms(backbone: nn.Module, family: Family, x: Tensor) -> Tensor:
    """What comes after the last layer, [n, D] -> [n, D]."""
    for name in family.after:
        norm = getattr(backbone, name)
        x = layer_norm(norm, x) if isinstance(norm, nn.LayerNorm) else rms_norm(norm, x)
    return x


def _rotary(backbone: nn.Module, family: Family, rows: Tensor, positions: Tensor | None):
    if not family.takes_positions:
        return None
    cos, sin = backbone.rotary_emb(rows, positions[None])
    return cos[0], sin[0]


def _position_bias(backbone: nn.Module, family: Family, rows: Tensor, plan: Plan) -> Tensor | None:
    """What attention adds to scores by distance, [H, S, S] for texts of S rows with their prompts
    (MPNet), by the model's own code; frozen. The same for all layers, so it is made once a batch.
    """
    if not family.relative_bias:
        return None
    with torch.no_grad():
        # (Transformers 5.17 counts places on the host, which no CUDA graph can hold.)
        places = torch.arange(plan.size, device=rows.device)
        encoder = backbone.encoder
        bucket = encoder.relative_position_bucket(places[None, :] - places[:, None])
        return encoder.relative_attention_bias(bucket).permute(2, 0, 1).contiguous()


def project_first(
    backbone: nn.Module,
    family: Family,
    k: int,
    rows: Tensor,
    positions: Tensor | None,
    updates: dict[int, dict[str, LowRank]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of layer k+1, [N, H d], [N, Hk d], [N, Hk d]; where one of them has
    an update, the frozen products that they begin with.

    Args:
        backbone, family, k: as for `run_lower`.
        rows: [N, D], the output of layer k.
        positions: int64 [N] for rotary models, else None.
        updates: as of `run_packed`.
    """
    block = block_type(backbone)(get_layers(backbone, family)[k])
    if first_updated(backbone, family, k, updates):
        return block.project_linear(block.normed(rows))
    return block.project(rows, _rotary(backbone, family, rows, positions))


def first_updated(
    backbone: nn.Module, family: Family, k: int, updates: dict[int, dict[str, LowRank]] | None
) -> bool:
    """Whether updates change the queries, keys or values of layer k+1; arguments as of
    `run_packed`.
    """
    own = (updates or {}).get(k)
    if not own:
        return False
    block = block_type(backbone)(get_layers(backbone, family)[k])
    block.update(own)
    return block.updated(*block.queries)
