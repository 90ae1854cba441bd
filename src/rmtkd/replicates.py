"""What two stochastic passes over the same inputs have in common: their symmetrised cross-covariance.

Between two draws of the noise (dropout) the same input gives x₁ and x₂. What is signal is in both; noise is in one
each, and adds to C = sym cov(x₁, x₂) a part whose spectrum is symmetric about zero. With half the sum s and half the
difference δ of the two,

    C = cov(s) − cov(δ),

so that two streaming covariances are all it takes; without noise δ is zero, and C the covariance itself.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rmtkd.covariance import Covariance


class Replicates:
    """Streaming symmetrised cross-covariance of two passes, about their means, in float64; exact to merge.

    Args:
        width: coordinates of a vector, d.
        groups: see `Covariance`.
    """

    def __init__(self, width: int, *, groups: int = 1) -> None:
        self._half_sum, self._half_difference = Covariance(width, groups=groups), Covariance(width, groups=groups)

    @torch.no_grad()
    def update(self, first: Float[Tensor, "n groups width"], second: Float[Tensor, "n groups width"]) -> None:
        """Add pairs of vectors: those of the same inputs, at the same places.

        Raises:
            DataError: if the shapes are wrong or a value is not finite.
        """
        if first.device.type == "mps":  # which has no float64
            first, second = first.cpu(), second.cpu()
        first, second = first.double(), second.double()
        self._half_sum.update((first + second) / 2)
        self._half_difference.update((first - second) / 2)

    def merge(self, other: "Replicates") -> "Replicates":
        """The replicates of the pairs of both; neither changes."""
        merged = Replicates(self._half_sum.width, groups=self._half_sum.groups)
        merged._half_sum = self._half_sum.merge(other._half_sum)
        merged._half_difference = self._half_difference.merge(other._half_difference)
        return merged

    def covariance(self) -> Float64[Tensor, "groups width width"]:
        """(C + Cᵀ)/2.

        Raises:
            DataError: if no pair was seen.
        """
        return self._half_sum.covariance() - self._half_difference.covariance()

    def eigenvalues(self) -> Float64[Tensor, "groups width"]:
        """Those of (C + Cᵀ)/2, descending; where there is noise, some are negative."""
        return torch.linalg.eigvalsh(self.covariance()).flip(-1)
