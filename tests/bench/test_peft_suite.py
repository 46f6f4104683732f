"""PEFT's tests with our method: how their lists are replaced, and a run of stand-ins for them."""

from __future__ import annotations

import pytest

from bench import peft_suite

LISTS = """
import pytest
from peft import LoraConfig

from .testing_utils import set_init_weights_false

PEFT_SEQ_CLS_MODELS_TO_TEST = [
    "somebody/a-model",
]
ALL_CONFIGS = [
    (
        LoraConfig,
        {"task_type": "SEQ_CLS"},
    ),
]
OTHER = [1, 2]
"""
TESTS = """

@pytest.mark.parametrize("model_id", PEFT_SEQ_CLS_MODELS_TO_TEST)
@pytest.mark.parametrize("config_cls,config_kwargs", ALL_CONFIGS)
def test_forward(model_id, config_cls, config_kwargs):
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(model_id)
    kwargs = set_init_weights_false(config_cls, config_kwargs)
    model = get_peft_model(model, config_cls(base_model_name_or_path=model_id, **kwargs))
    assert model.peft_type == "LPT"
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 2)


def test_that_fails():
    assert OTHER == [1]
"""


def test_lists_are_replaced():
    made = {}
    source = peft_suite.with_ours(LISTS, "SEQ_CLS", ["/models/one", "/models/two"])
    source = source.replace("from .testing_utils import set_init_weights_false", "")
    exec(source, made)
    assert made["PEFT_SEQ_CLS_MODELS_TO_TEST"] == ["/models/one", "/models/two"]
    assert made["OTHER"] == [1, 2]
    methods = {(cls.__name__, kw["task_type"], kw["generator"]) for cls, kw in made["ALL_CONFIGS"]}
    assert methods == {("LPTConfig", "SEQ_CLS", g) for g in peft_suite.GENERATORS}


def test_a_folder_that_is_not_pefts(tmp_path, capsys):
    assert peft_suite.main(["--peft", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "expected PEFT's sources" in said and str(tmp_path) in said


@pytest.mark.slow
def test_a_run(tmp_path, capfd):
    folder = tmp_path / "tests"
    folder.mkdir()
    for name in ("__init__", "conftest", "testing_common"):
        (folder / f"{name}.py").write_text("")
    broken = "def set_init_weights_false(config_cls, kwargs):\n    return {'init_weights': False}\n"
    (folder / "testing_utils.py").write_text(broken)
    (folder / "test_seq_classifier.py").write_text(LISTS + TESTS)
    before = sorted(path.name for path in folder.iterdir())
    assert peft_suite.main(["--peft", str(tmp_path), "--suite", "test_seq_classifier"]) == 1
    said = capfd.readouterr().out
    # Three models by three generators; what fails is counted as failed.
    assert "| test_forward | 9 | 0 | 0 |" in said and "| test_that_fails | 0 | 1 | 0 |" in said
    assert sorted(path.name for path in folder.iterdir()) == before
