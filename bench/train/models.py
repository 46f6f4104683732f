"""Who takes part in `python -m bench train`: models of one encoder, each trained by another method.

All start from the same weights and train the same head, with AdamW, fused where torch has it so.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    RobertaConfig,
    set_seed,
)

from lpt_fast import LPTConfig
from lpt_fast.backbone.families import find_backbone, head_modules
from lpt_fast.cache import ActivationCache
from lpt_fast.cli.model import PROMPT_TUNING_TOKENS
from lpt_fast.cli.train import LEARNING_RATES
from lpt_fast.packed.graphs import UpperGraphs
from lpt_fast.train.projections import Projections
from lpt_fast.train.trainer import find_late_prompt

from .contestants import (
    ALONE,
    AUTOCAST,
    GRAPHS,
    HALF,
    HOLDS,
    LATE,
    LORA,
    OWN_BF16,
    RECIPES,
    method_of,
)
from .data import Texts

# Random weights of these shapes; texts have the ids of another tokenizer, of which there are fewer.
SHAPES = {
    "roberta-base": (12, 768, 12, 3072),
    "roberta-large": (24, 1024, 16, 4096),
}
QUICK_SHAPE = (4, 64, 4, 128)
ENCODERS = ("minilm", *SHAPES)
ROBERTA_VOCAB, ROBERTA_POSITIONS = 50265, 514
LARGE = 10_000_000  # weights of models that are not left to the garbage collector's own time


@dataclass
class Contestant:
    """A model that trains.

    Attributes:
        name: of LATE or OTHERS.
        k: insertion layer, or None.
        model: called with `inputs(rows)`, gives a loss.
        inputs: numbers of texts -> keyword arguments of the model.
        device: where it is.
        autocast: dtype of autocast, or None.
        rows: what is computed already, or None.
        seconds: of its timed steps.
        in_a_row: means of as many steps as a training makes in its turn.
    """

    name: str
    k: int | None
    model: nn.Module
    inputs: Callable[[np.ndarray], dict]
    device: torch.device
    autocast: torch.dtype | None = None
    rows: Rows | None = None
    seconds: list[float] = field(default_factory=list)
    in_a_row: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.name if self.k is None else f"{self.name}, k = {self.k}"

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    @property
    def graphs(self):
        """Its UpperGraphs, None where it runs without."""
        return find_late_prompt(self.model).graphs if self.name in LATE else None

    @property
    def trainable(self) -> int:
        return sum(p.numel() for _, p in self.trained())

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        rate, own = LEARNING_RATES[method_of(self.name)], LEARNING_RATES["late_lora"]
        rate = own if LORA.get(self.name) == ALONE else rate
        groups = [
            {"params": [p for n, p in self.trained() if ("lpt_lora" in n) == lora], "lr": lr}
            for lora, lr in ((False, rate), (True, own))
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], fused=True)

    def _context(self):
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def forward(self, rows: np.ndarray):
        """The model's output for some texts, loss among it."""
        inputs = self.inputs(rows)
        with self._context():
            return self.model(**inputs)

    def step(self, rows: np.ndarray) -> Tensor:
        """Inputs, forward, backward, AdamW: what is timed. Returns the loss."""
        loss = self.forward(rows).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def gradients(self, rows: np.ndarray) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients in one forward and backward; nothing is changed."""
        loss = self.forward(rows).loss
        loss.backward()
        found = {n: p.grad.detach().double().cpu() for n, p in self.trained()}
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach()), found


class HeadOnly(nn.Module):
    """The head of a sequence classifier on the first token's state after the last layer.

    Args:
        model: the whole classifier; it is held, so that its memory counts.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.whole = model.requires_grad_(False)
        name, backbone, family = find_backbone(model)
        for head in head_modules(model, name, backbone, family):
            model.get_submodule(head).requires_grad_(True)
        self._pooler = getattr(backbone, family.pooler, None) if family.pooler else None

    def logits(self, features: Tensor) -> Tensor:
        x = features[:, None]
        if self._pooler is not None:
            x = self._pooler(x)
            x = self.whole.dropout(x) if hasattr(self.whole, "dropout") else x
        return self.whole.classifier(x)

    def forward(self, features: Tensor, labels: Tensor):
        logits = self.logits(features)
        return Result(F.cross_entropy(logits.float(), labels), logits)


