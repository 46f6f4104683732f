"""One operator: the prompt generator and its concatenation with the text, packed or padded.

api.py            what callers use, on checked arguments
reference.py      the same in plain PyTorch: the oracle of every fast way, to the formula
exportable.py     the prompts in operations that torch.export and ONNX know
ops.py            registration with PyTorch (autograd, torch.compile) of the kernels in lpt_kernels
checks.py         what is refused at the door
padded_layout.py  where rows of a padded batch are, masks with holes included

Gives the functions below to everybody. Knows tensors: no models, no adapters.
"""

from .api import gather_insert_prompt, insert_prompt, insert_prompt_, insert_prompt_padded

__all__ = ["gather_insert_prompt", "insert_prompt", "insert_prompt_", "insert_prompt_padded"]
