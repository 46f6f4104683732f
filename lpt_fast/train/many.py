"""ManyTrainer: several adapters of one frozen model trained in the same steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from ..method.groups import Group, heads_of
from ..method.mixed import run_groups
from ..packed.stack import first_updated
from .exact_resume import WEIGHT
from .learning_rates import give_rate
from .trainer import LPTTrainer, find_late_prompt

_RATES = ("learning_rate", "lora_learning_rate")


class ManyTrainer(LPTTrainer):
    """Trains N adapters at once, each on every batch: one pass over the frozen layers, one read of
    the cache, and what the first layer makes of the text rows once for all. Each adapter has its
    own prompt, late LoRA, head, learning rates and gradient clipping, so that it becomes what
    LPTTrainer makes of it alone with the same order of the data (dropout draws other numbers).

    Example:
        model = get_peft_model(base, LPTConfig(...), adapter_name="a")
        model.add_adapter("b", LPTConfig(...))
        trainer = ManyTrainer(
            model, args, train_dataset=rows, activation_cache="cache",
            adapters={"a": {"learning_rate": 1e-3}, "b": {"learning_rate": 4e-3}},
        )
        trainer.train()

    `parts` are the modules that train, by the name of their adapter. `loss` and `eval_loss` are
    sums over the adapters; metrics have the adapter's name, `eval_a_accuracy`, and without one
    they are means.

    Args:
        model, args, more, named: as of LPTTrainer.
        adapters: names of the model's adapters, with one insertion layer; each with
            `learning_rate` and `lora_learning_rate`, where other than `args.learning_rate`.

    Raises:
        ValueError: as of LPTTrainer; for adapters that cannot train together, several processes,
            checkpoints, and losses of the Trainer's own.
    """

    def __init__(self, model, args, *more, adapters: Mapping[str, Mapping[str, float]], **named):
        self.adapters = {name: dict(rates) for name, rates in adapters.items()}
        _check(model, self.adapters)
        late = _prepared(model, list(self.adapters))
        self.parts = {name: _parts_of(late, name) for name in self.adapters}
        super().__init__(model, args, *more, **named)
        self._check_alone()
        if self.compute_metrics is not None:
            self._metrics_of_one, self.compute_metrics = self.compute_metrics, self._metrics_of_all
        if self.preprocess_logits_for_metrics is not None:
            own = self.preprocess_logits_for_metrics
            self.preprocess_logits_for_metrics = lambda logits, labels: tuple(
                own(x, labels) for x in logits
            )

    def _check_alone(self) -> None:
        args = self.args
        for name, wrong, expected in (
            ("save_strategy", args.save_strategy != "no", "'no': save the adapters afterwards"),
            ("label_smoothing_factor", args.label_smoothing_factor != 0, "0"),
            ("world_size", args.world_size > 1, "1, a single process"),
            ("n_gpu", args.n_gpu > 1, "one GPU"),
        ):
            if wrong:
                raise ValueError(
                    f"ManyTrainer got `{name}` {getattr(args, name)!r}, expected {expected}; or "
                    "train each adapter by an LPTTrainer."
                )
        if self.compute_loss_func is not None or self.optimizer is not None:
            name = "compute_loss_func" if self.compute_loss_func is not None else "optimizers"
            raise ValueError(
                f"ManyTrainer got `{name}`, expected none: each adapter has the model's own loss "
                "and learning rates of its own; leave it out."
            )

    def _has_own_loss(self) -> bool:
        return type(self).compute_loss is not ManyTrainer.compute_loss

    def drop(self, name: str) -> None:
        """Ends the training of one adapter; the others go on. The last one ends the training."""
        self.adapters.pop(name)
        self.parts.pop(name).requires_grad_(False)
        if not self.adapters:
            self.control.should_training_stop = True

    # -- steps -------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of the adapters' losses; with `return_outputs` also their logits."""
        inputs = {name: value for name, value in inputs.items() if name != WEIGHT}
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            inputs["num_items_in_batch"] = num_items_in_batch
        every = tuple(range(len(inputs["labels"])))
        groups = [Group(name, every) for name in self.adapters]
        with self.accelerator.autocast():
            outputs = run_groups(self._late_prompt, groups, inputs)
        loss = torch.stack([out.loss.float() for out in outputs]).sum()
        if not return_outputs:
            return loss
        return loss, {"loss": loss, "logits": tuple(out.logits.float() for out in outputs)}

    def create_optimizer(self, *args, **kwargs):
        """As Trainer's; each adapter has its own learning rates."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            for name, rates in self.adapters.items():
                parts = self.parts[name]
                give_rate(optimizer, parts, rates.get("learning_rate", self.args.learning_rate))
                if rates.get("lora_learning_rate") is not None:
                    give_rate(optimizer, parts["lora"], rates["lora_learning_rate"])
        return optimizer

    def _clip_grad_norm(self, model) -> Tensor:
        """Each adapter's gradient is clipped by itself; gives the largest norm."""
        norms = [
            self.accelerator.clip_grad_norm_(list(parts.parameters()), self.args.max_grad_norm)
            for parts in self.parts.values()
        ]
        return torch.stack(norms).max()

    # -- evaluation --------------------------------------------------------------------------------

    def _metrics_of_all(self, prediction: EvalPrediction) -> dict[str, float]:
        found, every = {}, []
        for name, logits in zip(self.adapters, prediction.predictions, strict=True):
            own = EvalPrediction(predictions=logits, label_ids=prediction.label_ids)
            every.append(self._metrics_of_one(own))
            found |= {f"{name}_{key}": value for key, value in every[-1].items()}
        means = {key: sum(m[key] for m in every) / len(every) for key in every[0]}
        return {**means, **found}


