"""In which dtype the packed layers run on a CPU: fp32 as the model is, or bf16 where the processor
multiplies it faster (packed/compute.py).
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from ..backbone.families import get_layers
from ..method.cached_call import layer_dtype
from ..packed.blocks import BLOCKS
from ..packed.stack import block_type
from .training_record import read_facts

logger = logging.getLogger(__name__)

NAMES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
ENOUGH = 1.25  # times the rate; less is not worth other numbers
_WIDE = 128  # narrower layers wait for the dispatcher, not for products
_OPERATIONS = 2e9  # of a timed product, at most
_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and of Arm, as /proc/cpuinfo has them


def parse(value: str | torch.dtype | None) -> torch.dtype | None:
    """`compute_dtype` as a dtype; None and "auto" are None.

    Raises:
        ValueError: another value.
    """
    if value is None or value == "auto":
        return None
    found = NAMES.get(value) if isinstance(value, str) else value
    if found not in NAMES.values():
        raise ValueError(
            f"`compute_dtype` is {value!r}, expected one of {', '.join(NAMES)} or 'auto'; leave it "
            "out to let the machine decide."
        )
    return found


def why_not(late) -> str | None:
    """Why the packed layers of a model cannot run in another dtype than its own, in words."""
    if block_type(late.backbone) is None:
        return f"{type(late.backbone).__name__} is not among {', '.join(BLOCKS)}"
    if late.upper == "padded":
        return "upper is 'padded'"
    if late.active_config is None:
        return "no late prompt is active"
    dtype = layer_dtype(late, late.active_config.insertion_layer)
    if dtype != torch.float32:
        return f"the model's layers are in {dtype}"
    return None


@lru_cache
def has_bf16() -> bool:
    """Whether the processor has instructions for products of bf16."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # no Linux: PyTorch knows some
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return bool(words & (_FLAGS - ({"bf16"} if platform.machine() == "x86_64" else set())))


@lru_cache
def bf16_gain(out_features: int, in_features: int, threads: int) -> float:
    """Seconds of a linear layer's products in fp32 over those in bf16, by a test that takes less
    than a second; 0 where the processor lacks the instructions or the layer is narrow.

    Args:
        out_features, in_features: of the layer.
        threads: that PyTorch uses (another number is another test).
    """
    if not has_bf16() or min(out_features, in_features) < _WIDE:
        return 0.0
    size = out_features * in_features
    rows = int(min(1024, max(32, _OPERATIONS / (2 * size))))
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.full((out_features, in_features), 0.5, dtype=dtype)
        x = torch.full((rows, in_features), 0.5, dtype=dtype)
        runs[dtype] = lambda x=x, w=w: torch.mm(torch.mm(x, w.t()), w)
    with torch.no_grad():
        best = {dtype: _seconds(run) for dtype, run in runs.items()}  # warms up
        for _ in range(4):  # in turns; the least, for what else runs only adds
            best = {dtype: min(best[dtype], _seconds(run)) for dtype, run in runs.items()}
    return best[torch.float32] / best[torch.bfloat16]


def _seconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gain_of(layer: nn.Module) -> float:
    """`bf16_gain` of the largest linear layer in a transformer layer."""
    shapes = [tuple(p.shape) for p in layer.parameters() if p.dim() == 2]
    largest = max(shapes, key=lambda shape: shape[0] * shape[1], default=(0, 0))
    return bf16_gain(*largest, torch.get_num_threads())


def choose(late, asked: torch.dtype | None, autocast: torch.dtype | None) -> torch.dtype | None:
    """The dtype of packed layers on a CPU; None: the model's own.

    Args:
        late: the LatePrompt.
        asked: for a dtype; None: bf16 under bf16 autocast, or where it is faster.
        autocast: the caller's, or None.

    Raises:
        ValueError: bf16 was asked for, and this model cannot.
    """
    reason = why_not(late)
    if asked is not None:
        if asked == torch.float32:
            return None
        if reason is not None:
            raise ValueError(
                f"`compute_dtype` is bfloat16, expected it for float32 models whose upper layers "
                f"run packed: {reason}. Leave it out."
            )
        return asked
    if reason is not None or autocast not in (None, torch.bfloat16):
        return None
    if autocast is not None:
        return autocast
    layers = get_layers(late.backbone, late.family)
    gain = gain_of(layers[late.active_config.insertion_layer])
    if gain < ENOUGH:
        return None
    logger.info(
        "The packed layers compute in bfloat16, in which this processor multiplies %.1f times as "
        "fast; compute_dtype='float32' keeps them in float32.",
        gain,
    )
    return torch.bfloat16


class ComputingTraining:
    """Mixed into a Trainer that has `compute_dtype` (as `parse` gives it) and `_late_prompt`."""

    _dtype: torch.dtype | str | None = "open"  # until it is chosen

    @contextmanager
    def _computing(self):
        late = self._late_prompt
        before, late.compute_dtype = late.compute_dtype, self._chosen_dtype()
        try:
            yield
        finally:
            late.compute_dtype = before

    def _elsewhere(self) -> str | None:
        """Where the model trains, if not whole and on a CPU."""
        if self.args.device.type != "cpu":
            return f"{self.args.device.type!r}"
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return "shards of its weights" if sharded else None

    def _check_compute_dtype(self) -> None:
        """Raises ValueError where bf16 was asked for and cannot be."""
        if self.compute_dtype != torch.bfloat16:
            return
        if place := self._elsewhere():
            raise ValueError(
                f"`compute_dtype` is bfloat16 and the model trains on {place}, expected whole "
                "weights on a CPU; give TrainingArguments(bf16=True) there."
            )
        choose(self._late_prompt, self.compute_dtype, None)

    def _chosen_dtype(self) -> torch.dtype | None:
        """None: the model's own. All processes have the first one's, from the first use on."""
        args = self.args
        if self._elsewhere():
            return None
        if self._dtype == "open":
            autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
            chosen = [choose(self._late_prompt, self.compute_dtype, autocast)]
            if args.world_size > 1:
                broadcast_object_list(chosen)
            self._dtype = chosen[0]
        return self._dtype

    def all_facts(self) -> dict:
        """As of RecordedTraining, and in what the packed layers ran."""
        dtype = self._chosen_dtype()
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        return {**super().all_facts(), "compute_dtype": name}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.compute_dtype is None and self.args.device.type == "cpu":
            # (Checkpoints of before there was a choice say nothing: the model's own.)
            found = read_facts(Path(resume_from_checkpoint)).get("compute_dtype")
            self._dtype = None if found is None else NAMES.get(found)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
