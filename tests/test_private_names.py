"""The list of private names (private_names.py) is whole, and all of them are there."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import lpt_fast
from tests.private_names import PRIVATE

ROOT = Path(__file__).parent.parent
# Where attributes named in strings (getattr, tables of fields) may come from.
ATTRIBUTED = (
    "torch.nn.modules.module",
    "transformers.trainer",
    "transformers.modeling_utils",
    "transformers.configuration_utils",
    "peft.tuners.tuners_utils",
)
PROMISED = {"transformers", "peft", "peft.utils"}


def private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


def resolve(path: str):
    """The module or the object at a dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, _, name = path.rpartition(".")
        return getattr(resolve(owner), name)


def is_there(owner, name: str) -> bool:
    """As an attribute, or as one that instances get."""
    if hasattr(owner, name):
        return True
    source = inspect.getsource(owner) if inspect.isclass(owner) or inspect.ismodule(owner) else ""
    return re.search(rf"\.{name}\b|^\s+{name}\b", source, re.MULTILINE) is not None


@pytest.mark.parametrize("place", PRIVATE, ids=".".join)
def test_what_is_listed_is_there(place):
    owner, name = place
    if name == "_cuda_endAllocateToPool" and torch.version.cuda is None:
        pytest.skip("a PyTorch without CUDA")
    assert is_there(resolve(owner), name), f"{owner}.{name} is gone: {PRIVATE[place]}"


def test_a_name_that_is_gone_is_seen():
    from transformers import Trainer

    assert not is_there(Trainer, "_inner_training_loops")
    assert not is_there(Trainer, "_loss_of_this_step")


def own_names(trees) -> set[str]:
    """Private names that are defined here: functions, classes, variables, attributes of self."""
    own = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own |= {node.attr} if getattr(node.value, "id", "") == "self" else set()
    return own


def is_super(node) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"


def used_in(tree, own: set[str], attributes: str) -> set[str]:
    """Names of others that a file uses, private or from modules that are not promised."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            if is_super(node.value) or node.attr not in own:
                used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            library = (node.module or "").split(".")[0]
            deep = library in ("transformers", "peft") and node.module not in PROMISED
            used |= {alias.name for alias in node.names if deep or private(alias.name)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
            if private(name) and name not in own and re.search(rf"\.{name}\b", attributes):
                used.add(name)
    return used


def overridden() -> set[str]:
    """Private methods of others that classes here replace."""
    names = set()
    for found in pkgutil.walk_packages(lpt_fast.__path__, "lpt_fast."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != found.name:
                continue
            for base in cls.__mro__[1:]:
                if base.__module__.startswith(("transformers", "peft", "torch.nn", "torch.utils")):
                    names |= {n for n in vars(cls) if private(n) and n in vars(base)}
    return names - {"_abc_impl"}


def test_what_is_used_is_listed():
    files = [p for d in ("lpt_fast", "kernels/lpt_kernels") for p in (ROOT / d).rglob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    own = own_names(trees.values())
    attributes = "\n".join(inspect.getsource(importlib.import_module(m)) for m in ATTRIBUTED)
    listed = {name for _, name in PRIVATE}
    for path, tree in trees.items():
        missing = used_in(tree, own, attributes) - listed
        assert not missing, f"{path.relative_to(ROOT)} uses {missing}: list them"
    assert not overridden() - listed
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    unused = {name for name in listed if not re.search(rf"\b{name}\b", text)}
    assert not unused, f"{unused} are not used any more: take them off the list"


def test_the_finder_sees_each_way_to_use_a_name():
    source = """
from transformers.trainer import Moved
from transformers import Trainer
from torch.nn import _Thing
class Own(Trainer):
    def _mine(self): return super()._get_dataloader(self._mine, self._tr_loss)
    def hooks(self, module): return getattr(module, "_forward_hooks"), "_no_attribute_of_theirs"
"""
    tree = ast.parse(source)
    found = used_in(tree, own_names([tree]), "self._forward_hooks = 1")
    assert found == {"Moved", "_Thing", "_get_dataloader", "_tr_loss", "_forward_hooks"}
