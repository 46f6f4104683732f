"""What the rows of a cache depend on beside their text: its sha256 names the cache.

Hashed are the bytes of every frozen parameter and buffer at or below the cut, the fields of the
model's configuration that can move a hidden state, the cut, the dtype that is computed in and the
store. Paths, times, batch sizes, workers and seeds are not: a cache that moved is the same cache.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from ..backbone.copies import LATE_PROMPT
from ..backbone.families import Family, find_backbone, get_layers
from ..backbone.fingerprint import packed_weights, tensors_of
from ..backbone.lower import build_lower
from .documents import canonical
from .errors import CacheError
from .shard import DTYPES, STORES

VERSION = 1
_DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")

# Fields of a configuration that say nothing of the layers below the cut in eval mode. Everything
# else counts: a field too many costs a new cache, a field too few a wrong number.
_IGNORED = re.compile(
    r"_.*|.*dropout.*|.*drop_prob|.*_pdrop|layerdrop|initializer_.*|summary_.*|classifier_.*"
    r"|architectures|transformers_version|torch_dtype|dtype|id2label|label2id|num_labels"
    r"|problem_type|finetuning_task|task_specific_params|return_dict|output_.*|use_cache"
    r"|tokenizer_class|gradient_checkpointing|tie_word_embeddings|chunk_size_feed_forward"
    r"|is_encoder_decoder"
    r"|(bos|eos|sep|cls|pad|decoder_start|mask)_token_id|name_or_path|model_type_alias"
)


@dataclass(frozen=True)
class Identity:
    """Of one cache: rows computed with another identity are never served from it.

    Attributes:
        content: JSON object that everything follows from.
    """

    content: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(canonical(self.content)).hexdigest()

    @property
    def folder(self) -> str:
        """Name of the cache's folder."""
        return self.digest[:32]

    @property
    def layer(self) -> int:
        """k, the cut."""
        return self.content["layer"]

    @property
    def store(self) -> str:
        return self.content["store"]

    @property
    def width(self) -> int:
        """D."""
        return self.content["width"]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's hidden state in the store."""
        return self.width * DTYPES[STORES[self.store]][1]

    @property
    def compute_dtype(self) -> str:
        return self.content["compute_dtype"]

    def at(self, **changes) -> Identity:
        """The same with other fields (never of another layer: its weights are others)."""
        assert "layer" not in changes
        return Identity({**self.content, **changes})


@dataclass(frozen=True)
class Place:
    """A model cut at a layer: what precompute and guards look at.

    Attributes:
        root, backbone, family: the model, its backbone and line of the table.
        layer: k.
        lower: the copy of the backbone that runs the layers 1..k over the same weights.
    """

    root: nn.Module
    backbone: nn.Module
    family: Family
    layer: int
    lower: nn.Module

    @property
    def late_prompt(self):
        """The adapter's place in the backbone, None for a model without one."""
        return self.backbone._modules.get(LATE_PROMPT)


def cut(model: nn.Module, layer: int | None = None) -> Place:
    """Cuts a model at `layer`; default: where its active late prompt is inserted.

    Raises:
        ValueError: a model of no known family.
        CacheError: a layer that the model does not have, or none given and no late prompt to ask.
    """
    if not isinstance(model, nn.Module):
        raise CacheError(
            f"`model` is a {type(model).__name__}, expected a model that is loaded already; use "
            "AutoModel.from_pretrained(...)."
        )
    _, backbone, family = find_backbone(model)
    depth = len(get_layers(backbone, family))
    if layer is None:
        late = backbone._modules.get(LATE_PROMPT)
        config = None if late is None else late.active_config
        if config is None:
            raise CacheError(
                "The model has no active late prompt that says at which layer to cut, expected "
                f"`insertion_layer`; give it, 1 .. {depth - 1}."
            )
        layer = config.insertion_layer
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= depth - 1:
        raise CacheError(
            f"`insertion_layer` must be between 1 and {depth - 1} for this model of {depth} "
            f"layers, got {layer!r}."
        )
    return Place(model, backbone, family, layer, build_lower(backbone, family, layer))


