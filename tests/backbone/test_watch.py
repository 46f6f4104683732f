"""What follows from a model alone is worked out once, and every change of it is noticed."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from lpt_fast.backbone.families import find_backbone, get_layers
from lpt_fast.backbone.watch import Watch
from lpt_fast.cache.guards import check_batch
from lpt_fast.cache.identity import cut, identity_of
from lpt_fast.packed.stack import why_padded
from lpt_fast.packing import PackedBatch
from tests.adapters import lpt
from tests.packed.cases import way
from tests.tiny import batch, tiny

K = 2


def made(**more):
    return get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS", **more)).train()


def late_of(model):
    return find_backbone(model)[1].late_prompt


def calls_of(run) -> int:
    """Calls in `run`, of Python functions and of others from Python code."""
    count = 0

    def look(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def checks(model):
    """What every cached training step asks of the model."""
    late = late_of(model)
    identity = identity_of(cut(late.backbone, K)).digest
    held = PackedBatch(
        torch.zeros(1, 8), torch.tensor([0, 1], dtype=torch.int32), 1, identity=identity
    )

    def run():
        late._sync_modes(below=False)
        check_batch(late, held)
        assert why_padded(late.backbone, late.family, K, 9, True, late.plain) is None

    return run


def test_a_step_walks_through_no_modules():
    """Calls from Python do not grow with the model (a walk takes several for each of a layer's 18
    modules)."""
    model = made()
    run = checks(model)
    run()
    layers = get_layers(*find_backbone(model)[1:])
    few = calls_of(run)
    layers.extend([copy.deepcopy(layers[-1]) for _ in range(4)])
    run(), run()
    assert calls_of(run) <= few + 4 * 2


def hook(layer):
    layer.output.register_forward_hook(lambda *_: None)


def pre_hook(layer):
    layer.output.dense.register_forward_pre_hook(lambda *_: None)


def backward_hook(layer):
    layer.output.register_full_backward_hook(lambda *_: None)


def forward(layer):
    layer.intermediate.forward = type(layer.intermediate).forward.__get__(layer.intermediate)


def trains(layer):
    layer.output.LayerNorm.weight.requires_grad_(True)


def other_parameter(layer):
    layer.output.LayerNorm.bias = torch.nn.Parameter(layer.output.LayerNorm.bias.detach().clone())


def other_module(layer):
    class Own(torch.nn.Linear):
        pass

    dense = layer.output.dense
    layer.output.dense = Own(dense.in_features, dense.out_features).requires_grad_(False)


def other_class(layer):
    class Own(type(layer.output)):
        pass

    layer.output.__class__ = Own


def child(layer):
    layer.output.dropout.register_module("extra", type("Own", (torch.nn.Linear,), {})(2, 2))


def parameter(layer):
    layer.output.dropout.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))


def cleared_hooks(layer):
    """A dict of hooks that is another one, as some clear them."""
    handle = layer.output.register_forward_hook(lambda *_: None)
    handle.remove()
    hook(layer)


CHANGES = [
    *(hook, pre_hook, backward_hook, forward, trains, other_parameter, other_module, other_class),
    *(child, parameter, cleared_hooks),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_above_in_the_middle_of_a_run(change, caplog):
    model = made()
    inputs = batch()
    model(**inputs)
    assert "packed" in way(model, caplog, **inputs)
    change(get_layers(*find_backbone(model)[1:])[-1])
    assert "padded: " in way(model, caplog, **inputs)


def test_a_layer_that_is_replaced(caplog):
    model = made()
    model(**batch())
    layers = get_layers(*find_backbone(model)[1:])
    layers[3] = copy.deepcopy(layers[2])
    hook(layers[2])
    layers[2] = copy.deepcopy(layers[3])
    assert "packed" in way(model, caplog, **batch())
    late = late_of(model)
    assert torch.equal(
        model.eval()(**batch()).logits, copy.deepcopy(model).eval()(**batch()).logits
    )
    layers[2].train()
    late.train()
    assert not any(m.training for m in layers.modules())


@pytest.mark.parametrize("upper_dropout", [False, True])
def test_modes_that_somebody_sets(upper_dropout):
    """Layers come back to their modes in the next step of training, modules that are new too."""
    model = made(upper_dropout=upper_dropout)
    layers = get_layers(*find_backbone(model)[1:])
    wanted = [False, False, upper_dropout, upper_dropout]

    def modes():
        return [{module.training for module in layer.modules()} for layer in layers]

    for change in (model.eval, model.train, layers.train, layers.eval, layers[3].output.train):
        change()
        model.train(), model(**batch())
        assert modes() == [{mode} for mode in wanted]
        change()
        late_of(model).training = True
        model(**batch())
        assert modes() == [{mode} for mode in wanted]
    inject_adapter_in_model(
        LoraConfig(target_modules=["query"], lora_dropout=0.5), find_backbone(model)[1], "lora"
    )
    layers.train()
    model(**batch())
    assert modes() == [{mode} for mode in wanted]


def test_a_train_of_its_own_is_called():
    model = made()
    layers = get_layers(*find_backbone(model)[1:])
    seen = []
    kind = type(layers[3].output)

    class Own(kind):
        def train(self, mode=True):
            seen.append(mode)
            return super().train(mode)

    layers[3].output.__class__ = Own
    late_of(model)._modes = None
    model.train()
    assert seen[-1] is False and not layers[3].output.training


def test_copies_and_files_begin_anew():
    model = made()
    model(**batch())
    late = late_of(model)
    assert late._modes is not None and isinstance(late.plain[K], Watch)
    for twin in (copy.deepcopy(late), pickle.loads(pickle.dumps(late))):
        assert twin._modes is None and twin.plain == {K: None, 0: None}
