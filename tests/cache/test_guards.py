"""`model(cached_hidden=batch)` takes a batch only from the cache of its own lower layers, whenever
and however they change.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from lpt_fast.backbone.families import find_backbone, get_layers
from lpt_fast.cache import CacheError, guards, identity
from lpt_fast.cache.shard import STORES
from tests.adapters import lpt, stir
from tests.cache.cached_texts import filled, ragged
from tests.tiny import tiny
from tests.train.cases import assert_same, trained

K = 2
REFUSED = r"The cached batch was made by another model, configuration, layer or dtype \(cache "


def adapted(base=None, seed=7, **config):
    base = tiny("bert", "SEQ_CLS") if base is None else base
    torch.manual_seed(seed)
    settings = {"insertion_layer": K, "prompt_dropout": 0.0, "task_type": "SEQ_CLS", **config}
    model = get_peft_model(base, lpt(**settings))
    stir(model)
    return model


@pytest.fixture
def model():
    return adapted()


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    cache, rows = filled(tmp_path_factory.mktemp("cache"), tiny("bert", "SEQ_CLS"), ragged())
    return cache.read(rows)


@pytest.fixture
def hashed(monkeypatch):
    """How often the weights are hashed."""
    seen, real = [], identity.hash_weights
    monkeypatch.setattr(identity, "hash_weights", lambda lower: seen.append(1) or real(lower))
    return seen


def lower(model, name="output.dense.weight", layer=0):
    return get_layers(*find_backbone(model)[1:])[layer].get_parameter(name)


def change(weight, by=1e-3):
    """One element of it, as an optimiser would."""
    with torch.no_grad():
        weight.view(-1)[5] += by


def refused(model, batch, message=REFUSED):
    with pytest.raises(CacheError, match=message):
        model(cached_hidden=batch)
    return True


@pytest.mark.parametrize("store", STORES)
def test_a_batch_of_its_own_cache(store, tmp_path):
    model = adapted(tiny("bert", "SEQ_CLS", hidden_dropout_prob=0.0))  # the head's, in training
    cache, rows = filled(tmp_path, model, ragged(), store=store)
    for mode in (False, True):
        got = model.train(mode)(cached_hidden=cache.read(rows, room=2)).logits
        exact = torch.cat(
            [model(input_ids=torch.tensor([e["input_ids"]])).logits for e in ragged()]
        )
        tolerance = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 0.05}.get(store, 0.3)
        torch.testing.assert_close(got, exact, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_batches_of_other_models(tmp_path, model, batch, hashed):
    model(cached_hidden=batch)
    others = {
        "weights": tiny("bert", "SEQ_CLS", seed=1),
        "one weight": tiny("bert", "SEQ_CLS"),
        "configuration": tiny("bert", "SEQ_CLS", layer_norm_eps=1e-5),
    }
    change(lower(others["one weight"]))
    for other in others.values():
        cache, rows = filled(tmp_path, other, ragged())
        for _ in range(2):  # a refusal is not forgotten
            refused(model, cache.read(rows), REFUSED + cache.identity.digest[:12])
        model(cached_hidden=batch)
        adapted(other)(cached_hidden=cache.read(rows))
    half = tiny("bert", "SEQ_CLS").bfloat16()
    cache, rows = filled(tmp_path, half, ragged())
    refused(model, cache.read(rows))
    refused(adapted(half), batch, "`compute_dtype` must be .*got 'float32'")
    cache, rows = filled(tmp_path, tiny("bert", "SEQ_CLS"), ragged(), compute_dtype="bfloat16")
    model(cached_hidden=cache.read(rows))  # said by who filled it
    cache, rows = filled(tmp_path, tiny("bert", "SEQ_CLS"), ragged(), 3)
    with pytest.raises(ValueError, match="the output of layer 3, expected that of layer 2"):
        model(cached_hidden=cache.read(rows))


@pytest.mark.parametrize("seen_before", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_weight_that_changes(model, batch, layer, seen_before):
    """One element of one weight, also in the middle of a run; and it works again when restored."""
    if seen_before:
        model(cached_hidden=batch)
    weight = lower(model, layer=layer)
    kept = weight.detach().clone()
    change(weight)
    assert refused(model, batch) and refused(model, batch)
    with torch.no_grad():
        weight.copy_(kept)
    expected = adapted().eval()(cached_hidden=batch).logits
    assert torch.equal(model.eval()(cached_hidden=batch).logits, expected)


def replaced_weight(model):
    with torch.no_grad():
        dense = get_layers(*find_backbone(model)[1:])[1].output.dense
        dense.weight = torch.nn.Parameter(dense.weight + 1e-3, requires_grad=False)


def other_data(model):
    weight = lower(model)
    weight.data = weight.data + 1e-3


def other_layer(model):
    layers = get_layers(*find_backbone(model)[1:])
    layers[0] = copy.deepcopy(layers[3]).requires_grad_(False)


def exchanged_layers(model):
    layers = get_layers(*find_backbone(model)[1:])
    layers[0], layers[1] = layers[1], layers[0]


def other_embeddings(model):
    backbone = find_backbone(model)[1]
    backbone.embeddings = tiny("bert", seed=3).embeddings.requires_grad_(False)


def loaded(model):
    state = tiny("bert", seed=4).state_dict()
    state = {name: value for name, value in state.items() if "embeddings" in name}
    find_backbone(model)[1].load_state_dict(state, strict=False)


CHANGES = {
    "a weight that was replaced": replaced_weight,
    "a weight with other memory": other_data,
    "a layer that was replaced": other_layer,
    "layers that were exchanged": exchanged_layers,
    "embeddings that were replaced": other_embeddings,
    "weights that were loaded": loaded,
    "weights of another dtype": lambda model: find_backbone(model)[1].encoder.layer[0].double(),
}


@pytest.mark.parametrize("way", CHANGES)
def test_other_changes_in_the_middle_of_a_run(model, batch, way):
    model(cached_hidden=batch)
    CHANGES[way](model)
    refused(model, batch)


def test_what_begins_to_train_in_the_middle_of_a_run(model, batch):
    model(cached_hidden=batch)
    weight = lower(model)
    weight.requires_grad_(True)
    refused(model, batch, "layer.0.output.dense.weight at or below layer 2 trains")
    weight.requires_grad_(False)
    model(cached_hidden=batch)
    config = LoraConfig(target_modules=["query"], layers_to_transform=[1])
    inject_adapter_in_model(config, find_backbone(model)[1], "lora")
    refused(model, batch, "layer.1.attention.self.query at or below layer 2 has an adapter")


def test_changes_that_do_not_matter(model, batch, hashed):
    """Above the cut, and the adapter itself; nothing is hashed again."""
    model(cached_hidden=batch)
    before = len(hashed)
    change(lower(model, layer=2))
    change(find_backbone(model)[1].pooler.dense.weight)
    stir(model)
    model.train()(cached_hidden=batch).logits.sum().backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        model(cached_hidden=batch, labels=torch.ones(12, dtype=torch.long)).loss.backward()
        optimizer.step()
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
        model.eval(), model.train()
    assert before == len(hashed) == 1


def test_a_model_that_moves(model, batch, hashed):
    """A copy and a model whose weights lie elsewhere are hashed once, and pass."""
    expected = model.eval()(cached_hidden=batch).logits
    twin = copy.deepcopy(model)
    for _ in range(2):
        assert torch.equal(twin(cached_hidden=batch).logits, expected)
    assert len(hashed) == 2
    weight = lower(model)
    weight.data = weight.data.clone()
    for _ in range(2):
        assert torch.equal(model(cached_hidden=batch).logits, expected)
    assert len(hashed) == 3
    change(lower(twin))
    assert refused(twin, batch) and model(cached_hidden=batch)


def test_two_adapters_of_two_layers(batch, tmp_path):
    model = adapted()
    model.add_adapter("deep", lpt(insertion_layer=3, task_type="SEQ_CLS"))
    cache, rows = filled(tmp_path, tiny("bert", "SEQ_CLS"), ragged(), 3)
    deep = cache.read(rows)
    for _ in range(2):
        model.set_adapter("deep")
        model(cached_hidden=deep)
        with pytest.raises(ValueError, match="output of layer 2, expected that of layer 3"):
            model(cached_hidden=batch)
        model.set_adapter("default")
        model(cached_hidden=batch)
    change(lower(model, layer=2))  # below the cut of one of them alone
    model(cached_hidden=batch)
    model.set_adapter("deep")
    refused(model, deep)


def test_batches_that_say_nothing_are_taken(model, batch):
    """Those that users pack themselves; they answer for them."""
    fields = {name: getattr(batch, name) for name in ("hidden", "cu_seqlens", "max_seqlen")}
    change(lower(model))
    assert model(cached_hidden=type(batch)(**fields)).logits.shape == (12, 2)


def test_a_step_costs_a_look_at_version_counters(model, batch, monkeypatch):
    model(cached_hidden=batch)
    for name in ("identity_of", "check_frozen"):
        monkeypatch.setattr(guards, name, lambda *args: pytest.fail("it looked again"))
    before = trained(model)
    model(cached_hidden=batch)
    assert_same(before, trained(model), atol=0, rtol=0)