def _check(model: nn.Module, adapters: Mapping[str, Mapping[str, float]]) -> None:
    known = getattr(model, "peft_config", {})
    if not adapters:
        raise ValueError("`adapters` is empty, expected names of the model's adapters; give one.")
    for name, rates in adapters.items():
        if name not in known:
            raise ValueError(
                f"`adapters` names {name!r}, expected adapters of the model: "
                f"{', '.join(map(repr, known)) or 'it has none'}; add it first (add_adapter)."
            )
        for key, rate in rates.items():
            good = isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0
            if key not in _RATES or not (good or (rate is None and key == _RATES[1])):
                raise ValueError(
                    f"`adapters` has {key}={rate!r} for {name!r}, expected a number above 0 for "
                    f"{' or '.join(_RATES)}; correct it."
                )
        if rates.get("lora_learning_rate") is not None and known[name].lora_r is None:
            raise ValueError(
                f"`adapters` has a lora_learning_rate for {name!r}, which has no late LoRA, "
                "expected one that has (lora_r); leave it out."
            )
    layers = {name: known[name].insertion_layer for name in adapters}
    if len(set(layers.values())) > 1:
        raise ValueError(
            f"`adapters` have the insertion layers {layers}, expected one for all: they share the "
            "rows of one layer; train those of each layer together."
        )


def _prepared(model: nn.Module, names: list[str]):
    """All of these train. The active one is one whose rows of the first layer serve all."""
    late = find_late_prompt(model)
    k = model.peft_config[names[0]].insertion_layer
    updated = [n for n in names if first_updated(late.backbone, late.family, k, late.updates(n))]
    model.set_adapter((updated or names)[0])
    model.set_requires_grad([n for n in model.peft_config if n not in names], False)
    model.set_requires_grad(names)
    return late


def _parts_of(late, name: str) -> nn.ModuleDict:
    """What trains of an adapter: prompt, late LoRA, head."""
    heads = [
        module.modules_to_save[name] for module in heads_of(late) if name in module.modules_to_save
    ]
    lora = [late.lpt_lora[name]] if name in late.lpt_lora else []
    parts = {"prompt": late.lpt_generator[name], "heads": nn.ModuleList(heads)}
    return nn.ModuleDict({**parts, "lora": nn.ModuleList(lora)})
