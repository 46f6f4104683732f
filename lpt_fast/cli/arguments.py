"""The settings of the command line: one dataclass a command (settings.py fills them).

Names are those of Hugging Face's example scripts and TrainingArguments. Imports nothing heavy.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

METHODS = ("lpt", "head", "lora", "prompt_tuning", "full")
ADAPTER_METHODS = ("lpt", "lora", "prompt_tuning")  # the others save a whole model
FORMULATIONS = ("classification", "cloze")
UPPER = ("auto", "packed", "padded")
TORCH_DTYPES = ("float32", "bfloat16", "float16")
COMPUTE_DTYPES = ("float32", "bfloat16")
_OF_MODEL = (
    "Of the model on a CPU: float32 or bfloat16. Default: bfloat16 where the processor is found to "
    "multiply it faster."
)


def option(default: Any, help: str, panel: str) -> Any:
    """A setting with its help text and the panel of --help that it stands in."""
    metadata = {"help": help, "panel": panel}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def path(default: Any, help: str, panel: str) -> Any:
    """A setting that is the path of a file or folder, or may be one."""
    return field(default=default, metadata={"help": help, "panel": panel, "path": True})


class Paths:
    """Settings whose paths may begin with `~`, in a YAML file and in `--flag=~/...` too, where no
    shell has put the home folder in its place.
    """

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata.get("path") and value:
                several = isinstance(value, list)
                home = os.path.expanduser
                setattr(self, f.name, [home(v) for v in value] if several else home(value))


@dataclass
class DataArguments(Paths):
    """Where rows come from; shared by training, evaluation and prediction."""

    text_column: str | None = option(
        None,
        "Column of the text; two for pairs, with a comma between. Default: the task's, or 'text'.",
        "Data",
    )
    label_column: str = option("label", "Column of the label.", "Data")
    max_length: int | None = option(
        None,
        "Most tokens of an example; longer texts are cut, templates never. Default: 128, or what "
        "the model takes.",
        "Data",
    )


@dataclass
class TrainArguments(DataArguments):
    """Settings of `lpt-fast train`."""

    model: str | None = path(None, "Model: a hub name or a local folder.", "Model")
    method: str = option(
        "lpt",
        "What is trained: lpt, or for comparison head (pooler and classifier), lora, "
        "prompt_tuning, full.",
        "Model",
    )
    formulation: str = option(
        "classification",
        "'classification' trains a head; 'cloze' predicts label words, at the mask or (causal "
        "models) as next token.",
        "Model",
    )
    torch_dtype: str = option(
        "float32", "Dtype of the frozen model: float32, bfloat16 or float16.", "Model"
    )

    insertion_layer: int | None = option(
        None, "k: frozen layers before the prompt. Default: half.", "Prompt"
    )
    generator: str = option(
        "mppg",
        "static, npg, appg, mppg, attention or residual; none: no prompt, --lora_r alone.",
        "Prompt",
    )
    num_virtual_tokens: int = option(10, "m: prompt rows of an example.", "Prompt")
    bottleneck_size: int = option(128, "r: width of the generator's bottleneck.", "Prompt")
    prompt_dropout: float | None = option(
        None, "Dropout on the prompt. Default: the backbone's.", "Prompt"
    )
    upper_dropout: bool = option(
        False, "Keep dropout in the frozen layers above the insertion.", "Prompt"
    )

    lora_r: int | None = option(
        None,
        "Rank of low-rank updates of the linear layers above the prompt (late LoRA). Default: "
        "none; --method lora, in all layers: 8.",
        "LoRA",
    )
    lora_alpha: float | None = option(
        None, "Updates are scaled by alpha / r. Default: twice the rank.", "LoRA"
    )
    lora_dropout: float | None = option(
        None, "Dropout before them. Default: 0; --method lora: 0.1.", "LoRA"
    )
    lora_target_modules: str | None = option(
        None,
        "Names of linear layers with commas between, or all-linear. Default: all-linear; --method "
        "lora: PEFT's for the model, such as query,value.",
        "LoRA",
    )
    lora_learning_rate: float | None = option(
        None, "Peak learning rate of late LoRA. Default: --learning_rate, or 2e-3.", "LoRA"
    )

    task: str | None = path(
        None,
        "One of the paper's tasks (sst2, mpqa, mr, subj, trec, mnli, ...) or your own YAML file.",
        "Data",
    )
    dataset: str | None = path(
        None, "A hub data set such as glue/sst2, or a folder with its splits.", "Data"
    )
    train_file: str | None = path(
        None, "csv, tsv, json, jsonl or parquet file to train on.", "Data"
    )
    validation_file: str | None = path(None, "The same, evaluated after every epoch.", "Data")
    test_file: str | None = path(None, "The same, evaluated once at the end.", "Data")
    max_train_samples: int | None = option(
        None, "Train on a random sample of so many rows.", "Data"
    )
    max_eval_samples: int | None = option(
        None, "Evaluate on a random sample of so many rows.", "Data"
    )
    few_shot: int | None = option(
        None,
        "The paper's few-shot setting: K examples in all, drawn in proportion to the classes.",
        "Data",
    )

    activation_cache: str | None = path(
        None,
        "Folder of caches of the frozen layers' outputs (lpt-fast precompute); texts that it lacks "
        "are added. Default: run the frozen layers in every epoch.",
        "Speed",
    )
    upper: str | None = option(
        None,
        "How the layers above the prompt run: auto, packed (without padding) or padded. Default: "
        "auto.",
        "Speed",
    )

    compute_dtype: str | None = option(
        None,
        "Of the packed layers on a CPU: float32 or bfloat16. Default: bfloat16 with --bf16, and "
        "where the processor is found to multiply it faster.",
        "Speed",
    )

    output_dir: str = path("out", "Folder for the adapter, checkpoints and results.", "Training")
    learning_rate: float | None = option(
        None, "Peak learning rate. Default: one that suits the method.", "Training"
    )
    num_train_epochs: float = option(5.0, "Passes over the training data.", "Training")
    max_steps: int = option(
        -1, "If positive: so many optimiser steps instead of epochs.", "Training"
    )
    per_device_train_batch_size: int = option(32, "Examples of a step on each device.", "Training")
    per_device_eval_batch_size: int = option(64, "The same in evaluation.", "Training")
    gradient_accumulation_steps: int = option(
        1, "Batches added up for one optimiser step.", "Training"
    )
    weight_decay: float = option(0.01, "AdamW's weight decay.", "Training")
    warmup_steps: float = option(
        0.06, "Steps with a rising learning rate; below 1: a share of all.", "Training"
    )
    lr_scheduler_type: str = option("linear", "Schedule of the learning rate.", "Training")
    label_smoothing_factor: float = option(0.0, "Label smoothing.", "Training")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", "Training")
    group_by_length: bool = option(
        False,
        "Batches of texts of like length: less padding, so faster, but where length tells of the "
        "label a little worse.",
        "Training",
    )
    seed: int = option(
        42, "Seed of initialisation, order, dropout and few-shot sampling.", "Training"
    )
    bf16: bool = option(False, "bf16 autocast.", "Training")
    fp16: bool = option(False, "fp16 autocast with loss scaling.", "Training")
    gradient_checkpointing: bool = option(
        False, "Recompute upper layers in the backward.", "Training"
    )
    load_best_model_at_end: bool = option(
        False, "Keep the epoch with the best validation metric.", "Training"
    )
    eval_steps: int | None = option(
        None, "Steps between evaluations on validation data. Default: one an epoch.", "Training"
    )
    save_strategy: str = option("epoch", "When to save a checkpoint: epoch, steps, no.", "Training")
    save_total_limit: int | None = option(1, "How many checkpoints to keep.", "Training")
    logging_steps: int = option(50, "Steps between two lines of the log.", "Training")
    resume_from_checkpoint: str | None = path(
        None, "Checkpoint folder to go on from; 'last' takes the newest in output_dir.", "Training"
    )
    report_to: str = option("none", "Tracker: none, tensorboard, wandb, mlflow, ...", "Training")
    use_cpu: bool = option(False, "Stay on the CPU where there is a GPU.", "Training")

    def __post_init__(self):
        super().__post_init__()
        one_of("method", self.method, METHODS)
        one_of("formulation", self.formulation, FORMULATIONS)
        one_of("torch_dtype", self.torch_dtype, TORCH_DTYPES)
        if self.upper is not None:
            one_of("upper", self.upper, UPPER)
        if not self.model:
            raise ValueError(
                "`--model` is missing: give a hub name such as roberta-large, or a local folder."
            )
        if not (self.train_file or self.dataset):
            raise ValueError("There is nothing to train on: give --train_file or --dataset.")
        _check_compute_dtype(self.compute_dtype)
        for name in ("activation_cache", "upper", "lora_learning_rate", "compute_dtype"):
            value = getattr(self, name)
            if value is not None and self.method != "lpt":
                raise ValueError(
                    f"`--{name}` goes with --method lpt, got {value!r} with --method "
                    f"{self.method}, which has no late prompt; leave it out."
                )
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
            value = getattr(self, name)
            if value is not None and self.method not in ("lpt", "lora"):
                raise ValueError(
                    f"`--{name}` goes with --method lpt or lora, got {value!r} with --method "
                    f"{self.method}; leave it out."
                )
        if self.formulation == "cloze" and self.method != "lpt":
            raise ValueError(
                f"`--formulation cloze` goes with --method lpt, got --method {self.method}; the "
                "other methods are for comparison and train a classification head."
            )
        if self.formulation == "cloze" and not self.task:
            raise ValueError(
                "`--formulation cloze` needs a template and label words: give --task (a name or a "
                "YAML)."
            )
        if self.load_best_model_at_end and not (
            self.validation_file or self.dataset or self.few_shot
        ):
            raise ValueError(
                "`--load_best_model_at_end` needs validation data: give --validation_file."
            )
        if self.few_shot and (self.validation_file or self.max_train_samples):
            raise ValueError(
                "`--few_shot` draws its own training and validation rows from the training data; "
                "leave out --validation_file and --max_train_samples."
            )
        check_counts(self, "max_length", "max_train_samples", "max_eval_samples")
        check_counts(self, "few_shot", "eval_steps")


@dataclass
class EvalArguments(DataArguments):
    """Settings of `lpt-fast eval`."""

    adapter: str | None = path(None, "Folder that `lpt-fast train` wrote.", "Model")
    model: str | None = path(None, "Base model. Default: the one that the adapter names.", "Model")
    test_file: str | None = path(None, "csv, tsv, json, jsonl or parquet file with labels.", "Data")
    dataset: str | None = path(None, "A hub data set or folder; its test split is used.", "Data")
    split: str = option("test", "Split of --dataset.", "Data")
    max_eval_samples: int | None = option(None, "A random sample of so many rows.", "Data")
    max_length: int | None = option(
        None, "Most tokens of an example. Default: as in training.", "Data"
    )
    label_column: str | None = option(None, "Column of the label. Default: as in training.", "Data")
    per_device_eval_batch_size: int | None = option(
        None, "Examples of a batch. Default: by tokens, as suits the device.", "Run"
    )
    compute_dtype: str | None = option(None, _OF_MODEL, "Run")
    use_cpu: bool = option(False, "Stay on the CPU where there is a GPU.", "Run")

    def __post_init__(self):
        super().__post_init__()
        _check_compute_dtype(self.compute_dtype)
        check_counts(self, "per_device_eval_batch_size", "max_length", "max_eval_samples")
        _need_adapter(self.adapter)
        if not (self.test_file or self.dataset):
            raise ValueError("There is nothing to evaluate on: give --test_file or --dataset.")


@dataclass
class PredictArguments(Paths):
    """Settings of `lpt-fast predict`."""

    adapter: list[str] | None = path(  # noqa: RUF009 (a field, as all are)
        None,
        "Folder that `lpt-fast train` wrote; several of one base model label each text for all of "
        "their tasks.",
        "Model",
    )
    model: str | None = path(None, "Base model. Default: the one that the adapter names.", "Model")
    input_file: str = path(
        "-",
        "csv, tsv, json, jsonl or parquet file, or '-' for standard input with one text a line.",
        "Data",
    )
    text_column: str | None = option(
        None, "Column of the text; two for pairs. Default: as in training.", "Data"
    )
    max_length: int | None = option(
        None, "Most tokens of an example. Default: as in training.", "Data"
    )
    output_file: str = path("-", "Where to write, or '-' for standard output.", "Output")
    output_format: str = option("tsv", "tsv or jsonl.", "Output")
    activation_cache: str | None = path(
        None,
        "Cache of what the frozen layers give: read where it holds a text, filled where not.",
        "Run",
    )
    per_device_eval_batch_size: int | None = option(
        None, "Examples of a batch. Default: by tokens, as suits the device.", "Run"
    )
    compute_dtype: str | None = option(None, _OF_MODEL, "Run")
    use_cpu: bool = option(False, "Stay on the CPU where there is a GPU.", "Run")

    def __post_init__(self):
        if isinstance(self.adapter, str):
            self.adapter = [self.adapter]
        super().__post_init__()
        one_of("output_format", self.output_format, ("tsv", "jsonl"))
        _check_compute_dtype(self.compute_dtype)
        check_counts(self, "per_device_eval_batch_size", "max_length")
        _need_adapter(self.adapter)


@dataclass
class ExportArguments(Paths):
    """Settings of `lpt-fast export`."""

    adapter: str | None = path(None, "Folder that `lpt-fast train` wrote.", "Model")
    model: str | None = path(None, "Base model. Default: the one that the adapter names.", "Model")
    format: str = option(
        "onnx", "onnx (for ONNX Runtime) or torch (for torch.export.load).", "Output"
    )
    output_file: str | None = path(
        None, "Where to write. Default: model.onnx or model.pt2 in the adapter's folder.", "Output"
    )

    def __post_init__(self):
        super().__post_init__()
        one_of("format", self.format, ("onnx", "torch"))
        _need_adapter(self.adapter)


def check_counts(args: Any, *names: str) -> None:
    """Raises ValueError where a setting that counts something is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}.")


def _check_compute_dtype(value: str | None) -> None:
    if value is not None:
        one_of("compute_dtype", value, COMPUTE_DTYPES)


def _need_adapter(adapter: str | list[str] | None) -> None:
    if not adapter:
        raise ValueError("`--adapter` is missing: give the folder that `lpt-fast train` wrote.")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless a setting has one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"`--{name}` must be one of {', '.join(allowed)}, got {value!r}.")
