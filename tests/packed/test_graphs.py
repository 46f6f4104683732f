"""CUDA graphs of the packed layers, imitated on the CPU: buckets, filler texts, memory that replays
write over, and when a graph may not be used. test_graphs_gpu.py captures.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lpt_fast.backbone.families import find_backbone
from lpt_fast.packed import graphs
from lpt_fast.packed.blocks import PostNormBlock
from lpt_fast.packed.graph_passes import NoRoom
from tests.method.cases import M, cached
from tests.packed.cases import Imitation, assert_same, labels_for, outcome, pair, still, with_graphs
from tests.tiny import batch


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["static", "npg", "mppg", "residual"])
@pytest.mark.parametrize("head", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
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
    assert seen[0][0] == (32 + 6 * M, 32) and seen[0][1] == (6,)
    (bucket,) = late.graphs._made
    assert bucket.size == 64
    late, seen = with_graphs(model, monkeypatch, size_step=4)
    for _ in range(2):
        assert_same(outcome(model, "packed", at, cached_hidden=rows, **labels), expected)
    # Texts of up to 12: two divide the 8.
    assert seen[0][0] == (32 + 7 * M, 32) and late.graphs.replayed == 2


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
def test_a_chosen_token_is_read(family, monkeypatch):
    head = "MASKED_LM" if family in ("bert", "mpnet") else "CAUSAL_LM"
    base, model = pair(family, head)
    still(model)
    inputs = batch()
    place = torch.tensor([8, 2, 5, 0, 1])
    columns = torch.arange(9) == place[:, None]
    labels = torch.where(columns, 7, -100)
    labels[3] = -100  # (a context needs a token before the answer)
    rows = cached(base, inputs, room=M)
    late, seen = with_graphs(model, monkeypatch)
    call = {"cached_hidden": rows, "readout": place, "labels": labels}
    late.graphs, held = None, late.graphs
    expected = outcome(model, "packed", **call)
    late.graphs = held
    for _ in range(2):
        assert_same(outcome(model, "packed", **call), expected)
    assert seen[0][4] == (5,) and held.replayed == 2


def test_positions_of_the_callers_own(monkeypatch):
    base, model = pair("qwen3", "SEQ_CLS")
    still(model)
    inputs = batch()
    positions = torch.arange(9).expand(5, 9) + torch.tensor([[0], [3], [7], [1], [2]])
    late, seen = with_graphs(model, monkeypatch)
    held = late.graphs
    for given in (positions, None, positions + 1):
        rows = cached(base, inputs, room=M, positions=given)
        late.graphs = None
        expected = outcome(model, "packed", cached_hidden=rows)
        late.graphs = held
        assert_same(outcome(model, "packed", cached_hidden=rows), expected)
    assert len(held) == 2 and [x[3] is None for x in seen] == [False, True]


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


@pytest.mark.parametrize("head", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_accumulated_gradients_and_kept_outputs(family, head, monkeypatch):
    """Replays write over what a graph gave out before; two buckets alternate, and a long batch is
    followed by a shorter one."""
    base, model = pair(family, head, generator="npg")
    still(model)
    calls = []
    for lengths in ((9, 4, 7, 1, 3), (9, 9, 9, 4, 1), (9, 4, 3, 1, 3), (9, 9, 8, 4, 2)):
        inputs = batch(lengths=lengths)
        calls.append({"cached_hidden": cached(base, inputs, room=M), **labels_for(head, inputs)})
    late, seen = with_graphs(model, monkeypatch)
    late.upper, ends = "packed", []
    for by_graphs in (False, True):
        late.graphs, held = late.graphs if by_graphs else None, late.graphs
        model.zero_grad()
        logits, states = [], []
        hook = find_backbone(model)[1].register_forward_hook(
            lambda module, args, out, states=states: states.append(out.last_hidden_state)
        )
        for call in calls:
            out = model(**call)
            logits.append(out.logits)
            out.loss.backward()
        hook.remove()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        ends.append((logits, states, grads))
        late.graphs = held
    assert len(seen) == 2 and late.graphs.replayed == 4
    for got, expected in zip(*(a + b for a, b, _ in ends), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert_same((*[torch.zeros(1)] * 2, ends[1][2]), (*[torch.zeros(1)] * 2, ends[0][2]))


def test_a_nan_stays_in_its_batch(monkeypatch):
    base, model = pair("bert", "TOKEN_CLS")
    late, _ = with_graphs(still(model), monkeypatch)
    late.upper = "packed"
    long, short = (cached(base, batch(lengths=n), room=M) for n in ((9, 4, 9), (9, 3, 4)))
    long.hidden[-5:] = float("nan")
    for given in (long, short):
        model.zero_grad()
        loss = model(cached_hidden=given).logits.sum()
        loss.backward()
        grads = [p.grad for p in late.lpt_generator.parameters()]
        assert bool(loss.isnan()) == any(bool(g.isnan().any()) for g in grads) == (given is long)
    assert len(late.graphs) == 1 and late.graphs.replayed == 2


def test_a_graph_has_one_backward(monkeypatch):
    base, model = pair("bert", "SEQ_CLS")
    late, _ = with_graphs(still(model), monkeypatch)
    late.upper = "packed"
    loss = model(cached_hidden=cached(base, batch(), room=M)).logits.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice .* expected one a forward"):
        loss.backward()


def test_hooks_of_parameters_see_each_gradient_once(monkeypatch):
    """(A DDP counts them.)"""
    base, model = pair("bert", "SEQ_CLS", generator="static")
    late, _ = with_graphs(still(model), monkeypatch)
    late.upper = "packed"
    (weight,) = late.lpt_generator.parameters()
    before, after = [], []
    weight.register_hook(before.append)
    weight.register_post_accumulate_grad_hook(after.append)
    for _ in range(2):
        model(cached_hidden=cached(base, batch(), room=M)).logits.sum().backward()
    assert len(before) == len(after) == late.graphs.replayed == 2


def test_when_a_graph_is_not_used(monkeypatch):
    base, model = pair("bert", "SEQ_CLS")
    still(model)
    late, _ = with_graphs(model, monkeypatch)
    late.upper = "packed"
    inputs = batch()
    labels = labels_for("SEQ_CLS", inputs)
    rows = cached(base, inputs, room=M)
    other = cached(base, batch(lengths=(9, 9, 9, 9, 9)), room=M)

    def replays(call):
        before = late.graphs.replayed
        out = call()
        return late.graphs.replayed - before, out

    def forward(rows=rows):
        return model(cached_hidden=rows, **labels).loss

    count, loss = replays(forward)
    assert count == 1
    count, second = replays(forward)  # the first one's backward is still to come
    assert count == 0
    count, third = replays(lambda: forward(other))  # another graph's memory is the same
    assert count == 0
    (loss + second + third).backward()
    assert replays(forward)[0] == 1  # and nobody keeps this one
    count, fourth = replays(forward)
    assert count == 1
    fourth.backward()
    with torch.no_grad():
        assert replays(forward)[0] == 0
    model.eval()
    assert replays(forward)[0] == 0
    model.train()
    for p in late.lpt_generator.parameters():
        p.requires_grad_(False)
    assert replays(forward)[0] == 0
    for p in late.lpt_generator.parameters():
        p.requires_grad_(True)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["generator", "frozen", "dropout"])
def test_graphs_of_other_weights_are_dropped(part, monkeypatch):
    base, model = pair("bert", "SEQ_CLS")
    late, seen = with_graphs(still(model), monkeypatch)
    late.upper = "packed"
    rows, more = (cached(base, batch(lengths=n), room=M) for n in ((9, 4, 7, 1, 3), (9, 9, 9)))
    for batch_ in (rows, more, rows):
        model(cached_hidden=batch_).logits.sum().backward()
    assert len(late.graphs) == len(seen) == 2
    if part == "dropout":
        late.lpt_generator["default"].dropout.p = 0.5
    module = late.lpt_generator if part == "generator" else late.backbone.encoder.layer[2]
    if part != "dropout":
        for p in module.parameters():
            p.data = p.data.clone()
    model(cached_hidden=rows).logits.sum().backward()
    assert len(late.graphs) == 1 and len(seen) == 3


def test_a_bucket_has_to_come_again(monkeypatch):
    base, model = pair("bert", "SEQ_CLS")
    late, seen = with_graphs(still(model), monkeypatch, worth=2)
    late.upper = "packed"
    rows = cached(base, batch(), room=M)
    for calls in range(1, 5):
        model(cached_hidden=rows, labels=torch.tensor([0, 1, 0, 1, 1])).loss.backward()
        assert len(seen) == (calls > 2)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
def test_under_autocast(family, weights, monkeypatch):
    """No farther from fp32 than twice the way without graphs; weights that are in autocast's dtype
    run without it."""
    inputs = batch()
    labels = labels_for("SEQ_CLS", inputs)
    _, exact = pair(family, "SEQ_CLS")
    truth = outcome(still(exact), "padded", **inputs, **labels)
    base, model = pair(family, "SEQ_CLS", weights)
    still(model)
    late, _ = with_graphs(model, monkeypatch)
    held, errors, within = late.graphs, {}, []
    own = PostNormBlock.project_backward

    def backward(*given):
        within.append(torch.is_autocast_enabled("cpu"))
        return own(*given)

    monkeypatch.setattr(PostNormBlock, "project_backward", backward)
    rows = cached(base, inputs, room=M)
    for way in ("plain", "graphs", "again"):
        late.graphs = None if way == "plain" else held
        got = outcome(model, "packed", None, torch.bfloat16, cached_hidden=rows, **labels)
        both = [(got[0], truth[0]), *((got[2][n], g) for n, g in truth[2].items())]
        errors[way] = torch.tensor([float((a.double() - b.double()).norm()) for a, b in both])
        sizes = torch.tensor([float(b.double().norm()) for _, b in both])
    for way in ("graphs", "again"):
        assert (errors[way] <= 2 * errors["plain"] + sizes * 2**-8).all(), errors
    (bucket,) = held._made
    assert bucket.autocast == (None if weights == torch.bfloat16 else torch.bfloat16)
    assert held.replayed == 2
    if family == "bert":
        assert within == [True] + 3 * [weights == torch.float32]
    # (A step without autocast is another bucket.)
    if weights == torch.float32:
        outcome(model, "packed", cached_hidden=rows, **labels)
        assert len(held) == 2


@pytest.mark.parametrize("error", [RuntimeError("no capture"), NoRoom("little memory")])
def test_what_cannot_be_captured_runs_as_ever(error, monkeypatch, caplog):
    base, model = pair("bert", "SEQ_CLS")
    late, _ = with_graphs(still(model), monkeypatch)
    calls = []

    def fails(*given):
        calls.append(given)
        raise error

    inputs = batch()
    labels = labels_for("SEQ_CLS", inputs)
    rows = cached(base, inputs, room=M)
    late.graphs, held = None, late.graphs
    expected = outcome(model, "packed", cached_hidden=rows, **labels)
    late.graphs = held
    monkeypatch.setattr(held, "_capture", fails)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            got = outcome(model, "packed", cached_hidden=rows, **labels)
    assert_same(got, expected)
    assert len(calls) == 1 and held.replayed == 0
    words = [r.getMessage() for r in caplog.records if r.name == "lpt_fast.packed.graphs"]
    assert len(words) == isinstance(error, RuntimeError)
    assert all("no capture" in w and "without graphs" in w for w in words)


def test_there_is_a_largest_number_of_graphs(monkeypatch):
    base, model = pair("bert", "SEQ_CLS")
    late, seen = with_graphs(still(model), monkeypatch)
    monkeypatch.setattr(graphs, "MOST", 2)
    late.upper = "packed"
    for lengths in ((9,), (9, 4), (9, 4, 7), (9, 4, 7, 1), (9,)):
        model(cached_hidden=cached(base, batch(lengths=lengths), room=M)).logits.sum().backward()
    assert len(late.graphs) == len(seen) == 2 and late.graphs.replayed == 3


def test_buckets_grow_with_the_batch():
    """Few buckets, little filler in large batches, and no filler text longer than the longest:
    attention pads to that."""
    for texts, most, share in ((32, 17, 0.4), (256, 8, 0.09), (1047, 8, 0.045)):
        own, buckets = torch.Generator().manual_seed(texts), set()
        for _ in range(200):
            lengths = (torch.randn(texts, generator=own) * 9 + 25).clamp(3, 66).long()
            tokens, longest = int(lengths.sum()), int(lengths.max())
            size = graphs._rounded(longest, graphs.size_step(longest))
            step = graphs.token_step(tokens)
            fillers = -(-step // (size - 1))
            total = graphs._rounded(tokens + fillers, step)
            missing = total - tokens
            assert fillers <= missing and -(-missing // fillers) <= size
            assert missing < step + fillers and missing <= share * tokens
            buckets.add((total, size))
        assert len(buckets) <= most
    steps = [graphs.token_step(n) for n in (1, 975, 4095, 4096, 16383, 16384, 32748, 65536)]
    assert steps == [256, 256, 256, 512, 512, 1024, 1024, 2048]
    assert [graphs.size_step(n) for n in (1, 66, 1023, 1024)] == [64, 64, 64, 128]


class _NoHostLists(TorchFunctionMode):
    """Finds tensors made of Python's numbers, which would be copied to a GPU in each step."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in ("tensor", "as_tensor", "new_tensor", "from_numpy", "item", "tolist")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
def test_a_step_copies_no_numbers_to_the_device(family, monkeypatch):
    base, model = pair(family, "SEQ_CLS")
    late, _ = with_graphs(still(model), monkeypatch)
    late.upper = "packed"
    rows = cached(base, batch(), room=M)
    model(cached_hidden=rows).logits.sum().backward()
    # (What a graph itself does is launched by the graph.)
    monkeypatch.setattr(Imitation, "replay_forward", lambda self: None)
    with _NoHostLists():
        model(cached_hidden=rows)
    assert late.graphs.replayed == 2
