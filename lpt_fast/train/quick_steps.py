"""What a Trainer does around each step, without the walks through all modules and parameters that
it does for them: with few trained parameters and rows from a cache they took a tenth of a step.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from operator import is_not

import torch
from accelerate import DistributedType

from ..backbone.watch import Watch
from .kept_memory import kept_memory


class QuickSteps:
    """Mixed into a Trainer."""

    _watch: Watch | None = None  # of all modules
    _were: list[bool] = []  # noqa: RUF012 (never written to): which of them trained
    _operations: int | None = None  # of a token, as Trainer counts them
    _made: torch.optim.Optimizer | None = None  # by Trainer: it has all that trains
    _trained: tuple[list, list] = ([], [])  # what trains, as the optimiser and the model have it

    def create_optimizer(self, *args, **kwargs):
        """As Trainer's."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            self._made = optimizer
        return optimizer

    def _inner_training_loop(self, *args, **kwargs):
        self._operations = self._watch = None
        model, own = self.model, self.model.zero_grad
        cleared = False  # whole, once: before the first step

        def zero_grad(set_to_none: bool = True) -> None:
            nonlocal cleared
            if not (cleared and set_to_none and self._has_all(model)):
                cleared = True
                own(set_to_none)
                return
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None

        model.__dict__["zero_grad"] = zero_grad
        on_cpu = self.args.device.type == "cpu"
        try:
            with kept_memory() if on_cpu else nullcontext():
                return super()._inner_training_loop(*args, **kwargs)
        finally:
            model.__dict__.pop("zero_grad", None)

    def training_step(self, *args, **kwargs):
        """As Trainer's."""
        with self._modes():
            return super().training_step(*args, **kwargs)

    @contextmanager
    def _modes(self):
        """Trainer sets the mode of all modules in each step; here where one has another mode than
        it was left in, or is another.
        """
        model, watch = self.model, self._watch
        if watch is not None and watch.unchanged() and watch.modes() == self._were:
            model.__dict__["train"] = lambda mode=True: model
        else:
            model.train()
            self._watch = Watch(list(model.modules()))
            self._were = self._watch.modes()
        try:
            yield
        finally:
            model.__dict__.pop("train", None)

    def floating_point_ops(self, inputs) -> int:
        """As Trainer's, which counts the parameters again in each step: here those of a token, once
        a training.
        """
        if self._operations is None:
            name = self._main_input
            self._operations = super().floating_point_ops({name: torch.empty(1, device="meta")})
        return self._operations * self.tokens_in(inputs)

    @property
    def _main_input(self) -> str:
        return getattr(self.model, "main_input_name", "input_ids")

    def tokens_in(self, inputs) -> int:
        """Tokens of a batch, padding among them."""
        return inputs[self._main_input].numel() if self._main_input in inputs else 0

    def _clip_grad_norm(self, model):
        if not self._has_all(model):
            return super()._clip_grad_norm(model)
        trained = self._trained_in_order(model)
        if self.accelerator.distributed_type == DistributedType.NO:
            # What Accelerate does then, after it has looked whether it is so, for a tenth of a
            # millisecond.
            self.accelerator.unscale_gradients()
            return torch.nn.utils.clip_grad_norm_(trained, self.args.max_grad_norm)
        return self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)

    def _trained_in_order(self, model) -> list[torch.Tensor]:
        """What the optimiser has, in the model's order, in which Trainer adds norms up."""
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        before, in_order = self._trained
        if len(own) != len(before) or any(map(is_not, own, before)):
            known = set(map(id, own))
            in_order = [p for p in model.parameters() if id(p) in known]
            self._trained = own, in_order
        return in_order

    def _has_all(self, model) -> bool:
        """Whether the optimiser in use has all that trains of the model, unwrapped."""
        used = getattr(self.optimizer, "optimizer", self.optimizer)  # (Accelerate wraps it)
        made = used is not None and used is self._made
        return made and self.args.world_size == 1 and model is self.model
