"""How much memory a contestant of `python -m bench train` takes on the CPU: a process of its own
loads the model, then trains it for a few steps, and says the most that was resident meanwhile.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..paths import ROOT

LOAD, LOAD_HALF = "load", "load_bf16"  # processes that do nothing more than load the model


def write_job(path: Path, zoo, texts, batches: list[np.ndarray], features, threads: int) -> None:
    """What the processes need: settings, the texts of `batches` alone, and their features."""
    from safetensors.torch import save_file

    used = np.unique(np.concatenate(batches))
    place = {int(row): i for i, row in enumerate(used)}
    job = {
        "zoo": {name: getattr(zoo, name) for name in zoo.__dataclass_fields__},
        "examples": texts.take(used),
        "labels": texts.labels[torch.as_tensor(used)].tolist(),
        "classes": texts.classes,
        "pad_id": texts.pad_id,
        "batches": [[place[int(row)] for row in rows] for rows in batches],
        "threads": threads,
    }
    path.write_text(json.dumps(job), encoding="utf-8")
    own = features.features[torch.as_tensor(features.of_text[used])]
    save_file({"features": own.contiguous()}, path.with_suffix(".safetensors"))


def peak_bytes(job: Path, name: str, k: int | None, cache: str | None) -> int:
    """The most that a process had resident after it had loaded the model.

    Raises:
        RuntimeError: it failed; says how.
    """
    call = [sys.executable, "-m", "bench.train.memory", str(job), name]
    call += ["--k", str(k or 0), *(["--cache", cache] if cache else [])]
    root = str(ROOT)
    path = os.pathsep.join([root, f"{root}/kernels", os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        call,
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": path},
    )
    if run.returncode:
        raise RuntimeError(f"Training {name} in a process of its own failed: {run.stderr[-800:]}")
    return int(run.stdout.splitlines()[-1])


def _forget_peak() -> None:
    """What loading took for a moment does not count, where the system can forget it."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass


def _peak() -> int:
    """VmHWM (a child's ru_maxrss begins with its parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def child(path: Path, name: str, k: int | None, cache: str | None) -> int:
    """Body of the process."""
    from safetensors.torch import load_file

    from ..data import quiet
    from .contestants import HALF, HOLDS
    from .data import Texts
    from .models import Rows, Zoo, inputs_of
    from .rows import open_cache

    quiet()
    job = json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    zoo = Zoo(**job["zoo"])
    labels = torch.tensor(job["labels"])
    texts = Texts(job["examples"], labels, job["classes"], "job", job["pad_id"])
    half = zoo.dtype == "bf16" and (name in HALF or name == LOAD_HALF)
    model = zoo.base(half, copied=False)
    for parameter in model.parameters():
        # A file's pages would be counted when something touches them.
        parameter.data = parameter.data.clone()
    everything = np.arange(len(texts))
    _forget_peak()
    if name in (LOAD, LOAD_HALF):
        return _peak()
    rows = None
    if name == "head":
        features = load_file(path.with_suffix(".safetensors"))["features"]
        rows = Rows.numbered(texts, everything, everything, features=features)
    contestant = zoo.contestant(name, k, texts, rows, model=model)
    if cache is not None:
        rows = open_cache(zoo, texts, everything, k, cache, contestant.model)
        if name in HOLDS:
            rows = rows.hold(contestant.model)
        rows = replace(rows, room=contestant.model.peft_config["default"].num_virtual_tokens)
        contestant.inputs = inputs_of(name, texts, rows, zoo.place)
    for batch in job["batches"]:
        contestant.step(np.array(batch))
    return _peak()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("name")
    parser.add_argument("--k", type=int)
    parser.add_argument("--cache")
    options = parser.parse_args()
    print(child(Path(options.job), options.name, options.k or None, options.cache))
