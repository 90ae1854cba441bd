"""The one module that `rmtkd` adds to a network: an embedding in two factors."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class FactorizedEmbedding(nn.Module):
    """An embedding as a narrow table followed by a linear map to the model's width.

    It has no `weight`: code that wants one, such as transformers' `resize_token_embeddings`, fails by name rather than
    act on the table alone.
    """

    def __init__(self, table: nn.Embedding, projection: nn.Linear):
        super().__init__()
        self.table = table
        self.projection = projection

    @classmethod
    def identity(cls, embedding: nn.Embedding) -> "FactorizedEmbedding":
        """The same function as `embedding`: its table followed by the identity. The table is not copied."""
        weight = embedding.weight
        width = embedding.embedding_dim
        projection = nn.Linear(width, width, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
        with torch.no_grad():
            projection.weight.copy_(torch.eye(width, dtype=weight.dtype))
            projection.bias.zero_()
        return cls(embedding, projection).train(embedding.training)

    @staticmethod
    def names(path: str) -> tuple[str, str]:
        """Paths of table and projection of a factorised embedding at `path`."""
        return f"{path}.table", f"{path}.projection"

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Embed token ids."""
        return self.projection(self.table(ids))


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
