"""The trainings of a sweep, on one loaded model and one cache.

`run_group` is all that a sweep knows of training: trials of one layer and seed go in, accuracies
come out.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from ..backbone.families import find_backbone, get_layers
from ..cache import ActivationCache
from ..cache.build_settings import BuildReport
from ..cache.identity import hash_weights
from ..train.cached_loading import BUILD_WAIT
from ..train.compute_dtype import choose, parse
from ..train.trainer import find_late_prompt
from .arguments import TrainArguments
from .clock import Clock
from .data import load_tokenizer
from .model import Base, adapt, load_base
from .precompute import choose_device
from .sweep_arguments import SweepArguments
from .sweep_space import Axis, Space
from .sweep_study import SweepTrial
from .task_data import Data, Split, read_data
from .train import build_trainer, rates_of

Report = Callable[[SweepTrial, int, float], bool]


@dataclass
class Outcome:
    """What a training gave.

    Attributes:
        curve: accuracy on the validation data after each epoch, in [0, 1].
        pruned: whether it was stopped before its end.
        seconds: of training, without evaluations.
        parameters: that were trained.
    """

    curve: list[float] = field(default_factory=list)
    pruned: bool = False
    seconds: float = 0.0
    parameters: int = 0


class Shared:
    """What the trainings of a sweep have in common: the model's weights, tokenised data, an open
    cache of each layer.

    Args:
        args: of the sweep.

    Raises:
        ValueError: for data or a model that cannot be used, and a layer that it does not have.
    """

    def __init__(self, args: SweepArguments):
        self.args = args
        space = args.space()
        self._data: dict[int, Data] = {}
        for seed in space.seeds:
            self._data[seed] = self._read(seed)
        first = space.seeds[0]
        arguments = args.train_arguments({}, first)
        self.tokenizer = load_tokenizer(args.model)
        self.base: Base = load_base(arguments, self._data[first], self.tokenizer)
        self.space = self._with_layer(space)
        weights = self.base.model.state_dict()
        self._weights = {k: v for k, v in weights.items() if k not in self.base.fresh}
        self._examples: dict[int, tuple[list, list]] = {}
        for seed in space.seeds:
            self._examples[seed] = self._encoded(seed)
        self.caches: dict[int, ActivationCache] = {}

    # -- data --------------------------------------------------------------------------------------

    @property
    def _sampled(self) -> bool:
        """Whether each seed draws rows of its own."""
        args = self.args
        return any((args.few_shot, args.max_train_samples, args.max_eval_samples))

    def _read(self, seed: int) -> Data:
        if self._data and not self._sampled:
            return next(iter(self._data.values()))
        data = read_data(self.args.train_arguments({}, seed))
        if data.validation is None:
            raise ValueError(
                f"A sweep chooses by validation data and {self.args.dataset} has none, expected a "
                "validation split; give --validation_file or --few_shot."
            )
        known = next(iter(self._data.values()), data).labels
        if data.labels != known:
            raise ValueError(
                f"The samples of two seeds have {len(known)} and {len(data.labels)} classes, "
                "expected the same ones; raise --max_train_samples, or leave it out."
            )
        return data

    def _encoded(self, seed: int) -> tuple[list, list]:
        if self._examples and not self._sampled:
            return next(iter(self._examples.values()))
        data, encode = self._data[seed], self.base.formulation.encode

        def examples(split: Split) -> list[dict]:
            return encode(self.tokenizer, split.texts, split.labels, split.origin)

        return examples(data.train), examples(data.validation)

    def examples(self, seed: int) -> tuple[list, list]:
        """Those of a seed, for training and for validation."""
        return self._examples[seed]

    # -- model -------------------------------------------------------------------------------------

    def _with_layer(self, space: Space) -> Space:
        """The space with the default layer in it.

        Raises:
            ValueError: a layer that the model does not have.
        """
        _, backbone, family = find_backbone(self.base.model)
        depth = len(get_layers(backbone, family))
        axis = space.axes.get("insertion_layer") or Axis("insertion_layer", (depth // 2,))
        highest = max(axis.choices)
        if highest > depth - 1:
            raise ValueError(
                f"`--insertion_layer` got {highest}, expected layers from 1 to {depth - 1} of "
                f"{self.args.model}, which has {depth}; leave out what is beyond."
            )
        return Space({"insertion_layer": axis} | space.axes, space.seeds)

    def fresh_model(self, seed: int) -> nn.Module:
        """The base model as `lpt-fast train` has it when it was loaded with a seed: what its files
        lack is drawn anew, and the random numbers go on from there. The other weights are those of
        all trainings.
        """
        set_seed(seed)
        config = copy.deepcopy(self.base.model.config)
        cls, dtype = type(self.base.model), getattr(torch, self.args.torch_dtype)
        return cls.from_pretrained(None, config=config, state_dict=self._weights, dtype=dtype)

    def arguments(self, trial: SweepTrial) -> TrainArguments:
        """Those of `lpt-fast train` for a trial."""
        return self.args.train_arguments(trial.setting, trial.seed)

    # -- what makes the study ----------------------------------------------------------------------

    def facts(self) -> dict[str, str]:
        """What all trials of one study have in common: digests of data and model, settings."""
        digest = hashlib.sha256()
        for data in self._data.values() if self._sampled else [next(iter(self._data.values()))]:
            for split in (data.train, data.validation):
                content = [split.texts, [data.labels[i] for i in split.labels]]
                digest.update(json.dumps(content).encode())
        task = self.base.formulation.to_json()["task"]
        digest.update(json.dumps(task, sort_keys=True).encode())
        weights = nn.Module()
        for name, tensor in self._weights.items():
            weights.register_buffer(name.replace(".", "/"), tensor)
        return {
            "data": digest.hexdigest()[:16],
            "model": f"{self.base.model.config.model_type} {hash_weights(weights)[:16]}",
            **self.args.fixed(),
        }

    # -- the cache ---------------------------------------------------------------------------------

    def fill(self) -> BuildReport:
        """Fills the caches of all layers of the space in one pass, with what they lack; several
        processes wait for each other.
        """
        args, seed = self.args, self.space.seeds[0]
        folder = Path(args.activation_cache or Path(args.output_dir) / "cache")
        layers = self.space.axes["insertion_layer"].choices
        model = self.fresh_model(seed).requires_grad_(False).to(choose_device(args.use_cpu))
        cache = ActivationCache.open(folder, model, insertion_layer=layers[0])
        dtype = None if len(cache) else self._compute_dtype(layers[0])
        kept = {id(pair): pair for pair in self._examples.values()}.values()
        texts = [example for pair in kept for part in pair for example in part]
        cache = ActivationCache.open(folder, compute_dtype=dtype)
        report = cache.build(
            model,
            texts,
            insertion_layer=layers,
            wait=BUILD_WAIT,
            progress=True,
            provenance={"model": args.model},
        )
        for layer in layers:
            self.caches[layer] = ActivationCache.open(
                folder, model, insertion_layer=layer, compute_dtype=dtype
            )
        return report

    def _compute_dtype(self, layer: int) -> str | None:
        """That in which LPTTrainer would fill a new cache."""
        if choose_device(self.args.use_cpu).type != "cpu":
            return None
        arguments = self.args.train_arguments({"insertion_layer": layer, "generator": "npg"}, 0)
        late = find_late_prompt(adapt(self.fresh_model(0), arguments, self.base.task_type))
        autocast = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        dtype = choose(late, parse(self.args.compute_dtype), autocast)
        return None if dtype is None else str(dtype).removeprefix("torch.")


class _Watch(TrainerCallback):
    """Tells of each evaluation of each training, and stops those that are pruned.

    Args:
        parts: what each training gives, by the name of its accuracy.
        drop: stops the training of a name.
    """

    def __init__(
        self,
        parts: dict[str, tuple[SweepTrial, Outcome]],
        report: Report,
        drop: Callable[[str], None] | None,
    ):
        self.parts, self.report, self.drop = dict(parts), report, drop

    def on_evaluate(self, args, state, control, metrics=None, **more):
        for name, (trial, outcome) in list(self.parts.items()):
            accuracy = metrics[f"eval_{name}accuracy"]
            outcome.curve.append(accuracy)
            if not self.report(trial, len(outcome.curve), accuracy):
                continue
            outcome.pruned = True
            del self.parts[name]
            if self.drop is not None:
                self.drop(name.removesuffix("_"))
            if not self.parts:
                control.should_training_stop = True


def run_group(
    group: list[SweepTrial], shared: Shared, report: Report
) -> Iterator[tuple[SweepTrial, Outcome]]:
    """Trains trials of one insertion layer and seed in the same steps, each as `lpt-fast train`
    would: the same start, order of the data and learning rates; dropout draws other numbers. A
    single one is trained exactly so.

    Args:
        group: the trials.
        shared: what they have in common.
        report: is called with a trial, its epoch (from 1) and the accuracy after it; whether to
            stop that training.

    Yields:
        each trial with what it gave, when it is done. Seconds are its part of the group's.
    """
    args = shared.args
    # (Smoothed losses are the Trainer's, and what drops out above k runs for each by itself.)
    apart = args.label_smoothing_factor != 0 or args.upper_dropout or args.upper == "padded"
    for trials in [[trial] for trial in group] if apart else [group]:
        yield from _train(trials, shared, report)


def _train(trials, shared: Shared, report: Report) -> Iterator[tuple[SweepTrial, Outcome]]:
    several = len(trials) > 1
    names = [f"trial{i}" for i in range(len(trials))]
    arguments = [shared.arguments(trial) for trial in trials]
    seed = trials[0].seed
    model = adapt(shared.fresh_model(seed), arguments[0], shared.base.task_type)
    if several:
        # Each starts as it would alone, where it is the first to draw from the seed.
        for name, own in zip(names, arguments, strict=True):
            single = adapt(shared.fresh_model(seed), own, shared.base.task_type)
            model.add_adapter(name, copy.deepcopy(single.peft_config["default"]))
            state = get_peft_model_state_dict(single, adapter_name="default")
            set_peft_model_state_dict(model, state, adapter_name=name)
        model.set_adapter(names[0])
        model.delete_adapter("default")
        set_seed(seed)
    train_set, validation = shared.examples(seed)
    adapters = dict(zip(names, map(rates_of, arguments), strict=True)) if several else None
    trainer = build_trainer(
        arguments[0],
        model,
        shared.base.formulation,
        shared.tokenizer,
        train_set,
        validation,
        shared.caches[trials[0].layer],
        adapters,
        progress=False,
    )
    trainer.remove_callback(PrinterCallback)  # which takes the bars' place
    outcomes = [Outcome() for _ in trials]
    for name, outcome in zip(names, outcomes, strict=True):
        own = trainer.parts[name] if several else model
        outcome.parameters = sum(p.numel() for p in own.parameters() if p.requires_grad)
    keys = [f"{name}_" for name in names] if several else [""]
    parts = dict(zip(keys, zip(trials, outcomes, strict=True), strict=True))
    clock = Clock()
    trainer.add_callback(clock)  # before what reports, whose seconds are no training
    trainer.add_callback(_Watch(parts, report, trainer.drop if several else None))
    clock.start()
    trainer.train()
    for trial, outcome in zip(trials, outcomes, strict=True):
        outcome.seconds = clock.seconds / len(trials)
        yield trial, outcome
