"""`lpt-fast precompute`: fills a cache with what the frozen layers give for every text.

Several processes share the work: `torchrun --nproc_per_node N -m lpt_fast precompute ...`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from ..backbone.families import find_backbone, get_layers
from ..cache import ActivationCache
from ..cache.folder import MANIFEST, Folder, find_folders
from ..cache.forward import Runner, batches_of, device_of
from ..cache.guards import check_frozen
from ..cache.identity import cut, identity_of
from ..cache.plan import Target, bytes_needed
from ..cache.planner import amount, payoff
from ..cache.ranks import Ranks
from ..cache.rows import DatasetKeys, TextRules, read_keys, to_text
from ..cache.state import State
from ..tasks import encode_labels, load_task
from .console import table
from .data import (
    Formulation,
    cannot_load,
    checked_max_length,
    load_tokenizer,
    read_rows,
    text_columns_of,
)
from .outputs import check_folder
from .precompute_arguments import PrecomputeArguments

READ_RATE = 2e9  # bytes a second that --dry_run expects of reading (measured: bench/results)


def read_splits(args: PrecomputeArguments, task, labelled: bool) -> list[tuple]:
    """The texts by column of all splits that were named, with class ids where they are wanted,
    and where they come from.

    Args:
        args: of the command.
        task: TaskSpec or None.
        labelled: whether labels become tokens (causal models with label words).
    """
    columns = text_columns_of(task, args.text_column)
    label = args.label_column if labelled else None
    files = (args.train_file, args.validation_file, args.test_file)
    names = ("train", "validation", "test")
    sources = [(file, name, True) for file, name in zip(files, names, strict=True) if file]
    if args.dataset:
        here = names[:1] if Path(args.dataset).is_file() else names
        sources += [(args.dataset, name, name == "train") for name in here]
    found = []
    for source, name, needed in sources:
        try:
            rows, texts, origin = read_rows(source, name, task, columns, label)
        except FileNotFoundError:
            if needed:
                raise
            continue  # a data set need not have all splits
        labels = None
        if labelled:
            encoded = encode_labels(rows, label, list(task.labels), task.hub_label_ids, origin)
            labels = list(encoded["labels"])
        found.append((texts, labels, origin))
    return found


def load_model(args: PrecomputeArguments, device: torch.device) -> nn.Module:
    """The backbone, frozen, in eval mode."""
    try:
        model = AutoModel.from_pretrained(args.model, dtype=getattr(torch, args.torch_dtype))
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load("model", args.model, error)) from None
    return model.requires_grad_(False).eval().to(device)


def tokenised(args: PrecomputeArguments, model: nn.Module) -> list[dict]:
    """The examples of all splits, as `lpt-fast train` tokenises them."""
    tokenizer = load_tokenizer(args.model)
    task = load_task(args.task) if args.task else None
    cloze = args.formulation == "cloze"
    config = AutoConfig.from_pretrained(args.model)
    causal = cloze and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    _, backbone, family = find_backbone(model)
    limit = family.max_length(backbone.config) or 10**9
    formulation = Formulation(
        labels=list(task.labels) if cloze else [],
        text_columns=text_columns_of(task, args.text_column),
        label_column=args.label_column,
        max_length=checked_max_length(args.max_length, limit, args.model, tokenizer),
        cloze=cloze,
        causal=causal,
        task=task,
        model=args.model,
        dtype=args.torch_dtype,
    )
    return [
        example
        for texts, labels, origin in read_splits(args, task, labelled=causal)
        for example in formulation.encode(tokenizer, texts, labels, origin)
    ]


def choose_device(use_cpu: bool) -> torch.device:
    """The GPU of this process (torchrun gives each one of its own), else the CPU."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def shard_bytes_of(args: PrecomputeArguments) -> int:
    """--shard_mb in bytes."""
    return int(args.shard_mb * 2**20)


