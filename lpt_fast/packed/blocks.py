"""One transformer layer on packed rows, for each family of the fast stack.

A block reads the frozen weights where the Hugging Face modules have them; nothing is copied. It
knows how its layer projects rows to queries, keys and values, and what comes after attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .attention import attend
from .last_layer import attend_one, attend_one_absorbed, pick
from .ops import (
    FromPrompts,
    activation,
    add,
    backward_of,
    branches,
    conv1d,
    gated,
    layer_norm,
    rms_norm,
)
from .plan import Plan


class Block:
    """A layer on packed rows.

    Attributes:
        heads, kv_heads: of queries; of keys and values.
        scale: of the scores.
        causal: whether rows see only those before them.
        rotary: (cos, sin), [N, d] each, or None.
        linear: whether `project` is, so that its gradient is the same for all rows.
    """

    heads: int
    kv_heads: int
    scale: float
    causal = True
    linear = False
    rotary: tuple[Tensor, Tensor] | None = None

    def project(self, x: Tensor, rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of rows x [n, D]: [n, H d], [n, Hk d], [n, Hk d]."""
        raise NotImplementedError

    def project_backward(self, x: Tensor | None, rows: Tensor, grads: list[Tensor]) -> Tensor:
        """Gradient of `project` for a few rows, [n, D].

        Args:
            x: [n, D], what these rows held; None where `linear`.
            rows: int64 [n], which.
            grads: of q, k and v there.
        """
        return backward_of(lambda x: self.project_rows(x, rows), x, grads)

    def project_rows(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`project` of the rows `rows`, int64 [n]; None: of all."""
        return self.project(x, self._rotary(rows))

    def _rotary(self, rows: Tensor | None):
        if rows is None or self.rotary is None:
            return self.rotary
        return tuple(t[rows] for t in self.rotary)

    def project_all(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x for what comes after attention, and `project` of all its rows."""
        return x, *self.project(x, self.rotary)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output rows from its input rows and what attention gave, [n, D]."""
        raise NotImplementedError

    def read(
        self, x: Tensor, rows: Tensor, place: Tensor | None, plan: Plan, first: bool
    ) -> tuple[Tensor, Tensor]:
        """The rows `rows` [B] alone, one of each text: [B, D], and what attention gives them,
        [B, H d].
        """
        raise NotImplementedError

    def run(self, x: Tensor, plan: Plan, first: bool, held: list[Tensor] | None) -> Tensor:
        """The whole layer, [N, D] -> [N, D].

        Args:
            first: only the prompt rows of x have a gradient.
            held: in the first layer, what `project` gives for text rows, if it is known.
        """
        if first:
            functions = (self.project_rows, self.project_backward)
            x, q, k, v = FromPrompts.apply(x, *functions, plan, held, not self.linear)
        else:
            x, q, k, v = self.project_all(x)
        attended = attend(
            q,
            k,
            v,
            plan,
            heads=self.heads,
            kv_heads=self.kv_heads,
            scale=self.scale,
            causal=self.causal,
            prompt_only=first,
        )
        return self.finish(x, attended)

    def run_last(self, x: Tensor, plan: Plan, place: Tensor | None, first: bool) -> Tensor:
        """The layer's output at one token of each text, [N, D] -> [B, D]: queries, output and
        feed-forward for that row alone (DESIGN section 4, readout pruning).
        """
        rows = plan.readout_rows(place)
        return self.finish(*self.read(x, rows, place, plan, first))


class PostNormBlock(Block):
    """BERT, RoBERTa, XLM-RoBERTa, ELECTRA: norms after each residual."""

    causal = False
    linear = True

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

    def project(self, x, rotary):
        return tuple(F.linear(x, m.weight, m.bias) for m in (self.query, self.key, self.value))

    def project_all(self, x):
        return branches(x, self.query, self.key, self.value, keep=True)

    def project_backward(self, x, rows, grads):
        d = torch.mm(grads[0], self.query.weight)
        if d.dtype != self.query.weight.dtype:  # autocast, which leaves `addmm_` alone
            d = torch.addmm(d, grads[1], self.key.weight)
            return torch.addmm(d, grads[2], self.value.weight)
        return d.addmm_(grads[1], self.key.weight).addmm_(grads[2], self.value.weight)

    def finish(self, x, attended):
        x = layer_norm(self.norm, F.linear(attended, self.output.weight, self.output.bias), x)
        x, h = branches(x, self.up, keep=True)
        h = activation(self.act, h)
        return layer_norm(self.last_norm, F.linear(h, self.down.weight, self.down.bias), x)

    def read(self, x, rows, place, plan, first):
        x_places, x = pick(x, rows, plan)
        x, q = branches(x, self.query, keep=True)
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
        )


class GPT2Block(Block):
    """GPT-2: norms before, weights transposed, one matrix for queries, keys and values."""

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

    def _weights(self, i: int) -> tuple[Tensor, Tensor]:
        """Weight [D, D] and bias [D] of queries (0), keys (1) or values (2): views."""
        part = slice(i * self.width, (i + 1) * self.width)
        return self.qkv.weight[:, part], self.qkv.bias[part]

    def project(self, x, rotary):
        x = layer_norm(self.norm, x)
        return tuple(torch.addmm(b, x, w) for w, b in map(self._weights, range(3)))

    def _normed(self, x, rows):
        return (layer_norm(self.norm, x),)

    def _normed_backward(self, x, rows, grads):
        return backward_of(lambda x: self._normed(x, rows), x, grads)

    def finish(self, x, attended):
        x = add(conv1d(self.output, attended), x)
        h = activation(self.act, conv1d(self.up, layer_norm(self.last_norm, x)))
        return add(conv1d(self.down, h), x)

    def read(self, x, rows, place, plan, first):
        picked = x.index_select(0, rows)
        if first:
            _, x = FromPrompts.apply(x, self._normed, self._normed_backward, plan)
        else:
            x = layer_norm(self.norm, x)
        x_places, x = pick(x, rows, plan)
        w, b = self._weights(0)
        (w_k, _), (w_v, b_v) = self._weights(1), self._weights(2)
        return picked, attend_one_absorbed(
            torch.addmm(b, x, w),
            x_places,
            w_k.t(),
            w_v.t(),
            b_v,
            plan,
            heads=self.heads,
            scale=self.scale,
            causal=True,
            place=place,
        )


class LlamaBlock(Block):
    """Llama, Mistral, Qwen2, Qwen3: RMSNorm before, rotary positions, grouped heads, SwiGLU."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.last_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.q, self.k, self.v = attention.q_proj, attention.k_proj, attention.v_proj
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
        self.heads = self.q.out_features // self.size
        self.kv_heads = self.k.out_features // self.size
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

    def project(self, x, rotary):
        q, k, v = branches(rms_norm(self.norm, x), self.q, self.k, self.v)
        return self._rotated(q, self.q_norm, rotary), self._rotated(k, self.k_norm, rotary), v

    def _keys(self, x, rows):
        k, v = branches(rms_norm(self.norm, x), self.k, self.v)
        return self._rotated(k, self.k_norm, self._rotary(rows)), v

    def _keys_backward(self, x, rows, grads):
        return backward_of(lambda x: self._keys(x, rows), x, grads)

    def finish(self, x, attended):
        x = add(F.linear(attended, self.output.weight, self.output.bias), x)
        h = rms_norm(self.last_norm, x)
        h = gated(self.act, *branches(h, self.gate, self.up))
        return add(F.linear(h, self.down.weight, self.down.bias), x)

    def read(self, x, rows, place, plan, first):
        picked = x.index_select(0, rows)
        q = F.linear(rms_norm(self.norm, picked), self.q.weight, self.q.bias)
        q = self._rotated(q, self.q_norm, self._rotary(rows))
        if first:
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
    "GPT2Model": GPT2Block,
    "LlamaModel": LlamaBlock,
    "MistralModel": LlamaBlock,
    "Qwen2Model": LlamaBlock,
    "Qwen3Model": LlamaBlock,
}
