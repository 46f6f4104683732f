"""CUDA graphs of the packed layers. What a graph holds is tried on the CPU, where "capturing" gives
the module back: buckets, filler texts, and when a graph may not be used. Graphs themselves need a
GPU.
"""

from __future__ import annotations

import pytest
import torch
from test_cached_hidden import M, cached
from test_packed import assert_same, labels_for, outcome, pair, still
from tiny import batch

from lpt_fast import graphs
from lpt_fast.backbone.families import find_backbone
from lpt_fast.graphs import UpperGraphs

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def with_graphs(model, monkeypatch, step=16):
    monkeypatch.setattr(graphs, "STEP", step)
    monkeypatch.setattr(graphs, "WORTH", 0)
    seen = []

    def held(module, arguments):
        seen.append([tuple(x.shape) for x in arguments])
        return module

    late = find_backbone(model)[1].late_prompt
    late.graphs = UpperGraphs(late, held)
    return late, seen


@pytest.mark.parametrize("generator", ["static", "npg", "mppg", "residual"])
@pytest.mark.parametrize("head", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_a_bucket_gives_the_same(family, head, generator, monkeypatch):
    base, model = pair(family, head, generator=generator)
    still(model)
    inputs = batch(lengths=(9, 4, 7, 1, 3))
    labels = labels_for(head, inputs)
    at = None if head == "SEQ_CLS" else inputs["attention_mask"].bool()
    rows = cached(base, inputs, room=M)
    expected = outcome(model, "packed", at, cached_hidden=rows, **labels)
    late, seen = with_graphs(model, monkeypatch)
    assert_same(outcome(model, "packed", at, cached_hidden=rows, **labels), expected)
    # 24 tokens and a filler of 8 make 32; 6 prompts.
    assert seen[0][0] == (32 + 6 * M, 32) and seen[0][1] == (7,)
    assert late.graphs.replayed == 1
    (bucket,) = late.graphs._made
    assert bucket.size == 64  # bounds the longest text and the filler, in steps of 64


def test_batches_of_like_size_share_a_graph(monkeypatch):
    base, model = pair("bert", "SEQ_CLS")
    still(model)
    late, seen = with_graphs(model, monkeypatch)
    sizes = [(9, 4, 7, 1, 3), (9, 4, 6, 1, 3), (2, 4, 6, 1, 3), (9, 4, 7, 1), (9, 9, 9, 4, 1)]
    for lengths in sizes:  # 24, 23, 16, 21 and 32 tokens
        inputs = batch(lengths=lengths)
        labels = labels_for("SEQ_CLS", inputs)
        rows = cached(base, inputs, room=M)
        late.graphs, held = None, late.graphs
        expected = outcome(model, "packed", cached_hidden=rows, **labels)
        late.graphs = held
        assert_same(outcome(model, "packed", cached_hidden=rows, **labels), expected)
    # The fourth has another number of texts; 32 tokens leave no room for a filler below 48.
    assert len(late.graphs) == len(seen) == 3 and late.graphs.replayed == 5


def test_when_a_graph_is_not_used(monkeypatch):
    base, model = pair("bert", "SEQ_CLS")
    still(model)
    late, _ = with_graphs(model, monkeypatch)
    late.upper = "packed"
    inputs = batch()
    labels = labels_for("SEQ_CLS", inputs)
    rows = cached(base, inputs, room=M)

    def replays(call):
        before = late.graphs.replayed
        out = call()
        return late.graphs.replayed - before, out

    def forward():
        return model(cached_hidden=rows, **labels).loss

    count, loss = replays(forward)
    assert count == 1
    count, second = replays(forward)  # the first one's backward is still to come
    assert count == 0
    (loss + second).backward()
    assert replays(forward)[0] == 1  # and nobody keeps this one
    count, third = replays(forward)
    assert count == 1
    third.backward()
    with torch.no_grad():
        assert replays(forward)[0] == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert replays(forward)[0] == 0
    model.eval()
    assert replays(forward)[0] == 0
    model.train()
    for p in late.lpt_generator.parameters():
        p.data = p.data.clone()
    made = len(late.graphs)
    forward()
    assert len(late.graphs) == made + 1  # other weights, another graph


def test_a_bucket_has_to_come_again(monkeypatch):
    base, model = pair("bert", "SEQ_CLS")
    late, seen = with_graphs(still(model), monkeypatch)
    monkeypatch.setattr(graphs, "WORTH", 2)
    late.upper = "packed"
    rows = cached(base, batch(), room=M)
    for calls in range(1, 5):
        model(cached_hidden=rows, labels=torch.tensor([0, 1, 0, 1, 1])).loss.backward()
        assert len(seen) == (calls > 2)


def test_the_trainer_says_where_graphs_run(tmp_path):
    from test_trainer import new_model, rows
    from transformers import TrainingArguments

    from lpt_fast import LPTTrainer

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="trains on 'cpu', expected a CUDA device"):
        LPTTrainer(new_model(), args, train_dataset=rows(4), cuda_graphs=True)


@gpu
@needs_gpu
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_graphs_on_a_gpu(family):
    """Steps by graphs give the weights of steps without."""
    base, model = pair(family, "SEQ_CLS", torch.bfloat16)
    rows = cached(base, batch(), room=M)
    ends = []
    for by_graphs in (False, True):
        torch.manual_seed(0)
        model = still(pair(family, "SEQ_CLS", torch.bfloat16)[1]).cuda()
        late = find_backbone(model)[1].late_prompt
        late.upper = "packed"
        late.graphs = UpperGraphs(late) if by_graphs else None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(6):
            labels = torch.tensor([0, 1, 0, 1, 1], device="cuda")
            model(cached_hidden=rows, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not by_graphs or late.graphs.replayed == 4
        ends.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=2e-3, rtol=2e-2)
