"""Stands for CUDA graphs where there is no GPU: their memory, without their speed."""

from __future__ import annotations

import logging

import torch

from lpt_fast.backbone.families import find_backbone
from lpt_fast.packed.graph_passes import Passes
from lpt_fast.packed.graphs import UpperGraphs
from tests.method.cases import adapted
from tests.tiny import tiny


class Imitation(Passes):
    """Passes whose output and gradients lie in memory that every replay writes over, as those of a
    CUDA graph do, and what lies between in memory that all graphs share.
    """

    last = None  # whose forward has written to the shared memory

    def __init__(self, module, inputs, parameters):
        super().__init__(module, inputs, parameters)
        out = self.run_forward()
        self.grad = torch.zeros_like(out)
        self.flat = self.run_backward(out)
        self.out = out.detach()

    def replay_forward(self):
        self._fresh = self.run_forward()
        Imitation.last = self
        self.flat.fill_(float("nan"))
        self.out.copy_(self._fresh.detach())

    def replay_backward(self):
        assert Imitation.last is self, "another graph has written over what this one kept"
        self.out.fill_(float("nan"))
        self.flat.copy_(self.run_backward(self._fresh))
        self._fresh = None


def with_graphs(model, monkeypatch, step=16, size_step=64, worth=0):
    """The model's LatePrompt with imitated graphs, and a list that gets what each was made of."""
    from lpt_fast.packed import graphs

    for name, value in (("STEP", step), ("SIZE_STEP", size_step), ("WORTH", worth)):
        monkeypatch.setattr(graphs, name, value)
    seen = []

    def capture(module, inputs, parameters):
        seen.append([None if x is None else tuple(x.shape) for x in inputs])
        return Imitation(module, inputs, parameters)

    late = find_backbone(model)[1].late_prompt
    late.graphs = UpperGraphs(late, capture)
    return late, seen


# Windows as long as the texts of the tests: shorter ones are a test of their own.
WIDE = {"mistral": {"sliding_window": 64}, "qwen2": {"sliding_window": 64}}
HEADS = ["base", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"]
TASK = {"base": None, "MASKED_LM": None}


def pair(family, head, dtype=torch.float32, **config):
    """An unadapted model and an adapted one, in training mode with dropout off."""
    base = tiny(family, head, **WIDE.get(family, {})).to(dtype)
    torch.manual_seed(11)
    with torch.no_grad():
        for p in base.parameters():
            if p.dim() == 1:  # biases start at zero, norms at one
                p.add_(torch.randn_like(p) * 0.2)
    base, model = adapted(family, head, task=TASK.get(head, head), base=base, **config)
    if dtype == torch.float64:
        model.double()
    return base, model.train()


def still(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def labels_for(head, inputs, seed=3):
    own = torch.Generator().manual_seed(seed)
    mask = inputs["attention_mask"]
    if head == "SEQ_CLS":
        return {"labels": torch.randint(0, 2, (len(mask),), generator=own)}
    if head == "QUESTION_ANS":
        at = (mask * torch.arange(mask.shape[1])).argmax(1)
        return {"start_positions": mask.argmax(1), "end_positions": at}
    if head in ("TOKEN_CLS", "MASKED_LM", "CAUSAL_LM"):
        top = 2 if head == "TOKEN_CLS" else 99
        labels = torch.randint(0, top, mask.shape, generator=own).masked_fill(mask == 0, -100)
        if head == "CAUSAL_LM":
            labels[torch.arange(len(mask)), mask.argmax(1)] = -100
        return {"labels": labels}
    return {}


def outcome(model, upper, at=None, autocast=None, **call):
    """Logits (or states) at the tokens, loss, and gradients of what trains."""
    find_backbone(model)[1].late_prompt.upper = upper
    model.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = model(**call)  # backward runs outside, as in the Trainer
    names = ("logits", "start_logits", "last_hidden_state")
    value = next(out[name] for name in names if out.get(name) is not None)
    value = value if at is None else value[at]
    pull = torch.randn(value.shape, generator=torch.Generator().manual_seed(4)).to(value.dtype)
    loss = (value * pull).sum()
    own = out.get("loss")
    # The loss of question answering looks at padding, which the two ways fill as they like.
    if own is not None and "start_logits" not in out:
        loss = loss + own
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return value.detach(), own, grads


def assert_same(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got[0], expected[0], atol=tolerance, rtol=tolerance)
    assert got[2].keys() == expected[2].keys() and got[2]
    largest = max(grad.norm() for grad in expected[2].values())
    for name, grad in expected[2].items():
        # (Gradients that are zero in exact arithmetic are nothing but rounding.)
        assert (got[2][name] - grad).norm() <= tolerance * grad.norm() + 1e-7 * largest, name
    assert largest > 1e-3


def way(model, caplog, **call):
    """What a call says of how it ran."""
    caplog.clear()
    find_backbone(model)[1].late_prompt._said.clear()
    with caplog.at_level(logging.INFO, logger="lpt_fast"):
        model(**call)
    (message,) = said(caplog)
    return message


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("lpt_fast")]
