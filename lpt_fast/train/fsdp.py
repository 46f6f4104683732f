"""A frozen backbone that does not fit on one device: its layers in parts, one on each process.

PyTorch's FSDP2 (`fully_shard`) brings the whole of a layer together while the layer runs. What
trains, the prompt generator and the head, is small and whole on every process, so DDP averages its
gradients as ever.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..backbone.families import find_backbone, get_layers


def layers_to_shard(model: nn.Module) -> list[nn.Module]:
    """The transformer layers, lower and upper, and the word embeddings, where all their weights are
    frozen and nobody else reads them.
    """
    _, backbone, family = find_backbone(model)
    found = [*get_layers(backbone, family)]
    embeddings = backbone.get_input_embeddings()
    readers = [
        module
        for module in model.modules()
        if any(p is embeddings.weight for p in module.parameters(recurse=False))
    ]
    if readers == [embeddings]:  # a language model's head may have the same weight
        found.append(embeddings)
    return [m for m in found if not any(p.requires_grad for p in m.parameters())]


def shard_frozen(model: nn.Module, mesh=None) -> nn.Module:
    """Leaves each process a part of the frozen layers' weights.

    Call it after `get_peft_model`, on every process, before the Trainer or an optimiser is made.
    Layers then run as the model's own code (`upper="padded"`).

    Args:
        model: with a late prompt, all weights on this process.
        mesh: a `DeviceMesh` of one dimension; default: all processes.

    Returns:
        The same model.

    Raises:
        ValueError: no process group, or no layer that is frozen.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "shard_frozen() found no process group, expected one; start with torchrun and call "
            "torch.distributed.init_process_group() first."
        )
    layers = layers_to_shard(model)
    if not layers:
        raise ValueError(
            "shard_frozen() found no layer whose weights are all frozen, expected those of a model "
            "with a late prompt; get_peft_model(model, LPTConfig(...)) freezes them."
        )
    if mesh is None:
        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in layers:
        # (Said, since each is a root of its own here, and a root would stay whole after its run: in
        # memory, and on some processes alone after one of them saved a checkpoint.)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # DDP, which Trainer wraps around the model, leaves to FSDP what is FSDP's.
    sharded = [name for name, p in model.named_parameters() if is_sharded(p)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    return model


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of a weight."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
