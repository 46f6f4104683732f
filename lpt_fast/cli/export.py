"""`lpt-fast export`: a trained classifier as one file for ONNX Runtime or for torch.export, for
batches and texts of any size.

It is kept if it gives what the model gives, on batches of other sizes than it was traced with.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .arguments import ExportArguments
from .inference import Classifier
from .outputs import check_file

SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
# Largest difference of a logit, as a share of the largest one (at least of 1).
CLOSE = 1e-5
_TEXT = "a film that is good and bad at once was not what I saw"
# Words of it in the texts of each batch: the first is traced, the others are compared.
TRACED, COMPARED = (7, 3), ((2, 14, 4), (12,), (5, 5))


class _Logits(nn.Module):
    """The model with its inputs in a fixed order, and its logits alone."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def export(args: ExportArguments) -> list[str]:
    """Writes the file, whole or not at all.

    Returns:
        What to tell: the file, its inputs and output.

    Raises:
        ValueError: a package is missing, the folder holds no classifier with a head, or the file
            would not give what the model gives.
    """
    missing = [name for name in NEEDS[args.format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"`--format {args.format}` needs {', '.join(NEEDS[args.format])}, and "
            f"{', '.join(missing)} is not installed; pip install 'lpt-fast[export]'."
        )
    target = Path(args.output_file or Path(args.adapter) / f"model{SUFFIX[args.format]}")
    check_file(target, "--output_file")
    classifier = Classifier(args.adapter, args.model, use_cpu=True, compute_dtype="float32")
    if classifier.formulation.cloze:
        raise ValueError(
            f"{args.adapter} holds a model that predicts label words, expected one with a head "
            "(--formulation classification), whose logits are those of the classes; train that."
        )
    model = classifier.model.float().eval()
    _check_room(model, target)
    batches = [_batch(classifier, words) for words in (TRACED, *COMPARED)]
    names = list(batches[0])
    logits = _Logits(model, names)
    with torch.no_grad():
        wanted = [logits(*batch.values()) for batch in batches]
        try:
            program = _traced(logits, batches[0])
        except Exception as error:  # PyTorch's own have no base class
            raise ValueError(_could_not(model, error)) from None
    about = {
        "labels": classifier.labels,
        "inputs": names,
        "max_length": classifier.formulation.max_length,
    }
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.resolve().parent) as new:
        part = Path(new) / target.name
        write = {"onnx": _write_onnx, "torch": _write_torch}[args.format]
        try:
            run = write(program, about, part)
        except Exception as error:  # of PyTorch and three packages
            raise ValueError(_could_not(model, error)) from None
        worst = 0.0
        for batch, want in zip(batches, wanted, strict=True):
            worst = max(worst, float((run(batch) - want).abs().max() / want.abs().max().clamp(1)))
        if not worst <= CLOSE:
            raise ValueError(
                f"The exported model differs from its own by {worst:.1e} of its logits, expected "
                f"at most {CLOSE:.0e}: {args.format} does not run this base model alike; export it "
                f"as {'torch' if args.format == 'onnx' else 'onnx'}."
            )
        size = sum(file.stat().st_size for file in Path(new).iterdir())
        for file in Path(new).iterdir():  # (Large ONNX models have their weights beside them.)
            os.replace(file, target.resolve().parent / file.name)
    return [
        f"Wrote {target} ({size / 1e6:.1f} MB), equal to the model to {worst:.0e} on "
        f"{len(COMPARED)} batches of other sizes.",
        f"Inputs: {', '.join(names)}, int64 [batch, length]; the tokenizer is in {args.adapter}.",
        f"Output: logits [batch, {len(classifier.labels)}], in the order of the file's labels "
        f"({', '.join(map(str, classifier.labels[:5]))}{', ...' * (len(classifier.labels) > 5)}).",
    ]


def _check_room(model: nn.Module, target: Path) -> None:
    """(PyTorch says of a full disk only that it failed to write.)"""
    need = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(target.resolve().parent).free
    if free < need:
        raise ValueError(
            f"There are {free / 1e6:.1f} MB free where `--output_file` {target} would be, expected "
            f"{need / 1e6:.1f} MB for the weights; make room, or name another place."
        )


def _batch(classifier: Classifier, words: tuple[int, ...]) -> dict[str, Tensor]:
    """Texts of so many words, as the tokenizer gives them to the model."""
    texts = [" ".join(_TEXT.split()[:count]) for count in words]
    pairs = [texts[::-1]] if len(classifier.formulation.text_columns) == 2 else []
    how = {"padding": True, "truncation": True, "return_tensors": "pt"}
    most = classifier.formulation.max_length
    found = classifier.tokenizer(texts, *pairs, max_length=most, **how)
    known = ("input_ids", "attention_mask", "token_type_ids")
    return {name: found[name] for name in known if name in found}


def _traced(logits: nn.Module, batch: dict[str, Tensor]):
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return torch.export.export(
        logits, tuple(batch.values()), dynamic_shapes=((free,) * len(batch),), strict=False
    )


def _could_not(model: nn.Module, error: Exception) -> str:
    first = str(error).strip().split("\n")[0][:120]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return (
        f"PyTorch could not export {type(base).__name__} ({type(error).__name__}: {first}), "
        "expected a model whose forward is the same for batches of all sizes; see whether the base "
        "model by itself can be exported."
    )


def _write_torch(program, about: dict, path: Path) -> Callable[[dict], Tensor]:
    torch.export.save(program, path, extra_files={"lpt_fast.json": json.dumps(about)})
    module = torch.export.load(path).module()
    return lambda batch: module(*batch.values())


def _write_onnx(program, about: dict, path: Path) -> Callable[[dict], Tensor]:
    import onnxruntime

    how = {"input_names": about["inputs"], "output_names": ["logits"]}
    made = torch.onnx.export(program, (), dynamo=True, verbose=False, **how)
    batch, length = made.model.graph.inputs[0].shape
    made.rename_axes({batch: "batch", length: "length"})
    made.model.metadata_props["lpt_fast"] = json.dumps(about)
    made.save(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(
        session.run(None, {name: x.numpy() for name, x in batch.items()})[0]
    )
