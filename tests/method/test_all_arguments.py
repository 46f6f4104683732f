"""All arguments of a call reach the model, through PEFT's model of each task, as from a cache."""

from __future__ import annotations

import inspect

import peft
import pytest
import torch

from lpt_fast.cache import ActivationCache
from tests.method.cases import adapted, main_output
from tests.tiny import batch

M = 3
BY_TASK = {
    "SEQ_CLS": peft.PeftModelForSequenceClassification,
    "TOKEN_CLS": peft.PeftModelForTokenClassification,
    "QUESTION_ANS": peft.PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": peft.PeftModelForFeatureExtraction,
    "CAUSAL_LM": peft.PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": peft.PeftModelForSeq2SeqLM,
}
FAMILY = {"CAUSAL_LM": "gpt2", "SEQ_2_SEQ_LM": "t5"}


@pytest.mark.parametrize("task", BY_TASK)
def test_what_a_class_names_and_what_it_does_not(task):
    """The model gets each argument as it was given."""
    family = FAMILY.get(task, "bert")
    kind = "base" if task == "FEATURE_EXTRACTION" else task
    _, model = adapted(family, kind, task=task)
    assert type(model) is BY_TASK[task]
    ids = batch("none")["input_ids"]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_hidden_states": True}
    if task != "SEQ_2_SEQ_LM":
        given["position_ids"] = torch.arange(ids.shape[1]).flip(0).expand_as(ids).contiguous()
    if family == "bert":
        given["token_type_ids"] = ids % 2
    if task == "SEQ_2_SEQ_LM":
        given["decoder_input_ids"] = ids[:, :4]
    if task == "QUESTION_ANS":
        given |= {"start_positions": torch.arange(5), "end_positions": torch.arange(5) + 1}
    seen = {}
    base = model.get_base_model()
    base.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    out = model(**given)
    for name, value in given.items():
        assert seen[name] is value, name
    # By the tuner alone, without PEFT's model around it, it is the same.
    want = model.base_model(**given)
    torch.testing.assert_close(main_output(out), main_output(want), atol=0, rtol=0)
    # And none is without effect.
    for name in given.keys() & {"token_type_ids", "position_ids"}:
        fewer = main_output(model(**{k: v for k, v in given.items() if k != name}))
        assert (main_output(out) - fewer).abs().max() > 1e-3, name


@pytest.mark.parametrize("upper", ["packed", "padded"])
@pytest.mark.parametrize("extra", ["token_type_ids", "position_ids"])
@pytest.mark.parametrize("task", ["QUESTION_ANS", "SEQ_CLS", "TOKEN_CLS"])
def test_text_and_cache_agree(task, extra, upper, tmp_path):
    _, model = adapted("bert", task, task=task, upper=upper)
    ids = torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(0))
    values = (torch.arange(8) >= 4).long() if extra == "token_type_ids" else torch.arange(8).flip(0)
    texts = [{"input_ids": row.tolist(), extra: values.tolist()} for row in ids]
    cache = ActivationCache.open(tmp_path, model, insertion_layer=2, store="fp32")
    rows = cache.ensure(model, texts)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), extra: values.expand(4, 8)}
    with torch.no_grad():
        from_text, from_cache = model(**inputs), model(cached_hidden=cache.read(rows))
        without = model(**{k: v for k, v in inputs.items() if k != extra})
    names = ("start_logits", "end_logits") if task == "QUESTION_ANS" else ("logits",)
    for name in names:
        torch.testing.assert_close(from_cache[name], from_text[name], atol=1e-5, rtol=1e-5)
        assert (from_text[name] - without[name]).abs().max() > 1e-3


def test_other_methods_and_other_ways_to_call():
    """LoRA's calls are PEFT's own; positional arguments, tuples and losses stay what they were."""
    forward = peft.PeftModelForQuestionAnswering.forward
    assert list(inspect.signature(forward).parameters)[3:5] == ["token_type_ids", "position_ids"]
    base, model = adapted("bert", "QUESTION_ANS", task="QUESTION_ANS")
    ids = batch("none")["input_ids"]
    types, ones = ids % 2, torch.ones_like(ids)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=ones, token_type_ids=types)
        got = model(ids, ones, types, return_dict=False)
        assert isinstance(got, tuple) and torch.equal(got[0], want.start_logits)
        with model.disable_adapter():
            plain = model(input_ids=ids, token_type_ids=types, task_ids=None).start_logits
        assert torch.equal(plain, base(input_ids=ids, token_type_ids=types).start_logits)
        names = ["default", "__base__", "default", "default", "default"]
        mixed = model(ids, ones, types, adapter_names=names).start_logits
        torch.testing.assert_close(mixed[[0, 2, 3, 4]], want.start_logits[[0, 2, 3, 4]])
        torch.testing.assert_close(mixed[1], plain[1])
    lora = peft.get_peft_model(base, peft.LoraConfig(task_type="QUESTION_ANS")).eval()
    with torch.no_grad():
        a, b = (lora(input_ids=ids, token_type_ids=t).start_logits for t in (types, None))
    assert torch.equal(a, b)  # (PEFT's, as it is)
