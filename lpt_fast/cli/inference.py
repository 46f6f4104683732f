"""A trained adapter at work: class probabilities for texts, evaluation on labelled files."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from ..backbone.families import find_backbone, get_layers
from ..cache.forward import batches_of
from ..packed.prepacked import prepack
from ..tasks import classification_metrics, encode_labels
from ..tasks.messages import Origin
from ..train.compute_dtype import ENOUGH, gain_of, parse
from .arguments import ADAPTER_METHODS, EvalArguments
from .data import (
    RUN_FILE,
    Collator,
    Formulation,
    cannot_load,
    checked_max_length,
    load_tokenizer,
    read_rows,
    text_columns_of,
)
from .model import PROMPT_TUNING_TOKENS

logger = logging.getLogger(__name__)

TOKENS = {"cpu": 4096, "cuda": 32768}  # of a batch, padding counted
STATES = 32  # of D numbers each that a token takes at the most, feed-forward ones among them


class Classifier:
    """A model that `lpt-fast train` wrote, ready to classify texts.

    Args:
        folder: the output folder of the training.
        model: base model to use instead of the one that the folder names (it may have moved).
        max_length: most tokens of an example, if other than in training.
        batch_size: examples of a batch; None: so many as have TOKENS tokens of the device.
        use_cpu: stay on the CPU where there is a GPU.
        compute_dtype: of the model on a CPU, "float32" or "bfloat16"; None: bfloat16 where the
            processor is found to multiply it faster and the model is in float32.

    Raises:
        ValueError: for a folder that holds no training, or a base model that cannot be loaded or
            does not fit.
    """

    def __init__(
        self,
        folder: str,
        model: str | None = None,
        max_length: int | None = None,
        batch_size: int | None = None,
        use_cpu: bool = False,
        compute_dtype: str | None = None,
    ):
        self.formulation = read_formulation(folder)
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
        self.tokenizer = load_tokenizer(folder)
        self.model = self._load(folder, model or self.formulation.model).eval().to(self.device)
        self._choose_dtype(parse(compute_dtype))
        if max_length is not None:
            self.formulation.max_length = self._checked(max_length)
        self._words = self.formulation.word_ids(self.tokenizer) if self.formulation.cloze else None

    def _load(self, folder: str, base: str):
        form = self.formulation
        auto, more = AutoModelForSequenceClassification, {"num_labels": len(form.labels)}
        if form.cloze:
            auto, more = (AutoModelForCausalLM if form.causal else AutoModelForMaskedLM), {}
        # Not by what lies in the folder: an earlier training may have left its files there.
        adapter = form.method in ADAPTER_METHODS
        try:
            model = auto.from_pretrained(
                base if adapter else folder,
                ignore_mismatched_sizes=adapter,
                dtype=getattr(torch, form.dtype),
                **more,
            )
        except (OSError, ValueError) as error:
            way_out = f"{cannot_load('model', base, error)} Give the base model with --model."
            raise ValueError(way_out) from None
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        if not adapter:
            return model
        with _fitting(folder, base, form.model):
            return PeftModel.from_pretrained(model, folder)

    def load_adapter(self, folder: str, formulation: Formulation, name: str) -> None:
        """Loads another training's adapter beside the first, under a name of its own.

        Raises:
            ValueError: it does not fit the model.
        """
        with _fitting(folder, self.formulation.model, formulation.model):
            self.model.load_adapter(folder, adapter_name=name)
        self.model.eval().to(self.device)
        if self._cast:
            self.model.to(torch.bfloat16)

    def _choose_dtype(self, asked: torch.dtype | None) -> None:
        """Casts a model in fp32 to bf16 where that is asked for or faster, on a CPU. (Nobody else
        has it, and nothing of it is saved.)
        """
        self._cast = False
        _, backbone, family = find_backbone(self._base)
        layer = get_layers(backbone, family)[0]
        own = next(layer.parameters()).dtype
        if self.device.type != "cpu" or own != torch.float32 or asked == torch.float32:
            return
        if asked is None:
            gain = gain_of(layer)
            if gain < ENOUGH:
                return
            logger.info(
                "The model runs in bfloat16, which this processor multiplies %.1f times as fast; "
                "compute_dtype='float32' keeps it in float32.",
                gain,
            )
        self._cast = True
        self.model.to(torch.bfloat16)
        # Nothing of it changes any more.
        prepack(get_layers(backbone, family), torch.bfloat16)

    def _checked(self, max_length: int) -> int:
        _, backbone, family = find_backbone(self._base)
        limit = family.max_length(backbone.config) or 10**9
        if self.formulation.method == "prompt_tuning":
            limit -= PROMPT_TUNING_TOKENS
        return checked_max_length(max_length, limit, self.formulation.model, self.tokenizer)

    @property
    def _base(self):
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def labels(self) -> list[str]:
        """Class names in the order of ids."""
        return self.formulation.labels

    @torch.inference_mode()
    def probabilities(
        self, rows: dict[str, list[str]], progress: bool = False, origin: Origin | None = None
    ) -> np.ndarray:
        """Class probabilities, float32 [N, C], in the order of the rows.

        Args:
            rows: text column -> N texts.
            progress: show a progress bar.
            origin: of the rows, for messages.
        """
        examples = self.formulation.encode(self.tokenizer, rows, labels=None, origin=origin)
        out = np.zeros((len(examples), len(self.labels)), dtype=np.float32)
        collate = Collator(self.tokenizer)
        parts = batches_by_length(examples, self.batch_size, tokens_on(self.model))
        for index in tqdm(parts, desc="Predicting", disable=not progress):
            batch = {k: v.to(self.device) for k, v in collate([examples[i] for i in index]).items()}
            if not isinstance(self.model, PeftModel):
                batch.pop("context_lengths", None)
            if self.formulation.cloze:  # with a late prompt always: other methods train a head
                place = torch.tensor([examples[i]["readout"] for i in index], device=self.device)
                logits = self.model(**batch, readout=place).logits[:, 0, self._words]
            else:
                logits = self.model(**batch).logits
            out[index] = logits.float().softmax(-1).cpu().numpy()
        return out

    def predict(
        self, rows: dict[str, list[str]], progress: bool = False, origin: Origin | None = None
    ) -> Iterator[dict]:
        """For each row its label, the label's probability and those of all labels; arguments as
        for `probabilities`.
        """
        yield from predictions(self.probabilities(rows, progress, origin), self.labels)


def tokens_on(model: torch.nn.Module, most: dict[str, int] = TOKENS) -> int:
    """Tokens of a batch of a model where it is: what `most` says of the device (of one that is not
    known, what of a CPU), on CUDA at most what has room in half of the free memory.
    """
    weight = next(model.parameters())
    tokens = most.get(weight.device.type, most["cpu"])
    if weight.device.type != "cuda":
        return tokens
    free, _ = torch.cuda.mem_get_info(weight.device)
    row = STATES * getattr(model.config, "hidden_size", 1024) * weight.element_size()
    return max(most["cpu"], min(tokens, free // 2 // row))


def batches_by_length(examples: list[dict], size: int | None, tokens: int) -> list[np.ndarray]:
    """Numbers of the texts of each batch, texts of like length together: less padding.

    Args:
        examples: tokenised.
        size: texts of a batch; None: so many as have `tokens` tokens, padding counted.
    """
    lengths = np.array([len(example["input_ids"]) for example in examples], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")  # what does not fit the memory is said at once
    if size is None:
        return [order[part] for part in batches_of(lengths[order], tokens)]
    return [order[start : start + size] for start in range(0, len(order), size)]


def predictions(probabilities: np.ndarray, labels: list[str]) -> Iterator[dict]:
    """For each row of [N, C] its label, the label's probability and those of all labels."""
    for p in probabilities:
        best = int(p.argmax())
        yield {
            "label": labels[best],
            "probability": float(p[best]),
            "probabilities": {name: float(v) for name, v in zip(labels, p, strict=True)},
        }


