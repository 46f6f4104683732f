"""The model card beside a saved adapter: what it is, and how a process opens it that knows nothing
of this package.

PEFT has a closed list of methods and no entry points, so `import lpt_fast` must come before an
adapter is opened. PEFT says `KeyError: 'LPT'` where it did not, and its own card is an empty form.

(A file that Python runs at each start, `.pth`, would do without the import. It would also put an
import hook into every program of the environment, those that never touch PEFT among them.)
SentenceTransformer writes a card of its own over this one.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

logger = logging.getLogger(__name__)

BEGIN = "<!-- lpt-fast: this part is written anew by each save; what stands outside of it stays -->"
END = "<!-- lpt-fast: end -->"
_VERSIONS = "### Framework versions"
_MOST_LABELS = 20
_FEATURES = ["    print(model(**inputs).last_hidden_state.shape)"]
_GENERATES = [
    "    ids = model.generate(**inputs, max_new_tokens=20)[0]",
    "print(tokenizer.decode(ids, skip_special_tokens=True))",
]
# task type -> in words, the hub's name of it, PEFT's class, the lines that use the model
_TASKS: dict[str | None, tuple[str, str | None, str, list[str]]] = {
    "SEQ_CLS": (
        "text classification",
        "text-classification",
        "AutoPeftModelForSequenceClassification",
        [
            "    best = int(model(**inputs).logits.argmax())",
            "print(model.config.id2label[best])",
        ],
    ),
    "TOKEN_CLS": (
        "token classification",
        "token-classification",
        "AutoPeftModelForTokenClassification",
        [
            "    best = model(**inputs).logits[0].argmax(-1).tolist()",
            "print([model.config.id2label[i] for i in best])",
        ],
    ),
    "CAUSAL_LM": (
        "text generation",
        "text-generation",
        "AutoPeftModelForCausalLM",
        _GENERATES,
    ),
    "SEQ_2_SEQ_LM": (
        "sequence to sequence",
        None,
        "AutoPeftModelForSeq2SeqLM",
        _GENERATES,
    ),
    "QUESTION_ANS": (
        "extractive question answering",
        "question-answering",
        "AutoPeftModelForQuestionAnswering",
        [
            "    out = model(**inputs)",
            "first, last = int(out.start_logits.argmax()), int(out.end_logits.argmax())",
            'print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))',
        ],
    ),
    "FEATURE_EXTRACTION": (
        "features",
        "feature-extraction",
        "AutoPeftModelForFeatureExtraction",
        _FEATURES,
    ),
    None: (
        "none named",
        None,
        "AutoPeftModel",
        ["    print(model(**inputs)[0].shape)"],
    ),
}
_REGRESSES = ["    print(float(model(**inputs).logits))"]


def _plain(text: object) -> str:
    """Text that markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _task(config) -> tuple[str, str | None, str, list[str]]:
    name = config.task_type
    words, tag, cls, lines = _TASKS.get(None if name is None else str(getattr(name, "value", name)))
    if cls.endswith("SequenceClassification") and config.num_labels == 1:
        words, lines = "regression", _REGRESSES
    return words, tag, cls, lines


def _code(config, folder: Path) -> list[str]:
    _, _, cls, lines = _task(config)
    base = config.base_model_name_or_path or "THE BASE MODEL"
    tokenizer = "." if (folder / "tokenizer_config.json").is_file() else base
    texts = '"a question", "a text"' if cls.endswith("QuestionAnswering") else '"a text"'
    return [
        "import lpt_fast  # noqa: F401  (before the adapter is opened)",
        "import torch",
        f"from peft import {cls}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {cls}.from_pretrained(".").eval()  # this folder, by its path or name',
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(tokenizer, ensure_ascii=False)})",
        f'inputs = tokenizer({texts}, return_tensors="pt")',
        "with torch.no_grad():",
        *lines,
    ]


