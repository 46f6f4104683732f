"""The config that a user gives is the one that the model has, filled in place."""

from __future__ import annotations

import copy

import pytest
from peft import get_peft_model

from lpt_fast import LPTConfig
from lpt_fast.backbone.families import find_backbone
from tests.adapters import lpt
from tests.tiny import batch, tiny


def late(model):
    return find_backbone(model.get_base_model())[1].late_prompt


@pytest.mark.parametrize(
    "task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None]
)
def test_it_is_the_users_object(task):
    kind = task if task not in (None, "FEATURE_EXTRACTION") else "base"
    config = lpt(task_type=task)
    model = get_peft_model(tiny("bert", kind), config)
    assert model.peft_config["default"] is config
    assert config.insertion_layer == 2  # of 4 layers
    other = lpt(task_type=task, insertion_layer=3)
    model.add_adapter("other", other)
    assert model.peft_config["other"] is other
    if task == "SEQ_CLS":
        assert (config.num_labels, config.id2label) == (2, {0: "LABEL_0", 1: "LABEL_1"})
        assert sorted(config.modules_to_save) == ["bert.pooler", "classifier", "score"]


def test_one_object_for_two_equal_models():
    config = lpt(task_type="SEQ_CLS")
    models = [get_peft_model(tiny("bert", "SEQ_CLS"), config) for _ in range(2)]
    assert all(model.peft_config["default"] is config for model in models)
    assert sorted(config.modules_to_save) == ["bert.pooler", "classifier", "score"]  # each once


def test_one_object_for_two_models_that_fill_it_otherwise():
    """4 and 6 layers, 2 and 3 labels, pooler and none: the second starts from what was given."""
    config = lpt(task_type="SEQ_CLS")
    first = get_peft_model(tiny("bert", "SEQ_CLS"), config)
    deep = tiny("roberta", "SEQ_CLS", num_hidden_layers=6, num_labels=3)
    second = get_peft_model(deep, config)
    own = second.peft_config["default"]
    assert first.peft_config["default"] is config and own is not config
    assert (config.insertion_layer, own.insertion_layer) == (2, 3)
    assert (config.num_labels, own.num_labels) == (2, 3)
    assert config.target_modules != own.target_modules
    assert sorted(own.modules_to_save) == ["classifier", "score"]
    assert (
        first.peft_config["default"].num_labels == 2 and late(first).active_config.num_labels == 2
    )
    # A third that is as the first: the object itself again.
    assert get_peft_model(tiny("bert", "SEQ_CLS"), config).peft_config["default"] is config


def test_changes_afterwards_change_no_model():
    """As in a sweep over layers with one object."""
    config, models = lpt(task_type="SEQ_CLS"), []
    for k in (1, 2, 3):
        config.insertion_layer = k
        models.append(get_peft_model(tiny("bert", "SEQ_CLS"), config))
    assert [late(m).active_config.insertion_layer for m in models] == [1, 2, 3]
    given = lpt(task_type="SEQ_CLS", insertion_layer=1)
    want = get_peft_model(tiny("bert", "SEQ_CLS"), given)
    state = {n: p for n, p in models[0].state_dict().items()}
    want.load_state_dict(state)
    inputs = batch()
    assert (models[0](**inputs).logits - want(**inputs).logits).abs().max() < 1e-6


def test_a_copy_of_a_filled_one_starts_again():
    config = lpt(task_type="SEQ_CLS")
    get_peft_model(tiny("bert", "SEQ_CLS"), config)
    again = get_peft_model(tiny("bert", "SEQ_CLS", num_hidden_layers=6), copy.deepcopy(config))
    assert again.peft_config["default"].insertion_layer == 3


def test_a_config_that_is_refused_stays_as_it_was():
    config = lpt(task_type="SEQ_CLS", modules_to_save=["encoder.layer.0"])
    with pytest.raises(ValueError, match=r"at or below insertion_layer=2"):
        get_peft_model(tiny("bert", "SEQ_CLS"), config)
    assert config.insertion_layer is None and config.num_labels is None


def test_folding_leaves_the_users_object():
    config = lpt(task_type="SEQ_CLS", generator="residual")
    models = [get_peft_model(tiny("bert", "SEQ_CLS"), config) for _ in range(2)]
    models[0].base_model.fold_adapter()
    assert models[0].peft_config["default"].generator == "static"
    assert late(models[0]).active_config.generator == "static"
    assert models[1].peft_config["default"].generator == config.generator == "residual"


def test_what_was_filled_is_saved_and_nothing_else(tmp_path):
    config = lpt(task_type="SEQ_CLS")
    get_peft_model(tiny("bert", "SEQ_CLS"), config).save_pretrained(tmp_path)
    assert set(config.to_dict()) == set(LPTConfig(task_type="SEQ_CLS").to_dict())
    loaded = LPTConfig.from_pretrained(tmp_path)
    assert (loaded.insertion_layer, loaded.num_labels) == (2, 2)
