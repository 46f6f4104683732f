"""`adapter_names` on a GPU: `pytest -m gpu tests/method/test_mixed_gpu.py`.

Values and gradients of a mixed call in fp32 and bf16 are at most twice as far from float64 (on the
CPU, which test_mixed.py holds against each adapter alone) as those of each adapter alone are.
"""

from __future__ import annotations

import pytest
import torch

from tests.method.cases import cached
from tests.method.test_mixed import BASE, MIXES, OTHERS, alone, late_of, several, value_of
from tests.packed.cases import pair
from tests.tiny import batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16, FP32 = torch.bfloat16, torch.float32
# (Of a narrow bottleneck one unit is left after the ReLU, whose gradient is a sum that may cancel:
# in bf16 nothing can be said of it.)
WIDE = {"bottleneck_size": 24}
SEEDS = range(1, 5)  # of batches
FAMILIES = ["bert", "roberta", "mpnet", "gpt2", "llama", "qwen3"]


def pulled(logits, wide: int):
    """A number that depends on all logits of a row, however many there are."""
    pull = torch.linspace(-1, 1, wide, dtype=torch.float64, device=logits.device)
    found = torch.isfinite(logits)
    return (logits.double().masked_fill(~found, 0) * pull[: logits.shape[-1]]).sum()


def mixed(model, names, given, autocast=None):
    """Logits [B, C] and gradients of all that trains, in float64 on the CPU."""
    model.zero_grad()
    device = next(model.parameters()).device.type
    with torch.autocast(device, autocast, enabled=autocast is not None):
        logits = value_of(model(**given, adapter_names=names))
    pulled(logits, 4).backward()
    return logits.detach().double().cpu(), gradients(model)


def one_by_one(model, names, call, autocast=None):
    """The same of each adapter alone."""
    model.zero_grad()
    logits = torch.full((len(names), 4), float("-inf"), dtype=torch.float64)
    for name in dict.fromkeys(names):
        numbers = [i for i, own in enumerate(names) if own == name]
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            found = value_of(alone(model, name, numbers, **call))
        if found.requires_grad:
            pulled(found, 4).backward()
        logits[numbers, : found.shape[-1]] = found.detach().double().cpu()
    return logits, gradients(model)


def gradients(model) -> dict:
    return {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}


def by_adapter(grads: dict, names) -> dict:
    """Those of an adapter's prompt, updates and head, each as one vector."""
    found: dict = {}
    for key, grad in sorted(grads.items()):
        parts = key.split(".")
        who = next((n for n in names if n in parts), None)
        what = next((p for p in ("lpt_generator", "lpt_lora") if p in parts), "head")
        found.setdefault((who, what), []).append(grad.flatten())
    return {key: torch.cat(values) for key, values in found.items()}


def on_gpu(family, dtype):
    """A model on the GPU, and the same in float64 on the CPU."""
    others = {name: {**OTHERS[name], **WIDE} for name in OTHERS}
    exact = several(family, "SEQ_CLS", others, torch.float64, **WIDE)
    model = several(family, "SEQ_CLS", others, **WIDE)
    model.load_state_dict(exact.state_dict())
    model.to(dtype).cuda()
    late = late_of(model)
    late.lpt_generator.float()
    late.lpt_lora.float()
    exact.load_state_dict({n: x.double().cpu() for n, x in model.state_dict().items()})
    return model, exact


def together(runs: list):
    """Several batches' logits and gradients as one: of a single small one rounding may fall out
    three times as large, by chance.
    """
    grads = {key: torch.cat([run[1][key] for run in runs]) for key in runs[0][1]}
    return torch.cat([run[0] for run in runs]), grads


