"""Quantised bases: the packed way steps aside and says why, caches tell their weights apart."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
import xxhash
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from lpt_fast.cache import ActivationCache
from lpt_fast.cache.identity import cut, hash_weights, identity_of
from tests.adapters import lpt
from tests.tiny import batch, tiny

K = 2
TEXTS = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}]


class Codes(torch.Tensor):
    """A weight kept as int8 codes, a scale a row. Only linear layers know what to do with it."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], {"bits": 8}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, w, *bias = args
            return F.linear(x, w.codes * w.scale[:, None], *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} of codes")


class Hidden(Codes):
    """The same, but it does not say what it keeps."""

    __tensor_flatten__ = None

    def __getattribute__(self, name):
        if name == "__tensor_flatten__":
            raise AttributeError(name)
        return super().__getattribute__(name)


def coded(kind=Codes, change=None, task="SEQ_CLS"):
    """A base model whose linear layers are quantised by hand, and one with the same numbers."""
    base = tiny("bert", task)
    plain = copy.deepcopy(base)
    for name, module in base.bert.encoder.named_modules():
        if isinstance(module, nn.Linear):
            w = module.weight.detach()
            scale = w.abs().amax(1) / 127
            codes = (w / scale[:, None]).round().to(torch.int8)
            if change == name:
                codes[0, 0] += 1 if codes[0, 0] < 127 else -1
            if change == "scale":
                scale = scale * 1.5
            module.weight = nn.Parameter(kind(codes, scale), requires_grad=False)
            same = plain.bert.encoder.get_submodule(name)
            same.weight = nn.Parameter(codes * scale[:, None], requires_grad=False)
    return base, plain


def adapted(base, **more):
    torch.manual_seed(3)
    config = lpt(task_type="SEQ_CLS", insertion_layer=K, prompt_dropout=0.0, **more)
    return get_peft_model(base, config).eval()


@torch.no_grad()
def test_auto_falls_back_and_says_why(caplog):
    quantised, plain = coded()
    want = adapted(plain, upper="packed")(**batch()).logits
    with caplog.at_level(logging.INFO, logger="lpt_fast"):
        got = adapted(quantised)(**batch()).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert "padded: a weight of Linear above the insertion is a Codes (quantised)" in caplog.text
    with pytest.raises(ValueError, match="upper='packed'.*is a Codes.*Use upper='auto'"):
        adapted(coded()[0], upper="packed")(**batch())


def test_training_through_it():
    quantised, plain = coded()
    grads = []
    for base in (quantised, plain):
        model = adapted(base).train()
        model(**batch(), labels=torch.tensor([0, 1, 0, 1, 1])).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_of_it(tmp_path):
    model = adapted(coded()[0])
    cache = ActivationCache.open(tmp_path, model, insertion_layer=K, store="fp32")
    rows = cache.ensure(model, TEXTS)
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1] * 4, [1, 1, 0, 0]])
    want = model(input_ids=ids, attention_mask=mask).logits
    got = model(cached_hidden=cache.read(rows)).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    # Another model with the same codes reads it, one with a code changed is refused.
    assert torch.equal(adapted(coded()[0])(cached_hidden=cache.read(rows)).logits, got)
    other = adapted(coded(change="layer.0.output.dense")[0])
    with pytest.raises(Exception, match="made by another model"):
        other(cached_hidden=cache.read(rows))


def digest(base):
    return identity_of(cut(base, K)).digest


def test_identities_of_quantised_weights():
    quantised, plain = coded()
    same = [digest(quantised), digest(coded()[0])]
    assert same[0] == same[1]
    others = [coded(change=c)[0] for c in ("layer.1.attention.self.query", "scale")]
    assert len({same[0], digest(plain), *map(digest, others)}) == 4
    # What lies above the cut does not count.
    assert digest(coded(change="layer.3.output.dense")[0]) == same[0]


def test_identities_of_plain_models_stay():
    """By hand: names, dtypes, shapes and bytes of parameters, then of buffers, in order."""
    lower = cut(tiny("bert"), K).lower
    state = xxhash.xxh3_128()
    for found in (dict(lower.named_parameters()), dict(lower.named_buffers())):
        for name in sorted(found):
            t = found[name].detach()
            state.update(f"{name}|{t.dtype}|{list(t.shape)}|".encode())
            state.update(t.contiguous().numpy().tobytes())
    assert hash_weights(lower) == state.hexdigest()


def test_a_weight_that_does_not_say_what_it_keeps(tmp_path):
    model = adapted(coded(Hidden)[0])
    with torch.no_grad():
        want = adapted(coded()[1])(**batch()).logits
        torch.testing.assert_close(model(**batch()).logits, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="is a Hidden, expected a plain tensor") as caught:
        ActivationCache.open(tmp_path, model, insertion_layer=K)
    assert len(str(caught.value)) <= 300 and not list(tmp_path.iterdir())


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@torch.no_grad()
def test_quantize_dynamic_over_the_base(tmp_path):
    """Its weights are neither parameters nor buffers, and caches tell them apart all the same."""
    base, moved = tiny("bert", "SEQ_CLS"), tiny("bert", "SEQ_CLS")
    moved.bert.encoder.layer[0].output.dense.weight[0] *= 2
    a, b, again = (dynamic(m) for m in (base, moved, tiny("bert", "SEQ_CLS")))
    assert digest(a) == digest(again)
    assert digest(a) != digest(b)
    model = adapted(a)
    cache = ActivationCache.open(tmp_path, model, insertion_layer=K, store="fp32")
    rows = cache.ensure(model, TEXTS[:1])
    want = model(input_ids=torch.tensor([TEXTS[0]["input_ids"]])).logits
    got = model(cached_hidden=cache.read(rows)).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("generator", ["npg", "appg", "mppg"])
def test_quantize_dynamic_over_the_whole(generator):
    model = dynamic(adapted(tiny("bert", "SEQ_CLS"), generator=generator))
    with pytest.raises(ValueError, match="lost its weights.*quantise the base model alone"):
        model(**batch())


@torch.no_grad()
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(name, tmp_path):
    ao = pytest.importorskip("torchao.quantization")
    base = tiny("bert", "SEQ_CLS")
    plain = digest(base)
    ao.quantize_(base, getattr(ao, name)())
    assert digest(base) != plain
    model = adapted(base)
    want = model(input_ids=torch.tensor([TEXTS[0]["input_ids"]])).logits
    cache = ActivationCache.open(tmp_path, model, insertion_layer=K, store="fp32")
    got = model(cached_hidden=cache.read(cache.ensure(model, TEXTS[:1]))).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
