"""What the benchmarks of the activation cache are made of: real texts, models, and results that say
whether a target was met.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

MAX_LENGTH = 128  # as `lpt-fast train` cuts texts


class WrongResult(Exception):
    """What was to be measured computes something wrong: no figure."""


@contextmanager
def ends_where_wrong(part: str = ""):
    """Ends the program where something wrong was to be measured, and says what."""
    import typer  # (which programs on a GPU do without)

    try:
        yield
    except WrongResult as error:
        said = f"{part:9} WRONG" if part else "WRONG"
        typer.echo(f"{said}, no figure: {error}", err=True)
        raise typer.Exit(1) from None


def require(sound: bool, what: str) -> None:
    """The gate before every measurement."""
    if not sound:
        raise WrongResult(what)


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        part: of the benchmark.
        name: what it is.
        value, unit: how much.
        target: what it should be: at least that where `more` is better, else at most; None for a
            figure that only informs.
        details: further fields of the line in the results file.
    """

    part: str
    name: str
    value: float
    unit: str = ""
    target: float | None = None
    more: bool = False
    details: dict = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.more else self.value <= self.target

    def __str__(self) -> str:
        verdict = ""
        if self.target is not None:
            sign, met = ">=" if self.more else "<=", "met" if self.met else "NOT MET"
            verdict = f"(target {sign} {_short(self.target)}: {met})"
        more = ", ".join(f"{n} {_short(v)}" for n, v in self.details.items())
        value = f"{_short(self.value):>9} {self.unit}"
        return f"{self.part:9} {self.name:54} {value:14} {verdict:24} {more}".rstrip()

    def to_json(self) -> dict:
        return {
            "part": self.part,
            "name": self.name,
            "value": _rounded(self.value),
            "unit": self.unit,
            "target": self.target,
            "met": self.met,
            **{name: _rounded(value) for name, value in self.details.items()},
        }


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def _rounded(value):
    """As JSON has it, which knows no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(f"{value:.6g}") if isinstance(value, float) else value


class Recorder:
    """Prints figures and appends them to a results file, with the machine.

    Args:
        out: the file; None to print alone.
        common: fields of every line that are not printed.
    """

    def __init__(self, out: str | None, common: dict | None = None):
        self.out = None if out is None else Path(out)
        self.common = common or {}

    def __call__(self, figure: Figure) -> None:
        from .machine import describe

        print(figure, flush=True)
        if self.out is not None:
            line = json.dumps({**figure.to_json(), **self.common, **describe()})
            with open(self.out, "a", encoding="utf-8") as f:
                f.write(line + "\n")


@dataclass
class Source:
    """Real texts, tokenised, and the models that read them.

    Attributes:
        data: folder with a folder of train.tsv, dev.tsv, test.tsv for each task.
        model: name or folder of the encoder; None: the demo's (MiniLM, 6 layers, D = 384).
    """

    data: Path
    model: str | None = None

    @cached_property
    def model_name(self) -> str:
        from lpt_fast.cli.demo import demo_model

        return self.model or demo_model()

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_name)

    def lines(self, task: str, split: str = "train") -> list[tuple[str, str]]:
        """Texts and their labels."""
        path = self.data / task / f"{split}.tsv"
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
        return [tuple(line.rsplit("\t", 1)) for line in lines]

    def labelled(self, task: str, split: str = "train", rows: int | None = None):
        """Tokenised texts [N] and the names of their labels [N]; of more than `rows`, some spread
        over the file.
        """
        lines = self.lines(task, split)
        if rows is not None and rows < len(lines):
            lines = [lines[i] for i in np.linspace(0, len(lines) - 1, rows).astype(int)]
        texts, labels = zip(*lines, strict=True)
        encoded = self.tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)
        examples = [
            {name: values[i] for name, values in encoded.items()} for i in range(len(texts))
        ]
        return examples, list(labels)

    def examples(self, task: str, rows: int | None = None) -> list[dict]:
        """Tokenised training texts."""
        return self.labelled(task, "train", rows)[0]

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The encoder alone."""
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.model_name, dtype=dtype).eval()

    def adapted(self, layer: int, labels: int = 2, seed: int = 0) -> nn.Module:
        """The encoder with a head and a late prompt (npg) after `layer`."""
        from peft import get_peft_model
        from transformers import AutoModelForSequenceClassification, set_seed

        from lpt_fast import LPTConfig

        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            self.model_name, num_labels=labels, ignore_mismatched_sizes=True
        )
        config = LPTConfig(task_type="SEQ_CLS", insertion_layer=layer, generator="npg")
        return get_peft_model(model, config)

    @property
    def depth(self) -> int:
        """Layers of the encoder."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.model_name).num_hidden_layers


def wide_encoder(vocab_size: int, width: int, seed: int = 0) -> nn.Module:
    """A random encoder of two layers with a real width and a short feed-forward layer: what caches
    weigh and how fast they are read does not depend on what the numbers mean.
    """
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        intermediate_size=64,
    )
    return BertModel(config).eval()


def batches(count: int, size: int = 32, seed: int = 0) -> list[np.ndarray]:
    """Row numbers of one epoch in random order; the last batch may be smaller."""
    order = np.random.default_rng(seed).permutation(count)
    return [order[i : i + size] for i in range(0, count, size)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of a - b over that of b."""
    a, b = a.double(), b.double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Another number of torch threads in a block; None: as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def temporary() -> tempfile.TemporaryDirectory:
    """A folder on a disk: /tmp lies in memory on some machines, so TMPDIR counts."""
    return tempfile.TemporaryDirectory(prefix="lpt-fast-bench-")


@dataclass(frozen=True)
class Sizes:
    """How much is measured. The defaults keep each part under about two minutes on two cores.

    Attributes:
        size_rows: texts of a task that are weighed; None: all.
        build_rows, build_repeats: texts of a build, and how often it is timed.
        read_repeats, cold_repeats: epochs that are read from memory and from the disk.
        wide_rows: texts of the random encoders with D = 768 and 1024.
        steps: training steps that are timed.
        canary_rows, canary_context: texts that are computed again, among so many.
        memory_bytes, memory_allowance, memory_steps: of the cache, what a process may take
            beyond what training on text took, and how long it trains.
    """

    size_rows: int | None = None
    build_rows: int = 1200
    build_repeats: int = 5
    read_repeats: int = 15
    cold_repeats: int = 3
    wide_rows: int = 1500
    steps: int = 40
    canary_rows: int = 100
    canary_context: int = 2000
    memory_bytes: int = 2**30
    memory_allowance: int = 256 * 2**20
    memory_steps: int = 1500


QUICK = Sizes(
    size_rows=24,
    build_rows=24,
    build_repeats=2,
    read_repeats=3,
    cold_repeats=1,
    wide_rows=12,
    steps=3,
    canary_rows=4,
    canary_context=24,
    memory_bytes=112 * 2**20,
    memory_allowance=64 * 2**20,
    memory_steps=40,
)


def quiet() -> None:
    """Progress bars and loading reports say nothing here."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
