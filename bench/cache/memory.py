"""The memory part of `python -m bench cache`: a process trains from a cache that is larger than
the memory it may take.

The process limits its own address space (RLIMIT_AS) to the most that loading the model and training
it on text took, plus an allowance, then opens the cache, lets the planner choose, and trains.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lpt_fast.cache import ActivationCache

from ..data import MAX_LENGTH, Figure, Sizes, Source, batches, require, temporary
from ..paths import ROOT

LAYER, WIDTH, VOCAB, BATCH = 1, 1024, 2000, 16
# MiB. What a process has in memory goes up and down with the lengths of a batch's texts, by more
# than this from step to step; medians of many steps do not.
GROWTH_TARGET = 16.0


def narrow_decoder():
    """A random decoder with wide rows and next to no work in its layers, with a late prompt; the
    same weights each time.
    """
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from lpt_fast import LPTConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        pad_token_id=0,
        num_labels=2,
    )
    model = LlamaForSequenceClassification(config).eval()
    late = LPTConfig(
        task_type="SEQ_CLS", insertion_layer=LAYER, generator="npg", bottleneck_size=16
    )
    return get_peft_model(model, late)


def shuffled_texts(source: Source, tokens: int) -> list[dict]:
    """Texts as long as real ones, with words in other orders, until there are so many tokens."""
    examples = [np.array(e["input_ids"]) % VOCAB for e in source.examples("subj")]
    draw, out, count = np.random.default_rng(0), [], 0
    while count < tokens:
        ids = draw.permutation(examples[len(out) % len(examples)])
        out.append({"input_ids": ids})
        count += len(ids)
    return out


def memory(source: Source, sizes: Sizes) -> Iterator[Figure]:
    """Fills a cache, and lets a child with a limit train from it."""
    with temporary() as folder:
        filled = ActivationCache.open(folder, canary=False)
        texts = shuffled_texts(source, sizes.memory_bytes // (2 * WIDTH))
        filled.build(narrow_decoder(), texts, shard_bytes=64 * 2**20)
        size = filled.stats()["bytes"]
        filled.close()
        require(size > sizes.memory_allowance, "the cache is no larger than what is allowed")
        call = [sys.executable, "-m", "bench.cache.memory", folder]
        call += [str(sizes.memory_allowance), str(sizes.memory_steps)]
        run = subprocess.run(
            call,
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            # Else glibc reserves 64 MiB of address space for each thread, used or not.
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        )
        require(run.returncode == 0, f"training under the limit failed: {run.stderr[-800:]}")
        found = json.loads(run.stdout.splitlines()[-1])
    require(found["tier"] == "disk", f"the planner chose {found['why']}")
    require(found["finite"], "the loss is not finite")
    mib = 2**20
    resident = found["resident"]
    fifth = len(resident) // 5
    early, late = resident[fifth : 2 * fifth], resident[-fifth:]
    points = {i for i in (20, 100, len(resident)) if i <= len(resident)}
    yield Figure(
        "memory",
        "growth of the process, second to last fifth of the steps",
        (statistics.median(late) - statistics.median(early)) / mib,
        "MiB",
        GROWTH_TARGET,
        details={
            "cache_MiB": size / mib,
            "read_MiB": found["read"] / mib,
            "allowance_MiB": sizes.memory_allowance / mib,
            "limit_MiB": found["limit"] / mib,
            "before_MiB": found["before"] / mib,
            **{f"step_{i}_MiB": resident[i - 1] / mib for i in sorted(points)},
            "median_early_MiB": statistics.median(early) / mib,
            "median_late_MiB": statistics.median(late) / mib,
            "most_MiB": max(resident) / mib,
            "steps": len(resident),
            "tier": found["tier"],
            "why": found["why"],
        },
    )


def peak_address_space() -> int:
    """Bytes of address space that this process had at the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmPeak"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmPeak")


def child(folder: str, allowance: int, steps: int) -> dict:
    """Trains under the limit; resident bytes after each step."""
    import psutil

    torch.set_num_threads(1)
    process = psutil.Process()
    model = narrow_decoder().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    labels = torch.arange(BATCH) % 2
    longest = torch.arange(BATCH * MAX_LENGTH).view(BATCH, MAX_LENGTH) % VOCAB
    for _ in range(2):  # what training takes by itself
        model(input_ids=longest, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    limit = peak_address_space() + allowance
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, resident = process.memory_info().rss, []
    cache = ActivationCache.open(folder, model)
    epochs = range(1 + steps * BATCH // len(cache))
    order = [b for epoch in epochs for b in batches(len(cache), BATCH, epoch)][:steps]
    finite = True
    for batch in cache.batches(order):
        loss = model(cached_hidden=batch, labels=labels[: len(batch)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finite = finite and bool(loss.isfinite())
        resident.append(process.memory_info().rss)
    return {
        "limit": limit,
        "before": before,
        "resident": resident,
        "tier": cache.plan.tier,
        "why": cache.plan.why,
        "read": cache.stats()["bytes_read"],
        "finite": finite,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    for name in ("allowance", "steps"):
        parser.add_argument(name, type=int)
    print(json.dumps(child(**vars(parser.parse_args()))))
