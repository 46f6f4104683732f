"""`model(cached_hidden=batch)`: hidden states that are there already stand in for the text.

The model's own code around the backbone is not changed, and it needs inputs: heads look for the
last token that is not padding or for end tokens, T5 makes its decoder's input from them. So the
call gets the ids and the mask of the padded texts, and the backbone, which would only read them to
run layers 1..k, takes the hidden states instead.

Every token comes out as from the text padded on the right. Padding does not: its rows are zeros at
layer k here, and what the layers make of padding tokens there. A loss that reads them differs in a
batch of unequal lengths: that of question answering looks for answers among padding too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backbone.arguments import CACHE_NAMES
from ..backbone.families import get_layers
from ..packing import PackedBatch
from .context import parameter_names
from .readout import head_reads

CACHED = "cached_hidden"
# What the batch stands in for.
_TEXT = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "encoder_outputs",
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def enter(late, batch: PackedBatch, args: tuple, kwargs: dict) -> tuple[PackedBatch, dict]:
    """Checks a call of the whole model that brings hidden states, and gives it its other inputs.

    Args:
        late: the LatePrompt of the model.
        batch: what was given as `cached_hidden`.
        args, kwargs: the call's other arguments.

    Returns:
        The batch on the device of the adapter, and the call's keyword arguments, with `input_ids`
        and `attention_mask` (int64 [B, S], padded on the right) among them. Where nobody reads
        them, beside a head that looks at the first token, `input_ids` alone, zeros of that shape.

    Raises:
        ValueError: for a batch that does not fit the adapter, and for what cannot come with it.
    """
    if args:
        kwargs = {
            **dict(zip(parameter_names(type(late.root).forward), args, strict=False)),
            **kwargs,
        }
    _check_call(late, kwargs)
    _check_batch(late, batch)
    device = late.adapter_device(late.active_adapters[0])
    batch = batch.to(device, non_blocking=True)
    if head_reads(late.root) == "first":
        # (The first entry of cu_seqlens is a zero that is there: nothing has to be launched.)
        kwargs["input_ids"] = batch.cu_seqlens[:1].expand(len(batch), batch.max_seqlen)
        return batch, kwargs
    ids, pad = _token_ids(late.root, late.backbone, batch)
    kwargs["input_ids"] = batch.pad(ids, pad)
    kwargs["attention_mask"] = batch.mask().long()
    return batch, kwargs


def hidden_states(late, batch: PackedBatch, k: int) -> tuple[Tensor, dict]:
    """What the backbone goes on with above layer k.

    Returns:
        Hidden states [B, S, D] with zeros for padding, in the dtype of layer k's weights, which is
        what it would have given; and `attention_mask` and `position_ids` (where the batch has
        them) by name, int64 [B, S].
    """
    inputs = {"attention_mask": batch.mask().long()}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.pad(batch.position_ids)
    return batch.padded().to(layer_dtype(late, k) or batch.hidden.dtype), inputs


def layer_dtype(late, k: int) -> torch.dtype | None:
    """That of layer k's weights, in which it gives its output; None: it has no float weights."""
    weights = get_layers(late.backbone, late.family)[k - 1].parameters()
    return next((p.dtype for p in weights if p.dtype in _FLOATS), None)


def rows_dtype(late, k: int) -> torch.dtype | None:
    """Of rows that run packed above layer k: of the layers' copy where there is one, else layer
    k's.
    """
    return late.compute_dtype or layer_dtype(late, k)


def check_outputs(config, kwargs: dict) -> None:
    """Refuses to give what the layers that do not run would have given.

    Args:
        config: of the backbone.
        kwargs: of the backbone's forward.

    Raises:
        ValueError: when hidden states or attentions are asked for, by the call or by the config.
    """
    for name, value in outputs_asked(config, kwargs).items():
        raise ValueError(
            f"Late Prompt Tuning got {name}={value!r} together with `{CACHED}`, expected "
            "False: the layers up to the insertion do not run. Set it to False in the call, or "
            "give the text in place of the cache."
        )


