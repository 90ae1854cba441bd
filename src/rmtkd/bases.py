"""Which directions stay: the closed forms that turn second moments into a narrower basis, one per kind of site.

Everything is float64 and per group (attention head). A basis says how activations `h` of one stream are written in
`k` coordinates and read back: `z = reduce h`, `h ≈ mean + lift (z - reduce mean)`. At full width `lift reduce = I` by
construction, so that a cut which keeps everything changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-6
"""Added to every metric, relative to its mean diagonal: bounds the condition number of roots and inverses. Root and
inverse use the same regularised metric, which keeps the full-width forms exact."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """The basis of one stream.

    Attributes:
        reduce: coordinates of an activation, `groups × kept × width`.
        lift: activation from coordinates, `groups × width × kept`.
        mean: what is restored in place of dropped directions, `groups × width`; zeros for a bilinear stream.
    """

    reduce: Float[Tensor, "groups kept width"]
    lift: Float[Tensor, "groups width kept"]
    mean: Float[Tensor, "groups width"]

    @property
    def projector(self) -> Float[Tensor, "groups width width"]:
        """What a full-width activation becomes by reducing and lifting it."""
        return self.lift @ self.reduce


def linear_basis(
    covariance: Float[Tensor, "groups width width"],
    mean: Float[Tensor, "groups width"],
    readers: Float[Tensor, "groups out width"],
    keep: int,
) -> Basis:
    """The rank-`keep` basis with the least expected squared error of what the readers compute.

    With W = reader and C = covariance, `‖W (I - T) C^½‖` is least for the truncated singular value decomposition
    of `W C^½` (Eckart-Young), so `T = C^½ V_k V_kᵀ C^-½`. Among the bases of that subspace the one with orthonormal
    `reduce` is taken, most important direction first: the narrowed writer keeps the scale of the original.

    Reference:
        Type-III modules of MoDeGPT, arXiv 2408.09632, in the covariance of the head's context.
    """
    root, inverse = _roots(covariance)
    right = torch.linalg.svd(readers @ root, full_matrices=True).Vh[:, :keep]
    reduce = torch.linalg.qr((right @ inverse).mT).Q.mT
    return Basis(reduce=reduce, lift=_paired(reduce, root @ right.mT), mean=mean)


def unit_bases(
    covariances: Sequence[Float[Tensor, "groups width width"]],
    means: Sequence[Float[Tensor, "groups width"]],
    readers: Sequence[Float[Tensor, "groups _ width"]],
    keep: int,
    each: int = 1,
    orders: dict[int, Tensor] | None = None,
) -> tuple[Basis, ...]:
    """`keep` units and the least-squares reconstruction of all others from them: `T = C[:,S] C[S,S]⁻¹`.

    A rotation does not commute with a pointwise non-linearity, a choice of units does. `T[S,S] = I` by construction.
    Where units are read at several places, with other activations at each, the choice is one and the reconstructions
    are as many. A unit may have several coordinates, `each` side by side, which stay or go together: a head. Units are
    chosen one by one, so that fewer of them are the first of more: `orders` keeps those of each group from call to
    call.

    Args:
        covariances, means, readers: one for each place.
        keep: how many units stay.
        each: coordinates of a unit.
        orders: filled, and used.

    Returns:
        A basis for each place, with the same `reduce`.

    Reference:
        Nyström step of MoDeGPT, arXiv 2408.09632, §3; the choice of units is `order_units` or `select_heads`.
    """
    groups, width = means[0].shape
    reduce = means[0].new_zeros(groups, keep * each, width)
    lifts = [means[0].new_zeros(groups, width, keep * each) for _ in means]
    for g in range(groups):
        places = [covariance[g] for covariance in covariances], [reader[g] for reader in readers]
        if each == 1:
            known = {} if orders is None else orders
            if len(known.setdefault(g, torch.arange(0))) < keep < width:
                known[g] = order_units(*places, keep)
            kept = torch.arange(width) if keep == width else known[g][:keep].sort().values
        else:
            units = select_heads(places[0][0], places[1][0], keep, each)
            kept = (each * units[:, None] + torch.arange(each)).flatten()
        dropped = torch.ones(width, dtype=torch.bool).index_fill(0, kept, False)
        reduce[g, torch.arange(len(kept)), kept] = 1
        for lift, covariance in zip(lifts, places[0], strict=True):
            lift[g, kept, torch.arange(len(kept))] = 1
            metric = _regularized(covariance[kept][:, kept])
            lift[g, dropped] = torch.linalg.solve(metric, covariance[kept][:, dropped]).mT
    return tuple(Basis(reduce=reduce, lift=lift, mean=mean) for lift, mean in zip(lifts, means, strict=True))


def unit_basis(
    covariance: Float[Tensor, "groups width width"],
    mean: Float[Tensor, "groups width"],
    readers: Float[Tensor, "groups out width"],
    keep: int,
    each: int = 1,
) -> Basis:
    """`unit_bases` of units that are read at one place."""
    return unit_bases([covariance], [mean], [readers], keep, each)[0]


def order_units(
    covariances: Sequence[Float[Tensor, "width width"]], readers: Sequence[Float[Tensor, "_ width"]], keep: int
) -> Tensor:
    """Choose units one by one, each the one that explains most of what the readers' outputs still lack.

    With the covariance R of the residual after regressing on the chosen units, unit j explains `‖W R e_j‖² / R_jj` of
    a reader's output; where there are several readers, of other activations each, it counts in sum. R is never formed:
    a pivoted Cholesky factorisation keeps its diagonal and `W R`, at O(width · (chosen + out)) a step.

    Returns:
        Indices of the chosen units, the first choice first, shape `(keep,)`.
    """
    places = [_Residual(covariance, reader, keep) for covariance, reader in zip(covariances, readers, strict=True)]
    chosen: list[int] = []
    for _ in range(keep):
        gain = torch.stack([place.gain() for place in places]).sum(0)
        gain[chosen] = -1
        unit = int(gain.argmax())
        chosen.append(unit)
        for place in places:
            place.choose(unit)
    return torch.tensor(chosen, dtype=torch.long)


class _Residual:
    """What a reader's output lacks after regressing on the units chosen so far."""

    def __init__(self, covariance: Float[Tensor, "width width"], reader: Float[Tensor, "out width"], most: int):
        self.covariance = covariance
        self.diagonal = covariance.diagonal().clone()
        if len(reader) > reader.shape[1]:  # only WᵀW matters
            reader = torch.linalg.qr(reader, mode="r").R
        self.unseen = (covariance @ reader.mT).contiguous()  # (W R)ᵀ, width × out: a unit is a row in memory
        self.factor = covariance.new_zeros(most, len(covariance))
        self.floor = RIDGE * self.diagonal.mean().clamp_min(torch.finfo(covariance.dtype).tiny)
        self.chosen = 0

    def gain(self) -> Float[Tensor, " width"]:
        return torch.linalg.vector_norm(self.unseen, dim=1).square() / self.diagonal.clamp_min(self.floor)

    def choose(self, unit: int) -> None:
        before, self.chosen = self.factor[: self.chosen], self.chosen + 1
        residual = self.covariance[unit] - before[:, unit] @ before
        root = residual[unit].clamp_min(self.floor).sqrt()
        direction = self.factor[len(before)] = residual / root
        self.unseen.addr_(direction, self.unseen[unit] / root, alpha=-1)
        self.diagonal = (self.diagonal - direction.square()).clamp_min(0)