def read_formulation(folder: str) -> Formulation:
    """How a training's texts became inputs.

    Raises:
        ValueError: the folder holds no training.
    """
    run = Path(folder) / RUN_FILE
    if not run.is_file():
        raise ValueError(
            f"{folder} holds no {RUN_FILE}; give the folder that `lpt-fast train --output_dir` "
            "wrote."
        )
    return Formulation.from_json(json.loads(run.read_text(encoding="utf-8")))


@contextmanager
def _fitting(folder: str, base: str, trained_on: str) -> Iterator[None]:
    """Says which adapter does not fit which model."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"The adapter in {folder} does not fit the model {base} (it was trained on "
            f"{trained_on}): {reason}"
        ) from None


def evaluate(args: EvalArguments) -> dict[str, float]:
    """Metrics of a trained adapter on labelled data; the body of `lpt-fast eval`.

    Returns:
        accuracy, f1, mcc in [0, 1] (mcc in [-1, 1]), and `examples`.
    """
    size = args.per_device_eval_batch_size
    how = (args.model, args.max_length, size, args.use_cpu, args.compute_dtype)
    classifier = Classifier(args.adapter, *how)
    form = classifier.formulation
    columns = (
        text_columns_of(form.task, args.text_column) if args.text_column else form.text_columns
    )
    label_column = args.label_column or form.label_column
    source = args.test_file or args.dataset
    dataset, texts, origin = read_rows(
        source, args.split, form.task, columns, label_column, args.max_eval_samples
    )
    ids = form.task.hub_label_ids if form.task else None
    gold = list(encode_labels(dataset, label_column, form.labels, ids, origin)["labels"])
    predicted = classifier.probabilities(texts, True, origin).argmax(-1)
    metrics = classification_metrics(predicted, np.asarray(gold), num_classes=len(form.labels))
    return {**metrics, "examples": len(gold)}
