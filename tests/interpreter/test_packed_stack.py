"""The packed stack with the kernels: prompts filled in place, fused norms and activations; on a GPU
also PyTorch's variable-length attention.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")
from peft import get_peft_model

from lpt_fast.backbone.families import find_backbone
from tests.adapters import lpt, stir
from tests.tiny import batch, tiny

M = 3
CASES = [
    *(("bert", "npg"), ("mpnet", "appg")),
    *(("gpt2", "mppg"), ("llama", "appg"), ("qwen3", "static")),
]


def made(family, generator, k, head, device, dtype=torch.float32, **more):
    more_of_config = {"hidden_dropout_prob": 0.0} if family in ("bert", "mpnet") else {}
    base = tiny(family, head, **more_of_config)
    config = lpt(
        task_type=head,
        insertion_layer=k,
        generator=generator,
        num_virtual_tokens=M,
        prompt_dropout=0.0,
        **more,
    )
    model = get_peft_model(base.to(dtype), config)
    stir(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lpt_lora." in name:  # updates are smaller than what they update
                p.mul_(0.3)
    return model.eval().to(device)


def outcome(model, upper, inputs):
    late = find_backbone(model)[1].late_prompt
    late.upper = upper
    model.zero_grad()
    logits = model(**inputs).logits
    if logits.dim() == 3:
        logits = logits[inputs["attention_mask"].bool()]
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits)
    (logits * pull).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


@pytest.mark.parametrize("head", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("family", "generator"), CASES)
def test_equals_the_padded_way(family, generator, k, head, device):
    assert_equal_ways(made(family, generator, k, head, device), device)


@pytest.mark.parametrize("generator", ["npg", "none"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("family", [family for family, _ in CASES])
def test_late_lora(family, k, generator, device):
    """Updates of all linear layers, beside the kernels of the frozen ones."""
    more = {"lora_r": 2, "lora_target_modules": "all-linear"}
    assert_equal_ways(made(family, generator, k, "SEQ_CLS", device, **more), device)


def assert_equal_ways(model, device):
    inputs = {name: value.to(device) for name, value in batch().items()}
    expected, got = outcome(model, "padded", inputs), outcome(model, "packed", inputs)
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    assert got[1].keys() == expected[1].keys() and got[1]
    largest = max(grad.norm() for grad in expected[1].values())
    for name, grad in expected[1].items():
        assert (got[1][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7 * largest, name


def test_the_kernels_ran(device, monkeypatch):
    """In the interpreter and on a GPU the fused operations are the ones in use."""
    from lpt_kernels import frozen

    seen = set()
    for name in ("layer_norm", "activate", "rms_norm", "gated"):
        own = getattr(frozen, name)

        def watched(*args, own=own, name=name, **kwargs):
            seen.add(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(frozen, name, watched)
    inputs = {name: value.to(device) for name, value in batch().items()}
    for family in ("bert", "llama"):
        outcome(made(family, "npg", 2, "SEQ_CLS", device), "packed", inputs)
    assert seen == {"layer_norm", "activate", "rms_norm", "gated"}


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "llama"])
def test_half_precision(family, device):
    """bf16: no farther from fp32 than twice the padded way in bf16."""
    inputs = {name: value.to(device) for name, value in batch().items()}
    truth = outcome(made(family, "npg", 2, "SEQ_CLS", device), "padded", inputs)
    errors = {}
    for upper in ("padded", "packed"):
        model = made(family, "npg", 2, "SEQ_CLS", device, torch.bfloat16)
        got = outcome(model, upper, inputs)
        errors[upper] = float((got[0].double() - truth[0].double()).norm())
    assert 0 < errors["packed"] <= 2 * errors["padded"] + float(truth[0].norm()) * 2**-8
