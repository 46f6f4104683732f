"""The figures on the card of a trained adapter are those of the weights that were saved."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from transformers import TrainerState

from lpt_fast import LPTTrainer
from lpt_fast.train.figures import evaluated
from tests.train.cases import arguments, collate, model_of, rows


def log(*entries) -> TrainerState:
    return TrainerState(log_history=list(entries), best_global_step=4)


FIRST = {"eval_loss": 0.25, "eval_accuracy": 0.75, "eval_runtime": 1.0, "step": 4, "epoch": 1.0}
LAST = {"eval_loss": 0.5, "eval_accuracy": 0.5, "eval_runtime": 1.0, "step": 8, "epoch": 2.0}
END = {"train_runtime": 9.0, "train_loss": 0.4, "step": 8}
TEST = {"test_loss": 0.3, "test_runtime": 1.0, "test_samples_per_second": 3.0, "step": 8}


@pytest.mark.parametrize(
    ("entries", "best", "expected"),
    [
        ((), False, {}),
        (({"loss": 0.7, "step": 2}, END), False, {}),
        ((FIRST,), True, {"loss": 0.25, "accuracy": 0.75, "step": 4}),
        ((FIRST, LAST), True, {"loss": 0.5, "accuracy": 0.5, "step": 8}),  # a checkpoint
        ((FIRST, LAST, END), False, {"loss": 0.5, "accuracy": 0.5, "step": 8}),
        ((FIRST, LAST, END), True, {"loss": 0.25, "accuracy": 0.75, "step": 4}),
        ((FIRST, LAST, END, {**LAST, "eval_loss": 0.1}), True, {"loss": 0.1, "step": 4}),
    ],
)
def test_figures_of_the_weights(entries, best, expected):
    got = evaluated(log(*entries), best)
    names = {"loss": "eval_loss", "accuracy": "eval_accuracy", "step": "eval: steps of training"}
    for name, value in expected.items():
        assert got[names[name]] == value
    assert bool(got) == bool(expected) and not any("runtime" in name for name in got)


def test_every_evaluation_has_its_figures():
    got = evaluated(log(FIRST, END, TEST), True)
    assert (got["test_loss"], got["test: steps of training"], got["eval_loss"]) == (0.3, 4, 0.25)
    assert "test_samples_per_second" not in got


def test_the_card_has_the_figures(tmp_path):
    """In a checkpoint and in the end; a save without a Trainer, of weights that nobody has
    evaluated, has none.
    """
    model = model_of()
    args = arguments(
        tmp_path / "out", num_train_epochs=1, eval_strategy="epoch", save_strategy="epoch"
    )
    trainer = LPTTrainer(
        model, args, data_collator=collate, train_dataset=rows(16), eval_dataset=rows(8)
    )
    trainer.train()
    (loss,) = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    for folder in ("out/checkpoint-2", "final"):
        if folder == "final":
            trainer.save_model(str(tmp_path / folder))
        lines = ModelCard.load(tmp_path / folder / "README.md").text.splitlines()
        assert f"| eval\\_loss | {loss:.6g} |" in lines
        assert "| eval: steps of training | 2 |" in lines
    model.save_pretrained(tmp_path / "final")
    assert "Figures" not in ModelCard.load(tmp_path / "final" / "README.md").text


def test_trainers_own_card_keeps_what_opens_the_adapter(tmp_path):
    args = arguments(tmp_path, num_train_epochs=1)
    trainer = LPTTrainer(model_of(), args, data_collator=collate, train_dataset=rows(8))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.lstrip().startswith("<!--") and "## Training procedure" in card.text
    assert "import lpt_fast" in card.text and "LPT" in card.data.tags
