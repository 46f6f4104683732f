"""Layers k+1..L without padding: plain arguments in, rows out.

stack.py       runs the layers, says why a model cannot     plan.py        which row is whose
block.py       what the layers of all families share        attention.py   within texts
blocks.py      a layer of each family                       low_rank.py    updates of their products
ops.py         norms, activations, gated forms              last_layer.py  one token a text
held.py        projections that somebody holds         compute.py     layers in bf16, cast once
graphs.py      CUDA graphs by token bucket                  graph_passes.py  one captured pass

Knows backbone and insertion: no LatePrompt, no Trainer, no files.
"""
