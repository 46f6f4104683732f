"""bench/kernels/tune_insert.py as far as it goes without a GPU: nothing is timed, but every part
finds the kernel that it is about, in each configuration.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lpt_kernels import attention, insert, insert_backward, insert_config

from bench.kernels.tune_insert import PARTS, attention_rows, insert_rows
from bench.shapes import shape_of

SHAPE = shape_of("tiny-64-m3-trec")


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """Names of the kernels that were started, none of which runs."""
    names = []
    for module in (attention, insert, insert_backward):
        start = lambda kernel, grid, **options: names.append(kernel.__name__)  # noqa: E731
        monkeypatch.setattr(module, "launch", start)
    return names


@pytest.mark.parametrize("part", PARTS)
def test_every_part_finds_its_kernel(part, started, capsys):
    kernel, _ = PARTS[part]
    before = dict(insert_config.HALF)
    rows = list(insert_rows(part, SHAPE, torch.bfloat16, torch.device("cpu")))
    assert len(rows) == len({said for said, _ in rows}) > 4 and not capsys.readouterr().out
    assert sum(said.endswith("*") for said, _ in rows) == 1  # the default
    assert before == insert_config.HALF
    started.clear()
    rows[0][1]()
    (name,) = started
    assert kernel.endswith(name.removesuffix("_kernel"))


@pytest.mark.parametrize("part", ["attention_fwd", "attention_bwd"])
def test_attention(part, started, capsys):
    rows = list(attention_rows(part, SHAPE, torch.bfloat16, torch.device("cpu")))
    assert len(rows) == 9 and not capsys.readouterr().out
    started.clear()
    rows[0][1]()
    assert started == [{"attention_fwd": "attend_fwd_kernel"}.get(part, "attend_bwd_kernel")]
