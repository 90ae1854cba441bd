"""Streaming mean and second moments of vectors: what the spectra are made of.

The obvious way, Σxxᵀ/n − μμᵀ in float32, destroys the small eigenvalues as soon as a mean is large beside the
noise, and the noise level is read from the small eigenvalues. So the sums are taken about a shift c, fixed
early and close to the mean,

    s = Σ(x − c),   S = Σ(x − c)(x − c)ᵀ,   mean = c + s/n,   covariance = S/n − (s/n)(s/n)ᵀ,

which holds for any c and cancels nothing when c is near the mean. Products are taken in float32 over few rows
at a time, sums in float64. Parts with a common shift merge by adding (n, s, S), hence by an all-reduce;
others by the formula of Chan, Golub and LeVeque.

Reference:
    T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance: analysis and
        recommendations", The American Statistician 37 (1983) 242–247.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from rmtkd.errors import DataError, OptionError

_ROWS = 1024  # of one float32 product: short sums keep its error near one rounding
_COLUMNS = 256  # of a block: what lies left of the diagonal's blocks is the mirror of the right and not computed
_LARGEST = 1e17  # magnitude at which the sum of that many squares still fits float32
_SMALLEST = 1e-15  # and at which squares of what is a millionth of it still do


class Covariance:
    """Streaming mean and second moments of vectors, in groups (the heads of a layer); exact to merge.

    Sums live in float64 on the device of the vectors (on the CPU if that device has no float64); answers are
    float64 on the CPU.

    Args:
        width: coordinates of a vector, d.
        groups: independent sets of coordinates, each with its own covariance.
        shift: c, roughly the mean. Give the same to every worker whose sums are to be added; by default the
            mean of the first vectors seen. Rounded to float32, so that subtracting it from float32 vectors is
            exact.

    Raises:
        OptionError: if `width` or `groups` is below one, or `shift` has another shape or is not finite.
    """

    count: int
    """Vectors seen, n."""

    def __init__(self, width: int, *, groups: int = 1, shift: Float[Tensor, "groups width"] | None = None) -> None:
        if width < 1 or groups < 1:
            raise OptionError(f"width and groups must be at least 1 — got {width} and {groups} — pass positive ones.")
        if shift is not None:
            if shift.shape != (groups, width) or not shift.isfinite().all():
                raise OptionError(
                    f"shift must be finite, of shape [{groups}, {width}] — got shape {list(shift.shape)}, or "
                    "a value that is not finite — pass a rough mean, or none."
                )
            shift = _as_shift(shift.detach())
        self.count = 0
        self._shift = shift
        self._sum = torch.zeros(groups, width, dtype=torch.float64)
        self._scatter = torch.zeros(groups, width, width, dtype=torch.float64)
        """Right above; below the diagonal it holds what blocks happen to cover."""

    @property
    def width(self) -> int:
        """Coordinates of a vector, d."""
        return self._sum.shape[1]

    @property
    def groups(self) -> int:
        """Independent sets of coordinates."""
        return self._sum.shape[0]

    @torch.no_grad()
    def update(self, vectors: Float[Tensor, "n groups width"]) -> None:
        """Add vectors, of any floating dtype; none at all is allowed.

        Products are taken in the dtype of the vectors, float32 at least, whatever autocast says; in float64
        if the process has relaxed its float32 products (TF32 and the like), which would cost the small
        eigenvalues, or if the vectors are so small that squares would vanish.

        Args:
            vectors: n vectors of every group.

        Raises:
            DataError: if the shape or dtype is wrong, or a value is NaN, infinite or beyond 1e17. Nothing was
                added.
        """
        if vectors.ndim != 3 or vectors.shape[1:] != (self.groups, self.width) or not vectors.is_floating_point():
            raise DataError(
                f"Vectors must be floating point, of shape [n, {self.groups}, {self.width}] — got "
                f"{vectors.dtype}, {list(vectors.shape)} — reshape them, or make a Covariance of their width."
            )
        if len(vectors) == 0:
            return
        lowest, highest = (float(extreme) for extreme in torch.aminmax(vectors))
        if not (lowest > -_LARGEST and highest < _LARGEST):  # NaN fails every comparison
            raise DataError(
                f"Vectors must be finite and below {_LARGEST:.0e} — got values from {lowest} to {highest} — "
                "look for the module that overflows, or run the model in a wider dtype."
            )
        if not _holds_float64(vectors.device):
            vectors = vectors.cpu()
        is_tiny = max(-lowest, highest) < _SMALLEST
        exact = is_tiny or _products_are_relaxed()
        dtype = torch.float64 if exact else torch.promote_types(vectors.dtype, torch.float32)

        self._move(vectors.device)
        if self._shift is None:
            self._shift = _as_shift(vectors.mean(dim=0, dtype=torch.float64))
        shift = self._shift.to(dtype)
        with torch.autocast(vectors.device.type, enabled=False):
            for rows in vectors.split(_ROWS):
                centred = rows.to(dtype) - shift
                self._sum += centred.sum(dim=0, dtype=torch.float64)
                for i in range(0, self.width, _COLUMNS):
                    block = slice(i, i + _COLUMNS)
                    products = torch.einsum("ngi,ngj->gij", centred[..., block], centred[..., i:])
                    self._scatter[:, block, i:] += products
        self.count += len(vectors)

    def merge(self, other: "Covariance") -> "Covariance":
        """The covariance of the vectors of both; neither changes.

        Associative and commutative up to float64 rounding. Equal shifts (see `shift`) just add.

        Args:
            other: of the same width and groups, possibly empty, with any shift.

        Returns:
            A new object, on the device of `self`.

        Raises:
            DataError: if width or groups differ.
        """
        if (self.groups, self.width) != (other.groups, other.width):
            raise DataError(
                f"Only equal shapes merge — got groups × width of {self.groups} × {self.width} and "
                f"{other.groups} × {other.width} — merge per site."
            )
        a, b = self.state(), other.state()
        if other.count == 0:
            merged = a if "shift" in a else b
        elif self.count == 0:
            merged = b
        elif torch.equal(a["shift"], b["shift"]):
            merged = {name: a[name] + b[name] for name in ("count", "sum", "scatter")} | {"shift": a["shift"]}
        else:
            merged = _merge_about_the_common_mean(a, b)
        result = Covariance.from_state(merged)
        result._move(self._sum.device)
        return result

    @property
    def mean(self) -> Float64[Tensor, "groups width"]:
        """Mean of the vectors."""
        shift, mean, _ = self._moments()
        return shift + mean

    def covariance(self) -> Float64[Tensor, "groups width width"]:
        """Covariance about the mean, divided by n, exactly symmetric.

        Raises:
            DataError: if no vector was seen.
        """
        _, mean, second = self._moments()
        return second - _outer(mean, mean)

    def second_moment(self) -> Float64[Tensor, "groups width width"]:
        """Uncentred second moment Σxxᵀ/n, exactly symmetric.

        Raises:
            DataError: if no vector was seen.
        """
        shift, mean, second = self._moments()
        return _symmetric(second + _outer(mean, shift) + _outer(shift, mean) + _outer(shift, shift))

    def eigenvalues(self) -> Float64[Tensor, "groups width"]:
        """Eigenvalues of the covariance, descending; what rounding leaves below zero is zero.

        Raises:
            DataError: if no vector was seen.
        """
        return eigenvalues_of(self.covariance())

    def state(self) -> dict[str, Tensor]:
        """What to store or to all-reduce, as copies on the CPU.

        Returns:
            `count` [], `sum` and `shift` [groups, width], `scatter` [groups, width, width]. There is no
            `shift` before the first vector if none was given. With a common shift, the other three add over
            workers.
        """
        state = {"count": torch.tensor(self.count), "sum": self._sum, "scatter": _mirrored(self._scatter)}
        if self._shift is not None:
            state["shift"] = self._shift
        return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "Covariance":
        """The object whose `state` this is.

        Args:
            state: as `state` gives it; copied.

        Raises:
            DataError: if entries are missing or their shapes do not match.
        """
        total, scatter, shift, count = (state.get(name) for name in ("sum", "scatter", "shift", "count"))
        if total is None or scatter is None or count is None or (shift is None and int(count) > 0):
            raise DataError(
                f"A state must hold count, sum, scatter and, with vectors, shift — got "
                f"{', '.join(sorted(state))} — pass what state() returned."
            )
        if total.ndim != 2 or scatter.shape != (*total.shape, total.shape[-1]):
            raise DataError(
                f"A state must hold sum [groups, width] and scatter [groups, width, width] — got "
                f"{list(total.shape)} and {list(scatter.shape)} — pass what state() returned."
            )
        groups, width = total.shape
        result = cls(width, groups=groups, shift=shift)
        result.count = int(count)
        result._sum, result._scatter = (part.to("cpu", torch.float64, copy=True) for part in (total, scatter))
        return result

    def _move(self, device: torch.device) -> None:
        self._sum, self._scatter = self._sum.to(device), self._scatter.to(device)
        if self._shift is not None:
            self._shift = self._shift.to(device)

    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The shift, and mean and second moment about it, on the CPU."""
        if self.count == 0 or self._shift is None:
            raise DataError("A covariance needs at least one vector — got none — update it with vectors first.")
        return self._shift.cpu(), (self._sum / self.count).cpu(), _mirrored(self._scatter / self.count).cpu()


