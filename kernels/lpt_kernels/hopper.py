"""What is known of a kernel on an H100 or H200 before it runs there: how its programs fit on the
multiprocessors, and a race that Triton's compiler can make of a correct program.
"""

from __future__ import annotations

import math
import re

from .launch import Launch

# Of an H100 and H200: multiprocessors; registers and shared memory of each; programs at the most.
MULTIPROCESSORS, REGISTERS, SHARED, PROGRAMS = 132, 65536, 228 * 1024, 32


def figures(launch: Launch, needs: dict, compiled) -> dict:
    """What the machine code and Triton's own program say of a launch.

    Args:
        launch: recorded.
        needs: its `registers` a thread and `programs`.
        compiled: by Triton, for sm_90.

    Returns:
        waves: programs over those that fit on all multiprocessors at a time. kb_in_flight: how much
        of memory a multiprocessor waits for at a time at the most (Little's law: 32 KB keep it
        busy). race: as of `race_of`.
    """
    threads = 32 * launch.num_warps
    per_thread = -(-needs["registers"] // 8) * 8
    fit = min(
        REGISTERS // (per_thread * threads),
        SHARED // (compiled.metadata.shared + 1024),
        2048 // threads,
        PROGRAMS,
    )
    resident = min(fit, -(-needs["programs"] // MULTIPROCESSORS))
    ttgir = compiled.asm["ttgir"]
    return {
        "waves": round(needs["programs"] / (MULTIPROCESSORS * max(fit, 1)), 4),
        "kb_in_flight": round(resident * _loaded_at_once(ttgir) / 1024, 1),
        "race": race_of(ttgir),
    }


_WIDTHS = {"bf16": 2, "f16": 2, "f32": 4, "i8": 1, "i32": 4, "i64": 8}


def _size(shape: str) -> int:
    """Bytes of "3x64x128xbf16"."""
    *sizes, kind = shape.split("x")
    return math.prod(map(int, sizes)) * _WIDTHS.get(kind, 4)


def _loaded_at_once(ttgir: str) -> int:
    """Bytes that a program may wait for together: buffers that are filled ahead, and blocks that
    are loaded to registers.
    """
    ahead = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<([\dx]+x\w+),", ttgir)
    loads = re.findall(r"= tt\.load .*tensor<(\d+x\d+)x!tt\.ptr<(\w+)>", ttgir)
    return sum(map(_size, ahead)) + sum(_size("x".join(load)) for load in loads)


def race_of(ttgir: str) -> str:
    """What is wrong where a loop's buffer is read by an asynchronous product of the tensor cores
    and copied to registers too: Triton (3.6, 3.9) then gives it one buffer less than one that a
    product alone reads, and fills it again while the tensor cores may still read it. (Seen on an
    H200: rows that were some per cent off, now and then.)
    """
    if not re.search(r"pendings = [1-9]", ttgir):
        return ""
    product = r"warp_group_dot (%\w+), (%\w+),.*isAsync = true"
    read = {name for pair in re.findall(product, ttgir) for name in pair}
    views = dict(re.findall(r"(%\w+) = ttg\.memdesc_trans (%\w+) ", ttgir))
    read |= {views[name] for name in read if name in views}
    copied = set(re.findall(r"ttg\.local_load (%\w+) token", ttgir))
    if not read & copied:
        return ""
    return "its products read a buffer that is filled again too soon; load its other use by itself"
