"""Training by CUDA graphs (imitated): the same weights, by the Trainer."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback, TrainingArguments

from lpt_fast import LPTTrainer
from lpt_fast.backbone.families import find_backbone
from lpt_fast.packed import graphs
from lpt_fast.packed.graphs import UpperGraphs
from tests.packed.cases import Imitation
from tests.train.cases import assert_same as assert_same_weights
from tests.train.cases import cached as cached_trainer
from tests.train.cases import model_of, new_model, rows, trained


def test_the_trainer_says_where_graphs_run(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="trains on 'cpu', expected a CUDA device"):
        LPTTrainer(new_model(), args, train_dataset=rows(4), cuda_graphs=True)
    for wanted in (None, False):
        trainer = LPTTrainer(new_model(), args, train_dataset=rows(4), cuda_graphs=wanted)
        assert not trainer._takes_graphs()


class _Watch(TrainerCallback):
    """What the graphs of a training did, seen from within."""

    def __init__(self):
        self.graphs: UpperGraphs | None = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.graphs = find_backbone(model)[1].late_prompt.graphs


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_training_by_graphs_gives_the_same_weights(family, tmp_path, monkeypatch):
    """Accumulation, evaluation between, a checkpoint and going on from it."""
    monkeypatch.setattr(graphs, "STEP", 16)
    monkeypatch.setattr(graphs, "CudaCapture", lambda: Imitation)
    settings = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 6,
        "eval_dataset": rows(16, seed=1),
    }
    ends = []
    for by_graphs, resume in ((False, None), (True, None), (True, "checkpoint-6")):
        monkeypatch.setattr(LPTTrainer, "_takes_graphs", lambda self, yes=by_graphs: yes)
        model, watch = model_of(family), _Watch()
        folder = tmp_path / ("graphs" if by_graphs else "plain")
        trainer = cached_trainer(model, folder, tmp_path / "cache", callbacks=[watch], **settings)
        trainer.train(resume_from_checkpoint=resume and str(folder / resume))
        assert find_backbone(model)[1].late_prompt.graphs is None  # it ends with the training
        assert by_graphs == (watch.graphs is not None and watch.graphs.replayed > 4)
        ends.append(trained(model))
    for end in ends[1:]:
        assert_same_weights(end, ends[0], atol=1e-6, rtol=1e-4)
