"""One transformer layer on packed rows, for each family of the fast stack.

A block reads the frozen weights where the Hugging Face modules have them; nothing is copied. It
knows how its layer projects rows to queries, keys and values, and what comes after attention;
block.py has what all share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .block import Block
from .last_layer import attend_one, attend_one_absorbed, pick
from .ops import (
    FromPrompts,
    activation,
    add,
    backward_of,
    gated,
    layer_norm,
    linear,
    linear_gradient,
    rms_norm,
)


class PostNormBlock(Block):
    """BERT, RoBERTa, XLM-RoBERTa, ELECTRA: norms after each residual."""

    causal = False
    linear = True
    names: ClassVar[dict[str, str]] = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "output": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    }

    def __init__(self, layer: nn.Module):
        own = layer.attention.self
        self.query, self.key, self.value = own.query, own.key, own.value
        self.output, self.norm = layer.attention.output.dense, layer.attention.output.LayerNorm
        self.up, self.act = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
        self.down, self.last_norm = layer.output.dense, layer.output.LayerNorm
        self.heads = self.kv_heads = own.num_attention_heads
        self.scale = own.attention_head_size**-0.5

    @staticmethod
    def parts(layer: nn.Module) -> list[tuple[nn.Module, type]]:
        """The modules that are read, and the classes that they have to be of."""
        own, out = layer.attention.self, layer.attention.output
        linear = [own.query, own.key, own.value, out.dense]
        linear += [layer.intermediate.dense, layer.output.dense]
        norms = [out.LayerNorm, layer.output.LayerNorm]
        return [*((m, nn.Linear) for m in linear), *((m, nn.LayerNorm) for m in norms)]

    def project_linear(self, x, rows=None):
        return tuple(linear(m, x) for m in (self.query, self.key, self.value))

    def project_all(self, x):
        return self.products(x, *self.queries, keep=True)

    def project_backward(self, x, rows, grads):
        d = linear_gradient(self.query, grads[0])
        if d.dtype != self.query.weight.dtype:  # autocast, which leaves `addmm_` alone
            d = torch.addmm(d, grads[1], self.key.weight)
            return torch.addmm(d, grads[2], self.value.weight)
        return linear_gradient(self.value, grads[2], linear_gradient(self.key, grads[1], d))

    linear_backward = project_backward

    def finish(self, x, attended):
        x = layer_norm(self.norm, self.product("output", attended), x)
        x, h = self.products(x, "up", keep=True)
        h = activation(self.act, h)
        return layer_norm(self.last_norm, self.product("down", h), x)

    def read(self, x, rows, place, plan, first):
        x_places, x = pick(x, rows, plan)
        x, q = self.products(x, "query", keep=True)
        return x, attend_one_absorbed(
            q,
            x_places,
            self.key.weight,
            self.value.weight,
            self.value.bias,
            plan,
            heads=self.heads,
            scale=self.scale,
            causal=False,
            place=place,
            bias=self.bias,
            key_parts=self.parts_of.get("key", ()),
            value_parts=self.parts_of.get("value", ()),
        )


class MPNetBlock(PostNormBlock):
    """MPNet: as BERT, with a bias of attention by distance. The prompt stands directly before the
    text, so its rows are as far from the text's as tokens there would be.
    """

    names: ClassVar[dict[str, str]] = {
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "output": "attention.attn.o",
        "up": "intermediate.dense",
        "down": "output.dense",
    }

    def __init__(self, layer: nn.Module):
        own = layer.attention.attn
        self.query, self.key, self.value, self.output = own.q, own.k, own.v, own.o
        self.norm = layer.attention.LayerNorm
        self.up, self.act = layer.intermediate.dense, layer.intermediate.intermediate_act_fn
        self.down, self.last_norm = layer.output.dense, layer.output.LayerNorm
        self.heads = self.kv_heads = own.num_attention_heads
        self.scale = own.attention_head_size**-0.5

    @staticmethod
    def parts(layer):
        own = layer.attention.attn
        linear = [own.q, own.k, own.v, own.o, layer.intermediate.dense, layer.output.dense]
        norms = [layer.attention.LayerNorm, layer.output.LayerNorm]
        return [*((m, nn.Linear) for m in linear), *((m, nn.LayerNorm) for m in norms)]


class GPT2Block(Block):
    """GPT-2: norms before, weights transposed, one matrix for queries, keys and values."""

    names: ClassVar[dict[str, str]] = {
        "qkv": "attn.c_attn",
        "output": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }

    def __init__(self, layer: nn.Module):
        attention = layer.attn
        self.norm, self.qkv, self.output = layer.ln_1, attention.c_attn, attention.c_proj
        self.last_norm, self.up, self.down = layer.ln_2, layer.mlp.c_fc, layer.mlp.c_proj
        self.act = layer.mlp.act
        self.width = attention.embed_dim
        self.heads = self.kv_heads = attention.num_heads
        self.scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
        if attention.scale_attn_by_inverse_layer_idx:
            self.scale /= attention.layer_idx + 1

    @staticmethod
    def parts(layer):
        linear = [layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj]
        norms = [layer.ln_1, layer.ln_2]
        return [*((m, Conv1D) for m in linear), *((m, nn.LayerNorm) for m in norms)]

    def update(self, updates, among=None):
        super().update(updates, among)
        for whole in self.parts_of.pop("qkv", ()):  # one A, and a part of B for each
            for i, role in enumerate(self.queries):
                part = replace(whole, rows=self._features(i))
                self.parts_of.setdefault(role, []).append(part)

    def _features(self, i: int) -> slice:
        return slice(i * self.width, (i + 1) * self.width)

    def _weights(self, i: int) -> tuple[Tensor, Tensor]:
        """Weight [D, D] and bias [D] of queries (0), keys (1) or values (2): views."""
        return self.qkv.weight[:, self._features(i)], self.qkv.bias[self._features(i)]

    def normed(self, x):
        return layer_norm(self.norm, x)

    def project_linear(self, x, rows=None):
        return tuple(torch.addmm(b, x, w) for w, b in map(self._weights, range(3)))

    def _normed(self, x, rows):
        return (self.normed(x),)

    def _normed_backward(self, x, rows, grads):
        return backward_of(lambda x: self._normed(x, rows), x, grads)

    def finish(self, x, attended):
        x = add(self.product("output", attended), x)
        h = activation(self.act, self.product("up", layer_norm(self.last_norm, x)))
        return add(self.product("down", h), x)

    def read(self, x, rows, place, plan, first):
        picked = x.index_select(0, rows)
        if first:
            _, x = FromPrompts.apply(x, self._normed, self._normed_backward, plan)
        else:
            x = self.normed(x)
        x_places, x = pick(x, rows, plan)
        w, b = self._weights(0)
        (w_k, _), (w_v, b_v) = self._weights(1), self._weights(2)
        (q,) = self.adapt(x, torch.addmm(b, x, w), roles=("query",))
        return picked, attend_one_absorbed(
            q,
            x_places,
            w_k.t(),
            w_v.t(),
            b_v,
            plan,
            heads=self.heads,
            scale=self.scale,
            causal=True,
            place=place,
            key_parts=self.parts_of.get("key", ()),
            value_parts=self.parts_of.get("value", ()),
        )


class LlamaBlock(Block):
    """Llama, Mistral, Qwen2, Qwen3: RMSNorm before, rotary positions, grouped heads, SwiGLU."""

    names: ClassVar[dict[str, str]] = {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.last_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.query, self.key, self.value = attention.q_proj, attention.k_proj, attention.v_proj
        self.output = attention.o_proj
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        self.gate, self.up, self.down, self.act = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )
        self.size = attention.head_dim
        self.heads = self.query.out_features // self.size
        self.kv_heads = self.key.out_features // self.size
        self.scale = attention.scaling

    @staticmethod
    def parts(layer):
        own, mlp = layer.self_attn, layer.mlp
        linear = [own.q_proj, own.k_proj, own.v_proj, own.o_proj]
        linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        return [(m, nn.Linear) for m in linear]

    def _rotated(self, x: Tensor, norm: nn.Module | None, rotary) -> Tensor:
        """Rows [n, H d], each head normed (Qwen3) and turned by its row's position."""
        heads = x.view(len(x), -1, self.size)
        if norm is not None:
            heads = rms_norm(norm, heads)
        cos, sin = (t[:, None] for t in rotary)
        a, b = heads.chunk(2, -1)
        turned = heads * cos + torch.cat((-b, a), -1) * sin
        return turned.flatten(1)

    def normed(self, x):
        return rms_norm(self.norm, x)

    def turned(self, q, k, v, rotary):
        return self._rotated(q, self.q_norm, rotary), self._rotated(k, self.k_norm, rotary), v

    def _keys(self, x, rows):
        k, v = self.products(rms_norm(self.norm, x), "key", "value")
        return self._rotated(k, self.k_norm, self._rotary(rows)), v

    def _keys_backward(self, x, rows, grads):
        return backward_of(lambda x: self._keys(x, rows), x, grads)

    def finish(self, x, attended):
        x = add(self.product("output", attended), x)
        h = rms_norm(self.last_norm, x)
        h = gated(self.act, *self.products(h, "gate", "up"))
        return add(self.product("down", h), x)

    def read(self, x, rows, place, plan, first):
        picked = x.index_select(0, rows)
        q = self.product("query", rms_norm(self.norm, picked))
        q = self._rotated(q, self.q_norm, self._rotary(rows))
        if first and not self.updated("key", "value"):
            _, k, v = FromPrompts.apply(x, self._keys, self._keys_backward, plan)
        else:
            k, v = self._keys(x, None)
        return picked, attend_one(
            q,
            k,
            v,
            plan,
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=self.scale,
            causal=True,
            place=place,
        )


# By class of the backbone: the block of its layers.
BLOCKS: dict[str, Callable[[nn.Module], Block]] = {
    "BertModel": PostNormBlock,
    "RobertaModel": PostNormBlock,
    "XLMRobertaModel": PostNormBlock,
    "ElectraModel": PostNormBlock,
    "MPNetModel": MPNetBlock,
    "GPT2Model": GPT2Block,
    "LlamaModel": LlamaBlock,
    "MistralModel": LlamaBlock,
    "Qwen2Model": LlamaBlock,
    "Qwen3Model": LlamaBlock,
}
