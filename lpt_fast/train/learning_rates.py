"""A learning rate of its own for some of the parameters: late LoRA beside prompt and head."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer


def check_rate(rate: float, late, optimizer: Optimizer | None) -> None:
    """Raises ValueError unless `lora_learning_rate` can be given.

    Args:
        rate: what was asked for.
        late: the LatePrompt.
        optimizer: the user's own, or None.
    """
    config = late.active_config
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if not (number and 0 < rate < float("inf")):
        raise ValueError(f"`lora_learning_rate` must be a number above 0 or None, got {rate!r}.")
    if config is None or config.lora_r is None:
        raise ValueError(
            f"`lora_learning_rate` is {rate!r} and the active adapter has no late LoRA, expected "
            "one that has (LPTConfig(lora_r=8)); leave it out."
        )
    if optimizer is not None:
        raise ValueError(
            f"`lora_learning_rate` is {rate!r} together with an optimiser of your own, expected "
            "one of them; give the rate to the optimiser's group, or leave `optimizers` out."
        )


def give_rate(optimizer: Optimizer, module: nn.Module, rate: float) -> None:
    """Puts the parameters of a module that an optimiser trains into groups with another rate.
    Before a scheduler is made: it takes each group's rate as the peak.
    """
    wanted = {id(p) for p in module.parameters()}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in wanted]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in wanted]
            optimizer.add_param_group({**group, "params": own, "lr": rate})
