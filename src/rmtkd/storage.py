"""What is stored of a model: tensors by name, once each, each in memory of its own."""

from collections.abc import Mapping

from torch import Tensor, nn


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, once each, also buffers that a state dict leaves out; `surgery.fill` puts them
    back."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Those of them that belong to the model's state."""
    state = model.state_dict().keys()
    return {name: value for name, value in tensors_of(model).items() if name in state}


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, none of which lies in the memory of another: as safetensors wants them."""
    alone: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(memory.data_ptr())
        alone[name] = value
    return alone