def _labels(config) -> str:
    names = sorted((config.id2label or {}).items())
    shown = ", ".join(f"{i} {_plain(name)}" for i, name in names[:_MOST_LABELS])
    more = (
        f", ... ({len(names)}; all in adapter\\_config.json)" if len(names) > _MOST_LABELS else ""
    )
    return (shown + more) or "none"


def _section(config, folder: Path, figures: Mapping[str, float]) -> str:
    from .. import __version__

    base = config.base_model_name_or_path
    name = config.task_type
    task = _task(config)[0] + (f" ({_plain(getattr(name, 'value', name))})" if name else "")
    rows = {
        "task": task,
        "labels": _labels(config),
        "base model": _plain(base) if base else "not named: it had no name when this was saved",
        "insertion layer k": config.insertion_layer,
        "prompt rows m": config.num_virtual_tokens,
        "generator": config.generator,
    }
    if config.lora_r is not None:
        names = config.lora_target_modules
        names = names if isinstance(names, str) or names is None else ", ".join(names)
        rows["late LoRA"] = f"rank {config.lora_r} on {_plain(str(names))}"
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    more = ["## Figures", "", "| | |", "|---|---|"]
    more += [f"| {_plain(key)} | {value:.6g} |" for key, value in figures.items()]
    lines = [
        BEGIN,
        "# Late Prompt Tuning adapter",
        "",
        "A [PEFT](https://github.com/huggingface/peft) adapter of the method LPT (Late Prompt "
        "Tuning), made with the Python package `lpt-fast`.",
        "",
        *("| | |", "|---|---|", *table, ""),
        *(more if figures else ()),
        *([""] if figures else ()),
        "## Use",
        "",
        f"Install `lpt-fast` ({__version__} saved this) and import it **before** the adapter is "
        "opened, by whatever class. PEFT learns the method by that import alone; without it every "
        "way to open the adapter ends in `KeyError: 'LPT'`.",
        "",
        *("```python", *_code(config, folder), "```", ""),
        "The same import comes before `AutoModel`, `pipeline` or `SentenceTransformer` with this "
        "folder. A command is started with it so:",
        "",
        "```bash",
        "python -c \"import lpt_fast, runpy; runpy.run_module('lm_eval', run_name='__main__', "
        'alter_sys=True)" --help',
        "```",
        END,
    ]
    return "\n".join(lines)


def _text_with(section: str, text: str) -> str:
    """A card's text with the section in its place; PEFT's empty form gives way to it."""
    kept = re.search(re.escape(BEGIN) + r".*?" + re.escape(END), text, re.DOTALL)
    if kept:
        return text[: kept.start()] + section + text[kept.end() :]
    form, mark, versions = text.partition(_VERSIONS)
    if form.strip() in ("", ModelCard.from_template(ModelCardData()).text.strip()):
        return f"{section}\n\n{mark}{versions}".rstrip() + "\n"
    return f"{text.rstrip()}\n\n{section}\n"


def write_card(folder: str | os.PathLike, config, figures: Mapping[str, float] | None = None):
    """Writes or renews README.md beside a saved adapter; what users wrote in it stays.

    Never in the way of the adapter: where the card cannot be read or written, a warning says so.

    Args:
        folder: of the adapter.
        config: its LPTConfig.
        figures: name -> value, of the evaluations of these very weights; None: not known.
    """
    path = Path(folder) / "README.md"
    try:
        card = ModelCard.load(path) if path.is_file() else ModelCard("---\n{}\n---\n")
        data = card.data
        data["library_name"] = "peft"
        data["tags"] = sorted({*(data.get("tags") or ()), "LPT", "lpt-fast"})
        if config.base_model_name_or_path:
            data["base_model"] = data.get("base_model") or config.base_model_name_or_path
        tag = _task(config)[1]
        if tag is not None:
            data["pipeline_tag"] = data.get("pipeline_tag") or tag
        section = _section(config, path.parent, figures or {})
        card.text = _text_with(section, card.text).rstrip("\n") + "\n"
        card.save(path)
    except Exception as error:  # (yaml, jinja2, the file system, the form of a user's own card)
        logger.warning("The model card %s was left as it is: %s", path, error)
