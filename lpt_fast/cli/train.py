"""Training from the command line: data, model, the Hugging Face Trainer, results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations

from ..cache import ActivationCache
from ..tasks import (
    TaskSpec,
    classification_metrics,
)
from ..train.cursor import last_checkpoint
from ..train.disk_room import saving_to
from ..train.exact_resume import CountedTraining
from ..train.many import ManyTrainer
from ..train.trainer import LPTTrainer
from .arguments import ADAPTER_METHODS, TrainArguments
from .clock import Clock
from .data import (
    RUN_FILE,
    Collator,
    Formulation,
    load_tokenizer,
)
from .model import build_model
from .outputs import check_folder
from .task_data import Split, read_data

# Peak learning rates where none is given: customary for each method, not tuned to a task.
LEARNING_RATES = {
    **{"lpt": 1e-3, "head": 1e-3, "lora": 1e-3, "prompt_tuning": 1e-2, "full": 1e-4},
    "late_lora": 2e-3,  # by the sweep (bench/results/accuracy.md)
}
RESULTS = "results.json"
# A task's metric -> its name among the results.
_METRIC = {"accuracy": "accuracy", "f1": "f1", "matthews_correlation": "mcc"}


def training_arguments(
    args: TrainArguments, has_validation: bool, task: TaskSpec | None
) -> TrainingArguments:
    """Trainer's arguments from the command line's."""
    rate = rates_of(args)["learning_rate"]
    evaluation = "epoch" if args.eval_steps is None else "steps"
    evaluation = evaluation if has_validation else "no"
    save = args.save_strategy
    if args.load_best_model_at_end and has_validation:
        save = evaluation
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
        eval_steps=args.eval_steps,
        save_strategy=save,
        save_steps=args.eval_steps or 500,
        save_total_limit=args.save_total_limit,
        logging_steps=args.logging_steps,
        report_to=args.report_to,
        train_sampling_strategy="group_by_length" if args.group_by_length else "random",
        # (Without an accelerator TrainingArguments wants it said, where there is no choice.)
        use_cpu=args.use_cpu or (args.bf16 and not torch.accelerator.is_available()),
        # Trainer would drop what the base model's forward does not name, context_lengths among it.
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available() and not args.use_cpu,
    )


class CountedTrainer(CountedTraining, Trainer):
    """The Trainer of methods without a late prompt: its resumes are exact as well."""


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
    resumed = _checkpoint(args)
    check_folder(args.output_dir, "--output_dir", RUN_FILE, RESULTS)
    if args.activation_cache is not None:
        check_folder(args.activation_cache, "--activation_cache")
    data = read_data(args)
    tokenizer = load_tokenizer(args.model)
    set_seed(args.seed)
    model, formulation = build_model(args, data, tokenizer)

    def examples(split: Split | None):
        if split is None:
            return None
        return formulation.encode(tokenizer, split.texts, split.labels, split.origin)

    train_set, validation, test = (examples(s) for s in (data.train, data.validation, data.test))
    trainer = build_trainer(args, model, formulation, tokenizer, train_set, validation)
    trainer.facts = _facts(formulation)
    clock = Clock()
    trainer.add_callback(clock)
    clock.start()
    with saving_to(args.output_dir, resumed):
        trainer.train(resume_from_checkpoint=resumed)
    results = {
        "method": args.method,
        "train_examples": len(train_set),
        "train_seconds": round(clock.seconds, 1),  # without its evaluations
        "accuracy_over_seconds": clock.curve,
        "train_loss": trainer.state.log_history[-1].get("train_loss"),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if args.method == "lpt":
        config = model.peft_config["default"]
        names = ("generator", "insertion_layer", "lora_r")
        results |= {name: getattr(config, name) for name in names}
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
        for name, content in ((RUN_FILE, formulation.to_json()), (RESULTS, results)):
            (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return results


def build_trainer(
    args: TrainArguments,
    model: nn.Module,
    formulation: Formulation,
    tokenizer,
    train_set: list[dict],
    validation: list[dict] | None,
    cache: ActivationCache | None = None,
    adapters: dict[str, dict[str, float | None]] | None = None,
    progress: bool = True,
) -> Trainer:
    """The Trainer of a method, with its data and metrics.

    Args:
        args: of the command.
        model, formulation: as `build_model` gives them.
        tokenizer: of the base model.
        train_set, validation: encoded examples.
        cache: an open one instead of the folder `args.activation_cache`.
        adapters: those of the model that train together, as ManyTrainer takes them.
        progress: show progress bars, as Trainer would.
    """
    arguments = training_arguments(args, validation is not None, formulation.task)
    if not progress:
        arguments.disable_tqdm = True
    metrics = Metrics(formulation, tokenizer)
    trainer_class, more = CountedTrainer, {}
    if args.method == "lpt":
        # (Smoothed losses are Trainer's own, over the logits of every token.)
        one_token = formulation.cloze and args.label_smoothing_factor == 0
        trainer_class = LPTTrainer
        cache = args.activation_cache if cache is None else cache
        more = {"activation_cache": cache, "upper": args.upper}
        more |= {"readout_only": one_token, "compute_dtype": args.compute_dtype}
        if adapters is None:
            more["lora_learning_rate"] = rates_of(args)["lora_learning_rate"]
        else:
            trainer_class, more["adapters"] = ManyTrainer, adapters
    return trainer_class(
        model=model,
        args=arguments,
        data_collator=Collator(tokenizer),
        train_dataset=train_set,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=metrics.compute,
        preprocess_logits_for_metrics=metrics.preprocess_logits,
        **more,
    )


def rates_of(args: TrainArguments) -> dict[str, float | None]:
    """The learning rates of a training; late LoRA's own, where no rate is given at all."""
    rate, lora = args.learning_rate, args.lora_learning_rate
    if lora is None and rate is None and args.lora_r is not None:
        lora = LEARNING_RATES["late_lora"]
    rate = LEARNING_RATES[args.method] if rate is None else rate
    return {"learning_rate": rate, "lora_learning_rate": lora}


def _clear_other_kind(folder: Path, method: str) -> None:
    """An earlier training's adapter beside a whole model would be loaded with it, or it instead."""
    whole, adapter = (
        ("config.json", "model.safetensors"),
        ("adapter_config.json", "adapter_model.safetensors"),
    )
    for name in whole if method in ADAPTER_METHODS else adapter:
        (folder / name).unlink(missing_ok=True)


def _facts(formulation: Formulation) -> dict:
    """What a checkpoint's weights depend on beside the model (`RecordedTraining.facts`)."""
    facts = formulation.to_json()
    task, cloze = facts.pop("task"), facts.pop("cloze")
    facts |= {"formulation": "cloze" if cloze else "classification", "task": task and task["name"]}
    if cloze:
        facts |= {"template": formulation.template, "label_words": task["label_words"]}
    return facts


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