def outputs_asked(config, kwargs: dict) -> dict:
    """Which outputs of single layers a call of the backbone, or else its config, asks for."""
    names = ("output_hidden_states", "output_attentions")
    values = {name: kwargs.get(name, getattr(config, name, None)) for name in names}
    return {n: value for n, value in values.items() if value is not None and value is not False}


def _check_call(late, kwargs: dict) -> None:
    if late.active_config is None:
        raise ValueError(
            f"The model got `{CACHED}` while no late prompt is active, expected the text: the base "
            "model needs it. Give input_ids, or enable the adapter."
        )
    both = [name for name in _TEXT if kwargs.get(name) is not None]
    if both:
        raise ValueError(
            f"Late Prompt Tuning got `{both[0]}` together with `{CACHED}`, expected one of them: "
            f"the batch brings its texts' own. Leave out `{both[0]}`, or `{CACHED}` to run the "
            "text."
        )
    # (The cache of an encoder-decoder is its decoder's, and none of this project's business.)
    if late.family.causal:
        for name in (*CACHE_NAMES, "use_cache"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(
                    f"Late Prompt Tuning got `{name}` together with `{CACHED}`, expected no KV "
                    "cache: the layers up to the insertion, which do not run, would leave theirs "
                    f"empty. Leave out `{name}`, or give the text."
                )
    if _is(late.root, "ForMultipleChoice"):
        raise ValueError(
            f"{type(late.root).__name__} got `{CACHED}`, expected [B, choices, S] input_ids, from "
            "which it reads the number of choices. Give the text."
        )


def _check_batch(late, batch) -> None:
    if not isinstance(batch, PackedBatch):
        raise ValueError(
            f"`{CACHED}` is a {type(batch).__name__}, expected a PackedBatch; "
            "lpt_fast.packing.pack() makes one from padded hidden states and their mask."
        )
    if len(batch) == 0:
        raise ValueError(f"`{CACHED}` holds no text, expected at least one; skip empty batches.")
    k = late.active_config.insertion_layer
    if batch.layer is not None and batch.layer != k:
        raise ValueError(
            f"`{CACHED}` holds the output of layer {batch.layer}, expected that of layer {k}, the "
            "insertion_layer of the active adapter. Make the cache for this layer, or activate an "
            "adapter of the cache's."
        )
    width = late.backbone.config.hidden_size
    if batch.hidden.shape[1] != width or batch.hidden.dtype not in _FLOATS:
        raise ValueError(
            f"`{CACHED}` holds rows of {batch.hidden.shape[1]} {batch.hidden.dtype}, expected the "
            f"model's hidden size {width} in a float dtype. Make the cache with this model."
        )
    if batch.guard is not None and not torch.compiler.is_compiling():
        batch.guard(late, batch)


def _token_ids(root: nn.Module, backbone: nn.Module, batch: PackedBatch) -> tuple[Tensor, int]:
    """The ids of the text rows, int64 [T], and that of padding.

    Where the batch does not know its ids, each is one that heads do not look for. Then the last
    token of a text is the last for a decoder's classification head too, also where it is the
    padding token.
    """
    config = getattr(root, "config", None) or backbone.config
    pad = getattr(config, "pad_token_id", None)
    if batch.input_ids is not None:
        return batch.input_ids.long(), pad or 0
    if _is(root, "T5ForSequenceClassification", "T5ForQuestionAnswering"):
        raise ValueError(
            f"{type(root).__name__} got `{CACHED}` without input_ids, expected them: it looks for "
            "end tokens in them or makes its decoder's input from them. Make the batch or its "
            "cache with input_ids."
        )
    end = getattr(config, "eos_token_id", None)
    taken = {pad or 0, *(end if isinstance(end, list | tuple) else (end,))}
    plain = next(i for i in range(len(taken) + 1) if i not in taken)
    places = batch.cu_seqlens.new_full((batch.num_tokens,), plain, dtype=torch.int64)
    return places, pad or 0


def _is(model: nn.Module, *names: str) -> bool:
    """Whether a model is of a class that is called so. Users' own subclasses count."""
    return any(cls.__name__.endswith(names) for cls in type(model).__mro__)
