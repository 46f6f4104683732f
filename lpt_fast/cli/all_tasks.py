"""Several trained adapters of one frozen model at work on the same texts: each text runs the lower
layers once, then all tasks' rows run together (method/mixed.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm

from ..cache import ActivationCache
from ..method.config import LPT
from ..method.groups import Group
from ..method.mixed import run_groups
from ..tasks.messages import Origin
from ..train.cached_loading import open_for
from ..train.compute_dtype import choose, parse
from ..train.trainer import find_late_prompt
from .data import Collator, Formulation
from .inference import Classifier, batches_by_length, predictions, read_formulation, tokens_on

# Tokens of a batch in all tasks' copies of its texts, padding counted.
ROWS = {"cpu": 8192, "cuda": 131072}


class Classifiers:
    """Late prompts that `lpt-fast train` made for one base model, ready to classify texts together.

    Args:
        folders: output folders of trainings, by the names of their tasks; or folders alone, whose
            own names are their tasks'.
        model, max_length, batch_size, use_cpu, compute_dtype: as of Classifier.
        activation_cache: folder of a cache of the lowest insertion layer, which gives the rows of
            the texts that it holds and gets those of the others; None: from the text.

    Raises:
        ValueError: as of Classifier, for trainings of another method or base model, and for tasks
            that do not go together.
    """

    def __init__(
        self,
        folders: Mapping[str, str] | Sequence[str],
        model: str | None = None,
        max_length: int | None = None,
        batch_size: int | None = None,
        use_cpu: bool = False,
        compute_dtype: str | None = None,
        activation_cache: str | None = None,
    ):
        folders = named(folders)
        self.names = list(folders)
        paths = list(folders.values())
        forms = [read_formulation(path) for path in paths]
        _check_together(paths, forms, model)
        # (A cache is of the model as it was trained; then layers compute in bf16 on a copy.)
        own = compute_dtype if activation_cache is None else "float32"
        first = Classifier(paths[0], model, max_length, batch_size, use_cpu, own)
        if max_length is not None:
            for form in forms:
                form.max_length = first.formulation.max_length
        adapters = ["default", *(f"task{i}" for i in range(1, len(paths)))]
        for adapter, path, form in zip(adapters[1:], paths[1:], forms[1:], strict=True):
            first.load_adapter(path, form, adapter)
        self._take(first.model, first.tokenizer, adapters, forms, batch_size)
        self._cache = activation_cache
        if activation_cache is not None and self.device.type == "cpu":
            self.late.compute_dtype = choose(self.late, parse(compute_dtype), None)

    @classmethod
    def of_model(
        cls, model: PeftModel, tokenizer, max_length: int = 128, batch_size: int | None = None
    ) -> Classifiers:
        """Those of a model with several late prompts, by the names of its adapters, in its own
        dtype and on its own device.

        Raises:
            ValueError: an adapter is no classifier by late prompts.
        """
        self = cls.__new__(cls)
        forms, self.names = [], list(model.peft_config)
        for name, config in model.peft_config.items():
            if config.peft_type != LPT or not config.id2label or config.task_type != "SEQ_CLS":
                raise ValueError(
                    f"The adapter {name!r} is a {config.peft_type} for {config.task_type}, "
                    "expected late prompts for SEQ_CLS with names of labels; delete it from the "
                    "model, or give the folders of its trainings."
                )
            labels = [str(config.id2label[i]) for i in sorted(config.id2label)]
            forms.append(Formulation(labels, None, "label", max_length, False, False, None, ""))
        self._take(model.eval(), tokenizer, self.names, forms, batch_size)
        return self

    def _take(self, model, tokenizer, adapters, forms, batch_size) -> None:
        self.model, self.tokenizer, self.adapters = model, tokenizer, adapters
        self.formulations, self.batch_size = forms, batch_size
        self.late = find_late_prompt(model)
        self.device = next(model.parameters()).device
        self.words = [form.word_ids(tokenizer) if form.cloze else None for form in forms]
        self._cache: str | None = None

    def _opened(self, tasks: list[int]) -> ActivationCache:
        """The cache of the lowest layer that these need."""
        model, config = self.model, self.late.lpt_config
        names = [self.adapters[i] for i in tasks]
        model.set_adapter(min(names, key=lambda name: config[name].insertion_layer))
        return open_for(self._cache, model, lambda: self.late.compute_dtype)

    def formulation_of_all(self, named: bool) -> Formulation:
        """The first one, for reading texts.

        Args:
            named: whether the columns of the texts are named by the user.

        Raises:
            ValueError: another task reads other columns.
        """
        first, *others = self.formulations
        for name, form in zip(self.names[1:], others, strict=True):
            got, expected = (_columns(f) for f in (form, first))
            if len(got) != len(expected) or (got != expected and not named):
                raise ValueError(
                    f"The task {name} reads the columns {', '.join(got)}, expected "
                    f"{', '.join(expected)} as {self.names[0]} does; give --text_column, or "
                    "predict with it by itself."
                )
        return first

    @torch.inference_mode()
    def probabilities(
        self, rows: dict[str, list[str]], progress: bool = False, origin: Origin | None = None
    ) -> dict[str, np.ndarray]:
        """Class probabilities of each task, float32 [N, C]; arguments as of Classifier's."""
        out = {}
        shared: dict[tuple, list[int]] = {}
        for i, form in enumerate(self.formulations):
            # (Label words stand in a template of each task's own.)
            shared.setdefault((i, 0) if form.cloze else (-1, form.max_length), []).append(i)
        count = len(next(iter(rows.values())))
        bar = tqdm(
            total=count * len(self.names), desc="Predicting", unit="label", disable=not progress
        )
        with bar:
            for tasks in shared.values():
                out |= self._together(tasks, rows, origin, bar)
        return {name: out[name] for name in self.names}

    def _together(self, tasks: list[int], rows, origin, bar) -> dict[str, np.ndarray]:
        """Of tasks that read the texts alike."""
        form = self.formulations[tasks[0]]
        examples = form.encode(self.tokenizer, rows, labels=None, origin=origin)
        return self.of_examples(tasks, examples, bar)

    @torch.inference_mode()
    def of_examples(
        self, tasks: list[int], examples: list[dict], bar: tqdm | None = None
    ) -> dict[str, np.ndarray]:
        """Class probabilities of texts that are tokenised already, as `Formulation.encode` gives
        them, for some of the tasks.
        """
        form = self.formulations[tasks[0]]
        found = [np.zeros((len(examples), len(self.formulations[i].labels)), "f4") for i in tasks]
        rows = tokens_on(self.model, ROWS) // len(tasks)
        budget = max(1, min(tokens_on(self.model), rows))
        parts = batches_by_length(examples, self.batch_size, budget)
        cache = None
        if self._cache is not None:
            cache = self._opened(tasks)
            numbers = cache.ensure(self.model, examples)
        collate = Collator(self.tokenizer)
        for index in parts:
            batch = collate([examples[i] for i in index])
            batch = {name: value.to(self.device) for name, value in batch.items()}
            if form.cloze:
                place = [examples[i]["readout"] for i in index]
                batch["readout"] = torch.tensor(place, device=self.device)
            if cache is not None:
                kept = ("readout", "context_lengths")
                batch = {name: batch[name] for name in kept if name in batch}
                batch["cached_hidden"] = cache.read(numbers[index])
            every = tuple(range(len(index)))
            groups = [Group(self.adapters[i], every) for i in tasks]
            for i, values, output in zip(
                tasks, found, run_groups(self.late, groups, batch), strict=True
            ):
                logits = output.logits
                if form.cloze:
                    logits = logits[:, 0, self.words[i]]
                values[index] = logits.float().softmax(-1).cpu().numpy()
            if bar is not None:
                bar.update(len(index) * len(tasks))
        return {self.names[i]: values for i, values in zip(tasks, found, strict=True)}

    def predict(
        self, rows: dict[str, list[str]], progress: bool = False, origin: Origin | None = None
    ) -> dict[str, list[dict]]:
        """Of each task, for each row what `Classifier.predict` gives."""
        found = self.probabilities(rows, progress, origin)
        forms = dict(zip(self.names, self.formulations, strict=True))
        return {name: list(predictions(p, forms[name].labels)) for name, p in found.items()}


