"""The texts of several adapters in one pass through the frozen layers: what the backbone gives to
each adapter's texts, for `mixed.py`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial

import torch

from ..backbone.arguments import TEXT
from ..backbone.lower import run_between
from ..packed.attention import without_autocast
from ..packed.held import HeldRows, kind_of
from ..packed.stack import first_updated, project_first
from ..packed.stages import Share, Stage, run_stages
from . import cached_call as cached
from .call_inputs import check_inputs, give_each_a_token
from .context import Call
from .groups import BASE, Group, entries_of, running
from .packed_call import context_of, fill, output_of, readout_of, takes_packed
from .packed_lower import lower_states
from .packed_rows import Rows, tokens_of
from .readout import READOUT, checked_places

# Arguments of a call that the pass knows; with others each adapter's texts run by themselves.
_KNOWN = {*TEXT, "labels", "context_lengths", READOUT, cached.CACHED, "return_dict", "use_cache"}
_KNOWN |= {"num_items_in_batch", "output_hidden_states", "output_attentions"}


def joint_outputs(late, groups: list[Group], kwargs: dict, wrappers: list):
    """What the backbone gives to each group, made in one pass.

    Returns:
        Arguments that stand in for `cached_hidden`, and for each group what makes the backbone's
        output; None where the groups run by themselves.
    """
    root = late.root
    configs = {g.name: late.lpt_config[g.name] for g in groups if g.name != BASE}
    text = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    own = type(root).__module__.startswith("transformers.")
    plain = own and (root is late.backbone or "forward" not in root.__dict__)
    if not (configs and plain and set(kwargs) <= _KNOWN) or len(groups) < 2:
        return None
    if text is not None and text.dim() - ("inputs_embeds" in kwargs) != 2:
        return None  # multiple choice
    batch = kwargs.get(cached.CACHED)
    lowest = min(configs, key=lambda name: configs[name].insertion_layer)
    stand_in = {}
    if batch is not None:
        with running(late, lowest, wrappers, modes=False):
            batch, stand_in = cached.enter(late, batch, (), _without(kwargs, cached.CACHED))
        stand_in = {name: stand_in[name] for name in TEXT if name in stand_in}
    inputs = {name: kwargs[name] for name in TEXT if name in kwargs}
    others = {n: v for n, v in kwargs.items() if n.startswith("output_") or n == "use_cache"}
    if batch is None:
        check_inputs(inputs, others)
        give_each_a_token(inputs)
    call = Call(labels=kwargs.get("labels"), cached=batch)
    for name in configs:
        with running(late, name, wrappers, modes=False):
            if not takes_packed(late, call, inputs, others):
                return None
    states, tokens, positions = _lower(late, groups, configs, batch, inputs, others)
    if READOUT in kwargs:
        mask = batch.mask() if batch is not None else tokens
        size = (len(batch), batch.max_seqlen) if batch is not None else text.shape[:2]
        device = batch.hidden.device if batch is not None else text.device
        place = checked_places(kwargs[READOUT], mask, *size, device)
        kwargs = {**kwargs, READOUT: place}
    ids = stand_in.get("input_ids", inputs.get("input_ids"))
    pass_ = _Pass(late, groups, configs, states, tokens, positions, batch)
    return stand_in, pass_.run({**kwargs, "input_ids": ids})


def _without(kwargs: dict, name: str) -> dict:
    return {n: v for n, v in kwargs.items() if n != name}


def _lower(late, groups, configs, batch, inputs, others):
    """Outputs of the lower layers: k -> (what gives [n, S, D], the row in it of each text that has
    one; None: its number); tokens and positions of the call's texts.
    """
    backbone, family = late.backbone, late.family
    layers = sorted({config.insertion_layer for config in configs.values()})
    if batch is not None:
        lowest = cache(batch.padded)  # (only where a group has not all of the texts)
        inputs = {"attention_mask": batch.mask().long()}
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.pad(batch.position_ids)
    tokens, positions = tokens_of(late, inputs)
    if batch is None:
        more = {"return_dict": True}
        if family.causal:
            more["use_cache"] = False
        inputs = {**inputs, **others, **more}
        made = lower_states(late, layers[0], inputs, tokens, positions)
        lowest = cache(lambda: made)
    states = {layers[0]: (lowest, None)}
    if len(layers) > 1:
        hidden = lowest()
        deeper = {n for n, config in configs.items() if config.insertion_layer > layers[0]}
        texts = tuple(sorted({t for g in groups if g.name in deeper for t in g.texts}))
        own = {"attention_mask": torch.ones(hidden.shape[:2], device=hidden.device).long()}
        if tokens is not None:
            own["attention_mask"] = tokens.long()
        if positions is not None:
            own["position_ids"] = positions
        own = {name: entries_of(value, texts, len(hidden)) for name, value in own.items()}
        rest = entries_of(hidden, texts, len(hidden))
        rest = rest.to(cached.layer_dtype(late, layers[0]) or rest.dtype)
        found = run_between(backbone, family, layers[0], layers[1:], rest, own)
        row = {text: i for i, text in enumerate(texts)}
        states |= {k: (partial(found.get, k), row) for k in found}
    return states, tokens, positions


class _Pass:
    """The layers above the insertions, for all groups.

    Args:
        states, tokens, positions: as `_lower` gives them.
    """

    def __init__(self, late, groups, configs, states, tokens, positions, batch):
        self.late, self.groups, self.states = late, groups, states
        self.tokens, self.positions, self.batch = tokens, positions, batch
        self.lowest = min(states)
        self.count = len(batch) if batch is not None else len(states[self.lowest][0]())
        self.all = tuple(range(self.count))
        self._layer = {g.name: self.lowest for g in groups}  # the base model's texts join there
        self._layer |= {name: config.insertion_layer for name, config in configs.items()}
        self._m = {name: config.num_virtual_tokens for name, config in configs.items()}
        self._rows: dict[tuple, Rows] = {}

    def run(self, kwargs: dict) -> list[partial]:
        """For each group what makes the backbone's output; kwargs of the whole call."""
        late = self.late
        count = self.count
        order = sorted(range(len(self.groups)), key=lambda i: self._layer[self.groups[i].name])
        stages: dict[int, list] = {}
        rows_of, places, reads = {}, [], None
        for i in order:
            group = self.groups[i]
            own = {n: v for n, v in kwargs.items() if n != cached.CACHED}
            own = {n: entries_of(v, group.texts, count) for n, v in own.items()}
            names = ("context_lengths", "labels", "readout")
            call = Call(**{name: own.get(name) for name in names})
            rows = rows_of[i] = self._rows_for(group)
            reads, place = readout_of(late, call, own.get("input_ids"), rows)
            if place is not None:
                places.append(place)
            filled = rows.buffer
            if group.name != BASE:
                filled = fill(late, group.name, rows, *context_of(late, group.name, call, rows))
            stages.setdefault(self._layer[group.name], []).append((group, rows, filled))
        dtype = late.compute_dtype
        with nullcontext() if dtype is None else without_autocast(filled):
            out = run_stages(
                late.computing(self.lowest),
                late.family,
                [self._stage(k, own) for k, own in stages.items()],
                readout=reads is not None,
                place=torch.cat(places) if places else None,
                filler=dtype is not None,
            )
        if dtype is not None:
            out = out.to(cached.layer_dtype(late, self.lowest))
        sizes = [rows_of[i].shape[0] if reads else rows_of[i].plan.rows for i in order]
        parts = dict(zip(order, out.split(sizes), strict=True))
        return [
            partial(output_of, late, rows_of[i], parts[i], reads) for i in range(len(self.groups))
        ]

    def _rows_for(self, group: Group) -> Rows:
        """The group's rows with room for its prompts."""
        m = self._m.get(group.name, 0)
        key = (self._layer[group.name], m, group.texts)
        if key not in self._rows:
            self._rows[key] = self._text_rows(self._layer[group.name], group.texts, m)
            return self._rows[key]
        rows = self._rows[key]  # the same texts for another adapter, whose prompts take the place
        return Rows(
            rows.buffer.detach().clone(), rows.plan, rows.cu_seqlens, rows.shape, rows.padded_form
        )

    def _text_rows(self, k: int, texts: tuple[int, ...], m: int) -> Rows:
        """Rows of some texts with room for m."""
        dtype = cached.rows_dtype(self.late, k)
        if self.batch is not None and k == self.lowest and texts == self.all:
            return Rows.of_batch(self.batch, dtype or self.batch.hidden.dtype, m)
        made, row = self.states[k]
        hidden, tokens, positions = made(), self.tokens, self.positions
        tokens, positions = (entries_of(x, texts, self.count) for x in (tokens, positions))
        own = texts if row is None else tuple(row[text] for text in texts)
        hidden = entries_of(hidden, own, len(hidden))
        return Rows.of_text(hidden.to(dtype or hidden.dtype), tokens, positions, m)

    def _stage(self, k: int, own: list) -> Stage:
        late = self.late
        shares, m = [], []
        for group, rows, filled in own:
            updates = {} if group.name == BASE else late.updates(group.name)
            shares.append(Share(len(group.texts), len(filled), updates))
            m += [rows.plan.m] * len(group.texts)
        positions = None
        if late.family.takes_positions:
            positions = torch.cat([rows.rotary_positions() for _, rows, _ in own])
        return Stage(
            k=k,
            rows=torch.cat([filled for _, _, filled in own]),
            lengths=torch.cat([rows.cu_seqlens.diff() for _, rows, _ in own]).long(),
            longest=max(rows.plan.longest for _, rows, _ in own),
            m=m,
            positions=positions,
            shares=shares,
            held=self._held(k, [group for group, _, _ in own], shares, m),
        )

    def _held(self, k: int, groups: list[Group], shares: list[Share], m: list[int]):
        """What layer k+1 makes of the text rows, made once for texts that several adapters have."""
        late, numbers = self.late, [text for group in groups for text in group.texts]
        if k != self.lowest or (len(set(m)) > 1 and late.family.takes_positions):
            return None
        backbone, family = late.computing(k), late.family
        changing = [
            share.updates
            for share in shares
            if first_updated(late.backbone, family, k, share.updates)
        ]
        given = None if self.batch is None else self.batch.held
        if given is not None and given.kind[3] in m:
            rows = next(iter(self._rows.values())).buffer
            if given.fits(rows, given.kind[3] if len(set(m)) > 1 else m[0], bool(changing)):
                return HeldRows(given.tables, given.begins[numbers], given.kind)
        if len(set(numbers)) == len(numbers):
            return None
        plain = self._text_rows(k, self.all, 0)
        positions = None
        if family.takes_positions:
            positions = plain.rotary_positions() + (0 if changing else m[0])
        updates = changing[0] if changing else None
        with torch.no_grad():
            tables = project_first(backbone, family, k, plain.buffer, positions, updates)
        begins = plain.cu_seqlens[:-1].long()[numbers]
        return HeldRows(tuple(tables), begins, kind_of(plain.buffer, m[0], bool(changing)))
