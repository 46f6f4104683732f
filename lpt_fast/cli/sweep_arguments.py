"""The settings of `lpt-fast sweep`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from .arguments import DataArguments, TrainArguments, check_counts, one_of, option
from .settings import default_of
from .sweep_space import KINDS, OF_LORA, Axis, Space, parse_axis, parse_seeds

SAMPLERS = ("grid", "tpe")
NO_LORA = Axis("lora_r", (None,))
_TRAIN = {f.name: f for f in fields(TrainArguments)}
# What may differ between two runs of one study.
_FREE = ("trials", "sampler", "prune", "group", "output_dir", "activation_cache", "use_cpu")
# Where data and model lie; what is in them counts.
_PLACES = ("model", "task", "dataset", "train_file", "validation_file")


def _same(name: str) -> Any:
    """A setting as `lpt-fast train` has it."""
    f = _TRAIN[name]
    made = option(f.default if f.default is not MISSING else f.default_factory, "", "")
    made.metadata = f.metadata
    return made


def _axis(name: str) -> Any:
    """The same as an axis of the space."""
    default = default_of(_TRAIN[name])
    text = _TRAIN[name].metadata["help"]
    return option(None if default is None else str(default), text, "Space (A,B or A..B)")


@dataclass
class SweepArguments(DataArguments):
    """Settings of `lpt-fast sweep`. Those of the space are text: `2,3,4` is a list to choose from,
    `5e-4..5e-3` a range, one value is fixed. The others are those of `lpt-fast train`.
    """

    model: str | None = _same("model")
    formulation: str = _same("formulation")
    torch_dtype: str = _same("torch_dtype")

    insertion_layer: str | None = _axis("insertion_layer")
    generator: str = _axis("generator")
    num_virtual_tokens: str = _axis("num_virtual_tokens")
    bottleneck_size: str = _axis("bottleneck_size")
    prompt_dropout: str | None = _axis("prompt_dropout")
    learning_rate: str | None = _axis("learning_rate")
    lora_r: str | None = _axis("lora_r")
    lora_alpha: str | None = _axis("lora_alpha")
    lora_dropout: str | None = _axis("lora_dropout")
    lora_learning_rate: str | None = _axis("lora_learning_rate")
    seed: str = option("42", "Each setting is run with all of these seeds.", "Space (A,B or A..B)")

    trials: int = option(40, "Most trainings; a setting takes one for each seed.", "Search")
    sampler: str | None = option(
        None,
        "grid (every setting once) or tpe (Optuna's). Default: grid where there are only lists, of "
        "at most --trials trainings; else tpe.",
        "Search",
    )
    prune: bool | None = option(
        None,
        "Stop trainings that are below the median after some epochs, from the sixth on. Default: "
        "under tpe.",
        "Search",
    )
    group: int = option(
        8, "Most trainings of a layer and seed that train in the same steps.", "Search"
    )

    task: str | None = _same("task")
    dataset: str | None = _same("dataset")
    train_file: str | None = _same("train_file")
    validation_file: str | None = _same("validation_file")
    max_train_samples: int | None = _same("max_train_samples")
    max_eval_samples: int | None = _same("max_eval_samples")
    few_shot: int | None = _same("few_shot")

    activation_cache: str | None = _same("activation_cache")
    upper: str | None = _same("upper")
    compute_dtype: str | None = _same("compute_dtype")

    output_dir: str = _same("output_dir")
    upper_dropout: bool = _same("upper_dropout")
    lora_target_modules: str | None = _same("lora_target_modules")
    num_train_epochs: float = _same("num_train_epochs")
    per_device_train_batch_size: int = _same("per_device_train_batch_size")
    per_device_eval_batch_size: int = _same("per_device_eval_batch_size")
    gradient_accumulation_steps: int = _same("gradient_accumulation_steps")
    weight_decay: float = _same("weight_decay")
    warmup_steps: float = _same("warmup_steps")
    lr_scheduler_type: str = _same("lr_scheduler_type")
    label_smoothing_factor: float = _same("label_smoothing_factor")
    max_grad_norm: float = _same("max_grad_norm")
    group_by_length: bool = _same("group_by_length")
    bf16: bool = _same("bf16")
    fp16: bool = _same("fp16")
    use_cpu: bool = _same("use_cpu")

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, "trials", "group")
        if self.sampler is not None:
            one_of("sampler", self.sampler, SAMPLERS)
        space = self.space()
        if self.trials < len(space.seeds):
            raise ValueError(
                f"`--trials` is {self.trials} with {len(space.seeds)} seeds, expected at least one "
                "training for each seed; raise it, or give fewer seeds."
            )
        if self.few_shot is None and not (self.validation_file or self.dataset):
            raise ValueError(
                "A sweep chooses by validation data and got none, expected labelled rows that "
                "nothing trains on; give --validation_file, a --dataset with such a split, or "
                "--few_shot."
            )
        self.train_arguments({}, space.seeds[0])  # whose checks are these settings' too

    def space(self) -> Space:
        """The axes and seeds.

        Raises:
            ValueError: as of `parse_axis`, or for a space with nothing in it.
        """
        given = {name: getattr(self, name) for name in KINDS}
        axes = {name: parse_axis(name, text) for name, text in given.items() if text is not None}
        space = Space(axes, parse_seeds(self.seed))
        for name in OF_LORA:
            if name in axes and axes.get("lora_r", NO_LORA).choices == [None]:
                raise ValueError(
                    f"`--{name}` got {given[name]} without late LoRA, expected --lora_r beside it; "
                    "give a rank, or leave it out."
                )
        if space.settings() == []:
            raise ValueError(
                f"`--generator` got {self.generator!r} without late LoRA, expected something to "
                "train; give --lora_r, or another generator."
            )
        return space

    def train_arguments(self, setting: dict[str, Any], seed: int, **more: Any) -> TrainArguments:
        """Those of `lpt-fast train` that make one training of the sweep.

        Args:
            setting: values of the axes.
            seed: of the training.
            more: what differs beside.
        """
        shared = {f.name for f in fields(self)} & set(_TRAIN) - set(KINDS) - {"seed"}
        same = {name: getattr(self, name) for name in shared}
        return TrainArguments(**(same | {"save_strategy": "no", "seed": seed} | setting | more))

    def fixed(self) -> dict[str, str]:
        """What all runs of one study have in common beside data and model, as text."""
        left_out = (*_FREE, *_PLACES)
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        space = self.space()
        said = {name: str(axis) for name, axis in space.axes.items()}
        said["seed"] = ",".join(map(str, space.seeds))
        return {name: said.get(name, str(value)) for name, value in given.items()}
