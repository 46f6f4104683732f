"""Prompts and the layers above the insertion as CUDA graphs: a step from the cache launches two
graphs, forward and backward, in place of hundreds of kernels.

A graph has fixed shapes, so batches are brought to buckets: filler texts are added that bring the
number of tokens to a multiple of a step. Nothing sees them but themselves, and their output is
dropped. The rest of a training step (head, loss, optimiser: AdamW is one fused launch) stays as it
is, and with it every feature of the Trainer. graph_passes.py has the graphs themselves.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbone.families import frozen_above, get_layers, shared_by_layers
from .attention import autocast_dtype
from .graph_passes import CudaCapture, NoRoom, Passes, Turn, replay
from .plan import Plan
from .stack import run_packed

logger = logging.getLogger(__name__)

STEP = 256  # tokens, in batches of less than 4,096; doubled there and at each fourfold
SIZE_STEP = 64  # of the longest text, at least; an eighth of the next smaller power of two
WORTH = 2  # batches of a bucket before it becomes a graph
MOST = 32  # graphs of one training


def size_step(longest: int) -> int:
    """Grows with the longest text, so that few buckets serve all."""
    return max(SIZE_STEP, (1 << max(longest, 1).bit_length() - 1) // 8)


def token_step(tokens: int) -> int:
    """Grows as the root of the tokens, as the spread of batches of so many random texts does: few
    buckets serve all, and the larger the batch is the smaller is the filler's share.
    """
    return STEP << max(0, (tokens.bit_length() - 11) // 2)


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step


@dataclass(frozen=True)
class Bucket:
    """Shapes and settings that a graph holds fast.

    Attributes:
        adapter: its name.
        texts: B, filler texts not counted.
        fillers: F, texts that fill up; each has a token at least and `size` at most.
        tokens: text rows, filler included.
        size: bound of a text's tokens.
        width, dtype: of a row.
        readout: whether one token of each text is read.
        placed: whether that may be another one than the first.
        causal: whether there are contexts.
        rotary: whether there are positions other than the rows' places in their texts.
        autocast: what autocast makes of products inside; None: it is off.
    """

    adapter: str
    texts: int
    fillers: int
    tokens: int
    size: int
    width: int
    dtype: torch.dtype
    readout: bool
    placed: bool
    causal: bool
    rotary: bool
    autocast: torch.dtype | None

    def statics(self, m: int, device) -> tuple[Tensor | None, ...]:
        """What a graph of this bucket reads: arguments of `UpperRows`, to be filled."""
        total = self.tokens + (self.texts + self.fillers) * m
        own = {"dtype": torch.int64, "device": device}
        return (
            torch.zeros(total, self.width, dtype=self.dtype, device=device),
            torch.zeros(self.texts + 1, dtype=torch.int32, device=device),
            torch.zeros(self.texts, dtype=torch.int32, device=device) if self.causal else None,
            torch.zeros(total, **own) if self.rotary else None,
            torch.zeros(self.texts, **own) if self.placed else None,
        )


class UpperRows(nn.Module):
    """Prompts and layers k+1..L for one bucket, from tensors of its shapes alone.

    Args:
        late: the LatePrompt; its backbone is not made a child.
        bucket: of the batches.
    """

    def __init__(self, late, bucket: Bucket):
        super().__init__()
        self._late = [late]
        self.bucket = bucket
        self.generator = late.lpt_generator[bucket.adapter]
        # (A child, so that a pass may put others in the place of its parameters.)
        self.lora = late.lpt_lora[bucket.adapter] if bucket.adapter in late.lpt_lora else None  # noqa: SIM401

    def forward(self, buffer, cu_seqlens, context_ends, positions, place) -> Tensor:
        """As `forward_packed` in packed_call.py, with filler texts behind the batch.

        Args:
            buffer: [N, D], zeros behind the batch.
            cu_seqlens: int32 [B + 1] of the batch.
            context_ends: int32 [B], the first tokens that prompts are made from, or None: all.
            positions: int64 [N], any behind the batch, or None: places in the texts.
            place: int64 [B], or None.

        Returns:
            [B + F, D] for a readout, else [N, D].
        """
        late, bucket = self._late[0], self.bucket
        config = late.lpt_config[bucket.adapter]
        # Filler texts divide what is missing evenly.
        number = torch.arange(1, bucket.fillers + 1, dtype=torch.int32, device=buffer.device)
        end = cu_seqlens[-1:]
        ends = end + (bucket.tokens - end) * number // bucket.fillers
        whole = torch.cat((cu_seqlens, ends))
        context = None
        if bucket.causal:
            last = torch.cat((context_ends, torch.cat((end, ends)).diff()))
            context = torch.stack((torch.zeros_like(last), last), 1)
        if bucket.placed:
            place = torch.cat((place, place.new_zeros(bucket.fillers)))
        plan = Plan(whole, bucket.size, config.num_virtual_tokens, len(buffer))
        if positions is None and late.family.takes_positions:
            positions = plan.places_in_text
        casts = bucket.autocast is not None
        # (No cache: what is cast in a graph is made anew by each replay.)
        how = {"dtype": bucket.autocast, "enabled": casts, "cache_enabled": False}
        with torch.autocast(buffer.device.type, **how):
            rows = self.generator.fill(buffer.detach(), whole, context, _no_states)
            return run_packed(
                late.backbone,
                late.family,
                config.insertion_layer,
                rows,
                plan,
                positions=positions,
                readout=bucket.readout,
                place=place,
                updates=None if self.lora is None else self.lora.by_layer(),
            )


def _no_states():
    raise AssertionError("generators that look at padded states have no graph")


class _Model:
    """The weights and settings that graphs of one adapter hold fast.

    Args:
        late: the LatePrompt.
        name: of the adapter.
    """

    def __init__(self, late, name: str):
        layer = late.lpt_config[name].insertion_layer
        modules = [
            *frozen_above(late.backbone, late.family, layer),
            *shared_by_layers(late.backbone, late.family),
        ]
        self._frozen = [p for module in modules for p in module.parameters()]
        self._layers = self._last(late)
        dtypes = {p.dtype for p in self._frozen}
        # Of all frozen weights above the insertion, or None.
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.version = self._version(late, name)

    @staticmethod
    def _last(late) -> nn.Module:
        return get_layers(late.backbone, late.family)[-1]

    def _version(self, late, name: str) -> tuple:
        generator, lora = late.lpt_generator[name], late.updates(name)
        low = [update for layer in lora.values() for update in layer.values()]
        parts = [generator, *low]
        own = [(p.data_ptr(), p.requires_grad) for part in parts for p in part.parameters()]
        kind = (id(generator), generator.training, generator.dropout.p)
        kind += tuple((id(u), u.scaling, u.drops, u.lora_dropout.p) for u in low)
        return (*kind, *own, *(p.data_ptr() for p in self._frozen))

    def same(self, late, name: str) -> bool:
        """Whether they are what they were."""
        return self._layers is self._last(late) and self.version == self._version(late, name)


class UpperGraphs:
    """Graphs of one model, made as buckets come again. They share one pool of memory, so one alone
    is in use at a time.

    Args:
        late: the LatePrompt.
        capture: makes `Passes` of a module, inputs and parameters.

    Attributes:
        replayed: batches that ran by a graph.
    """

    def __init__(self, late, capture: Callable[..., Passes] | None = None):
        self._late, self._capture = late, capture or CudaCapture()
        self._models: dict[str, _Model] = {}
        self._seen: Counter[Bucket] = Counter()
        self._made: dict[Bucket, Passes] = {}
        self._refused: set[Bucket] = set()
        self._pending: weakref.ref | None = None
        self._broken = False
        self.replayed = 0

    def __len__(self) -> int:
        return len(self._made)

    def bucket(self, rows, readout: bool, place, autocast: torch.dtype | None) -> Bucket:
        """That of a batch (packed_rows.Rows); arguments else as of `run`."""
        late, plan = self._late, rows.plan
        tokens = plan.rows - plan.texts * plan.m
        size = _rounded(plan.longest, size_step(plan.longest))
        step = token_step(tokens)
        # So many that none is longer than `size`: they divide up to step - 1 tokens more than F.
        fillers = -(-step // max(size - 1, 1))
        return Bucket(
            adapter=late.active_adapters[0],
            texts=plan.texts,
            fillers=fillers,
            tokens=_rounded(tokens + fillers, step),
            size=size,
            width=rows.buffer.shape[1],
            dtype=rows.buffer.dtype,
            readout=readout,
            placed=readout and place is not None,
            causal=late.family.causal,
            rotary=late.family.takes_positions and rows.positions is not None,
            autocast=autocast,
        )

    def run(self, rows, context_ends, readout: bool, place) -> Tensor | None:
        """The output rows by a graph; None where the batch has none and must run by itself.

        Args:
            rows: the batch, a packed_rows.Rows.
            context_ends: int32 [B] of decoders, as of `UpperRows`.
            readout, place: whether one token is read of each text, int64 [B] (None: the first).
        """
        late = self._late
        if self._broken or not (late.training and torch.is_grad_enabled()) or self._in_use():
            return None
        name = late.active_adapters[0]
        generator = late.lpt_generator[name]
        own = dict(generator.named_parameters("generator"))
        if name in late.lpt_lora:
            own |= dict(late.lpt_lora[name].named_parameters("lora"))
        trained = {n: p for n, p in own.items() if p.requires_grad}
        if generator.reads_states or not trained:
            return None
        model, casts = self._model(), autocast_dtype(rows.buffer)
        if casts == rows.buffer.dtype == model.dtype:
            casts = None  # everything is in that dtype already
        bucket = self.bucket(rows, readout, place, casts)
        passes = self._made.get(bucket)
        if passes is None:
            self._seen[bucket] += 1
            if self._seen[bucket] <= WORTH or bucket in self._refused:
                return None
        values = (context_ends, rows.rotary_positions() if bucket.rotary else None, place)
        if passes is None:
            passes = self._make(bucket, rows, values, trained)
        else:
            _fill(passes.inputs, rows, *values)
        if passes is None:
            return None
        self.replayed += 1
        turn = Turn()
        self._pending = weakref.ref(turn)
        return replay(passes, turn, bucket.texts if readout else rows.plan.rows)

    def _in_use(self) -> bool:
        """Whether a forward waits for its backward."""
        turn = None if self._pending is None else self._pending()
        return turn is not None and not turn.done

    def _model(self) -> _Model:
        """The active adapter's; graphs of weights that are others now are dropped."""
        late = self._late
        name = late.active_adapters[0]
        known = self._models.get(name)
        if known is not None and known.same(late, name):
            return known
        self._refused.clear()
        for kept in (self._made, self._seen):
            for bucket in [b for b in kept if b.adapter == name]:
                del kept[bucket]
        self._models[name] = _Model(late, name)
        return self._models[name]

    def _make(self, bucket: Bucket, rows, values, trained) -> Passes | None:
        if len(self._made) >= MOST:
            if not self._refused:
                logger.info("There are %d CUDA graphs; batches of other sizes run without.", MOST)
            self._refused.add(bucket)
            return None
        inputs = bucket.statics(rows.plan.m, rows.buffer.device)
        _fill(inputs, rows, *values)
        try:
            self._made[bucket] = self._capture(UpperRows(self._late, bucket), inputs, trained)
        except NoRoom as error:
            logger.info("Batches of %d tokens run without CUDA graph: %s.", bucket.tokens, error)
            self._refused.add(bucket)
            return None
        except Exception as error:
            logger.warning(
                "The layers above the insertion could not be captured as a CUDA graph (%s: %s). "
                "Training goes on without graphs.",
                type(error).__name__,
                error,
            )
            self._broken = True
            self._made.clear()
            return None
        logger.info(
            "CUDA graph %d: %d texts, %d tokens.", len(self._made), bucket.texts, bucket.tokens
        )
        return self._made[bucket]


def _fill(inputs: tuple[Tensor | None, ...], rows, context_ends, positions, place) -> None:
    """Puts a batch where its graph reads; arguments as of `UpperRows`."""
    count = rows.plan.rows
    buffer, cu_seqlens, *others = inputs
    buffer[:count].copy_(rows.buffer)
    buffer[count:].zero_()  # an earlier batch's rows may hold NaN
    cu_seqlens.copy_(rows.cu_seqlens)
    for static, value in zip(others, (context_ends, positions, place), strict=True):
        if static is not None:
            static[: len(value)].copy_(value)
