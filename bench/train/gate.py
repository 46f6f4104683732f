"""The gate before `python -m bench train` times anybody: fresh contestants must compute what they
are said to compute.

In fp32, loss and gradients of our ways (caches of an fp32 store among them) equal those of the
recipe to 1e-5. In bf16 they are compared with a recipe in fp32, and must be at most twice as far
from it as the recipe with the same bf16 weights. The others must learn the batch. Who fails is not
timed; the others are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from ..data import Figure, require, temporary
from .contestants import LATE, LPTRAINER, OWN_BF16, RECIPES
from .data import Texts
from .models import Rows, Zoo
from .rows import fill_cache
from .whole_loop import WholeLoop

EXACT, TIMES = 1e-5, 2.0
# A loss may be right by luck; one rounding to bf16 is allowed in any case.
BF16_LOSS = 2**-8
# Of rows in a coarse store, timed but not exact: that far from the recipe they are other rows.
COARSE = 0.25
# Of the others, with a hundredth of their learning rates: with more, the losses of random encoders
# go up and down.
LEARNING_STEPS, CAREFUL = 5, 0.01
GRAPHED_AFTER = 4  # forwards of one batch, in which CUDA graphs are captured and replayed


def _groups(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the generator, of late LoRA and of the head, each as one vector."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, gradient in sorted(gradients.items()):
        place = next((p for p in ("generator", "lora") if f"lpt_{p}" in name), "head")
        groups.setdefault(place, []).append(gradient.flatten())
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


def allowed_by(peer: dict[str, float]) -> dict[str, float]:
    """What ours may be off in bf16: twice the errors of a recipe in bf16."""
    allowed = {part: TIMES * error for part, error in peer.items()}
    # (There is no recipe of late LoRA in bf16: it is allowed what the prompt is.)
    allowed["lora"] = allowed["generator"]
    return allowed | {"loss": max(allowed["loss"], BF16_LOSS)}


class LateGate:
    """Our ways against the recipe, on one batch.

    Args:
        timed: the rows of each of them that are timed, which may be in a coarse store.
        batch: numbers of texts.
    """

    def __init__(self, zoo: Zoo, texts: Texts, k: int, timed: Rows, batch: np.ndarray):
        self.zoo, self.texts, self.k, self.timed, self.batch = zoo, texts, k, timed, batch
        self.references = {"recipe": self._gradients("recipe", exact=True)}
        self.allowed = dict.fromkeys(("loss", "generator", "lora", "head"), EXACT)
        if zoo.dtype == "bf16":
            self.allowed = self._allowed_by("recipe_bf16")

    def _allowed_by(self, name: str) -> dict[str, float]:
        """Twice the errors of a recipe in bf16."""
        return allowed_by(errors(name, self._gradients(name), self.references["recipe"]))

    def _gradients(self, name: str, rows: Rows | None = None, exact: bool = False):
        if name == LPTRAINER:
            with temporary() as folder:
                loop = WholeLoop(self.zoo, self.texts, self.k, rows, folder)
                return loop.gradients(self.batch)
        made = self.zoo.contestant(name, self.k, self.texts, rows, exact)
        if made.graphs is None:
            return made.gradients(self.batch)
        for _ in range(GRAPHED_AFTER):  # as a graph, which it is when the batch has come before
            found = made.gradients(self.batch)
        return found

    def _reference(self, name: str) -> tuple[float, dict]:
        """The recipe that one of OURS has to equal."""
        recipe = RECIPES.get(name.removesuffix("_bf16"), "recipe")
        if recipe not in self.references:
            self.references[recipe] = self._gradients(recipe, exact=True)
        return self.references[recipe]

    def check(self, name: str) -> Iterator[Figure]:
        """One of OURS.

        Raises:
            WrongResult: it computes something else.
        """
        reference = self._reference(name)
        zoo, k, label = self.zoo, self.k, f"{name}, k = {self.k}"
        allowed, store = self.allowed, "bf16" if zoo.dtype == "bf16" else "fp32"
        if name in (*OWN_BF16, LPTRAINER):
            allowed, store = self._allowed_by("recipe_autocast"), "bf16"
        with temporary() as folder:
            rows = fill_cache(zoo, self.texts, np.unique(self.batch), k, folder, store).rows
            found = self._gradients(name, rows)
        for what, error in errors(label, found, reference).items():
            require(
                error <= allowed[what],
                f"{label}: {what} is {error:.2g} from that of the recipe, at most "
                f"{allowed[what]:.2g} is allowed",
            )
            yield Figure("gate", f"{label}: {what}, error", error, "", allowed[what])
        if LATE[name][1]:
            found = errors(label, self._gradients(name, self.timed), reference)
            worst = max(found.values())
            require(worst <= COARSE, f"the timed rows of {label}, are {worst:.2g} off")
            store = self.timed.cache.identity.store
            how = f"{label}: as timed ({store})"
            yield Figure("gate", how, worst, "", COARSE, False, dict(found))


def check_other(
    zoo: Zoo, texts: Texts, features: Rows, batch: np.ndarray, name: str
) -> Iterator[Figure]:
    """One of OTHERS learns a batch by heart: the loss is finite and falls.

    Raises:
        WrongResult: it does not.
    """
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
