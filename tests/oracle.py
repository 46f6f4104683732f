"""An independent way to the same numbers: nothing here uses the project's split, layout or
generators.

The whole, unsplit model runs on the text with m filler tokens before it; a hook on layer k+1 throws
away what the fillers and the text became and puts in [prompt; H], where H comes from a run of the
unsplit model on the text alone. Masks, positions and everything above are the model's own for a
text of m + S tokens. The prompt is made by formulas written out example by example.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

LAYER_LISTS = ("encoder.layer", "layers", "h", "block", "decoder.layers")


def layer_list(backbone):
    for path in LAYER_LISTS:
        try:
            return backbone.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(type(backbone))


def prompt_by_hand(kind: str, w: dict, rows: torch.Tensor, m: int, causal: bool) -> torch.Tensor:
    """Prompt [m, D] of one example from its readable rows [n, D] and the generator's weights by
    name.
    """
    if kind == "static":
        return w["prompt_embedding.weight"]
    if kind == "npg":
        h = rows[-1] if causal else rows[0]
        z = torch.relu(w["proj_down.weight"] @ h + w["proj_down.bias"])
        return (w["proj_up.weight"] @ z + w["proj_up.bias"]).view(m, -1)
    if kind == "attention":
        scores = rows @ w["queries.weight"].T / rows.shape[1] ** 0.5
        pooled = torch.softmax(scores, 0).T @ rows
        down = pooled @ w["proj_down.weight"].T + w["proj_down.bias"]
        return torch.relu(down) @ w["proj_up.weight"].T + w["proj_up.bias"]
    if kind == "residual":
        e = w["prompt_embedding.weight"]
        out = e
        for i in range(3):
            down = e @ w[f"proj_down.{i}.weight"].T + w[f"proj_down.{i}.bias"]
            out = out + torch.relu(down) @ w[f"proj_up.{i}.weight"].T + w[f"proj_up.{i}.bias"]
        return out
    pool = F.adaptive_avg_pool1d if kind == "appg" else F.adaptive_max_pool1d
    down = rows @ w["proj_down.weight"].T + w["proj_down.bias"]
    pooled = pool(down.T[None], m)[0].T
    return torch.relu(pooled) @ w["proj_up.weight"].T + w["proj_up.bias"]


def late_prompt_by_hand(backbone, k, kind, weights, m, inputs, readable=None):
    """Output of the last layer for the text rows, [B, S, D].

    Args:
        backbone: an unadapted backbone.
        k, kind, m: insertion layer, generator, prompt rows.
        weights: the generator's parameters by name; gradients flow into them.
        inputs: input_ids and attention_mask.
        readable: bool [B, S], what the generator may read; default: the attended positions. None
            for encoders.
    """
    causal = readable is not None
    mask = inputs["attention_mask"].bool()
    readable = mask if readable is None else readable
    layer = layer_list(backbone)[k]
    seen = {}

    def look(module, args, kwargs):
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        backbone(**inputs)
    handle.remove()
    hidden = seen["hidden"]
    size, length, _ = hidden.shape
    rows, ids, long_mask, text_at = [], [], [], []
    for b in range(size):
        start = int(mask[b].int().argmax())
        prompt = prompt_by_hand(kind, weights, hidden[b][readable[b]], m, causal)
        rows.append(torch.cat([hidden[b, :start], prompt, hidden[b, start:]]))
        filler = torch.full((m,), 5)
        ids.append(
            torch.cat([inputs["input_ids"][b, :start], filler, inputs["input_ids"][b, start:]])
        )
        one = torch.ones(m, dtype=torch.long)
        old = inputs["attention_mask"][b]
        long_mask.append(torch.cat([old[:start], one, old[start:]]))
        text_at.append(torch.tensor([t if t < start else t + m for t in range(length)]))
    rows = torch.stack(rows)

    def put(module, args, kwargs):
        if args:
            return (rows, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": rows}

    handle = layer.register_forward_pre_hook(put, with_kwargs=True)
    out = backbone(input_ids=torch.stack(ids), attention_mask=torch.stack(long_mask))
    handle.remove()
    at = torch.stack(text_at)[..., None].expand(-1, -1, out.last_hidden_state.shape[-1])
    return out.last_hidden_state.gather(1, at)
