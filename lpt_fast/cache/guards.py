"""What a cache refuses, because its rows would be a lie: lower layers that train, that carry an
adapter, or that drop units at random, and batches made by another model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..backbone.fingerprint import fingerprint, tensors_of
from ..backbone.watch import Watch, spine
from .errors import CacheError
from .identity import Place, cut, identity_of

if TYPE_CHECKING:
    from ..method.late_prompt import LatePrompt
    from ..packing import PackedBatch


def _drops(module: nn.Module) -> bool:
    """Whether a module in training mode drops something, by a dropout module or a number."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return any(
        isinstance(value, float) and value > 0 and ("dropout" in name or name.endswith("drop"))
        for name, value in vars(module).items()
    )


def check_frozen(place: Place) -> None:
    """Raises CacheError unless everything at and below the cut is frozen.

    A model without a late prompt may be as `from_pretrained` gives it: in eval mode nobody trains
    it, and what is changed later has another identity.
    """
    backbone, late = place.backbone, place.late_prompt
    names = {module: name for name, module in backbone.named_modules()}
    # (The cut copy has containers of its own, which say nothing.)
    modules = [module for module in place.lower.modules() if module in names]
    for module in modules:
        if isinstance(module, BaseTunerLayer):
            raise CacheError(
                f"{names[module]} at or below layer {place.layer} has "
                f"an adapter ({type(module).__name__}), expected a frozen layer; unload the "
                "adapter, or keep it above the cut."
            )
    training = any(module.training for module in modules)
    if late is not None or training:
        for name, parameter in place.lower.named_parameters():
            if parameter.requires_grad:
                raise CacheError(
                    f"The weight {name} at or below layer {place.layer} trains "
                    "(requires_grad=True), expected it frozen, since a cache would keep what it "
                    "was; freeze it with requires_grad_(False)."
                )
    for module in modules:
        if module.training and _drops(module):
            raise CacheError(
                f"{names[module]} at or below layer {place.layer} has "
                "active dropout, expected eval mode, since a cache would keep one draw of it; "
                "call .eval() on the lower layers."
            )


def check_batch(late: LatePrompt, batch: PackedBatch) -> None:
    """Raises CacheError unless `batch` was computed by the very weights below the insertion.

    The weights are hashed when an identity is seen for the first time; after that, a step looks at
    whether modules and tensors are the same, and at their version counters.
    """
    layer = late.active_config.insertion_layer
    seen = late.__dict__.setdefault("_seen_identities", {})
    # (What was hashed is held, so that nothing else can come to lie at its addresses.)
    known, _, watch = seen.get((batch.identity, layer), (None, None, None))
    if watch is not None and watch.unchanged():
        return
    place = cut(late.backbone, layer)  # anew: modules may have been replaced
    before = fingerprint(place.lower)
    if before != known:
        check_frozen(place)
        own = identity_of(place, batch.store or "bf16", batch.compute_dtype)
        if own.digest != batch.identity:
            raise CacheError(
                f"The cached batch was made by another model, configuration, layer or dtype (cache "
                f"{batch.identity[:12]}, this model's would be {own.digest[:12]}); open the cache "
                "with this model, or fill one with `lpt-fast precompute`."
            )
    seen[batch.identity, layer] = (before, place, _watch(place))


def _watch(place: Place) -> Watch:
    """Of everything that `fingerprint` of the cut model would be made from."""
    holders = spine(place.backbone, place.family)
    # (The cut copy has holders of its own.)
    real = {module for module in place.backbone.modules()}
    modules = [module for module in place.lower.modules() if module in real]
    modules = list(dict.fromkeys([*holders, *modules]))
    tensors = [tensor for _, tensor in tensors_of(place.lower)]
    return Watch(modules, ("_modules", "_parameters", "_buffers"), tensors=tensors)
