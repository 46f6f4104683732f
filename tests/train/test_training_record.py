"""Checkpoints say what they were trained with; a training that resumes is compared with it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from lpt_fast import LPTConfig, LPTTrainer
from lpt_fast.train.exact_resume import CountedTraining
from lpt_fast.train.training_record import FILE
from tests.tiny import tiny
from tests.train.cases import Stop, arguments, collate, rows, trained


class Counted(CountedTraining, Trainer):
    pass


def model_with(names=("bad", "good"), change=None, moved=None, **config):
    base = tiny("bert", "SEQ_CLS", id2label=dict(enumerate(names)))
    base.config._name_or_path = moved or "here"
    if change:
        with torch.no_grad():
            change(base)
    torch.manual_seed(3)
    settings = {"generator": "npg"}
    settings |= {"insertion_layer": 2, "bottleneck_size": 8, "num_virtual_tokens": 3, **config}
    return get_peft_model(base, LPTConfig(task_type="SEQ_CLS", **settings))


def train(model, folder, resume=None, cls=LPTTrainer, facts=None, **settings):
    settings = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1, **settings}
    stop = [] if resume else [Stop(2)]
    trainer = cls(model, arguments(folder, **settings), collate, rows(), callbacks=stop)
    trainer.facts = facts or {}
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    train(model_with(), folder, facts={"task": "films", "max_length": 32, "columns": ["a", "b"]})
    return folder


def test_what_a_checkpoint_says(stopped):
    content = json.loads((stopped / "checkpoint-2" / FILE).read_text())
    assert len(content.pop("weights")) == 32
    assert content == {
        "labels": ["bad", "good"],
        "model": "here",
        "insertion_layer": 2,
        "generator": "npg",
        "num_virtual_tokens": 3,
        "compute_dtype": None,
        "bottleneck_size": 8,
        "lora_r": None,
        "lora_alpha": None,
        "lora_dropout": 0.0,
        "lora_target_modules": None,
        "dtype": "float32",
        "task": "films",
        "max_length": 32,
        "columns": ["a", "b"],
    }


def first_layer(base):
    base.bert.encoder.layer[0].output.dense.weight[0, 0] += 1e-3


REFUSED = {
    "renamed": (
        {"names": ("worse", "better")},
        "class names: class 0 is 'bad' there, 'worse' here",
    ),
    "swapped": ({"names": ("good", "bad")}, "class names: class 0 is 'bad' there, 'good' here"),
    "added": (
        {"names": ("bad", "good", "neutral")},
        r"class names: 2 classes there, 3 here \('neutral' is new\)",
    ),
    "gone": ({"names": ("good",)}, r"class names: 2 classes there, 1 here \('bad' is gone\)"),
    "cut": ({"insertion_layer": 1}, "insertion_layer: 2 there, 1 here"),
    "generator": ({"generator": "mppg"}, "generator: 'npg' there, 'mppg' here"),
    "prompt": ({"num_virtual_tokens": 4}, "num_virtual_tokens: 3 there, 4 here"),
    "bottleneck": ({"bottleneck_size": 4}, "bottleneck_size: 8 there, 4 here"),
    "dtype": ({"change": lambda base: base.bfloat16()}, "dtype: 'float32' there, 'bfloat16' here"),
    "weights": ({"change": first_layer}, "model weights: 'here' there, 'here' here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused_by_name(stopped, tmp_path, case):
    settings, message = REFUSED[case]
    model = model_with(**settings)
    before = trained(model)
    with pytest.raises(ValueError, match=f"was trained with other {message}; give") as error:
        train(model, tmp_path, str(stopped / "checkpoint-2"))
    assert len(str(error.value)) <= 300 + len(str(stopped)) and "\n" not in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in trained(model).items())


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"task": "books"}, "task: 'films' there, 'books' here"),
        ({"task": None}, "task: 'films' there, None here"),
        ({"max_length": 31}, "max_length: 32 there, 31 here"),
        ({"columns": ("b", "a")}, r"columns: \['a', 'b'\] there, \['b', 'a'\] here"),
    ],
)
def test_other_facts_are_refused(stopped, tmp_path, facts, message):
    with pytest.raises(ValueError, match=f"with other {message}"):
        train(model_with(), tmp_path, str(stopped / "checkpoint-2"), facts=facts)


def test_a_thousand_classes_make_a_short_message(tmp_path):
    names = [f"class number {i}" for i in range(1500)]
    train(model_with(names), tmp_path / "a")
    names[1234] = "x" * 500
    with pytest.raises(ValueError, match="class 1234 is 'class number 1234' there") as error:
        train(model_with(names), tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"))
    assert len(str(error.value)) <= 300 + len(str(tmp_path))


@pytest.mark.parametrize("names", [("bad", "good"), ("LABEL_0", "LABEL_1")])
def test_the_same_goes_on(stopped, tmp_path, names):
    """From another place too: what lies there is compared, not where; a model without names has
    none to compare.
    """
    trainer = train(model_with(names, moved="there"), tmp_path, str(stopped / "checkpoint-2"))
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("left", ["nothing", "adapter"])
def test_older_checkpoints(tmp_path, left):
    """Without a record they go on; what PEFT wrote beside the adapter is looked at."""
    train(model_with(), tmp_path / "a")
    checkpoint = tmp_path / "a" / "checkpoint-2"
    (checkpoint / FILE).unlink()
    if left == "nothing":
        content = json.loads((checkpoint / "adapter_config.json").read_text())
        content |= {"id2label": None}
        (checkpoint / "adapter_config.json").write_text(json.dumps(content))
    assert train(model_with(), tmp_path / "b", str(checkpoint)).state.global_step == 4
    if left == "adapter":
        with pytest.raises(ValueError, match="class 0 is 'bad' there, 'worse' here"):
            train(model_with(("worse", "better")), tmp_path / "c", str(checkpoint))
        with pytest.raises(ValueError, match="insertion_layer: 2 there, 3 here"):
            train(model_with(insertion_layer=3), tmp_path / "c", str(checkpoint))
        return
    with pytest.raises(ValueError, match="does not fit the model: size mismatch for .* give the"):
        train(model_with(("bad", "good", "new")), tmp_path / "c", str(checkpoint))


def test_a_record_that_is_none(tmp_path):
    train(model_with(), tmp_path / "a")
    checkpoint = tmp_path / "a" / "checkpoint-2"
    for content in ("{", "[1]", '"x"'):
        (checkpoint / FILE).write_text(content)
        with pytest.raises(ValueError, match=f"{FILE} cannot be read"):
            train(model_with(), tmp_path / "b", str(checkpoint))


def test_a_cache_changes_nothing(tmp_path):
    """The frozen layers are the same, so a run from the text goes on from a cache."""
    train(model_with(), tmp_path / "a")
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    with pytest.raises(ValueError, match="class 0 is 'bad' there, 'worse' here"):
        LPTTrainer(
            model_with(("worse", "better")),
            arguments(tmp_path / "b"),
            collate,
            rows(),
            activation_cache=tmp_path / "cache",
        ).train(resume_from_checkpoint=checkpoint)


def test_methods_without_a_late_prompt(tmp_path):
    """The command line trains them too."""

    def lora(names):
        base = tiny("bert", "SEQ_CLS", id2label=dict(enumerate(names)))
        return get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2))

    train(lora(("bad", "good")), tmp_path / "a", cls=Counted)
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    assert train(lora(("bad", "good")), tmp_path / "b", checkpoint, Counted).state.global_step == 4
    with pytest.raises(ValueError, match="class 1 is 'good' there, 'fine' here"):
        train(lora(("bad", "fine")), tmp_path / "c", checkpoint, Counted)


def test_an_adapter_that_was_loaded(tmp_path, caplog):
    """Its names are those that its head knows; a model that has others is told so."""
    model_with().save_pretrained(tmp_path / "adapter")
    said = []
    for names in (("bad", "good"), ("LABEL_0", "LABEL_1"), ("bad", "good", "new"), ("good", "bad")):
        caplog.clear()
        base = tiny("bert", "SEQ_CLS", id2label=dict(enumerate(names)))
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        trainer = LPTTrainer(model, arguments(tmp_path / "out"), collate, rows())
        assert trainer.all_facts()["labels"] == ["bad", "good"]
        said.append([line for line in caplog.messages if "names its classes" in line])
    assert said[:3] == [[], [], []]
    assert "(class 0 is 'bad' in the adapter, 'good' in the model)" in said[3][0]