def _bytes_of(tensor: Tensor) -> memoryview:
    if hasattr(tensor, "full_tensor"):  # of which each process holds a part (fsdp.py)
        tensor = tensor.full_tensor()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def hash_weights(lower: nn.Module) -> str:
    """xxh3_128 over names, dtypes, shapes and bytes of all tensors below the cut, hexadecimal."""
    state = xxhash.xxh3_128()
    for name, tensor in tensors_of(lower):
        if tensor.is_meta:
            raise CacheError(
                f"The weight {name} has no values (it is on the meta device), expected a loaded "
                "model; load the weights first."
            )
        _update(state, name, tensor)
    for name, packed in packed_weights(lower):
        _update(state, name, packed.__getstate__())
    return state.hexdigest()


def _update(state, name: str, value: Any) -> None:
    """Of a tensor, or of what torch.ao's packed weights say that they are: tuples of tensors and
    numbers.
    """
    if isinstance(value, list | tuple):
        for i, part in enumerate(value):
            _update(state, f"{name}.{i}", part)
    elif isinstance(value, Tensor) and value.is_quantized:
        per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
        scale = (
            (value.q_per_channel_scales().tolist(), value.q_per_channel_zero_points().tolist())
            if per_channel
            else (value.q_scale(), value.q_zero_point())
        )
        _update(state, f"{name}|{value.qscheme()}|{scale}", value.int_repr())
    elif isinstance(value, Tensor):
        state.update(f"{name}|{value.dtype}|{list(value.shape)}|".encode())
        state.update(_bytes_of(value))
    else:
        state.update(f"{name}|{value!r}|".encode())


def config_fields(place: Place) -> dict[str, Any]:
    """The fields of the backbone's configuration that can move a hidden state below the cut."""
    content = place.backbone.config.to_dict()
    kept = {k: v for k, v in content.items() if not _IGNORED.fullmatch(k)}
    family = place.family
    if family.positions_after_padding and family.padding_id is None:
        # It says where positions begin.
        kept["pad_token_id"] = content.get("pad_token_id")
    return _jsonable(kept)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, float):
        return repr(value)  # infinities included, which JSON has not
    return value if isinstance(value, bool | int | str | None) else str(value)


def own_dtype(lower: nn.Module) -> str:
    """The dtype that a model computes in when nobody asks for another."""
    dtype = next((p.dtype for p in lower.parameters() if p.is_floating_point()), torch.float32)
    return str(dtype).removeprefix("torch.")


def plain_dtype(lower: nn.Module) -> torch.dtype | None:
    """The dtype of all weights below the cut, None where they are mixed."""
    found = {p.dtype for p in lower.parameters() if p.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def identity_of(place: Place, store: str = "bf16", compute_dtype: str | None = None) -> Identity:
    """The identity of the cache that holds what `place` gives.

    Args:
        place: the model and the cut.
        store: "bf16", "fp32", "fp16", "int8c" or "fp8", how rows are kept.
        compute_dtype: "bfloat16" or "float16" where the layers run under autocast of that dtype;
            None: as they are.

    Raises:
        CacheError: an unknown store or dtype.
    """
    if store not in STORES:
        raise CacheError(f"The store must be one of {', '.join(STORES)}, got {store!r}.")
    own = own_dtype(place.lower)
    compute_dtype = compute_dtype or own
    if compute_dtype not in _DTYPE_NAMES or (
        compute_dtype != own and compute_dtype not in ("bfloat16", "float16")
    ):
        raise CacheError(
            f"`compute_dtype` must be 'bfloat16' or 'float16' (autocast), or {own!r} as the model "
            f"is, got {compute_dtype!r}."
        )
    return Identity(
        {
            "version": VERSION,
            "backbone": type(place.backbone).__name__,
            "config": config_fields(place),
            "layer": place.layer,
            "width": int(place.backbone.config.hidden_size),
            "weights": hash_weights(place.lower),
            "compute_dtype": compute_dtype,
            "store": store,
        }
    )
