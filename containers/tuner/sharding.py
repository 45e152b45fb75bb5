"""A base model that does not fit one GPU: each process holds a part of it (PyTorch's FSDP2).

Before a block of the model computes, its weights are gathered from all processes, and dropped when it is through. The
adapter stays whole in each process, as without sharding: it is small, and so training, checkpoints and the adapter's
file are the same.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from kaito_flows.containers.tuner.model import Adapted
from kaito_flows.containers.tuner.world import World
from kaito_flows.errors import WeightsError

__all__ = ["drop_gathered", "shard"]


def shard(adapted: Adapted, world: World) -> Adapted:
    """Divide the base model among the processes, block by block, each onto its device.

    Raises:
        WeightsError: (code `weights-unsupported`) the model has no blocks of layers.
    """
    adapters = set(adapted.parameters.values())
    mesh = init_device_mesh(world.device.type, (world.size,))
    blocks = _blocks(adapted.model)
    if not blocks:
        message = f"a {adapted.model.config.model_type} model has no blocks to divide among processes"
        raise WeightsError(message, place="shard", code="weights-unsupported")
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=adapters)
    # The head lies outside, whole on each device: logits are made in chunks, for which nothing must be gathered. One
    # whose weights are the embedding's cannot.
    model, base = adapted.model, adapted.model.base_model
    head = model.get_output_embeddings()
    shared = head.weight is model.get_input_embeddings().weight
    fully_shard(model if shared else base, mesh=mesh, ignored_params=adapters)
    if not shared:
        head.to(world.device)
    for parameter in adapters:
        parameter.data = parameter.data.to(world.device)
    return replace(adapted, device=world.device, sharded=True)


def drop_gathered(adapted: Adapted) -> None:
    """Let each process hold its part alone, so that all gather the same things next.

    One that has written the adapter has dropped already what the others still hold.
    """
    for module in adapted.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of layers; what lists there are within them (experts) goes with its block."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in _blocks(child)]
