"""What the tests of cached calls share: what layer k gives alone, models with an adapter, runs."""

from __future__ import annotations

import copy

import torch
from peft import get_peft_model

from lpt_fast.backbone.families import find_backbone
from lpt_fast.packing import PackedBatch
from tests.adapters import lpt, stir
from tests.oracle import layer_list
from tests.tiny import batch, tiny, with_room

M = 3
ENDS = 1  # T5's end token


def states_alone(base, ids, k, **more):
    """What goes into layer k + 1 of an unadapted model for one text, [n, D]."""
    backbone, seen = find_backbone(base)[1], {}

    def look(module, args, kwargs):
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]

    handle = layer_list(backbone)[k].register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        backbone(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **more)
    handle.remove()
    return seen["hidden"][0]


def cached(base, inputs, k=2, room=0, ids=True, positions=None):
    """The batch of hidden states for right-padded inputs; its free rows hold NaN."""
    lengths = inputs["attention_mask"].sum(1)
    texts = [t[:n] for t, n in zip(inputs["input_ids"], lengths, strict=True)]
    more = [{} for _ in texts]
    if positions is not None:
        positions = [p[:n] for p, n in zip(positions, lengths, strict=True)]
        more = [{"position_ids": p[None]} for p in positions]
    hidden = [states_alone(base, t, k, **m) for t, m in zip(texts, more, strict=True)]
    packed = PackedBatch(
        torch.cat(hidden),
        torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        int(lengths.max()),
        input_ids=torch.cat(texts) if ids else None,
        position_ids=None if positions is None else torch.cat(positions),
    )
    return with_room(packed, room) if room else packed


def adapted(family, kind="base", k=2, task=None, base=None, **config):
    """The base model untouched, and an adapted copy of it that was moved as by training."""
    base = tiny(family, kind) if base is None else base
    torch.manual_seed(7)
    settings = {"insertion_layer": k, "num_virtual_tokens": M, "prompt_dropout": 0.0, **config}
    model = get_peft_model(copy.deepcopy(base), lpt(task_type=task, **settings)).eval()
    stir(model)
    return base, model


def text_batch(family="bert"):
    inputs = batch()
    if family == "t5":
        last = inputs["attention_mask"].sum(1) - 1
        inputs["input_ids"][torch.arange(5), last] = ENDS
    return inputs


def main_output(out):
    """Logits or states of a model's output, the first tensor that is not the loss."""
    names = ("logits", "start_logits", "last_hidden_state")
    return next(out[name] for name in names if out.get(name) is not None)


def run(model, at=None, **call):
    """Output at the tokens, loss, and the gradients of everything that trains."""
    model.zero_grad()
    out = model(**call)
    value = main_output(out)
    value = value if at is None else value[at]
    pull = torch.randn(value.shape, generator=torch.Generator().manual_seed(4))
    loss = out.get("loss")
    ((value * pull).sum() if loss is None else loss).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return value.detach(), None if loss is None else loss.detach(), grads


def assert_equal_runs(got, expected):
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    if expected[1] is not None:
        torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-5)
    assert got[2].keys() == expected[2].keys() and got[2]
    for name, grad in expected[2].items():
        # (Gradients that are zero in exact arithmetic are nothing but rounding.)
        assert (got[2][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name
    assert sum(grad.norm() for grad in expected[2].values()) > 1e-3
