"""What a checkpoint's weights mean: class names, task, model, cut. Resuming with others is refused,
for a head that learned "good, bad" would be read as "better, worse".
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbone.families import get_layers
from ..method.late_prompt import LatePrompt
from .cursor import write_json

logger = logging.getLogger(__name__)

FILE = "lpt_training.json"
ADAPTER = "adapter_config.json"  # PEFT's; in checkpoints that were written before FILE was
_OF_ADAPTER = ("insertion_layer", "generator", "num_virtual_tokens", "bottleneck_size")
# (Checkpoints of before there was late LoRA do not name these: they have none.)
_OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
_SAMPLE = 16  # numbers of each parameter that the digest of a model looks at
_LONG = 60  # characters of a value in a message


def facts_of(model: nn.Module) -> dict[str, Any]:
    """What the trained weights of a model depend on, as JSON has it.

    Returns:
        `labels` (names in the order of ids, or None), `model` (name or folder) and, with a late
        prompt, `insertion_layer`, `generator`, `num_virtual_tokens`, `bottleneck_size`, those of
        late LoRA, `dtype` of the frozen layers and `weights`, a digest of a sample of them (None:
        cannot be looked at).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    names = getattr(config, "id2label", None)
    facts: dict[str, Any] = {
        "labels": None if not names else [str(names[i]) for i in sorted(names)],
        "model": str(getattr(config, "_name_or_path", None) or ""),
    }
    late = next((m for m in model.modules() if isinstance(m, LatePrompt)), None)
    if late is not None and late.active_config is not None:
        facts |= {name: getattr(late.active_config, name) for name in (*_OF_ADAPTER, *_OF_LORA)}
        facts |= _weights_of(late)
    return facts


def _weights_of(late: LatePrompt) -> dict[str, Any]:
    """dtype and digest of the layers below the insertion. (A sample of each parameter: a fine-tuned
    model of the same shape differs everywhere, and all bytes of a large one take seconds.)
    """
    layers = get_layers(late.backbone, late.family)[: late.active_config.insertion_layer]
    found = [p.detach() for layer in layers for p in layer.parameters()]
    # Those that are quantised or shared out over processes have classes of their own.
    plain = all(type(p) is torch.Tensor and not p.is_meta for p in found)
    if not found or not plain or not all(p.is_floating_point() for p in found):
        return {"dtype": None, "weights": None}
    sample = torch.cat([p.flatten()[:_SAMPLE].float().to(found[0].device) for p in found])
    digest = hashlib.sha256(sample.cpu().numpy().tobytes()).hexdigest()[:32]
    return {"dtype": str(found[0].dtype).removeprefix("torch."), "weights": digest}


def read_facts(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint; of an older one what its adapter's configuration says.

    Raises:
        ValueError: a file that is no such record.
    """
    path = folder / FILE
    if not path.is_file():
        path = folder / ADAPTER
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == FILE:
            return {"lora_r": None, **content} if "generator" in content else dict(content)
        if content.get("peft_type") != "LPT":
            return {}
        names = content.get("id2label")
        facts = {name: content[name] for name in _OF_ADAPTER}
        facts |= {
            name: content.get(name) for name in _OF_LORA if name in content or name == "lora_r"
        }
        return facts | {"labels": None if names is None else [names[i] for i in _in_order(names)]}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}), expected what a training saved; "
            "resume from another checkpoint."
        ) from None


def _in_order(keys) -> list[str]:
    return sorted(keys, key=int)


def check_facts(checkpoint: str | Path, here: Mapping[str, Any]) -> None:
    """Compares a training that resumes with the checkpoint that it goes on from.

    Args:
        checkpoint: its folder.
        here: as of `facts_of`, with more of the caller's own.

    Raises:
        ValueError: something is not what it was; says what, first the class names.
    """
    there, here = read_facts(Path(checkpoint)), json.loads(json.dumps(here))
    looked = there.pop("weights", None), here.pop("weights", None)
    seen = None not in looked and there.get("dtype") == here.get("dtype")
    if seen:  # the name says less: a model may have moved, or another lie in its place
        names = there.pop("model", ""), here.pop("model", "")
    for name, value in there.items():
        if name in here:
            _compare(checkpoint, name, value, here[name])
    if seen and looked[0] != looked[1]:
        raise _refusal(checkpoint, "model weights", "{} there, {} here".format(*map(_short, names)))


def _compare(checkpoint, name: str, there: Any, here: Any) -> None:
    if name == "labels":
        difference, name = _other_labels(there, here), "class names"
    else:
        difference = None if there == here else f"{_short(there)} there, {_short(here)} here"
    if difference:
        raise _refusal(checkpoint, name, difference)


def _refusal(checkpoint, what: str, difference: str) -> ValueError:
    return ValueError(
        f"The checkpoint {checkpoint} was trained with other {what}: {difference}; give what it "
        "was trained with, or start without resume_from_checkpoint."
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."


def _other_labels(there: list[str] | None, here: list[str] | None) -> str | None:
    if there is None or here is None:
        return None
    if len(there) != len(here):
        more, fewer = (here, there) if len(here) > len(there) else (there, here)
        new = [name for name in more if name not in fewer]
        also = f" ({_short(new[0])} is {'new' if more is here else 'gone'})" if new else ""
        return f"{len(there)} classes there, {len(here)} here{also}"
    if _unnamed(there) or _unnamed(here):
        return None
    for i, (a, b) in enumerate(zip(there, here, strict=True)):
        if a != b:
            return f"class {i} is {_short(a)} there, {_short(b)} here"
    return None


def _unnamed(names: list[str]) -> bool:
    """Whether these are the names of a model to which nobody gave any."""
    return all(re.fullmatch(rf"LABEL_{i}", name) for i, name in enumerate(names))


def compare_names(late: LatePrompt) -> None:
    """Warns where an adapter that was trained before names its classes otherwise than the model
    into which it was loaded.
    """
    config, own = late.active_config, (late.base_labels or (None, None))[1]
    if config is None or not own or not config.id2label or len(own) != len(config.id2label):
        return
    theirs = [str(config.id2label[i]) for i in sorted(config.id2label)]
    difference = _other_labels(theirs, [str(own[i]) for i in sorted(own)])
    if difference:
        logger.warning(
            "The adapter names its classes otherwise than the model (%s); the adapter's names are "
            "those that its head knows, and are saved. Give labels by these, or a new adapter.",
            difference.replace(" there", " in the adapter").replace(" here", " in the model"),
        )


class RecordedTraining:
    """A mixin for `transformers.Trainer`: checkpoints say what they were trained with, and a
    training that resumes is compared with that.

    Attributes:
        facts: more of it than the model shows (columns, a task ...), compared as they are.
    """

    facts: Mapping[str, Any] = {}

    def all_facts(self) -> dict[str, Any]:
        """What this training's weights depend on."""
        facts = {**facts_of(self.model), **self.facts}
        here = Path(facts["model"])  # the same folder by whatever way it is named
        return facts | ({"model": str(here.resolve())} if facts["model"] and here.exists() else {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; a checkpoint gets its record."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:
            write_json(Path(output_dir) / FILE, self.all_facts())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        check_facts(resume_from_checkpoint, self.all_facts())
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            if not lines:
                raise
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} does not fit the model: "
                f"{lines[0][:100]}...; give the model, labels and settings that it was trained "
                "with, or start without resume_from_checkpoint."
            ) from error
