"""torch.export of models with a late prompt: batches and lengths of any size."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

from lpt_fast.insertion import exportable, reference
from lpt_fast.method.config import GENERATORS
from tests.interpreter.insert_rule import KINDS, make_weights
from tests.method.cases import adapted
from tests.tiny import batch


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def exported(model, strict=False):
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    how = {"dynamic_shapes": {"input_ids": free, "attention_mask": free}, "strict": strict}
    with torch.no_grad():
        return torch.export.export(Logits(model), (), batch("right"), **how).module()


OTHERS = (batch("left", lengths=(12, 3, 8), seed=4), batch("right", lengths=(7, 2), seed=5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "generator", "strict"),
    [
        *(("bert", generator, False) for generator in GENERATORS),
        *(("bert", generator, True) for generator in ("npg", "mppg")),
        *(
            (family, "appg", False)
            for family in ("roberta", "mpnet", "gpt2", "qwen3", "deberta-v2")
        ),
    ],
)
def test_batches_of_other_sizes(family, generator, strict):
    """What was traced with 5 texts padded on the right, of 3 padded on the left, and of 2."""
    _, model = adapted(family, "SEQ_CLS", task="SEQ_CLS", generator=generator)
    program = exported(model, strict)
    with torch.no_grad():
        for inputs in OTHERS:
            want = model(**inputs).logits
            torch.testing.assert_close(program(**inputs), want, atol=1e-5, rtol=1e-5)


def test_a_model_that_trains_is_refused():
    _, model = adapted("bert", "SEQ_CLS", task="SEQ_CLS", prompt_dropout=0.1)
    with pytest.raises(Exception, match=r"exported in training mode.*Call eval\(\) first"):
        exported(model.train())


@pytest.mark.parametrize("last_token", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_the_reference(kind, last_token):
    """Rows with padding on either side, holes, and as few tokens as one; padding holds NaN."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 0, 1],
                         [0, 0, 0, 0, 0, 0, 1]]).bool()  # fmt: skip
    m, D = 5, 8
    weights = make_weights(kind, D, 6, m, torch.float32, 0, "cpu")
    hidden = torch.randn(4, 7, D, generator=torch.Generator().manual_seed(1))
    with_nan = hidden.masked_fill(~mask[..., None], float("nan"))
    count = mask.sum(1)
    want = reference.make_prompts(
        hidden[mask], count.cumsum(0) - count, count, kind, weights, m, last_token=last_token
    )
    for rows in (hidden, with_nan):
        got = exportable.make_prompts(rows, mask, kind, weights, m, last_token)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    whole = exportable.make_prompts(hidden[:1], None, kind, weights, m, last_token)
    torch.testing.assert_close(whole, want[:1], atol=1e-6, rtol=1e-6)
