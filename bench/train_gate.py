"""The gate before `python -m bench train` times anybody: fresh contestants must compute what they
are said to compute.

In fp32, loss and gradients of our ways (caches of an fp32 store among them) equal those of the
recipe to 1e-5. In bf16 they are compared with a recipe in fp32, and must be at most twice as far
from it as the recipe with the same bf16 weights. The others must learn the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from .cache_data import Figure, require, temporary
from .train_data import Texts
from .train_models import LATE, ONLY_ON, OURS, Rows, Zoo
from .train_rows import fill_cache

EXACT, TIMES = 1e-5, 2.0
# A loss may be right by luck; one rounding to bf16 is allowed in any case.
BF16_LOSS = 2**-8
# Of rows in a coarse store, timed but not exact: that far from the recipe they are other rows.
COARSE = 0.25
# Of the others, with a hundredth of their learning rates: with more, the losses of random encoders
# go up and down.
LEARNING_STEPS, CAREFUL = 5, 0.01


def _groups(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the generator and of the head, each as one vector."""
    groups: dict[str, list[torch.Tensor]] = {"generator": [], "head": []}
    for name, gradient in sorted(gradients.items()):
        groups["generator" if "lpt_generator" in name else "head"].append(gradient.flatten())
    return {name: torch.cat(parts) for name, parts in groups.items()}


def errors(who: str, found: tuple[float, dict], reference: tuple[float, dict]) -> dict[str, float]:
    """How far loss, generator's and head's gradients of somebody are from the reference's, as
    shares of its size.
    """
    (loss, own), (loss_0, wanted) = found, reference
    require(own.keys() == wanted.keys(), f"{who}: other parameters train than in the recipe")
    out = {"loss": abs(loss - loss_0) / abs(loss_0)}
    own, wanted = _groups(own), _groups(wanted)
    for name, gradient in wanted.items():
        out[name] = float((own[name] - gradient).norm() / gradient.norm())
    require(all(map(math.isfinite, out.values())), f"{who}: loss or gradients are not finite")
    return out


def check_late(zoo: Zoo, texts: Texts, k: int, timed: Rows, batch: np.ndarray) -> Iterator[Figure]:
    """Our ways against the recipe, on one batch."""
    half = zoo.dtype == "bf16"
    ours = [name for name in OURS if ONLY_ON.get(name, zoo.device) == zoo.device]
    reference = zoo.contestant("recipe", k, texts, exact=True).gradients(batch)
    allowed = dict.fromkeys(("loss", "generator", "head"), EXACT)
    with temporary() as folder:
        chosen = np.unique(batch)
        exact_rows = fill_cache(zoo, texts, chosen, k, folder, "bf16" if half else "fp32").rows
        if half:
            name = "recipe_bf16"
            peer = errors(name, zoo.contestant(name, k, texts).gradients(batch), reference)
            allowed = {name: TIMES * error for name, error in peer.items()}
            allowed["loss"] = max(allowed["loss"], BF16_LOSS)
        for name in ours:
            found = zoo.contestant(name, k, texts, exact_rows).gradients(batch)
            for what, error in errors(f"{name}, k = {k}", found, reference).items():
                label = f"{name}, k = {k}: {what}"
                require(
                    error <= allowed[what],
                    f"{label} is {error:.2g} from that of the recipe, at most "
                    f"{allowed[what]:.2g} is allowed",
                )
                yield Figure("gate", f"{label}, error", error, "", allowed[what])
    for name in (name for name in ours if LATE[name][1]):
        found = zoo.contestant(name, k, texts, timed).gradients(batch)
        found = errors(f"{name}, k = {k}", found, reference)
        worst = max(found.values())
        require(worst <= COARSE, f"the timed rows of {name}, k = {k}, are {worst:.2g} off")
        store = timed.cache.identity.store
        details = dict(found)
        yield Figure(
            "gate", f"{name}, k = {k}: as timed ({store})", worst, "", COARSE, False, details
        )


def check_others(
    zoo: Zoo, texts: Texts, features: Rows, batch: np.ndarray, names: list[str]
) -> Iterator[Figure]:
    """They learn a batch by heart: the loss is finite and falls."""
    for name in names:
        contestant = zoo.contestant(name, None, texts, features)
        if name == "head":
            _check_head(zoo, texts, contestant, batch)
        for group in contestant.optimizer.param_groups:
            group["lr"] *= CAREFUL
        losses = [float(contestant.step(batch)) for _ in range(LEARNING_STEPS)]
        require(all(map(math.isfinite, losses)), f"the loss of {name} is not finite")
        require(losses[-1] < losses[0], f"{name} does not learn: its losses are {losses}")
        yield Figure(
            "gate",
            f"{name}: loss after {LEARNING_STEPS - 1} steps on a batch over that before",
            losses[-1] / losses[0],
            "x",
            1.0,
        )


def _check_head(zoo: Zoo, texts: Texts, contestant, batch: np.ndarray) -> None:
    """The head on features gives what the whole model gives."""
    model = zoo.base().eval()
    inputs = texts.collate(batch, zoo.place)
    with torch.no_grad():
        wanted = model(**inputs).logits
        found = contestant.forward(batch).logits.float()
    error = float((found - wanted).norm() / wanted.norm())
    allowed = 0.1 if zoo.dtype == "bf16" else EXACT
    require(error <= allowed, f"logits of the head on features are {error:.2g} off")