def assert_right(got, plain, truth, names, fine):
    wide = got[0].shape[1]  # the most labels of a head in the call
    assert torch.equal(torch.isfinite(got[0]), torch.isfinite(plain[0][:, :wide]))
    there = torch.isfinite(truth[0])
    assert there.any(1).all()
    errors = [(run[0][:, :wide] - truth[0])[there].norm() for run in (got, plain)]
    assert errors[0] <= 2 * errors[1] + fine * truth[0][there].norm(), errors
    grads = [by_adapter(run[1], names) for run in (got, plain, truth)]
    assert grads[0].keys() == grads[2].keys() and len(grads[2]) > 3
    largest = max(float(g.norm()) for g in grads[2].values())
    assert largest > 1e-3
    for key, value in grads[2].items():
        errors = [float((run[key] - value).norm()) for run in grads[:2]]
        allowed = 2 * errors[1] + fine * float(value.norm()) + 1e-7 * largest
        assert errors[0] <= allowed, (key, errors, float(value.norm()))


@pytest.mark.parametrize("names", MIXES, ids=["layers", "one", "lora"])
@pytest.mark.parametrize(
    ("weights", "autocast"), [(FP32, None), (BF16, None), (FP32, BF16)], ids=["fp32", "bf16", "amp"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_is_right(family, weights, autocast, names):
    model, exact = on_gpu(family, weights)
    runs = []
    for inputs in [batch(seed=seed) for seed in SEEDS]:
        there = {name: x.cuda() for name, x in inputs.items()}
        runs.append(
            (
                mixed(model, names, there, autocast),
                one_by_one(model, names, there, autocast),
                mixed(exact, names, inputs),
            )
        )
    fine = 2**-7 if BF16 in (weights, autocast) else 2**-17
    got, plain, truth = map(together, zip(*runs, strict=True))
    assert_right(got, plain, truth, [n for n in names if n != BASE], fine)


@pytest.mark.parametrize("weights", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "llama"])
def test_from_a_cache(family, weights):
    model, exact = on_gpu(family, weights)
    base = pair(family, "SEQ_CLS", torch.float64, k=2)[0].to(weights)
    fine = 2**-7 if weights == BF16 else 2**-17
    for k, names in ((1, MIXES[0]), (2, MIXES[1])):
        runs = []
        for inputs in [batch(seed=seed) for seed in SEEDS]:
            held = cached(base, inputs, k=k, room=2)
            runs.append(
                (
                    mixed(model, names, {"cached_hidden": held.to("cuda")}),
                    one_by_one(model, names, {name: x.cuda() for name, x in inputs.items()}),
                    mixed(exact, names, inputs),
                )
            )
        got, plain, truth = map(together, zip(*runs, strict=True))
        assert_right(got, plain, truth, [n for n in names if n != BASE], fine)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_losses(family):
    """The mean over all texts of the adapters' own."""
    model, _ = on_gpu(family, FP32)
    names = ["default", "mppg", "lower", "default", "alone"]
    call = {name: x.cuda() for name, x in batch().items()}
    call["labels"] = torch.tensor([1, 3, 0, 1, 2], device="cuda")
    got = model(**call, adapter_names=names).loss
    losses = [alone(model, name, [i], **call).loss for i, name in enumerate(names)]
    torch.testing.assert_close(got, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_generate():
    others = {name: OTHERS[name] for name in ("mppg", "lower", "alone")}
    model = several("llama", "CAUSAL_LM", others).eval().cuda()
    inputs = {name: x.cuda() for name, x in batch("left").items()}
    names = ["default", "mppg", "default", BASE, "mppg"]
    how = {"max_new_tokens": 5, "do_sample": False}
    got = model.generate(**inputs, adapter_names=names, **how)
    for i, name in enumerate(names):
        own = {n: x[i : i + 1] for n, x in inputs.items()}
        if name == BASE:
            with model.disable_adapter():
                expected = model.generate(**own, **how)
        else:
            model.set_adapter(name)
            expected = model.generate(**own, **how)
        assert torch.equal(got[i : i + 1, : expected.shape[1]], expected)