@dataclass
class Result:
    """What the head gives, as the models do."""

    loss: Tensor
    logits: Tensor


@dataclass
class Zoo:
    """Makes contestants that start from the same weights.

    Attributes:
        encoder: of ENCODERS.
        model_name: name or folder of pretrained weights; None: the encoder's, which for RoBERTa
            are random ones.
        classes: of the task.
        dtype: "fp32" or "bf16" (autocast, see HALF).
        device: where models go.
        pad_id: of the texts.
        dropout: as the methods have it; else there is none at all.
        quick: random encoders are tiny.
        seed: of all weights.
    """

    encoder: str
    model_name: str | None
    classes: int
    dtype: str = "fp32"
    device: str = "cpu"
    pad_id: int = 0
    dropout: bool = False
    quick: bool = False
    seed: int = 0

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    @cached_property
    def template(self) -> nn.Module:
        """The classifier as it is before anybody trains it, in fp32, where the others will be: no
        copy goes through the host.
        """
        return self._made().to(self.place)

    def _made(self) -> nn.Module:
        no_dropout = {
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "classifier_dropout": 0.0,
        }
        more = {} if self.dropout else no_dropout
        set_seed(self.seed)
        auto = AutoModelForSequenceClassification
        if self.model_name is None:
            shape = QUICK_SHAPE if self.quick else SHAPES[self.encoder]
            names = (
                "num_hidden_layers",
                "hidden_size",
                "num_attention_heads",
                "intermediate_size",
            )
            config = RobertaConfig(
                vocab_size=ROBERTA_VOCAB,
                max_position_embeddings=ROBERTA_POSITIONS,
                type_vocab_size=1,
                pad_token_id=self.pad_id,
                num_labels=self.classes,
                **dict(zip(names, shape, strict=True)),
                **more,
            )
            return auto.from_config(config, attn_implementation="sdpa")
        config = AutoConfig.from_pretrained(
            self.model_name, num_labels=self.classes, attn_implementation="sdpa", **more
        )
        return auto.from_pretrained(self.model_name, config=config, ignore_mismatched_sizes=True)

    @property
    def config(self):
        return self.template.config

    def base(self, half: bool = False, copied: bool = True) -> nn.Module:
        """The classifier, with its frozen weights in bf16 if `half`.

        Args:
            copied: whether it is another one than the template.
        """
        if self.template.num_parameters() > LARGE:
            gc.collect()  # earlier models hold themselves in cycles
        model = copy.deepcopy(self.template) if copied else self.template
        return model.to(self.place, torch.bfloat16 if half else torch.float32)

    def adapt(self, model: nn.Module, name: str, k: int | None) -> nn.Module:
        """The model as a method trains it."""
        set_seed(self.seed)
        method = method_of(name)
        if method == "lpt":
            config = LPTConfig(
                task_type="SEQ_CLS",
                insertion_layer=k,
                prompt_dropout=None if self.dropout else 0.0,
                upper=LATE[name][0],
                **{"generator": "npg", "num_virtual_tokens": 5, **LORA.get(name, {})},
            )
            model = get_peft_model(model, config)
            for part, weight in model.named_parameters():
                if (
                    "lora_B" in part and not self.dropout
                ):  # at zero, A would have no gradient to compare
                    nn.init.normal_(weight, std=0.02)
            return model
        if method == "full":
            return model
        if method == "head":
            return HeadOnly(model)
        # The same head as LPT trains, so that the methods compare.
        heads = head_modules(model, *find_backbone(model))
        if method == "lora":
            config = LoraConfig(
                task_type=TaskType.SEQ_CLS,
                r=8,
                lora_alpha=16,
                lora_dropout=0.1 if self.dropout else 0.0,
                target_modules=["query", "value"],
            )
        else:
            config = PromptTuningConfig(
                task_type=TaskType.SEQ_CLS, num_virtual_tokens=PROMPT_TUNING_TOKENS
            )
        config.modules_to_save = heads
        return get_peft_model(model, config)

    def contestant(
        self,
        name: str,
        k: int | None,
        texts: Texts,
        rows: Rows | None = None,
        exact: bool = False,
        model: nn.Module | None = None,
    ) -> Contestant:
        """A fresh contestant in training mode.

        Args:
            name: of LATE or OTHERS.
            k: insertion layer of a late prompt.
            texts: that it trains on.
            rows: what is computed already: of a cache, or features.
            exact: in fp32, whatever the dtype.
            model: the base model to adapt; default: a copy of the template.
        """
        half = self.dtype == "bf16" and name in HALF and not exact
        casts = self.dtype == "bf16" or name in AUTOCAST
        autocast = torch.bfloat16 if casts and not exact else None
        model = self.adapt(self.base(half) if model is None else model, name, k)
        for parameter in model.parameters():
            if parameter.requires_grad and half:
                parameter.data = parameter.data.float()
        model.train()
        if name == GRAPHS or (name in RECIPES and self.device == "cuda"):
            late = find_late_prompt(model)
            late.graphs = UpperGraphs(late)
        if name in OWN_BF16:
            find_late_prompt(model).compute_dtype = torch.bfloat16
            rows = None if rows is None else replace(rows, dtype=torch.bfloat16)
        if name in HOLDS and rows is not None and self.device == "cpu":
            with torch.autocast(self.device, autocast, enabled=autocast is not None):
                rows = rows.hold(model)
        if rows is not None and rows.cache is not None:
            m = model.peft_config["default"].num_virtual_tokens
            rows = replace(rows, room=m)
        inputs = inputs_of(name, texts, rows, self.place)
        return Contestant(name, k, model, inputs, self.place, autocast, rows)


