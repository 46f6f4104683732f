"""A row that attends to nothing: its own output means nothing but is finite, as with LoRA; the
others are what they are beside any other row.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lpt_fast.method.config import GENERATORS
from tests.method.cases import adapted, main_output
from tests.tiny import batch, tiny

EMPTY = 2


def with_an_empty_row(side="right"):
    """The same texts twice, the third of them without an attended token in the second."""
    whole, empty = batch(side), batch(side)
    empty["attention_mask"][EMPTY] = 0
    return whole, empty


@pytest.mark.parametrize("upper", ["packed", "padded"])
@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(
    ("family", "task", "side"),
    [("bert", "SEQ_CLS", "right"), ("bert", "TOKEN_CLS", "right"), ("gpt2", "CAUSAL_LM", "left")],
)
def test_others_are_what_they_are(family, task, side, generator, upper):
    _, model = adapted(family, task, task=task, generator=generator, upper=upper)
    whole, empty = with_an_empty_row(side)
    others = [0, 1, 3, 4]
    got, want = main_output(model(**empty)), main_output(model(**whole))
    assert got.isfinite().all()
    at = whole["attention_mask"].bool() if got.dim() == 3 else torch.ones(5, dtype=torch.bool)
    for row in others:
        torch.testing.assert_close(got[row][at[row]], want[row][at[row]], atol=1e-6, rtol=1e-5)
    # Gradients of what the others give do not see it.
    grads = []
    for out in (got, want):
        model.zero_grad()
        sum(out[row][at[row]].square().sum() for row in others).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(g.isfinite().all() for g in grads[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("upper", ["packed", "padded"])
def test_training_with_such_a_row(upper):
    _, model = adapted("bert", "SEQ_CLS", task="SEQ_CLS", upper=upper)
    _, empty = with_an_empty_row()
    loss = model.train()(**empty, labels=torch.tensor([0, 1, 0, 1, 1])).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    lora = get_peft_model(tiny("bert", "SEQ_CLS"), LoraConfig(task_type="SEQ_CLS")).eval()
    assert lora(**empty).logits.isfinite().all()  # what its users are used to


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("generator", ["static", "npg", "mppg"])
def test_generating_beside_such_a_row(generator, use_cache):
    _, model = adapted("llama", "CAUSAL_LM", task="CAUSAL_LM", generator=generator)
    whole, empty = with_an_empty_row("left")
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
    got, want = model.generate(**empty, **how), model.generate(**whole, **how)
    for row in (0, 1, 3, 4):
        assert got[row].tolist() == want[row].tolist()


def test_the_mask_of_the_caller_stays():
    _, model = adapted("bert", "SEQ_CLS", task="SEQ_CLS")
    _, empty = with_an_empty_row()
    before = empty["attention_mask"].clone()
    model(**empty)
    assert torch.equal(empty["attention_mask"], before)
    for kind in (torch.bool, torch.float32):  # as other tokenizers give masks
        mask = before.to(kind)
        assert torch.equal(
            model(input_ids=empty["input_ids"], attention_mask=mask).logits, model(**empty).logits
        )
