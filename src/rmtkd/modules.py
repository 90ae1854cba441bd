"""Embeddings in two factors, the one module that `rmtkd` adds to a network; and random starts."""

import torch
from torch import nn

from rmtkd.modeling_rmtkd import FactorizedEmbedding


def factorized(embedding: nn.Embedding) -> FactorizedEmbedding:
    """The same function as `embedding`: its table, which is not copied, followed by the identity."""
    weight, width = embedding.weight, embedding.embedding_dim
    made = FactorizedEmbedding.like(embedding, width, device="meta", dtype=weight.dtype)
    made.weight = weight
    made.projection.to_empty(device=weight.device)
    with torch.no_grad():
        made.projection.weight.copy_(torch.eye(width, dtype=weight.dtype))
        made.projection.bias.zero_()
    return made


def randomize(model: nn.Module, *, seed: int) -> None:
    """Give the model a random start, in place: Xavier for linear maps, as the paper trains; small embeddings.

    Drawn on the CPU: the same start on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(nn.init.xavier_uniform_(torch.empty(module.weight.shape), generator=generator))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(torch.empty(module.weight.shape).normal_(std=0.02, generator=generator))
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif type(module).__name__.endswith("Norm"):  # a norm of the architecture's own, without a shift
                for gain in module.parameters(recurse=False):
                    nn.init.ones_(gain)