def predict_all(
    adapters: Mapping[str, str] | Sequence[str] | PeftModel | Classifiers,
    texts: Sequence[str] | dict[str, list[str]],
    *,
    progress: bool = False,
    **how,
) -> dict[str, list[dict]]:
    """Labels of texts for several tasks, in one pass over the frozen model.

    Example:
        found = predict_all(["out/sst2", "out/subj"], ["a fine film"])
        found["sst2"][0]["label"]

    Args:
        adapters: folders that `lpt-fast train` wrote, or {task: folder}; or a PeftModel with these
            late prompts, and its `tokenizer`; or a Classifiers, which is loaded already.
        texts: the texts; or {column: texts}, two columns for pairs.
        progress: show a progress bar.
        how: further arguments of Classifiers, or of Classifiers.of_model.

    Returns:
        task -> for each text {"label", "probability", "probabilities": {label: probability}}.

    Raises:
        ValueError: as of Classifiers, and for a text that cannot be encoded.
    """
    if isinstance(adapters, Classifiers):
        if how:
            raise ValueError(
                f"predict_all() got {', '.join(how)} together with a Classifiers, expected one of "
                "them; give them when that is made."
            )
        loaded = adapters
    elif isinstance(adapters, PeftModel):
        loaded = Classifiers.of_model(adapters, **how)
    else:
        loaded = Classifiers(adapters, **how)
    if isinstance(texts, str):
        raise ValueError("`texts` is one text, expected a list of texts; give [text].")
    rows = texts if isinstance(texts, dict) else {"text": list(texts)}
    if not rows or not len(next(iter(rows.values()))):
        return {name: [] for name in loaded.names}
    return loaded.predict(rows, progress)