def select_heads(
    covariance: Float[Tensor, "width width"], reader: Float[Tensor, "out width"], keep: int, each: int
) -> Tensor:
    """Choose units of `each` coordinates one by one, each the one that explains most of what the reader's output still
    lacks.

    With the covariance R of the residual after regressing on the chosen units, unit j explains
    `tr(W R_:j R_jj⁻¹ R_j: Wᵀ)` of the reader's output: `order_units` with blocks for pivots. Units are few.

    Returns:
        Indices of the chosen units in ascending order, shape `(keep,)`.
    """
    blocks = [slice(start, start + each) for start in range(0, len(covariance), each)]
    ridge = _ridge(covariance) * torch.eye(each, dtype=covariance.dtype)
    residual, unseen = covariance, reader @ covariance  # R and W R
    chosen: list[int] = []
    for _ in range(keep):
        gain = [_explained(unseen[:, block], residual[block, block] + ridge) for block in blocks]
        best = max((unit for unit in range(len(blocks)) if unit not in chosen), key=gain.__getitem__)
        chosen.append(best)
        block = blocks[best]
        weights = torch.linalg.solve(residual[block, block] + ridge, residual[block])
        residual, unseen = residual - residual[:, block] @ weights, unseen - unseen[:, block] @ weights
    return torch.tensor(sorted(chosen), dtype=torch.long)


