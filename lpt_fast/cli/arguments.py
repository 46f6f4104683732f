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
STORES = ("bf16", "fp32", "fp16", "int8c", "fp8")


def _option(default: Any, help: str, panel: str) -> Any:
    metadata = {"help": help, "panel": panel}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _path(default: Any, help: str, panel: str) -> Any:
    """A setting that is the path of a file or folder, or may be one."""
    return field(default=default, metadata={"help": help, "panel": panel, "path": True})


class _Paths:
    """Settings whose paths may begin with `~`, in a YAML file and in `--flag=~/...` too, where no
    shell has put the home folder in its place.
    """

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata.get("path") and value:
                setattr(self, f.name, os.path.expanduser(value))


@dataclass
class DataArguments(_Paths):
    """Where rows come from; shared by training, evaluation and prediction."""

    text_column: str | None = _option(
        None,
        "Column of the text; two for pairs, with a comma between. Default: the task's, or 'text'.",
        "Data",
    )
    label_column: str = _option("label", "Column of the label.", "Data")
    max_length: int | None = _option(
        None,
        "Most tokens of an example; longer texts are cut, templates never. Default: 128, or what "
        "the model takes.",
        "Data",
    )


@dataclass
class TrainArguments(DataArguments):
    """Settings of `lpt-fast train`."""

    model: str | None = _path(None, "Model: a hub name or a local folder.", "Model")
    method: str = _option(
        "lpt",
        "What is trained: lpt, or for comparison head (pooler and classifier), lora, "
        "prompt_tuning, full.",
        "Model",
    )
    formulation: str = _option(
        "classification",
        "'classification' trains a head; 'cloze' predicts label words, at the mask or (causal "
        "models) as next token.",
        "Model",
    )
    torch_dtype: str = _option(
        "float32", "Dtype of the frozen model: float32, bfloat16 or float16.", "Model"
    )

    insertion_layer: int | None = _option(
        None, "k: frozen layers before the prompt. Default: half.", "Prompt"
    )
    generator: str = _option(
        "npg",
        "static, npg, appg, mppg, attention or residual; none: no prompt, --lora_r alone.",
        "Prompt",
    )
    num_virtual_tokens: int = _option(5, "m: prompt rows of an example.", "Prompt")
    bottleneck_size: int = _option(128, "r: width of the generator's bottleneck.", "Prompt")
    prompt_dropout: float | None = _option(
        None, "Dropout on the prompt. Default: the backbone's.", "Prompt"
    )
    upper_dropout: bool = _option(
        False, "Keep dropout in the frozen layers above the insertion.", "Prompt"
    )

    lora_r: int | None = _option(
        None,
        "Rank of low-rank updates of the linear layers above the prompt (late LoRA). Default: "
        "none; --method lora, in all layers: 8.",
        "LoRA",
    )
    lora_alpha: float | None = _option(
        None, "Updates are scaled by alpha / r. Default: twice the rank.", "LoRA"
    )
    lora_dropout: float | None = _option(
        None, "Dropout before them. Default: 0; --method lora: 0.1.", "LoRA"
    )
    lora_target_modules: str | None = _option(
        None,
        "Names of linear layers with commas between, or all-linear. Default: PEFT's for the model, "
        "such as query,value.",
        "LoRA",
    )
    lora_learning_rate: float | None = _option(
        None, "Peak learning rate of late LoRA. Default: --learning_rate.", "LoRA"
    )

    task: str | None = _path(
        None,
        "One of the paper's tasks (sst2, mpqa, mr, subj, trec, mnli, ...) or your own YAML file.",
        "Data",
    )
    dataset: str | None = _path(
        None, "A hub data set such as glue/sst2, or a folder with its splits.", "Data"
    )
    train_file: str | None = _path(
        None, "csv, tsv, json, jsonl or parquet file to train on.", "Data"
    )
    validation_file: str | None = _path(None, "The same, evaluated after every epoch.", "Data")
    test_file: str | None = _path(None, "The same, evaluated once at the end.", "Data")
    max_train_samples: int | None = _option(
        None, "Train on a random sample of so many rows.", "Data"
    )
    max_eval_samples: int | None = _option(
        None, "Evaluate on a random sample of so many rows.", "Data"
    )
    few_shot: int | None = _option(
        None,
        "The paper's few-shot setting: K examples in all, drawn in proportion to the classes.",
        "Data",
    )

    activation_cache: str | None = _path(
        None,
        "Folder of caches of the frozen layers' outputs (lpt-fast precompute); texts that it lacks "
        "are added. Default: run the frozen layers in every epoch.",
        "Speed",
    )
    upper: str | None = _option(
        None,
        "How the layers above the prompt run: auto, packed (without padding) or padded. Default: "
        "auto.",
        "Speed",
    )

    output_dir: str = _path("out", "Folder for the adapter, checkpoints and results.", "Training")
    learning_rate: float | None = _option(
        None, "Peak learning rate. Default: one that suits the method.", "Training"
    )
    num_train_epochs: float = _option(5.0, "Passes over the training data.", "Training")
    max_steps: int = _option(
        -1, "If positive: so many optimiser steps instead of epochs.", "Training"
    )
    per_device_train_batch_size: int = _option(32, "Examples of a step on each device.", "Training")
    per_device_eval_batch_size: int = _option(64, "The same in evaluation.", "Training")
    gradient_accumulation_steps: int = _option(
        1, "Batches added up for one optimiser step.", "Training"
    )
    weight_decay: float = _option(0.01, "AdamW's weight decay.", "Training")
    warmup_steps: float = _option(
        0.06, "Steps with a rising learning rate; below 1: a share of all.", "Training"
    )
    lr_scheduler_type: str = _option("linear", "Schedule of the learning rate.", "Training")
    label_smoothing_factor: float = _option(0.0, "Label smoothing.", "Training")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm.", "Training")
    group_by_length: bool = _option(
        False,
        "Batches of texts of like length: less padding, so faster, but where length tells of the "
        "label a little worse.",
        "Training",
    )
    seed: int = _option(
        42, "Seed of initialisation, order, dropout and few-shot sampling.", "Training"
    )
    bf16: bool = _option(False, "bf16 autocast.", "Training")
    fp16: bool = _option(False, "fp16 autocast with loss scaling.", "Training")
    gradient_checkpointing: bool = _option(
        False, "Recompute upper layers in the backward.", "Training"
    )
    load_best_model_at_end: bool = _option(
        False, "Keep the epoch with the best validation metric.", "Training"
    )
    save_strategy: str = _option(
        "epoch", "When to save a checkpoint: epoch, steps, no.", "Training"
    )
    save_total_limit: int | None = _option(1, "How many checkpoints to keep.", "Training")
    logging_steps: int = _option(50, "Steps between two lines of the log.", "Training")
    resume_from_checkpoint: str | None = _path(
        None, "Checkpoint folder to go on from; 'last' takes the newest in output_dir.", "Training"
    )
    report_to: str = _option("none", "Tracker: none, tensorboard, wandb, mlflow, ...", "Training")
    use_cpu: bool = _option(False, "Stay on the CPU where there is a GPU.", "Training")

    def __post_init__(self):
        super().__post_init__()
        _one_of("method", self.method, METHODS)
        _one_of("formulation", self.formulation, FORMULATIONS)
        _one_of("torch_dtype", self.torch_dtype, TORCH_DTYPES)
        if self.upper is not None:
            _one_of("upper", self.upper, UPPER)
        if not self.model:
            raise ValueError(
                "`--model` is missing: give a hub name such as roberta-large, or a local folder."
            )
        if not (self.train_file or self.dataset):
            raise ValueError("There is nothing to train on: give --train_file or --dataset.")
        for name in ("activation_cache", "upper", "lora_learning_rate"):
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
        for name in ("max_length", "max_train_samples", "max_eval_samples", "few_shot"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {value}.")


@dataclass
class EvalArguments(DataArguments):
    """Settings of `lpt-fast eval`."""

    adapter: str | None = _path(None, "Folder that `lpt-fast train` wrote.", "Model")
    model: str | None = _path(None, "Base model. Default: the one that the adapter names.", "Model")
    test_file: str | None = _path(
        None, "csv, tsv, json, jsonl or parquet file with labels.", "Data"
    )
    dataset: str | None = _path(None, "A hub data set or folder; its test split is used.", "Data")
    split: str = _option("test", "Split of --dataset.", "Data")
    max_eval_samples: int | None = _option(None, "A random sample of so many rows.", "Data")
    max_length: int | None = _option(
        None, "Most tokens of an example. Default: as in training.", "Data"
    )
    label_column: str | None = _option(
        None, "Column of the label. Default: as in training.", "Data"
    )
    per_device_eval_batch_size: int = _option(64, "Examples of a batch.", "Run")
    use_cpu: bool = _option(False, "Stay on the CPU where there is a GPU.", "Run")

    def __post_init__(self):
        super().__post_init__()
        _need_adapter(self.adapter)
        if not (self.test_file or self.dataset):
            raise ValueError("There is nothing to evaluate on: give --test_file or --dataset.")


@dataclass
class PredictArguments(_Paths):
    """Settings of `lpt-fast predict`."""

    adapter: str | None = _path(None, "Folder that `lpt-fast train` wrote.", "Model")
    model: str | None = _path(None, "Base model. Default: the one that the adapter names.", "Model")
    input_file: str = _path(
        "-",
        "csv, tsv, json, jsonl or parquet file, or '-' for standard input with one text a line.",
        "Data",
    )
    text_column: str | None = _option(
        None, "Column of the text; two for pairs. Default: as in training.", "Data"
    )
    max_length: int | None = _option(
        None, "Most tokens of an example. Default: as in training.", "Data"
    )
    output_file: str = _path("-", "Where to write, or '-' for standard output.", "Output")
    output_format: str = _option("tsv", "tsv or jsonl.", "Output")
    per_device_eval_batch_size: int = _option(64, "Examples of a batch.", "Run")
    use_cpu: bool = _option(False, "Stay on the CPU where there is a GPU.", "Run")

    def __post_init__(self):
        super().__post_init__()
        _one_of("output_format", self.output_format, ("tsv", "jsonl"))
        _need_adapter(self.adapter)


@dataclass
class ExportArguments(_Paths):
    """Settings of `lpt-fast export`."""

    adapter: str | None = _path(None, "Folder that `lpt-fast train` wrote.", "Model")
    model: str | None = _path(None, "Base model. Default: the one that the adapter names.", "Model")
    format: str = _option(
        "onnx", "onnx (for ONNX Runtime) or torch (for torch.export.load).", "Output"
    )
    output_file: str | None = _path(
        None, "Where to write. Default: model.onnx or model.pt2 in the adapter's folder.", "Output"
    )

    def __post_init__(self):
        super().__post_init__()
        _one_of("format", self.format, ("onnx", "torch"))
        _need_adapter(self.adapter)


@dataclass
class PrecomputeArguments(DataArguments):
    """Settings of `lpt-fast precompute`. What changes a text's tokens has the names and defaults
    of `lpt-fast train`, which then finds them.
    """

    model: str | None = _path(None, "Model: a hub name or a local folder.", "Model")
    torch_dtype: str = _option(
        "float32", "Dtype of the frozen model: float32, bfloat16 or float16.", "Model"
    )
    insertion_layer: str | None = _option(
        None,
        "k: after how many layers to cut; several with commas between (12,16,20) are filled in one "
        "pass. Default: half.",
        "Model",
    )
    compute_dtype: str | None = _option(
        None, "bfloat16 or float16: run under autocast. Default: as the model is.", "Model"
    )

    formulation: str = _option(
        "classification", "'classification' or 'cloze' (the task's template is put in).", "Data"
    )
    task: str | None = _path(
        None, "One of the paper's tasks (sst2, mpqa, ...) or your own YAML file.", "Data"
    )
    dataset: str | None = _path(
        None, "A hub data set such as glue/sst2, or a folder; all its splits are read.", "Data"
    )
    train_file: str | None = _path(None, "csv, tsv, json, jsonl or parquet file.", "Data")
    validation_file: str | None = _path(None, "The same.", "Data")
    test_file: str | None = _path(None, "The same.", "Data")

    out: str | None = _path(None, "Folder of caches; made where there is none.", "Cache")
    store: str = _option("bf16", f"How rows are kept: {', '.join(STORES)}.", "Cache")
    max_cache_gb: float | None = _option(
        None, "Most GB (10^9 bytes) that one cache may take. Default: what is free.", "Cache"
    )
    shard_mb: float = _option(256.0, "MB of a file, at most.", "Cache")
    dry_run: bool = _option(
        False,
        "Say what would be computed, how long it takes and whether it pays; write nothing.",
        "Cache",
    )
    num_train_epochs: float = _option(
        5.0, "Epochs planned, of all runs together, for --dry_run's advice.", "Cache"
    )

    batch_tokens: int | None = _option(
        None, "Tokens of a batch, padding counted. Default: what suits the device.", "Run"
    )
    wait: float = _option(0.0, "Seconds to wait while another process builds.", "Run")
    use_cpu: bool = _option(False, "Stay on the CPU where there is a GPU.", "Run")

    def __post_init__(self):
        super().__post_init__()
        _one_of("formulation", self.formulation, FORMULATIONS)
        _one_of("torch_dtype", self.torch_dtype, TORCH_DTYPES)
        _one_of("store", self.store, STORES)
        if not self.model:
            raise ValueError(
                "`--model` is missing: give a hub name such as roberta-large, or a local folder."
            )
        if not self.out:
            raise ValueError("`--out` is missing: give a folder for the cache.")
        if not (self.dataset or self.train_file or self.validation_file or self.test_file):
            raise ValueError("There are no texts: give --train_file or --dataset.")
        if self.formulation == "cloze" and not self.task:
            raise ValueError(
                "`--formulation cloze` needs a template: give --task (a name or a YAML)."
            )
        if self.compute_dtype is not None:
            _one_of("compute_dtype", self.compute_dtype, TORCH_DTYPES)
        for name in ("max_length", "batch_tokens", "max_cache_gb", "shard_mb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`--{name}` must be above 0, got {value}.")
        self.layers()

    def layers(self) -> list[int] | None:
        """The cuts; None: half the layers."""
        if self.insertion_layer is None:
            return None
        try:
            layers = [int(part) for part in self.insertion_layer.split(",")]
        except ValueError:
            layers = []
        if not layers or min(layers) < 1 or len(set(layers)) != len(layers):
            raise ValueError(
                "`--insertion_layer` must be a layer, or different ones with commas between, got "
                f"{self.insertion_layer!r}."
            )
        return layers


def _need_adapter(adapter: str | None) -> None:
    if not adapter:
        raise ValueError("`--adapter` is missing: give the folder that `lpt-fast train` wrote.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`--{name}` must be one of {', '.join(allowed)}, got {value!r}.")
