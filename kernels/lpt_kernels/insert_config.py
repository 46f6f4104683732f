"""Launch configurations of the insertion kernels, and how work is divided among programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .launch import ceil_div, next_power_of_2, on_hopper

# Programs that keep a GPU busy: two for each multiprocessor of an H100 or H200 (132).
PROGRAMS = 264


@dataclass(frozen=True)
class Config:
    """Launch configuration of one kernel.

    Attributes:
        BLOCK_T: rows of a block (of text, or of prompts).
        BLOCK_D: columns.
        num_warps, num_stages: of a program.
        BLOCK_R: channels at the most.
    """

    BLOCK_T: int
    BLOCK_D: int
    num_warps: int = 4
    num_stages: int = 2
    BLOCK_R: int = 128

    def blocks(self, *names: str) -> dict[str, int]:
        """Arguments of a launch: these blocks and the options."""
        own = {name: getattr(self, name) for name in names}
        return own | {"num_warps": self.num_warps, "num_stages": self.num_stages}


# For sm_90, chosen on an H200 (bench/results/gpu.md).
HALF = {
    "npg_down_fwd": Config(32, 128, 8, 2, BLOCK_R=32),
    "pools_down_fwd": Config(128, 128, 8, 3),
    "npg_up_fwd": Config(64, 64, 8, 3),
    "up_fwd": Config(64, 128, 8, 3),
    "static_bwd": Config(32, 128, 4, 2),
    "up_bwd": Config(64, 64, 4, 3),
    "npg_up_bwd_weight": Config(64, 64, 4, 3),
    "up_bwd_weight": Config(64, 128, 8, 3),
    "down_bwd": Config(64, 128, 8, 3),
    "hidden_bwd": Config(64, 128, 8, 2),
}
# Nothing was tuned on other GPUs: less at once, for sm_80, sm_100 and the 64 KB of gfx942.
HALF_ELSEWHERE = HALF | {
    "pools_down_fwd": Config(64, 64, 8, 2),
    "npg_up_fwd": Config(64, 64, 8, 2),
    "up_fwd": Config(64, 64, 8, 2),
    "up_bwd": Config(32, 64, 4, 2),
    "npg_up_bwd_weight": Config(32, 64, 8, 2),
    "up_bwd_weight": Config(32, 64, 8, 2),
    "down_bwd": Config(64, 64, 4, 2),
    "hidden_bwd": Config(64, 64, 8, 2),
}
# Products of fp32 numbers have no tensor cores and hold whole rows of both factors in registers, so
# that their blocks are smaller.
FP32 = {
    "npg_down_fwd": Config(32, 32, 4, 2, BLOCK_R=32),
    "pools_down_fwd": Config(64, 16, 8, 2),
    "npg_up_fwd": Config(64, 16, 8, 2),
    "up_fwd": Config(64, 16, 8, 2),
    "static_bwd": Config(32, 128, 4, 2),
    "up_bwd": Config(64, 16, 8, 2),
    "npg_up_bwd_weight": Config(16, 32, 8, 2),
    "up_bwd_weight": Config(16, 64, 8, 2),
    "down_bwd": Config(16, 32, 8, 2),
    "hidden_bwd": Config(32, 32, 8, 2),
}


def block_d(D: int, most: int) -> int:
    """Columns of a block, a power of two of at least 16."""
    return next_power_of_2(min(D, most), 16)


def block_r(R: int) -> int:
    """Channels of a block: a power of two, 16 to 128."""
    return next_power_of_2(min(R, 128), 16)


def block_p(rows: int, most: int) -> int:
    """Prompt rows of a block."""
    return next_power_of_2(min(rows, most), 16)


def splits_of(programs: int, most: int, wanted: int = PROGRAMS) -> int:
    """In how many parts to divide the work of each of `programs`, at the most `most`."""
    return max(1, min(most, ceil_div(wanted, max(programs, 1))))


def chunks_of(count: int, block: int, blocks: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """Rows of a split, whole blocks of them, and how many splits; one at least, for gradients of no
    rows are zero.

    Args:
        count: rows. block: of a step. blocks: programs that there are for each split.
        programs: wanted in all.
    """
    splits = splits_of(blocks, ceil_div(count, block), programs)
    chunk = max(ceil_div(ceil_div(count, block), splits), 1) * block
    return chunk, max(ceil_div(count, chunk), 1)


def table_of(dtype: torch.dtype) -> dict[str, Config]:
    """Kernel -> its configuration on this GPU, for hidden states of a dtype."""
    if dtype == torch.float32:
        return FP32
    return HALF if on_hopper() else HALF_ELSEWHERE


def config_of(kernel: str, dtype: torch.dtype, D: int) -> Config:
    """The default of a kernel."""
    return _narrow(table_of(dtype)[kernel], D)


def _narrow(config: Config, D: int) -> Config:
    return Config(**{**vars(config), "BLOCK_D": block_d(D, config.BLOCK_D)})


def candidates(kernel: str, D: int) -> list[Config]:
    """What LPT_AUTOTUNE=1 and bench/kernels/tune_insert.py try beside the default."""
    if kernel == "npg_down_fwd":
        found = [
            Config(t, d, w, s, BLOCK_R=32)
            for t, d in ((16, 256), (32, 128), (32, 256), (64, 128))
            for w in (4, 8)
            for s in (2, 3)
        ]
    else:
        rows = (32, 64) if kernel == "hidden_bwd" else (64, 128)
        stages = (2, 3) if kernel in ("hidden_bwd", "static_bwd") else (3, 4)
        found = [
            Config(t, d, w, s) for t in rows for d in (64, 128) for w in (4, 8) for s in stages
        ]
    return [_narrow(config, D) for config in found]
