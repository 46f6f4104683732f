"""Prompts and the layers above the insertion as CUDA graphs: a step from the cache launches two
graphs, forward and backward, in place of hundreds of kernels.

A graph has fixed shapes, so batches are brought to buckets: a filler text is added that makes the
number of tokens a multiple of STEP. Nothing sees it but itself, and its output is dropped. The
rest of a training step (head, loss, optimiser: AdamW is one fused launch) stays as it is, and with
it every feature of the Trainer.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .backbone.packed import run_packed
from .backbone.packed_attention import autocast_dtype
from .backbone.packed_plan import Plan

STEP = 256  # tokens; a batch gets 1 .. STEP more
SIZE_STEP = 64  # of the longest text
WORTH = 2  # batches of a bucket before it becomes a graph


@dataclass(frozen=True)
class Bucket:
    """Shapes and settings that a graph holds fast.

    Attributes:
        adapter: name and place of the weights, so that changed ones make another graph.
        texts: B, the filler text not counted.
        tokens: text rows, filler included.
        size: bound of a text's tokens.
        width, dtype: of a row.
        readout: whether one token of each text is read.
        causal, rotary: whether there are contexts; positions.
    """

    adapter: tuple
    texts: int
    tokens: int
    size: int
    width: int
    dtype: torch.dtype
    readout: bool
    causal: bool
    rotary: bool


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
        self.generator = late.lpt_generator[late.active_adapters[0]]

    def forward(self, buffer, cu_seqlens, context, positions, place) -> Tensor:
        """As `forward_packed` in packed_forward.py.

        Args:
            buffer: [N, D]; cu_seqlens: int32 [B + 2]; context: int32 [B + 1, 2];
            positions: int64 [N]; place: int64 [B + 1]. Those that the bucket has no use for may
            hold anything.

        Returns:
            [B + 1, D] for a readout, else [N, D].
        """
        late, bucket = self._late[0], self.bucket
        config = late.active_config
        plan = Plan(cu_seqlens, bucket.size, config.num_virtual_tokens, len(buffer))
        rows = self.generator.fill(
            buffer.detach(), cu_seqlens, context if bucket.causal else None, _no_states
        )
        return run_packed(
            late.backbone,
            late.family,
            config.insertion_layer,
            rows,
            plan,
            positions=positions if bucket.rotary else None,
            readout=bucket.readout,
            place=place if bucket.readout else None,
        )


def _no_states():
    raise AssertionError("generators that look at padded states have no graph")


def capture(module: UpperRows, arguments: tuple[Tensor, ...]) -> Callable:
    """The module as CUDA graphs, forward and backward."""
    return torch.cuda.make_graphed_callables(module, arguments)


class _Pending:
    """Stands for a forward whose backward is still to come: its graph's buffers are in use."""

    done = False


class UpperGraphs:
    """Graphs of one model, made as buckets come again.

    Args:
        late: the LatePrompt.
        capture: makes a callable of a module and sample arguments.
    """

    def __init__(self, late, capture: Callable = capture):
        self._late, self._capture = late, capture
        self._seen: Counter[Bucket] = Counter()
        self._made: dict[Bucket, Callable] = {}
        self._pending: dict[Bucket, weakref.ref] = {}
        self.replayed = 0

    def __len__(self) -> int:
        return len(self._made)

    def bucket(self, rows, readout: bool) -> Bucket:
        """That of a batch (packed_forward.Rows)."""
        late, plan = self._late, rows.plan
        name = late.active_adapters[0]
        weights = (
            *late.lpt_generator[name].parameters(),
            next(late.backbone.get_submodule(late.family.layers)[-1].parameters()),
        )
        tokens = plan.rows - plan.texts * plan.m
        tokens = (tokens // STEP + 1) * STEP
        longest = max(plan.size - plan.m, min(STEP, tokens))
        return Bucket(
            adapter=(name, *(p.data_ptr() for p in weights)),
            texts=plan.texts,
            tokens=tokens,
            size=-(-longest // SIZE_STEP) * SIZE_STEP,
            width=rows.buffer.shape[1],
            dtype=rows.buffer.dtype,
            readout=readout,
            causal=late.family.causal,
            rotary=late.family.takes_positions,
        )

    def run(self, rows, context, positions, readout: bool, place) -> Tensor | None:
        """The output rows by a graph; None where the batch has none and must run by itself.

        Args:
            rows: the batch, a packed_forward.Rows.
            context: int32 [B, 2] of decoders.
            positions: int64 [N] of rotary models.
            readout, place: whether one token is read of each text, int64 [B] (None: the first).
        """
        late = self._late
        generator = late.lpt_generator[late.active_adapters[0]]
        usable = late.training and torch.is_grad_enabled() and not generator.reads_states
        if not usable or autocast_dtype(rows.buffer) is not None:
            return None
        bucket = self.bucket(rows, readout)
        pending = self._pending.get(bucket)
        pending = None if pending is None else pending()
        if pending is not None and not pending.done:
            return None  # a second forward before the first one's backward
        self._seen[bucket] += 1
        if bucket not in self._made and self._seen[bucket] <= WORTH:
            return None
        arguments = _arguments(rows, bucket, context, positions, place)
        if bucket not in self._made:
            samples = tuple(x.clone() for x in arguments)
            self._made[bucket] = self._capture(UpperRows(late, bucket), samples)
        out = self._made[bucket](*arguments)
        self.replayed += 1
        token = _Pending()
        self._pending[bucket] = weakref.ref(token)

        def finish(grad, token=token):
            token.done = True

        if out.requires_grad:
            out.register_hook(finish)
        return out[: bucket.texts] if readout else out[: rows.plan.rows]


def _arguments(rows, bucket: Bucket, context, positions, place) -> tuple[Tensor, ...]:
    """A batch with its filler text, in the shapes of its bucket."""
    plan, device = rows.plan, rows.buffer.device
    tokens = plan.rows - plan.texts * plan.m
    total = bucket.tokens + (bucket.texts + 1) * plan.m
    buffer = rows.buffer.new_zeros(total, bucket.width)
    buffer[: plan.rows] = rows.buffer
    end = rows.cu_seqlens.new_full((1,), bucket.tokens)
    cu_seqlens = torch.cat((rows.cu_seqlens, end))
    none = torch.zeros((), dtype=torch.int64, device=device)
    if bucket.causal:
        whole = context.new_tensor([[0, bucket.tokens - tokens]], device=device)
        context = torch.cat((context, whole))
    if bucket.rotary:
        filler = torch.arange(total - plan.rows, device=device)
        positions = torch.cat((positions, filler))
    if bucket.readout:
        own = rows.cu_seqlens.new_zeros(plan.texts) if place is None else place
        place = torch.cat((own.long(), none[None]))
    given = (context, positions, place)
    return (buffer, cu_seqlens, *(none if x is None else x for x in given))
