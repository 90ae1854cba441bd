"""How many independent vectors the vectors of a stream are worth: neighbouring tokens resemble each other.

Let the rows of X be vectors of covariance Σ, their correlation over positions A with Aₜₜ = 1. An average
over the rows of products of two coordinates, such as an entry of a covariance, has the variance of one over

    n_eff = (tr A)² / tr A²

independent rows, as far as second moments go: for i ≠ j and Σ diagonal, E (XᵀX)ᵢⱼ² = Σᵢᵢ Σⱼⱼ (tr A)² / n_eff.
(An autoregression of coefficient ρ has n (1 − ρ²)/(1 + ρ²); r copies of each vector n/r.) To measure it, sequences
are dealt to eight groups g, each with its own scatter S_g. With p_g the share of the vectors in a group and S the sum
of its half of the groups, in the eigenbasis of the *other* half,

    1 / n_eff = mean over i ≠ j of  Σ_g (S_g − p_g S)ᵢⱼ² / ((1 − Σ p_g²) Sᵢᵢ Sⱼⱼ).

As every pair of directions weighs the same, strong ones do not outweigh the bulk, which is all that counts (the lower
three quarters of the spectrum: signal is correlated otherwise); and off the diagonal neither a group's common scale
nor the kurtosis of single coordinates tells. Nothing of this needs all d coordinates: vectors are first summed with
fixed random signs into 128 buckets, an orthogonal projection but for scale, so that a stream costs 1 MB and d additions
a vector, whatever d. A massive coordinate stays in its bucket.

The ratio is one of quadratic forms of few vectors where sequences are few, and then n_eff comes out too large: with
ρ = 0.9 and sequences of 32, by 44 % of 8 sequences, 13 % of 20, 6 % of 40, 2 % of 200.

References:
    Z. Burda, J. Jurkiewicz, B. Wacław, "Eigenvalue density of empirical covariance matrix for correlated samples", Acta
        Phys. Polon. B 36 (2005) 2641–2653: how A broadens the spectrum.
    M. Charikar, K. Chen, M. Farach-Colton, "Finding frequent items in data streams", ICALP 2002: the sketch.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import pad

from rmtkd.covariance import Covariance
from rmtkd.errors import DataError

GROUPS = 8
"""Into which sequences are dealt."""
BUCKETS = 128
"""Coordinates of the sketch, at most."""
_BULK = 0.75  # of the directions that are alive, from below
_WAITING = 2048  # vectors, before they are dealt
_ALIVE = 1e-12  # of the whole variance; what float32 leaves of a dead direction is less


class EffectiveSize:
    """Streaming effective number of vectors; exact to merge, as it is eight covariances of a sketch.

    Args:
        width: coordinates of a vector, d. Heads, whose tokens are the same, are one vector.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        buckets = min(width, BUCKETS)
        signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(width)) * 2 - 1
        self._signs = pad(signs, (0, -width % buckets)).double()
        self._dealt: Sequence[Covariance] = [Covariance(buckets) for _ in range(GROUPS)]
        self._waiting: list[tuple[Tensor, Tensor]] = []  # sketches and their groups: many at a time are much faster
        self.count = 0
        """Vectors seen, n."""

    @torch.no_grad()
    def update(self, vectors: Float[Tensor, "n width"], sequences: Int64[Tensor, " given"]) -> None:
        """Add vectors.

        Args:
            vectors: n vectors, finite.
            sequences: for each the number of the sequence that it belongs to. A sequence may come in parts.

        Raises:
            DataError: if the shapes are wrong, or a value is not finite.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.width or sequences.shape != vectors.shape[:1]:
            raise DataError(
                f"Vectors must have shape [n, {self.width}], and n sequences — got {list(vectors.shape)} and "
                f"{list(sequences.shape)} — pass the number of a sequence for every vector."
            )
        sketch = self._sketch(vectors)
        if not sketch.isfinite().all():
            raise DataError("Vectors must be finite — some are not — look for the module that overflows.")
        self._waiting.append((sketch, _scattered(sequences).to(sketch.device)))
        self.count += len(sketch)
        if sum(len(sketch) for sketch, _ in self._waiting) >= _WAITING:
            self._deal()

    def _deal(self) -> None:
        """Add the sketches that wait to their groups."""
        if not self._waiting:
            return
        sketch, group = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        parts = sketch[group.argsort(stable=True)].double().split(torch.bincount(group, minlength=GROUPS).tolist())
        for covariance, part in zip(self._dealt, parts, strict=True):
            covariance.update(part[:, None])

    @property
    def _groups(self) -> Sequence[Covariance]:
        self._deal()
        return self._dealt

    def merge(self, other: "EffectiveSize") -> "EffectiveSize":
        """The effective size of the vectors of both; neither changes. Associative up to float64 rounding.

        Raises:
            DataError: if the widths differ.
        """
        if self.width != other.width:
            raise DataError(f"Only equal widths merge — got {self.width} and {other.width} — merge per stream.")
        result = EffectiveSize(self.width)
        result._dealt = [a.merge(b) for a, b in zip(self._groups, other._groups, strict=True)]
        result.count = self.count + other.count
        return result

    def value(self) -> float | None:
        """n_eff, at most n.

        Returns:
            None where nothing can be said: fewer than two groups of sequences in a half, or fewer than three
            directions.
        """
        if self.count == 0:
            return None
        n, scatter = _about_the_common_mean(self._groups)
        inverses = []
        for half, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            share = n[half] / n[half].sum()
            spread = float(1 - share.square().sum())
            if not spread > 1e-9:  # one group, or none
                return None
            basis = _bulk(scatter[other].sum(0), scatter.sum(0))
            if basis.shape[1] < 2:
                return None
            seen = basis.mT @ scatter[half] @ basis
            total = seen.sum(0)
            excess = (seen - share[:, None, None] * total).square().sum(0) / spread
            ratio = excess / total.diagonal().outer(total.diagonal())
            off = ~torch.eye(len(ratio), dtype=torch.bool)
            inverses.append(float(ratio[off].mean()) * float(n[half].sum()))
        return min(1.0, 2 / sum(inverses)) * self.count

    def _sketch(self, vectors: Tensor) -> Tensor:
        if vectors.device.type == "mps":  # which has no float64
            vectors = vectors.cpu()
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        self._signs = self._signs.to(vectors)
        signed = pad(vectors, (0, len(self._signs) - self.width)) * self._signs
        return signed.unflatten(1, (-1, min(self.width, BUCKETS))).sum(1)


def _scattered(sequences: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """The group of each sequence: Fibonacci hashing, which deals neighbouring numbers evenly and in no short cycle."""
    return (sequences.long() * 2654435761 % 2**32) * GROUPS // 2**32


def _about_the_common_mean(groups: Sequence[Covariance]) -> tuple[Float64[Tensor, " groups"], Tensor]:
    """The number of vectors of each group, and their scatter about the mean of all."""
    n = torch.tensor([group.count for group in groups], dtype=torch.float64)
    empty = torch.zeros(1, groups[0].width, dtype=torch.float64)
    means = torch.cat([group.mean if group.count else empty for group in groups])
    covariances = torch.cat([g.covariance() if g.count else empty[..., None] * empty for g in groups])
    gap = means - (n / n.sum()) @ means
    return n, n[:, None, None] * (covariances + gap[:, :, None] * gap[:, None, :])


def _bulk(scatter: Float64[Tensor, "m m"], whole: Float64[Tensor, "m m"]) -> Float64[Tensor, "m bulk"]:
    """The lower three quarters of the eigenvectors along which the whole has any variance."""
    vectors = torch.linalg.eigh(scatter).eigenvectors
    alive = torch.einsum("im,ij,jm->m", vectors, whole, vectors) > _ALIVE * whole.trace()
    vectors = vectors[:, alive]
    return vectors[:, : int(_BULK * vectors.shape[1])]
