"""The layers below the insertion without padding, where texts come without a cache."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lpt_fast.backbone.families import find_backbone, get_layers
from lpt_fast.backbone.lower import run_lower
from lpt_fast.method import packed_lower
from lpt_fast.method.packed_rows import tokens_of
from lpt_fast.packed.blocks import BLOCKS
from tests.packed.cases import pair, still
from tests.tiny import CAUSAL, LAYERS, batch

FAMILIES = ["bert", "roberta", "xlm-roberta", "electra", "mpnet"]
FAMILIES += ["gpt2", "llama", "mistral", "qwen2", "qwen3"]
OWN_CODE = ["hook", "dropout", "class", "holder's hook", "holder's class"]
OWN_CODE += ["no mask", "little padding"]


def made(family, dtype=torch.float64, **config):
    """A LatePrompt in eval mode."""
    model = still(pair(family, "base", dtype, **config)[1]).eval()
    return find_backbone(model)[1].late_prompt


@pytest.fixture
def layers_run(monkeypatch):
    """How many layers the model's own code is asked for, call by call."""
    seen = []

    def run(backbone, family, k, inputs):
        seen.append(k)
        return run_lower(backbone, family, k, inputs)

    monkeypatch.setattr(packed_lower, "run_lower", run)
    return seen


def asked(family, inputs):
    more = {"use_cache": False} if family in CAUSAL else {}
    return {**inputs, **more, "return_dict": True}


def lower_states(late, k, inputs):
    return packed_lower.lower_states(late, k, inputs, *tokens_of(late, inputs))


def own_code(late, k, inputs):
    with torch.no_grad():
        return run_lower(late.backbone, late.family, k, inputs).last_hidden_state


def test_all_families_are_here():
    assert len(BLOCKS) == len(FAMILIES) == len({type(made(f).backbone) for f in FAMILIES})


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_model_s_own_code(family, side, layers_run):
    """To twelve digits, after any layer, zeros at padding; and only embeddings ran there."""
    late = made(family)
    inputs = asked(family, batch(side))
    mask = inputs["attention_mask"].bool()
    # (Rotary angles are in fp32, and of other columns behind padding; their differences count.)
    near = 1e-6 if late.family.takes_positions and side == "left" else 1e-12
    for k in range(1, LAYERS):
        got = lower_states(late, k, dict(inputs))
        expected = own_code(late, k, dict(inputs))
        torch.testing.assert_close(got[mask], expected[mask], atol=near, rtol=near)
        assert got.shape == expected.shape and not got[~mask].any() and not got.requires_grad
    assert layers_run == [0] * (LAYERS - 1)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_holes_positions_and_embeddings(family, layers_run):
    """Tokens in the middle of a text that nobody sees, positions and vectors of the caller's."""
    late = made(family)
    inputs = asked(family, batch())
    inputs["attention_mask"][:, 2] = 0
    count = inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.arange(count).flip(0).expand(5, count).contiguous()
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = late.backbone.get_input_embeddings()(ids).detach()
    mask = inputs["attention_mask"].bool()
    got, expected = lower_states(late, 2, dict(inputs)), own_code(late, 2, dict(inputs))
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-12, rtol=1e-12)
    assert layers_run == [0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "llama"])
def test_bf16_is_as_near_as_the_model_s_own(family, autocast):
    """At most twice as far from float64 as the model's own code in the same dtype."""
    late = made(family)
    inputs = asked(family, batch())
    mask = inputs["attention_mask"].bool()
    for module in late.backbone.modules():  # the oracle has the weights that bf16 has
        for p in module._parameters.values():
            if p is not None:
                p.data = p.data.bfloat16().double()
    expected = own_code(late, 3, dict(inputs))[mask]
    late.backbone.to(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = lower_states(late, 3, dict(inputs))[mask].double()
        plain = own_code(late, 3, dict(inputs))[mask].double()
    assert 0 < (got - expected).norm() <= 2 * (plain - expected).norm()


@pytest.mark.parametrize(
    "what",
    ["hook", "dropout", "class", "holder's hook", "holder's class", "no mask", "little padding"],
)
def test_layers_that_are_not_plain(what, layers_run):
    """A user's hook, active dropout (which the lower half never has), another class, of a layer or
    of what they hang in, texts with next to no padding: the model's own code.
    """
    late = made("bert")
    inputs = asked("bert", batch())
    lower_states(late, 2, dict(inputs))
    assert layers_run.pop() == 0
    if what == "no mask":
        del inputs["attention_mask"]
    elif what == "little padding":  # one place of 66, where 31 of 32 must be tokens
        inputs["input_ids"] = torch.arange(66).view(6, 11)
        inputs["attention_mask"] = torch.ones(6, 11).long()
        inputs["attention_mask"][3, -1] = 0
    expected = own_code(late, 2, dict(inputs))
    below = get_layers(late.backbone, late.family)[0]
    seen = []
    if what == "hook":
        below.attention.register_forward_hook(lambda *args: seen.append(1))
    elif what == "dropout":
        below.output.dropout.p = 0.5
        below.train()
    elif what == "holder's hook":
        late.backbone.encoder.register_forward_hook(lambda *args: seen.append(1))
    elif what == "holder's class":
        late.backbone.encoder.__class__ = type("Mine", (type(late.backbone.encoder),), {})
    elif what == "class":
        below.output.dense.__class__ = type("Mine", (torch.nn.Linear,), {})
    got = lower_states(late, 2, dict(inputs))
    assert layers_run == [2] and torch.equal(got, expected) and bool(seen) == ("hook" in what)


def test_padding_is_not_computed():
    """A text of 12 tokens among 31 of two: the layers' products are those of 74 rows, not 384."""
    late = made("bert", torch.float32)
    mask = torch.zeros(32, 12, dtype=torch.int64)
    mask[:, :2], mask[0] = 1, 1
    inputs = asked("bert", {"input_ids": torch.full((32, 12), 5), "attention_mask": mask})
    with FlopCounterMode(display=False) as counter:
        lower_states(late, 2, dict(inputs))
    per_row = 2 * 2 * (4 * 32 * 32 + 2 * 32 * 37)  # 2 layers; 4 projections and the feed-forward
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.aten.addmm] == per_row * (12 + 31 * 2)
