"""Arguments of the backbone's forward: both names of the KV cache, and those that nobody knows."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache

from lpt_fast.backbone.arguments import CACHE_NAMES, cache_name, given_cache
from tests.adapters import lpt, stir
from tests.method.cases import cached
from tests.tiny import batch, tiny


def adapted(family, kind, **config):
    base = tiny(family, kind)
    task = None if kind == "base" else kind
    model = get_peft_model(copy.deepcopy(base), lpt(task_type=task, insertion_layer=2, **config))
    stir(model.eval())
    return base, model


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", ["CAUSAL_LM", "base"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_both_names_of_the_kv_cache(family, kind, name):
    """A step with the cache that a call filled and one with the cache that it gave back are worth a
    run over everything; as `cached=None` they would be a run over one token.
    """
    _, model = adapted(family, kind)
    ids = batch("none")["input_ids"]
    own = {"context_lengths": torch.full((5,), 8)}
    whole = model(input_ids=ids, use_cache=False, **own)[0][:, -1]
    mine = DynamicCache(config=model.config)
    model(input_ids=ids[:, :8], **{name: mine}, use_cache=True)
    assert [layer.get_seq_length() for layer in mine.layers] == [8, 8, 11, 11]
    given = given_cache(model(input_ids=ids[:, :8], use_cache=True))
    for cache in (mine, given):
        mask = torch.ones_like(ids)
        step = model(input_ids=ids[:, 8:], attention_mask=mask, **{name: cache})[0][:, -1]
        torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)
    alone = model(input_ids=ids[:, 8:], use_cache=False)[0][:, -1]
    assert (alone - whole).abs().max() > 1e-2


@torch.no_grad()
def test_a_users_forward_that_names_no_cache():
    """It hands on what it gets; its base class knows the name."""
    base, _ = adapted("llama", "CAUSAL_LM")

    class Own(type(base.model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert cache_name(base.model) in CACHE_NAMES
    base.model.__class__ = Own
    assert cache_name(base.model) == cache_name(tiny("llama"))
    model = get_peft_model(base, lpt(task_type="CAUSAL_LM", insertion_layer=2)).eval()
    stir(model)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    got = model.generate(**batch("left"), **settings)
    assert got.tolist() == model.generate(**batch("left"), **settings, use_cache=False).tolist()


UNKNOWN = {
    "is_causal": False,  # the packed layers would go on looking to the left
    "output_router_logits": True,
    "cache_position": torch.arange(9),
    "kv_state": DynamicCache(),  # what a coming version may call the cache
}


@torch.no_grad()
@pytest.mark.parametrize("upper", ["packed", "padded"])
@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize(("family", "kind"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_what_nobody_knows_is_refused(family, kind, name, upper):
    base, model = adapted(family, kind, upper=upper)
    inputs = batch()
    with pytest.raises(ValueError, match=rf"^\w+Model with a late prompt got `{name}`") as caught:
        model(**inputs, **{name: UNKNOWN[name]})
    assert len(str(caught.value)) <= 300
    with pytest.raises(ValueError, match=rf"with a late prompt got `{name}`"):
        model(cached_hidden=cached(base, inputs), **{name: UNKNOWN[name]})
    model(**inputs, **{name: None})
    with model.disable_adapter():
        model(**inputs)


@torch.no_grad()
def test_a_kv_cache_that_cannot_be_meant():
    _, encoder = adapted("bert", "base")
    for name in CACHE_NAMES:
        with pytest.raises(ValueError, match=f"BertModel .* got `{name}`, expected no KV cache"):
            encoder(**batch(), **{name: DynamicCache()})
    _, model = adapted("llama", "base")
    with pytest.raises(ValueError, match="as `cache` and as `past_key_values`, expected one"):
        model(**batch(), cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="`alora_offsets`"):
        model(**batch(), alora_offsets=[1] * 5)