# -- what is computed already ----------------------------------------------------------------------


@dataclass
class Rows:
    """What some texts gave in frozen layers.

    Attributes:
        of_text: int64 [N], the row of each text, -1 for those that were not computed.
        cache: where rows of layer k are read from, or None.
        dtype: in which they are read; None: as they are stored.
        room: free rows before each text.
        features: [rows, D], first tokens after the last layer, or None.
        held: projections of all rows, or None; held_seconds: that they took.
    """

    of_text: np.ndarray
    cache: ActivationCache | None = None
    dtype: torch.dtype | None = None
    room: int = 5
    features: Tensor | None = None
    held: Projections | None = None
    held_seconds: float = 0.0

    @property
    def computed(self) -> np.ndarray:
        """Numbers of the texts that have a row."""
        return np.flatnonzero(self.of_text >= 0)

    def keys(self, chosen: np.ndarray) -> np.ndarray:
        """Of texts, in the cache."""
        return self.cache.table.key[self.of_text[chosen]]

    def hold(self, model: nn.Module) -> Rows:
        """These rows with their projections by a model."""
        start = time.perf_counter()
        held = Projections(find_late_prompt(model), self.cache, self.keys(self.computed))
        return replace(self, held=held, held_seconds=time.perf_counter() - start)

    @classmethod
    def numbered(cls, texts: Texts, chosen: np.ndarray, numbers: np.ndarray, **more) -> Rows:
        of_text = np.full(len(texts), -1)
        of_text[chosen] = numbers
        return cls(of_text, **more)


def inputs_of(name: str, texts: Texts, rows: Rows | None, device: torch.device) -> Callable:
    """What makes a contestant's inputs from numbers of texts."""

    def labels(chosen):
        return texts.labels[torch.as_tensor(chosen)].to(device, non_blocking=True)

    def text(chosen):
        return texts.collate(chosen, device)

    def cached(chosen):
        batch = rows.cache.read(rows.of_text[chosen], room=rows.room, dtype=rows.dtype)
        if rows.held is not None:
            batch = replace(batch, held=rows.held.of(rows.keys(chosen)))
        return {"cached_hidden": batch, "labels": labels(chosen)}

    def features(chosen):
        numbers = torch.as_tensor(rows.of_text[chosen], device=device)
        return {"features": rows.features[numbers], "labels": labels(chosen)}

    if name == "head":
        return features
    return cached if name in LATE and LATE[name][1] else text
