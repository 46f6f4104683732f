"""A Hugging Face model cut at layer k.

families.py     the table of model families: where layers, heads and positions are
lower.py        layers 1..k                 upper.py       layers k+1..L by the model's own code
low_rank.py     late LoRA: updates of linear layers above k
copies.py       halves over the same weights
arguments.py    what a forward may be given, and what its KV cache is called
cache_view.py   the KV cache as one half sees it
fingerprint.py  whether frozen tensors are what they were
watch.py        whether modules are what they were, asked in every step

Knows transformers and modules: no prompts, no adapters, no files.
"""
