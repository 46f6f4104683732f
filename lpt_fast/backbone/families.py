"""The one table of model families: what the split of a backbone at layer k must know about each.

A backbone is run in two halves, both through the model's own code: a shallow copy that shares every
weight, with the layer list cut. The lower half leaves out what comes after the last layer (final
norm, output projection), the upper half leaves out what comes before the first (embeddings, their
norm and dropout). A family is a line that names these places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .copies import LATE_PROMPT


@dataclass(frozen=True)
class Family:
    """One family of backbones.

    Attributes:
        name: as users know it.
        layers: dotted path from the backbone to its list of layers.
        causal: decoder: attends to the left, has a KV cache; the prompt is made from the context
            alone.
        after: modules of the backbone that come after the last layer and are not part of the head
            (final norms).
        pooler: module of the backbone that belongs to the head, or "".
        skip_embeddings: changes the upper copy so that `inputs_embeds` goes into its first layer as
            it is.
        takes_positions: whether the layers read `position_ids` (rotary), so that the upper half
            must shift them.
        layer_types: whether the code reads `config.layer_types[i]`, which then must be cut as the
            layers are.
        bias_owner: T5: only the first layer holds the relative position bias, and the upper half's
            first needs it.
        first_layer_extra: path of a module that acts after layer 1 only (DeBERTa-v2's convolution),
            or "".
        relative_bias: MPNet: module that holds a bias of attention by distance, for all layers, or
            "". Prompt rows stand as the m places directly before the text's first token.
        positions_after_padding: whether learned positions start behind the padding token's id
            (RoBERTa), so that the table has that many places less.
        padding_id: that id where the model's code has it fast, whatever its config says; None: it
            is the config's.
        dropout_keys: config fields that may hold the hidden dropout, the first found counts.
    """

    name: str
    layers: str
    skip_embeddings: Callable[[nn.Module], None]
    causal: bool = False
    after: tuple[str, ...] = ()
    pooler: str = ""
    takes_positions: bool = False
    layer_types: bool = False
    bias_owner: bool = False
    first_layer_extra: str = ""
    relative_bias: str = ""
    positions_after_padding: bool = False
    padding_id: int | None = None
    dropout_keys: tuple[str, ...] = ("hidden_dropout_prob",)

    def max_length(self, config) -> int | None:
        """Most tokens that the backbone takes; None where nothing limits it (T5)."""
        places = getattr(config, "max_position_embeddings", None)
        if places is not None and self.positions_after_padding:
            places -= (config.pad_token_id if self.padding_id is None else self.padding_id) + 1
        return places

    def default_dropout(self, config) -> float:
        """The hidden dropout of the backbone, which the prompt takes when its own is not set."""
        return next(
            (float(getattr(config, k)) for k in self.dropout_keys if hasattr(config, k)), 0.0
        )


class PassEmbeddings(nn.Module):
    """Stands in for an embedding module that also takes `inputs_embeds`: gives them back
    unchanged.
    """

    def forward(self, input_ids=None, *args, inputs_embeds=None, **kwargs):
        return inputs_embeds


class ZeroPositions(nn.Module):
    """Stands in for learned positions: the hidden states above the insertion carry theirs
    already.
    """

    def forward(self, mask_or_positions, *args, **kwargs):
        return torch.zeros((), device=mask_or_positions.device)


class SkipFirst(nn.Module):
    """T5 uses one dropout module before its first and after its last layer. Only the second is
    above the prompt.
    """

    def __init__(self, dropout: nn.Module):
        super().__init__()
        self.dropout = dropout
        self.calls = 0
        self.training = dropout.training

    def forward(self, hidden):
        self.calls += 1
        return hidden if self.calls == 1 else self.dropout(hidden)


def _encoder_embeddings(upper: nn.Module) -> None:
    upper.embeddings = PassEmbeddings()
    # ELECTRA widens small embeddings, and asks by hasattr whether it must.
    upper._modules.pop("embeddings_project", None)


def _gpt2_embeddings(upper: nn.Module) -> None:
    upper.wpe = ZeroPositions()
    upper.drop = nn.Identity()


def _opt_embeddings(upper: nn.Module) -> None:
    upper.embed_positions = ZeroPositions()
    upper.project_in = None
    # The stack skips layers at random in training when asked to; frozen layers are never skipped.
    upper.layerdrop = 0.0


def _t5_embeddings(upper: nn.Module) -> None:
    upper.dropout = SkipFirst(upper.dropout)


def _none(upper: nn.Module) -> None:
    """`inputs_embeds` goes straight into the first layer."""


def _encoder(name: str, **kwargs) -> Family:
    return Family(name, "encoder.layer", _encoder_embeddings, **kwargs)


def _llama(name: str, **kwargs) -> Family:
    return Family(
        name, "layers", _none, True, ("norm",), takes_positions=True, dropout_keys=(), **kwargs
    )


# Keyed by the class of the backbone, not by model_type: one model_type has several classes (T5's
# encoder stack inside T5Model, OPTDecoder inside OPTModel), and the class is what gets split.
FAMILIES: dict[str, Family] = {
    "BertModel": _encoder("BERT", pooler="pooler"),
    "RobertaModel": _encoder("RoBERTa", pooler="pooler", positions_after_padding=True),
    "XLMRobertaModel": _encoder("XLM-RoBERTa", pooler="pooler", positions_after_padding=True),
    "ElectraModel": _encoder("ELECTRA"),
    "MPNetModel": _encoder(
        "MPNet",
        pooler="pooler",
        positions_after_padding=True,
        padding_id=1,
        relative_bias="encoder.relative_attention_bias",
    ),
    "DebertaModel": _encoder("DeBERTa"),
    "DebertaV2Model": _encoder("DeBERTa-v2/v3", first_layer_extra="encoder.conv"),
    "ModernBertModel": Family(
        "ModernBERT",
        "layers",
        _encoder_embeddings,
        after=("final_norm",),
        takes_positions=True,
        layer_types=True,
        dropout_keys=("embedding_dropout",),
    ),
    "GPT2Model": Family(
        "GPT-2", "h", _gpt2_embeddings, True, ("ln_f",), dropout_keys=("resid_pdrop",)
    ),
    "OPTDecoder": Family(
        "OPT",
        "layers",
        _opt_embeddings,
        True,
        ("final_layer_norm", "project_out"),
        dropout_keys=("dropout",),
    ),
    "LlamaModel": _llama("Llama"),
    "MistralModel": _llama("Mistral"),
    "Qwen2Model": _llama("Qwen2", layer_types=True),
    "Qwen3Model": _llama("Qwen3", layer_types=True),
    "Gemma2Model": _llama("Gemma 2", layer_types=True),
    "Gemma3TextModel": _llama("Gemma 3 (text)", layer_types=True),
    "Phi3Model": _llama("Phi-3"),
    "T5Stack": Family(
        "T5 (encoder)",
        "block",
        _t5_embeddings,
        after=("final_layer_norm", "dropout"),
        bias_owner=True,
        dropout_keys=("dropout_rate",),
    ),
}

# Where a task model's head reads the backbone only in part, its modules with weights outside the
# backbone are the head. These task models are language models: their head is part of what was
# pre-trained and stays frozen.
_CAUSAL_LM = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")
_LM_HEADS = (*_CAUSAL_LM, "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining")


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the labels of a model are the tokens to generate. Users' own subclasses count."""
    return any(cls.__name__.endswith(_CAUSAL_LM) for cls in type(model).__mro__)


def is_language_model(model: nn.Module) -> bool:
    """Whether a model's head gives logits of tokens. Users' own subclasses count."""
    return any(cls.__name__.endswith(_LM_HEADS) for cls in type(model).__mro__)


def family_of(module: nn.Module) -> Family | None:
    """The family of a backbone module, looked up by its class and its bases; None for anything
    else.
    """
    for cls in type(module).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    return None


def find_backbone(model: nn.Module) -> tuple[str, nn.Module, Family]:
    """The backbone inside a model: its dotted name ("" for the model itself), the module and its
    family.

    Raises:
        ValueError: when the model holds no backbone of a known family; lists the families.
    """
    for name, module in model.named_modules():
        family = family_of(module)
        # T5's decoder is a T5Stack too; the prompt goes into the encoder.
        if family is None or (family.bias_owner and module.is_decoder):
            continue
        if not family.causal and getattr(module.config, "is_decoder", False):
            raise ValueError(
                f"{type(module).__name__} is set up as a decoder (config.is_decoder=True); Late "
                f"Prompt Tuning knows {family.name} as an encoder only. Load it with "
                "is_decoder=False."
            )
        return name, module, family
    known = ", ".join(sorted(f.name for f in FAMILIES.values()))
    raise ValueError(
        f"Late Prompt Tuning does not know the model {type(model).__name__}; the known families "
        f"are {known}. A new one is a line in lpt_fast/backbone/families.py."
    )


def get_layers(backbone: nn.Module, family: Family) -> nn.ModuleList:
    """The backbone's layers in order."""
    return backbone.get_submodule(family.layers)


def frozen_below(backbone: nn.Module, family: Family, k: int) -> list[nn.Module]:
    """Everything that acts before the insertion: embeddings and layers 1..k."""
    below = [*_others(backbone, family, set(family.after)), *get_layers(backbone, family)[:k]]
    below += shared_by_layers(backbone, family)
    return [module for module in below if module is not None]


def shared_by_layers(backbone: nn.Module, family: Family) -> list[nn.Module]:
    """What hangs beside the list of layers and acts in all of them, or after the first: positions
    of attention, their norm.
    """
    holder, _, name = family.layers.rpartition(".")
    if not holder:
        return []
    others = backbone.get_submodule(holder)._modules
    return [m for n, m in others.items() if n != name and m is not None]


def frozen_above(backbone: nn.Module, family: Family, k: int) -> list[nn.Module]:
    """What acts after the insertion and is not part of the head: layers k+1..L, final norms."""
    after = [getattr(backbone, name) for name in family.after if name in backbone._modules]
    return [*get_layers(backbone, family)[k:], *(module for module in after if module is not None)]


def _others(backbone: nn.Module, family: Family, without: set[str]) -> list[nn.Module]:
    without = without | {LATE_PROMPT, family.pooler, family.layers.split(".")[0]}
    return [m for name, m in backbone._modules.items() if name not in without and m is not None]


def head_modules(
    model: nn.Module, backbone_name: str, backbone: nn.Module, family: Family
) -> list[str]:
    """Dotted names (relative to the model) of everything with weights between the last layer and
    the logits.

    Empty for language models (their head was pre-trained and stays frozen) and for a bare backbone
    (no head). A pooler that sits in the backbone is part of the head when the model has one.
    """
    if backbone_name == "" or is_language_model(model):
        return []
    # What holds the backbone, its sibling stacks (T5's decoder) and shared embeddings are not the
    # head.
    names = [
        name
        for name, child in model.named_children()
        if not isinstance(child, PreTrainedModel | nn.Embedding)
        and name != backbone_name.split(".")[0]
        and any(True for _ in child.parameters())
    ]
    if names and family.pooler and isinstance(getattr(backbone, family.pooler, None), nn.Module):
        names.insert(0, f"{backbone_name}.{family.pooler}")
    return names