def eigenvalues_of(covariance: Float64[Tensor, "groups width width"]) -> Float64[Tensor, "groups width"]:
    """Eigenvalues of a covariance, descending; what rounding leaves below zero is zero."""
    return torch.linalg.eigvalsh(covariance).flip(-1).clamp_min(0)


def _merge_about_the_common_mean(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Chan's formula. Each part is centred on its own mean first: a far shift would cancel digits."""
    (n_a, mean_a, scatter_a), (n_b, mean_b, scatter_b) = (_centred(part) for part in (a, b))
    n, gap = n_a + n_b, mean_b - mean_a
    mean = mean_a + gap * (n_b / n)
    shift = _as_shift(mean)
    rest = mean - shift
    scatter = scatter_a + scatter_b + _outer(gap, gap) * (n_a * (n_b / n)) + _outer(rest, rest) * n
    return {"count": torch.tensor(n), "shift": shift, "sum": rest * n, "scatter": scatter}


def _centred(state: dict[str, Tensor]) -> tuple[int, Tensor, Tensor]:
    """Count, mean, and scatter about the mean."""
    n = int(state["count"])
    offset = state["sum"] / max(n, 1)
    return n, state["shift"] + offset, state["scatter"] - _outer(offset, offset) * n


def _as_shift(mean: Tensor) -> Tensor:
    return mean.to(torch.float32).to("cpu" if not _holds_float64(mean.device) else mean.device, torch.float64)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(-1) * y.unsqueeze(-2)


def _mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrices of these upper triangles; what lies below is not looked at."""
    return upper.triu() + upper.triu(1).mT


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2


def _holds_float64(device: torch.device) -> bool:
    return device.type != "mps"


def _products_are_relaxed() -> bool:
    """Whether float32 products may run in TF32 or bfloat16 in this process."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch refuses to answer once a backend was set by itself, which means: relaxed
        return True
