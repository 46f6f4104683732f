"""The model that `lpt-fast train` trains: backbone, head, adapter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from ..backbone.families import find_backbone, head_modules
from ..method.config import LPTConfig
from .arguments import TrainArguments
from .data import (
    Formulation,
    cannot_load,
    checked_max_length,
)
from .task_data import Data

PROMPT_TUNING_TOKENS = 20
# Queries and values, by model_type, where PEFT knows none.
_LORA_TARGETS = {"mpnet": ["q", "v"], "modernbert": ["Wqkv"], "phi3": ["qkv_proj"]}


@dataclass
class Base:
    """A model without an adapter.

    Attributes:
        model: backbone and head.
        task_type: PEFT's, or None.
        formulation: of the task.
        fresh: names of the weights that its files lack, which are drawn at random.
    """

    model: nn.Module
    task_type: TaskType | None
    formulation: Formulation
    fresh: set[str]


def build_model(args: TrainArguments, data: Data, tokenizer) -> tuple[nn.Module, Formulation]:
    """The model with what `--method` trains, and the formulation of the task; raises as
    `load_base`.
    """
    base = load_base(args, data, tokenizer)
    return adapt(base.model, args, base.task_type), base.formulation


def load_base(args: TrainArguments, data: Data, tokenizer) -> Base:
    """The model as it is before there is an adapter.

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
    fresh = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    return Base(model, task_type, formulation, fresh)


def lora_targets(names: str | None) -> str | list[str] | None:
    """`--lora_target_modules` as PEFT takes them."""
    if names is None or names == "all-linear":
        return names
    return [name.strip() for name in names.split(",")]


def adapt(model: nn.Module, args: TrainArguments, task_type) -> nn.Module:
    """The model with what `--method` trains."""
    if args.method == "lpt":
        config = LPTConfig(
            task_type=task_type,
            insertion_layer=args.insertion_layer,
            generator=args.generator,
            num_virtual_tokens=args.num_virtual_tokens,
            bottleneck_size=args.bottleneck_size,
            prompt_dropout=args.prompt_dropout,
            upper_dropout=args.upper_dropout,
            lora_r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout or 0.0,
            lora_target_modules=lora_targets(args.lora_target_modules),
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
        r = 8 if args.lora_r is None else args.lora_r
        targets = lora_targets(args.lora_target_modules)
        if targets is None:
            targets = _LORA_TARGETS.get(model.config.model_type)
        config = LoraConfig(
            task_type=task_type,
            r=r,
            lora_alpha=2 * r if args.lora_alpha is None else args.lora_alpha,
            lora_dropout=0.1 if args.lora_dropout is None else args.lora_dropout,
            target_modules=targets,
        )
    else:
        config = PromptTuningConfig(task_type=task_type, num_virtual_tokens=PROMPT_TUNING_TOKENS)
    config.modules_to_save = heads
    return get_peft_model(model, config)
