"""What of a model is in this process: all of its parameters, or shards of them, as FSDP2 makes them."""

import torch
from torch import Tensor, nn

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process has a shard of it alone."""
    return torch.distributed.is_available() and isinstance(parameter, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What of a parameter is in this process, to read or to write: all of it, unless it is sharded."""
    if is_sharded(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    return tensor.detach()


def shard_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of a tensor, which all processes have whole, that belongs to what they have of a parameter."""
    if not is_sharded(parameter):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return local(distribute_tensor(tensor, mesh, placements, src_data_rank=None)).to(local(parameter).device)


def several_processes() -> bool:
    """Whether this process is one of a group."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def any_process(flag: Tensor) -> bool:
    """Whether a flag, of one entry, is set in any process of the group; all of them have to ask."""
    if several_processes():
        flag = flag.to(torch.int32)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def agree(module: nn.Module, names: tuple[str, ...]) -> None:
    """Gives tensors of a module, whichever of these it has whole, the values that they have in the first process."""
    for name in names:
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor) and not is_sharded(tensor):
            torch.distributed.broadcast(tensor.detach(), 0)
