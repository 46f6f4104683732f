"""Every family: the split run against the unsplit model and against an independent forward."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from lpt_fast import LPTConfig
from lpt_fast.backbone.families import FAMILIES as TABLE
from lpt_fast.backbone.families import family_of, find_backbone
from lpt_fast.backbone.lower import run_lower
from lpt_fast.insertion.padded_layout import PromptLayout
from lpt_fast.method.config import GENERATORS
from tests.oracle import late_prompt_by_hand
from tests.tiny import CAUSAL, FAMILIES, LAYERS, attentions, batch, tiny

CASES = [(f, a) for f in FAMILIES for a in attentions(f)]
M = 3


def adapted(family, attention=None, **config):
    """The base model untouched, and an adapted copy of it with its generator and backbone."""
    base = tiny(family, attention=attention)
    torch.manual_seed(7)
    settings = {"bottleneck_size": 16, "num_virtual_tokens": M, "prompt_dropout": 0.0, **config}
    model = get_peft_model(copy.deepcopy(base), LPTConfig(**settings))
    generator = find_backbone(model.get_base_model())[1].late_prompt.lpt_generator["default"]
    return base, model, generator


def split_output(model, inputs):
    return find_backbone(model.get_base_model())[1](**inputs).last_hidden_state


def compare_with_oracle(family, attention, side, k, kind, m=M):
    base, model, generator = adapted(
        family, attention, insertion_layer=k, generator=kind, num_virtual_tokens=m
    )
    inputs = batch(side)
    attended = inputs["attention_mask"].bool()
    backbone = find_backbone(base)[1]
    weights = {n: p.detach().clone().requires_grad_() for n, p in generator.named_parameters()}
    readable = attended if family in CAUSAL else None
    expected = late_prompt_by_hand(backbone, k, kind, weights, m, inputs, readable)
    got = split_output(model, inputs)
    torch.testing.assert_close(got[attended], expected[attended], atol=1e-5, rtol=1e-5)
    pull = torch.randn_like(expected) * attended[..., None]
    (expected * pull).sum().backward()
    (got * pull).sum().backward()
    for name, p in generator.named_parameters():
        # (A narrow bottleneck can be dead at the start: then both gradients are exactly zero.)
        expected_grad = weights[name].grad
        assert (p.grad - expected_grad).norm() <= 1e-5 * expected_grad.norm(), name
    # The prompt must matter, or the comparison says nothing.
    plain = backbone(**inputs).last_hidden_state
    assert (plain - expected)[attended].abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_equals_independent_forward(family, attention, side):
    compare_with_oracle(family, attention, side, k=2, kind="npg")


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_and_last_insertion_layer(family, k):
    compare_with_oracle(family, None, "right", k=k, kind="appg")


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 3, 5, 20])
@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("family", ["roberta", "mpnet", "gpt2"])
def test_every_generator(family, kind, side, m):
    compare_with_oracle(family, None, side, k=2, kind=kind, m=m)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_invisible_prompt_leaves_the_model_unchanged(family, attention, side, k, monkeypatch):
    base, model, _ = adapted(family, attention, insertion_layer=k)

    def hide(self, mask):
        return self.insert(mask.new_zeros(len(mask), self.m), mask)

    monkeypatch.setattr(PromptLayout, "extend_mask", hide)
    find_backbone(model)[1].late_prompt.upper = "padded"
    inputs = batch(side)
    attended = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = find_backbone(base)[1](**inputs).last_hidden_state
        got = split_output(model, inputs)
    torch.testing.assert_close(got[attended], expected[attended], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_matter(family):
    """The same texts alone, padded right and padded left, with more padding: the same states."""
    _, model, _ = adapted(family, insertion_layer=2, generator="mppg")
    right, left = batch("right"), batch("left")
    length = right["attention_mask"].sum(1)
    for row, n in enumerate(length):
        ids = right["input_ids"][row : row + 1, :n]
        left["input_ids"][row, -n:] = ids[0]
        alone = split_output(model, {"input_ids": ids})[0]
        inside = split_output(model, right)[row, :n]
        torch.testing.assert_close(inside, alone, atol=1e-5, rtol=1e-5)
    if family not in ("gpt2", "bert", "roberta", "xlm-roberta", "electra", "mpnet"):
        # Absolute positions count padding on the left, in the base model already, unless
        # position_ids are given.
        for row, n in enumerate(length):
            a = split_output(model, left)[row, -n:]
            b = split_output(model, right)[row, :n]
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL)
def test_explicit_position_ids_left_padded(family):
    """As generate() gives them: text from 0. Equals the right-padded batch without them."""
    _, model, _ = adapted(family, insertion_layer=2)
    right, left = batch("right"), batch("left")
    length = right["attention_mask"].sum(1)
    for row, n in enumerate(length):
        left["input_ids"][row, -n:] = right["input_ids"][row, :n]
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    a, b = split_output(model, left), split_output(model, right)
    right["position_ids"] = (right["attention_mask"].cumsum(1) - 1).clamp(min=0)
    again = split_output(model, right)
    for row, n in enumerate(length):
        torch.testing.assert_close(a[row, -n:], b[row, :n], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again[row, :n], b[row, :n], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attentions(family):
    base, model, _ = adapted(family, attention="eager", insertion_layer=2)
    inputs = batch()
    backbone = find_backbone(model.get_base_model())[1]
    with torch.no_grad():
        plain = find_backbone(base)[1](**inputs, output_hidden_states=True)
        out = backbone(**inputs, output_hidden_states=True, output_attentions=True)
        again = backbone(**inputs, output_hidden_states=True)
        with model.disable_adapter():
            off = backbone(**inputs, output_hidden_states=True)
    assert (
        len(out.hidden_states) == len(again.hidden_states) == len(plain.hidden_states) == LAYERS + 1
    )
    assert len(off.hidden_states) == LAYERS + 1  # capture hooks were put on once
    for state in out.hidden_states:
        assert state.shape[:2] == inputs["input_ids"].shape
    for i in range(2):
        torch.testing.assert_close(out.hidden_states[i], plain.hidden_states[i])
    torch.testing.assert_close(out.hidden_states[-1], out.last_hidden_state)
    widths = [a.shape[-1] for a in out.attentions]
    assert widths == [9, 9, 9 + M, 9 + M]
    as_tuple = backbone(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)
    tokens = inputs["attention_mask"].bool()
    torch.testing.assert_close(as_tuple[0][tokens], out.last_hidden_state[tokens])


def test_lower_half_is_frozen_whatever_the_mode():
    """By itself too, as a cache would run it: no dropout, no graph, the model's own states."""
    base = tiny("bert", hidden_dropout_prob=0.5)
    inputs = batch()
    expected = base(**inputs, output_hidden_states=True).hidden_states[2]
    base.train()
    base.enable_input_require_grads()
    out = run_lower(base, TABLE["BertModel"], 2, inputs).last_hidden_state
    assert not out.requires_grad
    torch.testing.assert_close(out, expected)


def test_unknown_family_lists_the_known_ones():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"does not know the model Strange.*BERT.*ModernBERT.*T5"):
        get_peft_model(Strange(), LPTConfig())


def test_table_is_complete():
    """Each tiny model finds its own line; no line is untested."""
    found = {find_backbone(tiny(f))[2].name for f in FAMILIES}
    assert found == {f.name for f in TABLE.values()}
    assert family_of(nn.Linear(2, 2)) is None


def test_encoder_as_decoder_is_refused():
    with pytest.raises(ValueError, match="is_decoder=False"):
        get_peft_model(tiny("bert", is_decoder=True), LPTConfig())
