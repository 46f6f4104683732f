"""When the layers above the insertion run padded all the same, and what is said of it."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lpt_fast.backbone.families import find_backbone
from tests.adapters import lpt
from tests.packed.cases import TASK, pair, said, way
from tests.tiny import batch, tiny


def test_said_once(caplog):
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS"))
    assert "packed, without padding" in way(model, caplog, **batch())
    with caplog.at_level(logging.INFO, logger="lpt_fast"):
        model(**batch())
    assert len(said(caplog)) == 1


@pytest.mark.slow
def test_falls_back(caplog):
    def made(family="bert", head="SEQ_CLS", **more):
        config = {n: more.pop(n) for n in ("upper_dropout",) if n in more}
        task = None if head in TASK else head
        return get_peft_model(tiny(family, head, **more), lpt(task_type=task, **config)).eval()

    inputs = batch()
    assert "DebertaModel is not among" in way(made("deberta"), caplog, **inputs)
    eager = made(attention="eager")
    assert "output_attentions" in way(eager, caplog, **inputs, output_attentions=True)
    assert "packed" in way(eager, caplog, **inputs)
    assert "output_hidden_states" in way(made(), caplog, **inputs, output_hidden_states=True)
    assert "active dropout" in way(made(upper_dropout=True).train(), caplog, **inputs)
    assert "packed" in way(made(upper_dropout=True), caplog, **inputs)
    assert "sliding window of 6" in way(made("mistral"), caplog, **inputs)
    assert "sliding window of 6" in way(made("qwen2"), caplog, **inputs)
    short = batch(lengths=(3, 2))
    assert "packed" in way(made("mistral"), caplog, **short)
    assert "KV cache" in way(made("llama", "CAUSAL_LM"), caplog, **inputs)
    assert "packed" in way(made("llama", "CAUSAL_LM"), caplog, **inputs, use_cache=False)
    hooked = made()
    hooked.get_base_model().bert.encoder.layer[3].output.register_forward_hook(lambda *_: None)
    assert "has a hook" in way(hooked, caplog, **inputs)
    trains = made()
    trains.get_base_model().bert.encoder.layer[3].output.dense.weight.requires_grad_(True)
    assert "trains" in way(trains, caplog, **inputs)
    backward = made()
    layer = backward.get_base_model().bert.encoder.layer[3]
    layer.register_full_backward_hook(lambda *_: None)
    assert "backward hook" in way(backward, caplog, **inputs)
    drops = made("llama", attention_dropout=0.1, upper_dropout=True)
    assert "packed" in way(drops, caplog, **inputs)
    assert "attention above the insertion" in way(drops.train(), caplog, **inputs)
    language = made("llama", "CAUSAL_LM")
    texts = batch(lengths=(9, 4, 7))
    labels = texts["input_ids"].index_fill(1, torch.tensor([0]), -100)
    assert "packed" in way(language, caplog, **texts, labels=labels)
    checkpointed = made().train()
    checkpointed.gradient_checkpointing_enable()
    assert "gradient checkpointing" in way(checkpointed, caplog, **inputs)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "'dynamic'" in way(made("llama", rope_parameters=rope), caplog, **inputs)


def test_layers_with_adapters_of_their_own_run_as_they_are(caplog):
    base = tiny("bert", "SEQ_CLS")
    other = LoraConfig(target_modules=["query"], layers_to_transform=[3], r=2)
    get_peft_model(base, other)
    model = get_peft_model(base, lpt(task_type="SEQ_CLS")).eval()
    assert "in place of its own module" in way(model, caplog, **batch())


def test_asked_for_where_it_cannot_be():
    model = get_peft_model(tiny("deberta", "SEQ_CLS"), lpt(task_type="SEQ_CLS", upper="packed"))
    with pytest.raises(ValueError, match="upper='packed', expected .*DebertaModel is not among"):
        model(**batch())
    with pytest.raises(ValueError, match="must be one of auto, packed, padded, got 'fast'"):
        lpt(upper="fast")
    with pytest.raises(ValueError, match="must be one of"):
        find_backbone(model)[1].late_prompt.upper = "fast"
    find_backbone(model)[1].late_prompt.upper = "padded"
    model(**batch())


def test_generation_runs_padded():
    """Decoding needs a KV cache; upper="packed" leaves it alone."""
    model = pair("llama", "CAUSAL_LM")[1].eval()
    got = {}
    for upper in ("packed", "padded"):
        find_backbone(model)[1].late_prompt.upper = upper
        got[upper] = model.generate(**batch("left"), max_new_tokens=4, do_sample=False)
    assert torch.equal(got["packed"], got["padded"])
