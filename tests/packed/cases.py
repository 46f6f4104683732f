"""Stands for CUDA graphs where there is no GPU: their memory, without their speed."""

from __future__ import annotations

import torch

from lpt_fast.backbone.families import find_backbone
from lpt_fast.packed.graph_passes import Passes
from lpt_fast.packed.graphs import UpperGraphs


class Imitation(Passes):
    """Passes whose output and gradients lie in memory that every replay writes over, as those of a
    CUDA graph do, and what lies between in memory that all graphs share.
    """

    last = None  # whose forward has written to the shared memory

    def __init__(self, module, inputs, parameters):
        super().__init__(module, inputs, parameters)
        out = self.run_forward()
        self.grad = torch.zeros_like(out)
        self.flat = self.run_backward(out)
        self.out = out.detach()

    def replay_forward(self):
        self._fresh = self.run_forward()
        Imitation.last = self
        self.flat.fill_(float("nan"))
        self.out.copy_(self._fresh.detach())

    def replay_backward(self):
        assert Imitation.last is self, "another graph has written over what this one kept"
        self.out.fill_(float("nan"))
        self.flat.copy_(self.run_backward(self._fresh))
        self._fresh = None


def with_graphs(model, monkeypatch, step=16, size_step=64, worth=0):
    """The model's LatePrompt with imitated graphs, and a list that gets what each was made of."""
    from lpt_fast.packed import graphs

    for name, value in (("STEP", step), ("SIZE_STEP", size_step), ("WORTH", worth)):
        monkeypatch.setattr(graphs, name, value)
    seen = []

    def capture(module, inputs, parameters):
        seen.append([None if x is None else tuple(x.shape) for x in inputs])
        return Imitation(module, inputs, parameters)

    late = find_backbone(model)[1].late_prompt
    late.graphs = UpperGraphs(late, capture)
    return late, seen
