"""Late LoRA in the packed stack: the numbers of the padded way, from text, cache and held rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lpt_fast import ActivationCache
from lpt_fast.backbone.families import find_backbone, get_layers
from lpt_fast.backbone.low_rank import LowRank
from lpt_fast.packed import attention as packed_attention
from lpt_fast.packed.block import Block
from lpt_fast.packed.blocks import BLOCKS
from lpt_fast.train.projections import Projections
from tests.method.cases import M, cached
from tests.packed.cases import assert_same, labels_for, outcome, pair, still, way, with_graphs
from tests.packed.test_packed import DECODERS, ENCODERS
from tests.tiny import LAYERS, batch

PACKED = [*ENCODERS, *DECODERS]
ALONE = {"generator": "none"}
ALL = {"lora_target_modules": "all-linear"}
# Queries and values, by whatever name (GPT-2: with the keys).
SOME = {"lora_target_modules": r".*\.(query|q|q_proj|value|v|v_proj|c_attn)"}


def adapted(family, head="SEQ_CLS", dtype=torch.float32, **config):
    """As of `pair`, with late LoRA, without dropout but the one that is asked for."""
    base, model = pair(family, head, dtype, **{"lora_r": 2, **config})
    drop = config.get("lora_dropout", 0.0)
    still(model)
    for module in model.modules():
        if isinstance(module, LowRank):
            module.lora_dropout.p = drop
            with torch.no_grad():  # moved as by training, and not as far as the frozen weights are
                for p in module.parameters():
                    p.mul_(0.3)
    return base, model


def updated(grads) -> list[str]:
    return [name for name, grad in grads.items() if ".lpt_lora." in name and grad.norm() > 0]


@pytest.mark.slow
@pytest.mark.parametrize("targets", [SOME, ALL], ids=["some", "all-linear"])
@pytest.mark.parametrize("prompt", [{}, ALONE], ids=["npg", "alone"])
@pytest.mark.parametrize("k", [1, LAYERS - 1])
@pytest.mark.parametrize("family", PACKED)
def test_equals_the_padded_way(family, k, prompt, targets):
    m = 0 if prompt else M
    for head in ("SEQ_CLS", "TOKEN_CLS"):
        base, model = adapted(family, head, k=k, **prompt, **targets)
        inputs = batch()
        labels = labels_for(head, inputs)
        at = None if head == "SEQ_CLS" else inputs["attention_mask"].bool()
        expected = outcome(model, "padded", at, **inputs, **labels)
        names = find_backbone(model)[1].late_prompt.lpt_lora["default"].names
        assert len(updated(expected[2])) == 2 * len(names) > 0  # each A and each B learns
        assert_same(outcome(model, "packed", at, **inputs, **labels), expected)
        for room in (0, m):
            rows = cached(base, inputs, k=k, room=room)
            got = outcome(model, "packed", at, cached_hidden=rows, **labels)
            assert_same(got, expected)
            assert_same(outcome(model, "padded", at, cached_hidden=rows, **labels), expected)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["products", "sdpa"])
@pytest.mark.parametrize("family", PACKED)
def test_double_precision(family, attention, monkeypatch):
    if attention == "sdpa":
        monkeypatch.setattr(packed_attention, "PRODUCTS_UP_TO", 0)
    for k in (1, 2, LAYERS - 1):
        for more in ({"generator": "mppg"}, ALONE):
            _, model = adapted(family, dtype=torch.float64, k=k, **more, **ALL)
            inputs = batch(lengths=(9, 1, 8, 9, 2, 3))
            call = {**inputs, **labels_for("SEQ_CLS", inputs)}
            expected = outcome(model, "padded", **call)
            assert_same(outcome(model, "packed", **call), expected, 1e-12)


@pytest.mark.parametrize("target", ["q", "k", "v"])
@pytest.mark.parametrize("family", ["roberta", "qwen3"])
def test_each_projection_alone(family, target):
    """What the last layer makes of queries, keys and values, and where the first one's backward may
    stop, depends on which of them learn.
    """
    names = {"q": "query", "k": "key", "v": "value"} if family == "roberta" else {}
    target = names.get(target, f"{target}_proj")
    for k in (1, LAYERS - 1):
        for more in ({}, ALONE):
            _, model = adapted(family, k=k, lora_target_modules=[target], **more)
            inputs = batch()
            call = {**inputs, **labels_for("SEQ_CLS", inputs)}
            expected = outcome(model, "padded", **call)
            assert updated(expected[2])
            assert_same(outcome(model, "packed", **call), expected)


class Sieve(nn.Dropout):
    """Dropout that drops the same features of every row, so that two ways can be compared."""

    def forward(self, x):
        keep = torch.arange(x.shape[-1]) % 3 != 0
        return x * keep.to(x.dtype) * 1.5 if self.training else x


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "llama", "qwen3"])
def test_dropout_of_the_updates(family):
    for k in (1, LAYERS - 1):
        for more in ({}, ALONE):
            _, model = adapted(family, k=k, lora_dropout=0.3, **more, **ALL)
            inputs = batch()
            call = {**inputs, **labels_for("SEQ_CLS", inputs)}
            torch.manual_seed(0)
            first, second = (outcome(model, "packed", **call) for _ in range(2))
            assert not torch.equal(first[0], second[0])  # other rows are dropped each time
            for module in model.modules():
                if isinstance(module, LowRank):
                    module.lora_dropout = Sieve(0.3)
            model.train()
            expected = outcome(model, "padded", **call)
            assert not torch.allclose(expected[0], first[0], atol=1e-4)
            assert_same(outcome(model, "packed", **call), expected)
            model.eval()
            expected = outcome(model, "padded", **call)
            assert_same(outcome(model, "packed", **call), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen3"])
def test_half_precision(family):
    """bf16, and autocast: no farther from fp32 than twice the padded way."""
    inputs = batch()
    call = {**inputs, **labels_for("SEQ_CLS", inputs)}
    truth = outcome(adapted(family, **ALL)[1], "padded", **call)
    cases = (
        (adapted(family, dtype=torch.bfloat16, **ALL)[1], None),
        (adapted(family, **ALL)[1], torch.bfloat16),
    )
    for model, autocast in cases:
        errors = {}
        for upper in ("padded", "packed"):
            got = outcome(model, upper, autocast=autocast, **call)
            grads = [
                torch.cat([r[2][n].double().flatten() for n in truth[2]]) for r in (got, truth)
            ]
            pairs = [(got[0], truth[0]), grads]
            errors[upper] = torch.tensor([float((a.double() - b).norm()) for a, b in pairs])
            sizes = torch.tensor([float(b.norm()) for _, b in pairs])
        assert (errors["packed"] <= 2 * errors["padded"] + sizes * 2**-8).all(), errors
        assert errors["packed"].min() > 0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("prompt", [{}, ALONE], ids=["npg", "alone"])
def test_held_projections(family, prompt, tmp_path):
    """The frozen part of what layer k+1 projects text rows to is held; updates are added to it."""
    texts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16, 17, 18]]
    model = adapted(family, k=1, **prompt, **ALL)[1]
    late = find_backbone(model)[1].late_prompt
    late.upper = "packed"
    cache = ActivationCache.open(tmp_path, model, store="fp32")
    numbers = cache.ensure(model, [{"input_ids": t} for t in texts])
    keys = cache.table.key[numbers]
    m = late.active_config.num_virtual_tokens
    rows = cache.read(keys, room=m)
    holding = replace(rows, held=Projections(late, cache, keys).of(keys))
    labels = {"labels": torch.tensor([0, 1, 1, 0])}
    expected = outcome(model, "padded", cached_hidden=cache.read(keys, room=m), **labels)
    for batch_ in (rows, holding, holding):
        assert_same(outcome(model, "packed", cached_hidden=batch_, **labels), expected)
    # They are those of this kind of adapter: another one, whose products are not changed, computes.
    seen = []
    run = Block.project_first

    def looking(block, x, plan, held):
        seen.append(held is not None)
        return run(block, x, plan, held)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "project_first", looking)
        outcome(model, "packed", cached_hidden=holding, **labels)
        late.lpt_lora["default"].names = []
        plain = outcome(model, "packed", cached_hidden=holding, **labels)
    assert seen == [True, False]
    expected = outcome(model, "padded", cached_hidden=cache.read(keys, room=m), **labels)
    torch.testing.assert_close(plain[0], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
@pytest.mark.parametrize("prompt", [{}, ALONE], ids=["npg", "alone"])
def test_cuda_graphs_imitated(family, prompt, monkeypatch):
    base, model = adapted(family, **prompt, **ALL)
    inputs = batch(lengths=(9, 4, 7, 1, 3))
    labels = labels_for("SEQ_CLS", inputs)
    rows = cached(base, inputs, room=0 if prompt else M)
    expected = outcome(model, "packed", cached_hidden=rows, **labels)
    late, _ = with_graphs(model, monkeypatch)
    for _ in range(2):
        assert_same(outcome(model, "packed", cached_hidden=rows, **labels), expected)
    assert late.graphs.replayed == 2
    # An update that is another object now is not the one that the graph holds fast.
    with torch.no_grad():
        for update in late.lpt_lora["default"].modules():
            if isinstance(update, LowRank):
                update.lora_B = nn.Linear(2, update.lora_B.out_features, bias=False)
    late.graphs, graphs = None, late.graphs
    expected = outcome(model, "packed", cached_hidden=rows, **labels)
    late.graphs = graphs
    assert_same(outcome(model, "packed", cached_hidden=rows, **labels), expected)


@pytest.mark.parametrize("changed", [0, 1, 4])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_texts_do_not_meet(family, changed):
    """Bit-equal logits of the others when one text changes; NaN stays where it is."""
    base, model = adapted(family, **ALL)
    model.eval()
    late = find_backbone(model)[1].late_prompt
    late.upper = "packed"
    rows = cached(base, batch(), room=M)
    with torch.no_grad():
        before = model(cached_hidden=rows).logits
        text = slice(int(rows.cu_seqlens[changed]), int(rows.cu_seqlens[changed + 1]))
        hidden = rows.hidden.clone()
        hidden[text.start + (changed + 1) * M : text.stop + (changed + 1) * M] = float("nan")
        after = model(cached_hidden=replace(rows, hidden=hidden)).logits
    others = [i for i in range(5) if i != changed]
    assert torch.equal(before[others], after[others]) and after[changed].isnan().all()


@pytest.mark.parametrize("family", PACKED)
def test_every_linear_layer_has_a_role(family):
    """An update that a block did not know would be left out in silence."""
    _, model = adapted(family, k=1, **ALL)
    backbone = find_backbone(model)[1]
    names = {name for _, name in backbone.late_prompt.lpt_lora["default"].names}
    block = BLOCKS[type(backbone).__name__]
    assert names == set(block.names.values())
    made = block(get_layers(backbone, find_backbone(model)[2])[1])
    assert all(isinstance(getattr(made, role), nn.Module) for role in block.names)


def test_the_packed_way_is_taken(caplog):
    _, model = adapted("bert", **ALL)
    assert "packed" in way(model, caplog, **batch())
