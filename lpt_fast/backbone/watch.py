"""Whether modules are still what they were, asked in every step.

What follows from a model alone (that its layers below the insertion are those of a cache, that
those above it are plain and frozen) is worked out once and holds until something changes. PyTorch
counts no such changes, so a `Watch` remembers which objects hang in the modules and compares them
one by one. Its passes run in C (`map`, `all`), some 30 ns an object.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from operator import attrgetter, contains, is_, itemgetter

from torch import Tensor, nn

from .families import Family, frozen_above, frozen_below

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_END = object()  # of a comparison: nothing in a module is this
_TRAINING = itemgetter("training")
_TRAINS, _VERSION = attrgetter("requires_grad"), attrgetter("_version")


def _same(found: Iterable, known: list) -> bool:
    """Whether these are the very objects of `known`, which ends with _END."""
    return all(map(is_, chain(found, (_END,)), known))


class _Entries:
    """One dict of each module (`_modules`, `_parameters`, ...) and what is in it.

    Not seen: a dict that was empty and is another object now, which nn.Module never does.
    """

    def __init__(self, owners: list[dict], field: str):
        self._get = itemgetter(field)
        self._dicts = list(map(self._get, owners))
        self._owners = [own for own in owners if own[field]]
        self._filled = [*map(self._get, self._owners), _END]
        self._values = [*chain.from_iterable(map(dict.values, self._filled[:-1])), _END]

    def unchanged(self) -> bool:
        return (
            sum(map(len, self._dicts)) == len(self._values) - 1
            and _same(map(self._get, self._owners), self._filled)
            and _same(chain.from_iterable(map(dict.values, self._filled[:-1])), self._values)
        )


class Remembered:
    """A copy of a model, or a loaded one, begins without: its modules are others."""

    def __deepcopy__(self, memo) -> None:
        return None

    def __reduce__(self):
        return type(None), ()


class Watch(Remembered):
    """Remembers modules as they are now.

    Args:
        modules: all of them, each child too: descendants are not looked for.
        fields: which of their dicts to compare.
        code: whether to compare what they run, their class and a `forward` of their own.
        tensors: whose memory, version and `requires_grad` to compare.
        frozen: tensors of which none may require a gradient.
        holders: further modules of which only the children are compared.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        fields: Iterable[str] = ("_modules",),
        code: bool = False,
        tensors: Iterable[Tensor] = (),
        frozen: Iterable[Tensor] = (),
        holders: Iterable[nn.Module] = (),
    ):
        self._modules = modules
        self._owners = [module.__dict__ for module in modules]
        # (Not in those of an nn.Module that an old file brings.)
        known = [f for f in fields if all(f in own for own in self._owners)]
        self._complete = known == list(fields)
        self._entries = [_Entries(self._owners, field) for field in known]
        self._entries.append(_Entries([m.__dict__ for m in holders], "_modules"))
        self._code = self._code_now() if code else None
        self._tensors, self.frozen = list(tensors), list(frozen)
        # (Tensors of inference mode have no version.)
        self._counted = [t for t in self._tensors if not t.is_inference()]
        self._state = self._state_now()

    def _code_now(self) -> tuple[list, list]:
        own_forward = list(map(contains, self._owners, repeat("forward")))
        return list(map(type, self._modules)), own_forward

    def _state_now(self) -> tuple[list, ...]:
        tensors, counted = self._tensors, self._counted
        return (
            list(map(Tensor.data_ptr, tensors)),
            list(map(_VERSION, counted)),
            list(map(_TRAINS, tensors)),
        )

    def unchanged(self) -> bool:
        """Whether all is as it was. (Not seen: writing through `.data`, which hides from PyTorch's
        version counters.)
        """
        return (
            self._complete
            and all(entries.unchanged() for entries in self._entries)
            and (self._code is None or self._code_now() == self._code)
            and not any(map(_TRAINS, self.frozen))
            and self._state_now() == self._state
        )

    def modes(self) -> list[bool]:
        """Which of the modules are in training mode."""
        return list(map(_TRAINING, self._owners))

    def any_training(self) -> bool:
        return any(map(_TRAINING, self._owners))

    def all_training(self) -> bool:
        return all(map(_TRAINING, self._owners))


def spine(backbone: nn.Module, family: Family) -> list[nn.Module]:
    """What the layers hang in: the backbone, what holds their list, and the list."""
    modules = [backbone]
    for name in family.layers.split("."):
        modules.append(getattr(modules[-1], name))
    return modules


def descendants(parts: Iterable[nn.Module]) -> list[nn.Module]:
    """The parts and all below them, each once."""
    return list(dict.fromkeys(module for part in parts for module in part.modules()))


class _Half:
    """Layers that are all in one mode."""

    def __init__(self, parts: list[nn.Module], holders: Iterable[nn.Module]):
        self.parts, modules = parts, descendants(parts)
        self.watch = Watch(modules, holders=holders)
        self._owners = [module.__dict__ for module in modules]
        # Somebody's own `train` may do more than set the flag.
        self._plain = all(
            type(m).train is nn.Module.train and "train" not in m.__dict__ for m in modules
        )

    def set(self, mode: bool) -> None:
        if self.watch.all_training() if mode else not self.watch.any_training():
            return
        if self._plain:
            for own in self._owners:
                own["training"] = mode
        else:
            for part in self.parts:
                part.train(mode)


class Modes(Remembered):
    """Sets the modes of the frozen layers, where they differ.

    Args:
        backbone, family, k: as for `run_lower`.
    """

    def __init__(self, backbone: nn.Module, family: Family, k: int):
        self._k = k
        self._below = _Half(frozen_below(backbone, family, k), ())
        self._above = _Half(frozen_above(backbone, family, k), spine(backbone, family))

    def fits(self, k: int, below: bool) -> bool:
        """Whether these are still all modules of a cut at k; below it where that is asked."""
        if k != self._k or not self._above.watch.unchanged():
            return False
        return not below or self._below.watch.unchanged()

    def set(self, above: bool) -> None:
        """Eval mode below the insertion, the given one above it."""
        self._below.set(False)
        self._above.set(above)
