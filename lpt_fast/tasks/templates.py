"""The tasks that are known by name, and how any task is loaded.

The ten tasks of the paper are in `TASKS`; `load_task` also reads a user's own task from YAML.
Templates and label words of the masked models are those of the authors' program
(github.com/xyltt/LPT, encoder-only/data/process.py), decoder templates those of
decoder-only/data/utils.py there.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .spec import TaskSpec
from .yaml_task import read_yaml_task

_SENTIMENT = {"negative": "terrible", "positive": "great"}


def _single(name: str, words: Mapping[str, str], template: str = "", **hub: Any) -> TaskSpec:
    return TaskSpec(
        name=name,
        text_columns=("text",),
        template=template or "{text} . It was {mask} .",
        decoder_template="{text} It was",
        label_words=words,
        **hub,
    )


def _pair(name: str, words: Mapping[str, str], metric: str = "accuracy", **hub: Any) -> TaskSpec:
    return TaskSpec(
        name=name,
        text_columns=("sentence1", "sentence2"),
        # QQP alone has no question mark of the template's own: its texts end in one.
        template=("{sentence1}" if name == "qqp" else "{sentence1} ?") + " {mask} , {sentence2}",
        # The authors join the ids of both texts with no space between; a space is put here.
        # They give RTE, QNLI and MRPC this form; MNLI and QQP have it by analogy.
        decoder_template="{sentence1} {sentence2} They are",
        label_words=words,
        metric=metric,
        hub_name=f"glue/{name}",
        hub_label_ids=dict(enumerate(words)),
        **hub,
    )


# Class order: the hub's where there is one, so that F1 counts class 1 (equivalent, duplicate);
# sorted otherwise. F1 for MRPC and QQP as in LM-BFF (Gao et al. 2021), whose tasks these are.
TASKS: Mapping[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        _single(
            "sst2",
            _SENTIMENT,
            hub_name="glue/sst2",
            hub_columns=("sentence",),
            hub_label_ids={0: "negative", 1: "positive"},
        ),
        _single("mpqa", _SENTIMENT),
        _single(
            "mr",
            _SENTIMENT,
            hub_name="cornell-movie-review-data/rotten_tomatoes",
            hub_label_ids={0: "negative", 1: "positive"},
        ),
        _single("subj", {"objective": "objective", "subjective": "subjective"}),
        _single(
            "trec",
            {
                "abbreviation": "Expression",
                "description": "Description",
                "entity": "Entity",
                "human": "Human",
                "location": "Location",
                "number": "Number",
            },
            # No hub name: the hub's TREC is a loading script, which `datasets` >= 4 refuses.
            template="{mask} : {text}",
        ),
        _pair(
            "mnli",
            {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"},
            hub_columns=("premise", "hypothesis"),
        ),
        _pair("mrpc", {"not_equivalent": "No", "equivalent": "Yes"}, metric="f1"),
        _pair(
            "qnli",
            {"entailment": "Yes", "not_entailment": "No"},
            hub_columns=("question", "sentence"),
        ),
        _pair(
            "qqp",
            {"not_duplicate": "No", "duplicate": "Yes"},
            metric="f1",
            hub_columns=("question1", "question2"),
        ),
        _pair("rte", {"entailment": "Yes", "not_entailment": "No"}),
    )
}


def load_task(name_or_path: str | Path) -> TaskSpec:
    """A task of `TASKS` by name, or a user's own from a `.yaml` / `.yml` file.

    Keys of the file: name, text_columns (one name or a list of one or two), template,
    label_words (label: word), decoder_template and metric (both optional).

    Raises:
        ValueError: unknown name, or a file that says something else than the above.
        FileNotFoundError: no such YAML file.
    """
    text = str(name_or_path)
    if Path(text).suffix.lower() in (".yaml", ".yml"):
        return read_yaml_task(Path(text))
    if text.lower() in TASKS:
        return TASKS[text.lower()]
    close = difflib.get_close_matches(text.lower().replace("-", ""), TASKS, n=1, cutoff=0.4)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(
        f"got the task {text!r}{hint}, expected one of {', '.join(TASKS)}: choose one, or give "
        "the path of a .yaml file that describes your own task"
    )
