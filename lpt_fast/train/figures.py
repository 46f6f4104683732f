"""The figures of a training that go on the model card of its adapter."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState

from ..method.card import write_card
from ..method.late_prompt import LatePrompt

# What evaluations say of the machine, not of the model.
_OF_THE_MACHINE = ("runtime", "_per_second", "_preparation_time")


def evaluated(state: TrainerState, best: bool) -> dict[str, float]:
    """The last figures of each evaluation and the steps after which they were taken.

    Args:
        state: of the Trainer.
        best: whether the best model is loaded again when the training is over: figures of other
            steps than its own are not its figures then.

    Returns:
        name -> value, such as eval_loss and "eval: steps of training".
    """
    ends = [i for i, entry in enumerate(state.log_history) if "train_runtime" in entry]
    end = ends[-1] if ends else len(state.log_history)
    own = state.best_global_step if best and ends else None
    figures: dict[str, float] = {}
    for i, entry in enumerate(state.log_history):
        step = entry.get("step")
        if own is not None and i < end and step != own:
            continue
        for prefix in [
            name.removesuffix("_runtime") for name in entry if name.endswith("_runtime")
        ]:
            if prefix == "train":
                continue
            found = {n: v for n, v in entry.items() if n.startswith(f"{prefix}_")}
            figures |= {n: v for n, v in found.items() if not n.endswith(_OF_THE_MACHINE)}
            figures[f"{prefix}: steps of training"] = step if own is None else own
    return {n: v for n, v in figures.items() if isinstance(v, int | float)}


def write_figures(folder: str, late: LatePrompt, state: TrainerState, best: bool) -> None:
    """Writes the figures on the card of the adapter that was just saved.

    Args:
        folder: what the model was saved to.
        late: the late prompt of the model.
        state, best: as for `evaluated`.
    """
    for name, config in late.lpt_config.items():
        place = Path(folder) if name == "default" else Path(folder, name)
        if name in late.active_adapters and (place / "adapter_config.json").is_file():
            write_card(place, config, evaluated(state, best))
