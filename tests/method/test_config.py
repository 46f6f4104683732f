"""LPTConfig: defaults, refusals that name the field, JSON and back."""

from __future__ import annotations

import dataclasses

import pytest
from peft import PeftConfig, get_peft_model

from lpt_fast import LPTConfig
from tests.tiny import tiny

BAD = [
    ({"insertion_layer": 0}, "`insertion_layer`.*at least 1.*got 0"),
    ({"insertion_layer": 1.5}, "`insertion_layer`.*got 1.5"),
    ({"insertion_layer": True}, "`insertion_layer`.*got True"),
    ({"num_virtual_tokens": 0}, "`num_virtual_tokens`.*at least 1.*generator='none'.*got 0"),
    ({"num_virtual_tokens": -3}, "`num_virtual_tokens`.*got -3"),
    ({"bottleneck_size": 0}, "`bottleneck_size`.*got 0"),
    (
        {"generator": "lstm"},
        "`generator`.*static, npg, appg, mppg, attention, residual, none, got 'lstm'",
    ),
    ({"prompt_dropout": 1.0}, r"`prompt_dropout`.*\[0, 1\).*got 1.0"),
    ({"prompt_dropout": "no"}, "`prompt_dropout`.*got 'no'"),
    ({"upper_dropout": 0.1}, "`upper_dropout`.*True or False, got 0.1"),
    ({"init_from_vocab": True}, "`init_from_vocab`.*generator='static' only, got generator='mppg'"),
    ({"num_labels": 0}, "`num_labels`.*got 0"),
    ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, r"`id2label`.*0\.\.2.*got the keys \[0, 1\]"),
    ({"modules_to_save": "classifier"}, "`modules_to_save`.*list.*got 'classifier'"),
    ({"task_type": "SEQ_CLASS"}, "Invalid task type: 'SEQ_CLASS'"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_wrong_values_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        LPTConfig(**wrong)


@pytest.mark.parametrize("k", [4, 5, 100])
def test_layer_outside_of_the_model(k):
    with pytest.raises(
        ValueError, match=f"`insertion_layer` must be between 1 and 3 .* 4 layers, got {k}"
    ):
        get_peft_model(tiny("bert"), LPTConfig(insertion_layer=k))


def test_refused_model_is_left_as_it_was():
    model = tiny("bert")
    with pytest.raises(ValueError, match="insertion_layer"):
        get_peft_model(model, LPTConfig(insertion_layer=9))
    assert not hasattr(model, "late_prompt")
    assert "forward" not in vars(model)
    assert all(p.requires_grad for p in model.parameters())


def test_defaults():
    config = LPTConfig(task_type="SEQ_CLS")
    assert (config.num_virtual_tokens, config.generator, config.bottleneck_size) == (
        10,
        "mppg",
        128,
    )
    model = get_peft_model(tiny("bert", "SEQ_CLS", hidden_dropout_prob=0.3), config)
    assert model.peft_config["default"].insertion_layer == 2
    generator = model.get_base_model().bert.late_prompt.lpt_generator["default"]
    assert generator.dropout.p == 0.3


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gpt2", "resid_pdrop", 0.2),
        ("opt", "dropout", 0.4),
        ("t5", "dropout_rate", 0.25),
        ("llama", "", 0.0),
    ],
)
def test_prompt_dropout_is_the_backbones(family, key, value):
    model = get_peft_model(tiny(family, **({key: value} if key else {})), LPTConfig())
    generator = next(m for m in model.modules() if hasattr(m, "lpt_generator")).lpt_generator[
        "default"
    ]
    assert generator.dropout.p == value


def test_every_field_has_help():
    own = set(LPTConfig.__annotations__)
    for field in dataclasses.fields(LPTConfig):
        if field.name in own:
            assert len(field.metadata.get("help", "")) > 20, field.name


def test_json_round_trip(tmp_path):
    config = LPTConfig(
        task_type="SEQ_CLS",
        insertion_layer=3,
        generator="mppg",
        id2label={0: "no", 1: "yes", 2: "?"},
    )
    config.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert '"peft_type": "LPT"' in text
    assert '"target_modules' not in text
    back = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(back, LPTConfig)
    assert back.id2label == {0: "no", 1: "yes", 2: "?"} and back.num_labels == 3
    assert back.peft_type == "LPT" and back.peft_type.value == "LPT"
    assert back.insertion_layer == 3 and back.generator == "mppg"


def test_the_command_line_knows_the_same_choices():
    """It has its own lists, for it starts before PEFT is imported."""
    from lpt_fast.cache import shard
    from lpt_fast.cli import arguments, precompute_arguments
    from lpt_fast.method import config

    assert arguments.UPPER == config.UPPER
    assert set(precompute_arguments.STORES) == set(shard.STORES)