def _explained(unseen: Float[Tensor, "out each"], metric: Float[Tensor, "each each"]) -> float:
    """`tr(U M⁻¹ Uᵀ)`"""
    return float((torch.linalg.solve(metric, unseen.mT) * unseen.mT).sum())


def bilinear_bases(
    first: Float[Tensor, "groups width width"], second: Float[Tensor, "groups width width"], keep: int
) -> tuple[Basis, Basis]:
    """The rank-`keep` pair with the least expected squared error of the scalar product of two streams.

    For independent q and k with second moments M_q and M_k, `E (qᵀk - qᵀXk)² = ‖M_q^½ (I - X) M_k^½‖²` is least for
    the truncated singular value decomposition `U S Vᵀ` of `M_q^½ M_k^½`; `X = A_qᵀ A_k` with
    `A_q = S^½ Uᵀ M_q^-½`, `A_k = S^½ Vᵀ M_k^-½`, which gives both streams the same second moment `S`.

    Reference:
        The attention step of MoDeGPT, arXiv 2408.09632 (there a choice of columns), with free rotations.
    """
    (root_q, inverse_q), (root_k, inverse_k) = _roots(first), _roots(second)
    left, values, right = torch.linalg.svd(root_q @ root_k)
    balance = torch.diag_embed(values[:, :keep].sqrt())
    reduce_q = balance @ left[:, :, :keep].mT @ inverse_q
    reduce_k = _paired(reduce_q, (balance @ right[:, :keep] @ inverse_k).mT).mT
    # A product has no reader: qᵀ X k is q lifted by A_kᵀ against the full-width k, and the other way round.
    zero = first.new_zeros(first.shape[:2])
    return (
        Basis(reduce=reduce_q, lift=reduce_k.mT, mean=zero),
        Basis(reduce=reduce_k, lift=reduce_q.mT, mean=zero),
    )


def _paired(
    reduce: Float[Tensor, "groups kept width"], lift: Float[Tensor, "groups width kept"]
) -> Float[Tensor, "groups width kept"]:
    """The lift with the same range for which `reduce lift = I`. The closed forms satisfy this in exact arithmetic, but
    lose digits to the condition numbers of root and inverse, which full width must not show."""
    return torch.linalg.solve(reduce @ lift, lift, left=False)


def _regularized(matrix: Float[Tensor, "*groups width width"]) -> Float[Tensor, "*groups width width"]:
    """The matrix plus `RIDGE` of its mean diagonal; the identity where the matrix is zero."""
    return matrix + _ridge(matrix)[..., None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype)


def _ridge(matrix: Float[Tensor, "*groups width width"]) -> Float[Tensor, "*groups"]:
    ridge = RIDGE * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.where(ridge > 0, ridge, torch.ones_like(ridge))


def _roots(
    matrix: Float[Tensor, "groups width width"],
) -> tuple[Float[Tensor, "groups width width"], Float[Tensor, "groups width width"]]:
    """Square root of the regularised matrix, and its inverse. What lies below the ridge is rounding: moments are summed
    in products of float32, which may take a direction without variance further below zero than the ridge lifts it."""
    values, vectors = torch.linalg.eigh(_regularized(matrix))
    root = torch.maximum(values, _ridge(matrix)[..., None]).sqrt()
    return (vectors * root[:, None]) @ vectors.mT, (vectors / root[:, None]) @ vectors.mT
