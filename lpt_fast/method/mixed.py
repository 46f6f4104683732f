"""Several adapters in one call: `model(..., adapter_names=[...])`, one name a text, as PEFT has it.

Up to the lowest insertion all adapters are one computation, and above it they share the weights. So
each text runs the lower layers once, and above them the texts of all adapters run packed in one
pass (packed/stages.py); then each adapter's texts go through the model's own head and loss under
that adapter's name. Where the packed way does not serve, each adapter's texts run by themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from . import cached_call as cached
from .context import parameter_names
from .groups import BASE, Group, entries_of, heads_of, running
from .merging import generated, merged
from .one_pass import joint_outputs

_NAMES = "adapter_names"
_LOCK = threading.RLock()  # which adapter runs is a matter of the model


@contextmanager
def mixing(late, names) -> Iterator[None]:
    """While a PeftModel's forward or generate runs: the call of the whole model in it is one for
    several adapters.

    Args:
        late: the LatePrompt.
        names: of the adapter of each text.
    """
    root, context, mine = late.root, late.context, threading.get_ident()
    own = root.__dict__.get("forward")

    def forward(*args, **kwargs):
        if threading.get_ident() != mine:
            return (own or partial(type(root).forward, root))(*args, **kwargs)
        give_back()
        return run_mixed(late, names, args, kwargs)

    def give_back():
        context.names.pop(mine, None)
        if own is None:
            root.__dict__.pop("forward", None)
        else:
            root.forward = own

    with _LOCK:
        context.names[mine] = (names, give_back)
        root.forward = forward
        try:
            yield
        finally:
            give_back()


def groups_of(late, names, batch: int) -> list[Group]:
    """The texts of each adapter, in the order in which the adapters come.

    Raises:
        ValueError: not one name for each text, or the name of no adapter.
    """
    if isinstance(names, str) or len(names) != batch:
        got = repr(names) if isinstance(names, str) else f"{len(names)} names"
        raise ValueError(
            f"`{_NAMES}` holds {got}, expected a list with one name for each of the {batch} texts "
            f"({BASE!r} for the base model)."
        )
    known = [*late.lpt_config, BASE]
    for name in dict.fromkeys(names):
        if name not in known:
            raise ValueError(
                f"`{_NAMES}` names {name!r}, expected names of this model's adapters: "
                f"{', '.join(map(repr, known))}. Load it first (load_adapter)."
            )
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        numbers.setdefault(BASE if late.disable_adapters else name, []).append(number)
    return [Group(name, tuple(own)) for name, own in numbers.items()]


def run_mixed(late, names, args: tuple, kwargs: dict):
    """The whole model's forward for texts of several adapters.

    Args:
        late: the LatePrompt.
        names: of the adapter of each text, B of them.
        args, kwargs: of the model's forward.

    Returns:
        The model's usual output in the order of the texts. Logits of a text whose head has fewer
        classes than another's are -inf beyond its own; `loss` is the mean over all texts (or
        labels) of the adapters' own losses.

    Raises:
        ValueError: as of `groups_of`, and for outputs that have no common form.
    """
    root = late.root
    kwargs = {**dict(zip(parameter_names(type(root).forward), args, strict=False)), **kwargs}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    groups = groups_of(late, names, _batch_of(kwargs))
    return_dict = kwargs.pop("return_dict", getattr(root.config, "return_dict", True))
    outputs = run_groups(late, groups, kwargs)
    batch = _batch_of(kwargs)
    counted = {n: kwargs[n] for n in ("labels", "num_items_in_batch") if n in kwargs}
    parts = [
        {n: entries_of(value, group.texts, batch) for n, value in counted.items()}
        for group in groups
    ]
    out = merged(outputs, [group.texts for group in groups], parts, late.causal_lm)
    return out if return_dict else out.to_tuple()


def generate_mixed(late, names, context_lengths, args: tuple, kwargs: dict):
    """`generate` for texts of several adapters, one after another.

    Args:
        late, names: as of `run_mixed`.
        context_lengths: as of LatePrompt's `generate`.
        args, kwargs: of the model's.

    Returns:
        int64 [B, S], filled up on the right with the padding token; with return_dict_in_generate
        the model's own output, without a KV cache.

    Raises:
        ValueError: as of `groups_of`, and for outputs that have no common form.
    """
    if context_lengths is not None:
        kwargs = {**kwargs, "context_lengths": context_lengths}
    text = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if text is None:
        raise ValueError(f"generate() got `{_NAMES}` without input_ids, expected a text; give one.")
    groups = groups_of(late, names, len(text))
    config = kwargs.get("generation_config") or late.root.generation_config
    if kwargs.get("streamer"):
        raise ValueError(
            f"generate() got `streamer` together with `{_NAMES}`, expected one of them: each "
            "adapter's texts are generated by themselves. Leave it out."
        )
    made = []
    for group in groups:
        own = [entries_of(value, group.texts, len(text)) for value in args]
        more = {n: entries_of(value, group.texts, len(text)) for n, value in kwargs.items()}
        with running(late, group.name):
            made.append(late.root.generate(*own, **more))
    pad = kwargs.get("pad_token_id", config.pad_token_id)
    if pad is None:
        end = kwargs.get("eos_token_id", config.eos_token_id)
        pad = end[0] if isinstance(end, list) else end or 0
    return generated(made, [group.texts for group in groups], pad)


def run_groups(late, groups: list[Group], kwargs: dict) -> list:
    """What each adapter's texts give: the model's own outputs, one a group. A text may be in
    several groups.

    Args:
        late: the LatePrompt.
        groups: the texts of each adapter.
        kwargs: of the whole model's forward, with all texts.
    """
    if kwargs.get("use_cache"):
        raise ValueError(
            f"The model got `use_cache` together with `{_NAMES}`, expected no KV cache: adapters' "
            "caches have no common form. Leave it out; generate() takes adapter_names."
        )
    outputs = []
    with _LOCK:
        wrappers = heads_of(late)
        made = joint_outputs(late, groups, kwargs, wrappers)
        if made is not None:
            text, given = made
            kwargs = {n: v for n, v in kwargs.items() if n != cached.CACHED} | text
        for i, group in enumerate(groups):
            with running(late, group.name, wrappers, modes=made is None):
                if made is not None:
                    late.context.give(given[i])
                outputs.append(late.root(**_taken(kwargs, group.texts), return_dict=True))
    return outputs


# -- the texts of a call ---------------------------------------------------------------------------


def _batch_of(kwargs: dict) -> int:
    for name in ("input_ids", "inputs_embeds", cached.CACHED):
        if kwargs.get(name) is not None:
            return len(kwargs[name])
    raise ValueError(
        f"The model got `{_NAMES}` without a text, expected input_ids, inputs_embeds or "
        f"{cached.CACHED}; give one."
    )


def _taken(kwargs: dict, texts: tuple[int, ...]) -> dict:
    """The arguments for some of the texts."""
    batch = _batch_of(kwargs)
    return {name: entries_of(value, texts, batch) for name, value in kwargs.items()}
