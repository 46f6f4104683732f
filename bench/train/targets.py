"""What was promised of a training step from the cache, and when a cache has paid for itself."""

from __future__ import annotations

# (encoder, k, device) -> how many times faster than (the recipe, LoRA) a step from the cache should
# be, packed. On the CPU in fp32, on CUDA in bf16.
TARGETS: dict[tuple[str, int, str], tuple[float, float | None]] = {
    ("minilm", 3, "cpu"): (3.4, 5.0),
    ("minilm", 4, "cpu"): (5.5, 8.0),
    ("roberta-base", 9, "cpu"): (6.5, 10.0),
    ("roberta-large", 12, "cuda"): (3.0, None),
    ("roberta-large", 18, "cuda"): (6.0, None),
}

# (encoder, k) -> of layers in bf16 on a CPU, over the recipe in fp32 and under autocast, and over
# LoRA in fp32.
BF16 = {
    ("minilm", 3): {"recipe": 6.5, "recipe_autocast": 3.5, "lora": 9.0},
    ("minilm", 4): {"recipe": 11.0, "recipe_autocast": 6.0, "lora": 16.0},
    ("roberta-base", 9): {"recipe": 11.0, "recipe_autocast": 6.0, "lora": 18.0},
}

LORA_AT_MOST = 1.35  # a step with late LoRA over one of the prompt alone
LOOP_AT_MOST = 1.05  # a step of a whole training over its own work


def target_of(
    encoder: str, k: int, device: str, dtype: str, other: str, own: str = "cached_packed"
) -> float | None:
    """What "`other` over `own`" should be at least; None: nothing was promised."""
    if own == "ours_bf16":
        return BF16.get((encoder, k), {}).get(other)
    if own not in ("cached_packed", "cached_held"):
        return None
    if dtype != {"cpu": "fp32", "cuda": "bf16"}[device] or other not in ("recipe", "lora"):
        return None
    pair = TARGETS.get((encoder, k, device), (None, None))
    return pair[0 if other == "recipe" else 1]


def payback(build: float, uncached: float, cached: float) -> float:
    """Epochs after which a cache has saved what it took; infinite where it saves nothing.

    Args:
        build: seconds of the build.
        uncached, cached: seconds of an epoch.
    """
    saved = uncached - cached
    return build / saved if saved > 0 else float("inf")