def precompute(args: PrecomputeArguments) -> Iterator[str]:
    """Fills the cache (or says what that would take); the body of the command.

    Yields:
        lines for the screen, on the first process alone.
    """
    check_folder(args.out, "--out")
    device = choose_device(args.use_cpu)
    model = load_model(args, device)
    _, backbone, family = find_backbone(model)
    layers = args.layers() or [max(1, len(get_layers(backbone, family)) // 2)]
    examples = tokenised(args, model)
    ranks = Ranks.of_environment()
    first = ranks.rank == 0
    if args.dry_run:
        if first:
            yield from dry_run(args, model, layers, examples)
        return
    cache = ActivationCache.open(args.out, store=args.store, compute_dtype=args.compute_dtype)
    report = cache.build(
        model,
        examples,
        insertion_layer=layers,
        batch_tokens=args.batch_tokens,
        shard_bytes=shard_bytes_of(args),
        max_bytes=None if args.max_cache_gb is None else int(args.max_cache_gb * 1e9),
        wait=args.wait,
        progress=True,
        provenance={"model": args.model},
    )
    if not first:
        return
    yield (
        f"{report.rows:,} texts ({report.unique:,} different): {report.computed:,} computed, "
        f"{report.tokens:,} tokens, {amount(report.bytes)} in {report.seconds:.1f} s"
        + (f", from layer {report.continued_from} on" if report.continued_from else "")
        + (f" (the share of the first of {ranks.world} processes)" if ranks.world > 1 else "")
    )
    yield from folders_of(Path(args.out))


def dry_run(
    args: PrecomputeArguments, model: nn.Module, layers: list[int], examples: list[dict]
) -> Iterator[str]:
    """What `precompute` would do: identity, rows, bytes, free disk, time, and whether it pays.
    Runs a few batches to measure, writes nothing.
    """
    root = Path(args.out)
    place = cut(model, max(layers))
    rules = TextRules.of(place.backbone, place.family)
    keys = read_keys(examples, rules)
    rows = [["layer", "identity", "texts", "missing", "tokens", "to write"]]
    needed, share = 0, 0.0
    for layer in layers:
        at = cut(model, layer)
        check_frozen(at)
        identity = identity_of(at, args.store, args.compute_dtype)
        path = root / identity.folder
        state = State(Folder(path, identity))
        if (path / MANIFEST).exists():
            state = State(Folder.read(path)).load(adopt=True)
        target = Target(at, state)
        missing = target.find_missing(keys)
        tokens = int(keys.lengths[missing].sum())
        size = bytes_needed(target, keys, shard_bytes_of(args)) if missing.any() else 0
        needed += size
        share = max(share, tokens / int(keys.lengths.sum()))
        counts = (f"{len(keys):,}", f"{int(missing.sum()):,}", f"{tokens:,}")
        rows.append([str(layer), identity.digest[:12], *counts, amount(size)])
    yield table(rows)
    there = root
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    verdict = "enough" if needed <= free else "NOT enough"
    yield f"Disk: {amount(free)} free at {there}, {amount(needed)} needed: {verdict}."
    rate = _tokens_per_second(args, model, layers, examples, keys, rules)
    forward = int(keys.lengths.sum()) / rate
    yield (
        f"Time: about {1.1 * share * forward:,.1f} s to fill ({rate:,.0f} tokens/s measured on a "
        f"few batches through layer {max(layers)} on {device_of(place)})."
    )
    reading = int(keys.lengths.sum()) * identity.token_bytes / READ_RATE
    advice = payoff(args.num_train_epochs, forward, share, reading)
    yield f"Advice: {advice}. (Epochs of all runs that will use it: --num_train_epochs.)"


def _tokens_per_second(args, model, layers, examples, keys: DatasetKeys, rules) -> float:
    """Of the lower layers, on batches of short, middling and long texts."""
    runner = Runner(cut(model, max(layers)), layers, args.compute_dtype or args.torch_dtype)
    order = np.lexsort((keys.lengths, keys.kinds))
    tokens = seconds = 0.0
    for share in (0.1, 0.5, 0.9):
        rows = order[int(share * (len(order) - 1)) :]
        rows = rows[keys.kinds[rows] == keys.kinds[rows[0]]]
        batch = next(batches_of(keys.lengths[rows], runner.budget(args.batch_tokens)))
        texts = [to_text(row, examples[row], rules) for row in rows[batch].tolist()]
        for warm in (False, True):
            start = time.perf_counter()
            runner.run(texts)
            if runner.device.type == "cuda":
                torch.cuda.synchronize(runner.device)
            if warm:
                seconds += time.perf_counter() - start
                tokens += sum(map(len, texts))
    return tokens / seconds


def folders_of(root: Path) -> Iterator[str]:
    """A table of the caches in a folder."""
    rows = [["cache", "layer", "store", "computed in", "rows", "size", "model"]]
    for path in find_folders(root):
        folder = Folder.read(path)
        identity = folder.identity
        entries = folder.read_index() or []
        rows.append(
            [
                identity.digest[:12],
                str(identity.layer),
                identity.store,
                identity.compute_dtype,
                f"{sum(entry.rows for entry in entries):,}",
                amount(sum(entry.bytes for entry in entries)),
                str(folder.provenance.get("model", "?")),
            ]
        )
    yield table(rows)
