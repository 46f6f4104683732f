"""python -m bench cache-quantize: what each store loses of real hidden states, layer by layer, and
which channel scales suit int8c best.

Channel scales come from some texts and the error is measured on others, as in a cache that grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer

from ..paths import RESULTS

# Ways to choose the channel scales of int8c from hidden states [T, D].
CALIBRATIONS = {
    "default": "quantize.calibrate: root mean square of each channel",
    "max": "largest magnitude of each channel",
    "q999": "99.9 % quantile of each channel's magnitudes",
    "none": "no channel scale: plain int8 with a scale for each token",
}


def channel_scale(name: str, hidden):
    """float32 [D] by one of CALIBRATIONS."""
    import torch

    from lpt_fast.cache.quantize import calibrate

    x = hidden.float()
    if name == "default":
        return calibrate(x)
    if name == "none":
        return torch.ones(x.shape[1])
    if name == "max":
        scale = x.abs().amax(0)
    else:
        scale = x.abs().sort(0).values[int(0.999 * (len(x) - 1))]
    return scale.clamp(min=1e-3 * float(scale.mean()) + 1e-30)


def states_of(source, task: str, rows: int) -> Iterator[tuple[int, object, object, object, object]]:
    """Layer, hidden states to calibrate with [T, D], hidden states to measure with [T', D], and the
    lengths [B'] and the model of the latter. All in float32.
    """
    import numpy as np
    import torch

    from lpt_fast.cache.build import CALIBRATION_TOKENS
    from lpt_fast.cache.forward import Runner, batches_of
    from lpt_fast.cache.identity import cut
    from lpt_fast.cache.rows import TextRules, to_text

    model = source.base()
    layers = list(range(1, source.depth))
    place = cut(model, layers[-1])
    rules = TextRules.of(place.backbone, place.family)
    texts = [to_text(i, e, rules) for i, e in enumerate(source.examples(task, rows))]
    runner = Runner(place, layers, "float32")

    def states(chosen) -> tuple[dict, np.ndarray]:
        chosen = sorted(chosen, key=len, reverse=True)
        lengths = np.array([len(text) for text in chosen])
        parts = [runner.run(chosen[b]) for b in batches_of(lengths, 4096)]
        return {k: torch.cat([part[k] for part in parts]) for k in layers}, lengths

    known, measured = [], texts[1::2]
    for text in texts[::2]:
        if sum(map(len, known)) < CALIBRATION_TOKENS:
            known.append(text)
    before, _ = states(known)
    after, lengths = states(measured)
    for layer in layers:
        yield layer, before[layer], after[layer], lengths, place


def errors(original, decoded, lengths) -> dict[str, float]:
    """Root mean square of the difference over that of the original: over everything, in the worst
    text, and in the worst channel (over that channel's own).
    """
    import numpy as np
    import torch

    a, d = original.double(), decoded.double() - original.double()
    ends = torch.from_numpy(np.cumsum(lengths))

    def per_text(x):
        sums = torch.cat([torch.zeros(1, dtype=x.dtype), x.square().sum(1).cumsum(0)[ends - 1]])
        return sums.diff()

    text = (per_text(d) / per_text(a)).sqrt()
    channel = (d.square().sum(0) / a.square().sum(0)).sqrt()
    return {
        "error": float((d.square().sum() / a.square().sum()).sqrt()),
        "worst_text": float(text.max()),
        "worst_channel": float(channel.max()),
        "median_channel": float(channel.median()),
    }


def last_layer(place, layer: int, hidden, lengths):
    """What the layers above make of hidden states of layer k, [T, D]."""
    import torch

    from lpt_fast.backbone.upper import build_upper

    upper = build_upper(place.backbone, place.family, layer, training=False)
    parts, out = hidden.split([int(n) for n in lengths]), []
    with torch.no_grad():
        for i in range(0, len(parts), 64):
            padded = torch.nn.utils.rnn.pad_sequence(parts[i : i + 64], batch_first=True)
            counts = torch.tensor([len(part) for part in parts[i : i + 64]])
            mask = torch.arange(padded.shape[1]) < counts[:, None]
            states = upper(inputs_embeds=padded, attention_mask=mask.long())
            out.append(states.last_hidden_state[mask])
    return torch.cat(out)


def measure(source, task: str, rows: int) -> Iterator[dict]:
    """Lines of results: every layer, every store, and int8c with every calibration."""
    import torch

    from lpt_fast.cache import canary, quantize
    from lpt_fast.cache.shard import QUANTISED, STORES

    from ..data import relative, require

    for layer, known, hidden, lengths, place in states_of(source, task, rows):
        cases = [(store, "default" if store == "int8c" else None) for store in STORES]
        cases += [("int8c", name) for name in CALIBRATIONS if name != "default"]
        wanted = last_layer(place, layer, hidden, lengths)
        for store, calibration in cases:
            scale = None if calibration is None else channel_scale(calibration, known)
            codes, token = quantize.encode(hidden, store, scale)
            token = token if store in QUANTISED else None
            decoded = quantize.decode(codes, torch.float32, token, scale)
            found = errors(hidden, decoded, lengths)
            require(store != "fp32" or found["error"] == 0, "fp32 rows are not what they were")
            yield {
                "part": "quantize",
                "task": task,
                "layer": layer,
                "store": store,
                "calibration": calibration,
                **found,
                "last_layer": relative(last_layer(place, layer, decoded, lengths), wanted),
                "canary_allows": canary.STORE[store],
                "tokens": len(hidden),
            }


def main(
    data: str = typer.Option(..., "--data", help="Folder with a folder of .tsv for each task."),
    tasks: str = typer.Option("subj,trec", "--tasks"),
    rows: int = typer.Option(1600, "--rows", help="Half of them to calibrate, half to measure."),
    model: str = typer.Option(None, "--model", help="Default: the demo's encoder (MiniLM)."),
    out: str = typer.Option(
        str(RESULTS / "cache_quantize.jsonl"), "--out", help="JSON lines are appended to it."
    ),
) -> None:
    """What each store loses of hidden states, at every layer."""
    import json

    from ..data import Source, quiet
    from ..machine import describe

    quiet()
    source = Source(Path(data), model)
    heads = ("error", "worst_text", "worst_channel", "median_channel", "last_layer")
    for task in tasks.split(","):
        typer.echo(f"{task:24} " + " ".join(f"{h:>14}" for h in heads) + "  canary allows")
        for line in measure(source, task, rows):
            name = f"layer {line['layer']} {line['store']} {line['calibration'] or ''}"
            cells = " ".join(f"{line[h]:14.3g}" for h in heads)
            late = "" if line["worst_text"] <= line["canary_allows"] else "  EXCEEDED"
            typer.echo(f"{name:24} {cells} {line['canary_allows']:14.3g}{late}")
            with open(out, "a", encoding="utf-8") as f:
                line = {n: float(f"{v:.4g}") if type(v) is float else v for n, v in line.items()}
                f.write(json.dumps({**line, **describe()}) + "\n")
