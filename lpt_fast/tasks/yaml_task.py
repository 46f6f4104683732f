"""A user's own task from a YAML file: every mistake is one sentence that names the way out."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from .messages import shown
from .spec import TaskSpec

_REQUIRED = ("name", "text_columns", "template", "label_words")
_OPTIONAL = ("metric", "decoder_template")


def read_yaml_task(path: Path) -> TaskSpec:
    """Read one `TaskSpec` from a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, unknown or missing keys, values of the wrong kind, or whatever
            `TaskSpec` itself refuses.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(
            f"got the task file {str(path)!r}, which does not exist, expected a YAML file: check "
            "the path"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path}: got text that is no YAML ({detail}), expected key: value lines: quote "
            "templates, which hold braces and colons"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: got a {type(content).__name__}, expected a mapping with the keys "
            f"{', '.join(_REQUIRED)}: write one key: value a line"
        )
    _check_keys(path, content)
    columns = content["text_columns"]
    if isinstance(columns, str):
        columns = [columns]
    if not isinstance(columns, list) or not all(isinstance(c, str) for c in columns):
        raise ValueError(
            f"{path}: got text_columns {shown(columns)}, expected one column name or a list of "
            "two: write it as [sentence1, sentence2]"
        )
    for key in ("name", "template", "metric", "decoder_template"):
        value = content.get(key)
        if not isinstance(value, str) and not (key in _OPTIONAL and value is None):
            raise ValueError(
                f"{path}: got {shown(value)} for {key}, expected text: put it in double quotes"
            )
    return TaskSpec(
        name=content["name"],
        text_columns=tuple(columns),
        template=content["template"],
        decoder_template=content.get("decoder_template"),
        label_words=_label_words(path, content["label_words"]),
        metric=content.get("metric") or "accuracy",
    )


def _check_keys(path: Path, content: dict[Any, Any]) -> None:
    known = [*_REQUIRED, *_OPTIONAL]
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"{path}: got the unknown key {key!r}{hint}, expected only {', '.join(known)}: "
                "correct or remove it"
            )
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        raise ValueError(
            f"{path}: got no {' and no '.join(missing)}, expected the keys {', '.join(_REQUIRED)}: "
            "add what is missing"
        )


def _label_words(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: got label_words {shown(value)}, expected a mapping from label to word: write "
            "one label: word a line"
        )
    words = {}
    for label, word in value.items():
        # YAML 1.1 reads a bare yes, no, on, off as a boolean and a bare null as nothing: label
        # words of just these kinds are common ("Yes"), so the sentence says what happened.
        if isinstance(label, bool) or not isinstance(label, str | int) or not isinstance(word, str):
            raise ValueError(
                f"{path}: got {shown(label)}: {shown(word)} in label_words, expected text for both "
                "(YAML reads a bare yes, no, on, off or null as something else): put them in quotes"
            )
        words[str(label)] = word
    return words
