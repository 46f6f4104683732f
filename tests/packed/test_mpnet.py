"""MPNet's attention by distance, packed: which rows stand where, and when it cannot run so."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from lpt_fast.backbone.families import find_backbone
from lpt_fast.cache.identity import cut, identity_of
from lpt_fast.packed import attention as packed_attention
from tests.adapters import lpt
from tests.method.cases import M, cached
from tests.packed.cases import assert_same, labels_for, outcome, pair, still, way
from tests.tiny import batch, tiny


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_distance_counts(head, side):
    """The bias moves what comes out, prompt rows stand as m tokens before the text, and a text that
    is padded on the left has the same distances.
    """
    if (head, side) == ("SEQ_CLS", "left"):
        pytest.skip("the head reads the first column")
    model = still(pair("mpnet", head)[1])
    inputs = batch(side)
    at = None if head == "SEQ_CLS" else inputs["attention_mask"].bool()
    expected = outcome(model, "padded", at, **inputs)
    assert_same(outcome(model, "packed", at, **inputs), expected)
    backbone = find_backbone(model)[1]
    with torch.no_grad():
        backbone.encoder.relative_attention_bias.weight.mul_(-3)
    moved = outcome(model, "padded", at, **inputs)
    assert not torch.allclose(moved[0], expected[0], atol=1e-2)
    assert_same(outcome(model, "packed", at, **inputs), moved)


def test_by_hand():
    """One head of one text: softmax(q k / sqrt d + b[j - i]) v, b looked up by distance."""
    from lpt_fast.packed.attention import attend
    from lpt_fast.packed.plan import Plan

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 7, 4, dtype=torch.float64)
    plan = Plan(torch.tensor([0, 2, 5], dtype=torch.int32), 3, 1, 7)
    by_distance = torch.randn(9, dtype=torch.float64)
    place = torch.arange(4)
    bias = by_distance[place[None, :] - place[:, None] + 4][None]
    how = {"heads": 1, "kv_heads": 1, "scale": 0.5, "causal": False, "bias": bias}
    wanted = torch.cat(
        [
            torch.softmax(q[own] @ k[own].T * 0.5 + bias[0, : len(own), : len(own)], -1) @ v[own]
            for own in (torch.arange(3), torch.arange(3, 7))
        ]
    )
    torch.testing.assert_close(attend(q, k, v, plan, **how), wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "PRODUCTS_UP_TO", 0)
        torch.testing.assert_close(attend(q, k, v, plan, **how), wanted)


def test_a_mask_with_gaps_runs_padded(caplog):
    """Distances are those of columns: packed rows would stand closer."""
    model = still(pair("mpnet", "SEQ_CLS")[1])
    inputs = batch("none")
    inputs["attention_mask"][1, 3:5] = 0
    assert "gaps" in way(model, caplog, **inputs)
    with pytest.MonkeyPatch.context() as patch:
        expected = outcome(model, "padded", **inputs)
        assert_same(outcome(model, "auto", **inputs), expected)
        from lpt_fast.method import packed_call

        patch.setattr(
            packed_call, "_has_gap", lambda mask: torch.zeros(len(mask), dtype=torch.bool)
        )
        closer = outcome(model, "auto", **inputs)
    assert not torch.allclose(closer[0], expected[0], atol=1e-4)
    # Another family counts no columns above the insertion.
    assert "packed" in way(still(pair("bert", "SEQ_CLS")[1]), caplog, **inputs)


def test_a_bias_that_trains_runs_padded(caplog):
    model = still(pair("mpnet", "SEQ_CLS")[1])
    find_backbone(model)[1].encoder.relative_attention_bias.requires_grad_(True)
    assert "Embedding above the insertion trains" in way(model, caplog, **batch())


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mpnet", "relative_attention_bias"),
        ("deberta", "rel_embeddings"),
        ("deberta-v2", "rel_embeddings"),
    ],
)
def test_what_all_layers_share_lies_below_the_cut(family, name):
    """It moves what the layers below give, so it cannot train, and a cache is bound to it."""
    base = tiny(family, "SEQ_CLS")
    before = identity_of(cut(base, 2)).digest
    with torch.no_grad():
        getattr(find_backbone(base)[1].encoder, name).weight.mul_(1.5)
    assert identity_of(cut(base, 2)).digest != before
    with pytest.raises(ValueError, match=rf"`modules_to_save` names '{name}'.*nothing trains"):
        get_peft_model(base, lpt(task_type="SEQ_CLS", modules_to_save=[name]))


@pytest.mark.parametrize("k", [1, 3])
def test_texts_do_not_meet(k):
    base, model = pair("mpnet", "SEQ_CLS", k=k)
    still(model).eval()
    find_backbone(model)[1].late_prompt.upper = "packed"
    rows = cached(base, batch(), k=k, room=M)
    with torch.no_grad():
        before = model(cached_hidden=rows).logits
        first = int(rows.cu_seqlens[2]) + 3 * M
        rows.hidden[first : int(rows.cu_seqlens[3]) + 3 * M] = float("nan")
        after = model(cached_hidden=rows).logits
    others = [0, 1, 3, 4]
    assert torch.equal(before[others], after[others]) and after[2].isnan().all()


def test_half_precision():
    inputs = batch()
    call = {**inputs, **labels_for("SEQ_CLS", inputs)}
    truth = outcome(still(pair("mpnet", "SEQ_CLS")[1]), "padded", **call)[0]
    model = still(pair("mpnet", "SEQ_CLS", torch.bfloat16)[1])
    error = {w: (outcome(model, w, **call)[0].float() - truth).norm() for w in ("padded", "packed")}
    assert 0 < error["packed"] <= 2 * error["padded"] + 2**-8 * truth.norm()