def named(folders: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Folders by the names of their tasks: their own, or where two have one name, their paths."""
    if isinstance(folders, Mapping):
        found = {str(name): str(folder) for name, folder in folders.items()}
    else:
        paths = [str(folders)] if isinstance(folders, str | Path) else [str(f) for f in folders]
        names = [Path(path).resolve().name for path in paths]
        found = {
            path if names.count(name) > 1 else name: path
            for name, path in zip(names, paths, strict=True)
        }
        if len(found) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise ValueError(
                f"{twice} is named twice, expected each adapter once; leave one of them out."
            )
    if not found:
        raise ValueError("No adapter is named, expected one or more folders; give one.")
    return found


def _check_together(paths: list[str], forms: list[Formulation], model: str | None) -> None:
    """Raises ValueError for trainings that cannot run together, by the name of the folder."""
    first = forms[0]
    for path, form in zip(paths, forms, strict=True):
        if form.method != "lpt":
            raise ValueError(
                f"{path} holds a training of --method {form.method}, expected late prompts (lpt), "
                "which share a frozen model; predict with it by itself."
            )
        if model is None and _same(form.model) != _same(first.model):
            raise ValueError(
                f"{path} was trained on {form.model}, expected {first.model}, the base model of "
                f"{paths[0]}; predict with it by itself, or name the model of both with --model."
            )
        for name, got, expected in (
            ("formulation", _kind(form), _kind(first)),
            ("dtype", form.dtype, first.dtype),
        ):
            if got != expected:
                raise ValueError(
                    f"{path} has the {name} {got}, expected {expected} as {paths[0]} has: they "
                    "share one model; predict with it by itself."
                )


def _same(model: str) -> str:
    """A base model's name, as two folders that name it in other words have it."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _columns(form: Formulation) -> list[str]:
    return list(form.text_columns or form.task.text_columns)


def _kind(form: Formulation) -> str:
    return "cloze" if form.cloze else "classification"
