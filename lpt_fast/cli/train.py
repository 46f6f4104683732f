"""Training from the command line: data, model, the Hugging Face Trainer, results."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from ..backbone.families import find_backbone, head_modules
from ..method.config import LPTConfig
from ..tasks import (
    TaskSpec,
    classification_metrics,
    encode_labels,
    few_shot_split,
    label_names,
    load_task,
)
from ..train.cursor import last_checkpoint
from ..train.disk_room import saving_to
from ..train.trainer import LPTTrainer
from .arguments import ADAPTER_METHODS, TrainArguments
from .data import (
    RUN_FILE,
    Collator,
    Formulation,
    cannot_load,
    checked_max_length,
    load_tokenizer,
    read_rows,
    text_columns_of,
    texts_of,
)

# Peak learning rates where none is given: customary for each method, not tuned to a task.
LEARNING_RATES = {"lpt": 1e-3, "head": 1e-3, "lora": 1e-3, "prompt_tuning": 1e-2, "full": 1e-4}
PROMPT_TUNING_TOKENS = 20
# A task's metric -> its name among the results.
_METRIC = {"accuracy": "accuracy", "f1": "f1", "matthews_correlation": "mcc"}


@dataclass
class Split:
    """Rows of one split, with class ids."""

    texts: dict[str, list[str]]
    labels: list[int]


@dataclass
class Data:
    train: Split
    validation: Split | None
    test: Split | None
    labels: list[str]
    task: TaskSpec | None
    text_columns: list[str] | None


def read_data(args: TrainArguments) -> Data:
    """Reads and checks all splits before anything expensive starts."""
    task = load_task(args.task) if args.task else None
    columns = text_columns_of(task, args.text_column)

    def read(source, split, max_samples):
        rows, _ = read_rows(source, split, task, columns, args.label_column, max_samples, args.seed)
        return rows

    full = read(
        args.train_file or args.dataset, "train", None if args.few_shot else args.max_train_samples
    )
    ids = task.hub_label_ids if task else None
    names = list(task.labels) if task else label_names(full, args.label_column, ids)
    if len(names) < 2:
        raise ValueError(
            f"The training data has {len(names)} label ({', '.join(names)}), expected at least 2 "
            f"to tell apart; check the column {args.label_column!r}."
        )

    def split_of(rows) -> Split:
        encoded = encode_labels(rows, args.label_column, names, ids)
        return Split(texts_of(rows, task, columns), list(encoded["labels"]))

    def other(file, split):
        if file:
            return split_of(read(file, split, args.max_eval_samples))
        if args.dataset and not args.train_file and not Path(args.dataset).is_file():
            # Test splits of hub data sets often have no labels, so only folders' are read.
            if split == "test" and not Path(args.dataset).is_dir():
                return None
            try:
                return split_of(read(args.dataset, split, args.max_eval_samples))
            except FileNotFoundError:
                return None
        return None

    validation, test = other(args.validation_file, "validation"), other(args.test_file, "test")
    if args.few_shot:
        few, dev = few_shot_split(full, args.few_shot, args.seed, args.label_column)
        train, validation = split_of(few), split_of(dev)
    else:
        train = split_of(full)
    return Data(train, validation, test, names, task, columns)


def build_model(args: TrainArguments, data: Data, tokenizer) -> tuple[nn.Module, Formulation]:
    """The model with what `--method` trains, and the formulation of the task.

    Raises:
        ValueError: for a model that cannot be found, or whose family Late Prompt Tuning does not
            know.
    """
    id2label = dict(enumerate(data.labels))
    try:
        config = AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load("model", args.model, error)) from None
    cloze = args.formulation == "cloze"
    causal = cloze and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    dtype = getattr(torch, args.torch_dtype)
    more = {}
    if not cloze:
        auto, task_type = AutoModelForSequenceClassification, TaskType.SEQ_CLS
        # A head of another task with another number of labels is left behind.
        more = {
            "num_labels": len(id2label),
            "id2label": id2label,
            "label2id": {name: i for i, name in id2label.items()},
            "ignore_mismatched_sizes": True,
        }
    elif causal:
        auto, task_type = AutoModelForCausalLM, TaskType.CAUSAL_LM
    else:
        auto, task_type = AutoModelForMaskedLM, None
    try:
        model, info = auto.from_pretrained(
            args.model, dtype=dtype, output_loading_info=True, **more
        )
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load("model", args.model, error)) from None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    name, backbone, family = find_backbone(model)
    missing = sorted(k for k in info["missing_keys"] if not k.startswith(f"{name.split('.')[0]}."))
    if cloze and missing:
        raise ValueError(
            f"{args.model} has no language model head ({missing[0]} is missing), and a random one "
            "predicts nothing; use --formulation classification, or a checkpoint of a language "
            "model."
        )
    limit = family.max_length(backbone.config) or 10**9
    if args.method == "prompt_tuning":
        limit -= PROMPT_TUNING_TOKENS  # they stand in the input
    max_length = checked_max_length(args.max_length, limit, args.model, tokenizer)
    formulation = Formulation(
        labels=data.labels,
        text_columns=data.text_columns,
        label_column=args.label_column,
        max_length=max_length,
        cloze=cloze,
        causal=causal,
        task=data.task,
        model=args.model,
        method=args.method,
        dtype=args.torch_dtype,
    )
    return _adapt(model, args, task_type), formulation


def _adapt(model: nn.Module, args: TrainArguments, task_type) -> nn.Module:
    if args.method == "lpt":
        config = LPTConfig(
            task_type=task_type,
            insertion_layer=args.insertion_layer,
            generator=args.generator,
            num_virtual_tokens=args.num_virtual_tokens,
            bottleneck_size=args.bottleneck_size,
            prompt_dropout=args.prompt_dropout,
            upper_dropout=args.upper_dropout,
        )
        return get_peft_model(model, config)
    if args.method == "full":
        return model
    # The other methods train the same head as LPT does, pooler included, so that they compare.
    name, backbone, family = find_backbone(model)
    heads = head_modules(model, name, backbone, family)
    if args.method == "head":
        model.requires_grad_(False)
        for module in backbone.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # features of a frozen model, without noise
        for head in heads:
            model.get_submodule(head).requires_grad_(True)
        return model
    if args.method == "lora":
        config = LoraConfig(task_type=task_type, r=8, lora_alpha=16, lora_dropout=0.1)
    else:
        config = PromptTuningConfig(task_type=task_type, num_virtual_tokens=PROMPT_TUNING_TOKENS)
    config.modules_to_save = heads
    return get_peft_model(model, config)


def training_arguments(
    args: TrainArguments, has_validation: bool, task: TaskSpec | None
) -> TrainingArguments:
    rate = args.learning_rate if args.learning_rate is not None else LEARNING_RATES[args.method]
    evaluation = "epoch" if has_validation else "no"
    save = args.save_strategy
    if args.load_best_model_at_end and has_validation:
        save = "epoch"
    return TrainingArguments(
        output_dir=args.output_dir,
        learning_rate=rate,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        weight_decay=args.weight_decay,
        warmup_steps=args.warmup_steps,
        lr_scheduler_type=args.lr_scheduler_type,
        label_smoothing_factor=args.label_smoothing_factor,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
        bf16=args.bf16,
        fp16=args.fp16,
        gradient_checkpointing=args.gradient_checkpointing,
        load_best_model_at_end=args.load_best_model_at_end,
        metric_for_best_model=_METRIC[task.metric] if task else "accuracy",
        eval_strategy=evaluation,
        save_strategy=save,
        save_total_limit=args.save_total_limit,
        logging_steps=args.logging_steps,
        report_to=args.report_to,
        train_sampling_strategy="group_by_length" if args.group_by_length else "random",
        use_cpu=args.use_cpu,
        # Trainer would drop what the base model's forward does not name, context_lengths among it.
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available() and not args.use_cpu,
    )


class Metrics:
    """Turns logits into accuracy, F1 and Matthews correlation, for heads and for label words.

    Args:
        formulation: of the task.
        tokenizer: of the base model.
    """

    def __init__(self, formulation: Formulation, tokenizer):
        self.formulation = formulation
        self.words = torch.tensor(formulation.word_ids(tokenizer)) if formulation.cloze else None

    def preprocess_logits(self, logits, labels: torch.Tensor) -> torch.Tensor:
        """Logits of the classes [B, C]: for cloze those of the label words at the label's place
        (the only one in logits [B, 1, V]).
        """
        logits = logits[0] if isinstance(logits, tuple) else logits
        if self.words is None:
            return logits
        if logits.shape[1] == 1:
            return logits[:, 0, self.words.to(logits.device)]
        place = (labels != -100).int().argmax(1) - int(self.formulation.causal)
        at = logits[torch.arange(len(logits), device=logits.device), place]
        return at[:, self.words.to(at.device)]

    def compute(self, prediction) -> dict[str, float]:
        labels = np.asarray(prediction.label_ids)
        if self.words is not None:
            token = labels[np.arange(len(labels)), (labels != -100).argmax(1)]
            labels = (token[:, None] == self.words.numpy()).argmax(1)
        predicted = np.asarray(prediction.predictions).argmax(-1)
        return classification_metrics(predicted, labels, num_classes=len(self.formulation.labels))


def train(args: TrainArguments) -> dict:
    """Trains, evaluates, saves; the body of `lpt-fast train`.

    Returns:
        The results that are also written to `results.json` in the output folder: metrics in [0, 1]
        of each split, seconds, trainable parameters.
    """
    _check_trackers(args.report_to)
    data = read_data(args)
    tokenizer = load_tokenizer(args.model)
    set_seed(args.seed)
    model, formulation = build_model(args, data, tokenizer)

    def examples(split: Split | None):
        return None if split is None else formulation.encode(tokenizer, split.texts, split.labels)

    train_set, validation, test = (examples(s) for s in (data.train, data.validation, data.test))
    metrics = Metrics(formulation, tokenizer)
    trainer_class, more = Trainer, {}
    if args.method == "lpt":
        # (Smoothed losses are Trainer's own, over the logits of every token.)
        one_token = formulation.cloze and args.label_smoothing_factor == 0
        trainer_class = LPTTrainer
        more = {"activation_cache": args.activation_cache, "upper": args.upper}
        more["readout_only"] = one_token
    trainer = trainer_class(
        model=model,
        args=training_arguments(args, validation is not None, data.task),
        data_collator=Collator(tokenizer),
        train_dataset=train_set,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=metrics.compute,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
        **more,
    )
    start = time.perf_counter()
    resumed = _checkpoint(args)
    with saving_to(args.output_dir, resumed):
        trainer.train(resume_from_checkpoint=resumed)
    seconds = time.perf_counter() - start
    results = {
        "method": args.method,
        "train_examples": len(train_set),
        "train_seconds": round(seconds, 1),
        "train_loss": trainer.state.log_history[-1].get("train_loss"),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if args.method == "lpt":
        config = model.peft_config["default"]
        results |= {"generator": config.generator, "insertion_layer": config.insertion_layer}
    for name, rows in (("validation", validation), ("test", test)):
        if rows is not None:
            got = trainer.evaluate(rows, metric_key_prefix=name)
            keys = ("accuracy", "f1", "mcc", "loss")
            results[name] = {key: got[f"{name}_{key}"] for key in keys}
            results[name]["examples"] = len(rows)
    if args.activation_cache is not None:
        cache = trainer.open_cache()
        results["activation_cache"] = {
            "path": args.activation_cache,
            "rows": len(cache),
            "store": cache.identity.store,
            "tier": cache.plan.tier,
        }
    _clear_other_kind(Path(args.output_dir), args.method)
    with saving_to(args.output_dir, resumed):
        trainer.save_model(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        folder = Path(args.output_dir)
        for name, content in ((RUN_FILE, formulation.to_json()), ("results.json", results)):
            (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return results


def _clear_other_kind(folder: Path, method: str) -> None:
    """An earlier training's adapter beside a whole model would be loaded with it, or it instead."""
    whole, adapter = (
        ("config.json", "model.safetensors"),
        ("adapter_config.json", "adapter_model.safetensors"),
    )
    for name in whole if method in ADAPTER_METHODS else adapter:
        (folder / name).unlink(missing_ok=True)


def _check_trackers(name: str) -> None:
    """Before anything is loaded: Trainer would say it last."""
    if name in ("none", "all"):
        return
    available = get_available_reporting_integrations()
    if name not in available:
        raise ValueError(
            f"`--report_to` is {name!r}, which is not installed here; installed trackers: "
            f"{', '.join(available) or 'none'}."
        )


def _checkpoint(args: TrainArguments) -> str | None:
    name = args.resume_from_checkpoint
    if name is None:
        return None
    if name == "last":
        folder = last_checkpoint(args.output_dir)  # that was written to its end
        if folder is None:
            raise ValueError(
                f"There is no checkpoint in {args.output_dir} to resume from; start without "
                "--resume_from_checkpoint."
            )
        return str(folder)
    if not (Path(name) / "trainer_state.json").is_file():
        raise ValueError(f"{name} is no checkpoint of a training (it holds no trainer_state.json).")
    return name
