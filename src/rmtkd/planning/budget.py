"""How a budget is divided among widths: by what each costs in held-out loss for what it saves.

For every shared width a `Curve` holds measured losses: the Kullback–Leibler divergence from the teacher's answers on
held-out rows when this width alone is narrowed in closed form. Taken as additive, the best widths for a budget
minimise `Σ loss_a(x_a)` under `cost(x) ≤ limit`: with a multiplier μ, each width stands where one unit of cost less
would cost μ of loss (Everett 1963). On convex curves and a cost that is a sum over widths, the greedy descent below,
which always takes the step that loses least for what it saves, visits exactly these points for ever greater μ. Curves
are therefore replaced by their convex minorants, whose vertices are the widths that are best for some μ. Where two
widths meet in one matrix the descent sees the saving at the widths as they then are.

References:
    H. Everett, "Generalized Lagrange multiplier method for solving problems of optimum allocation of resources",
    Operations Research 11 (1963) 399–417. Y. Shoham, A. Gersho, "Efficient bit allocation for an arbitrary set of
    quantizers", IEEE Trans. ASSP 36 (1988) 1445–1453.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

POLICIES = ("guarded", "paper")
"""How widths are chosen: by measured losses on held-out rows, or by the noise edges alone, as published."""

CostOf = Callable[[Mapping[str, int]], float]
"""A cost at these shared widths, all of them."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Held-out loss against one shared width, as measured.

    Attributes:
        widths: where it was measured, ascending, the last the full width.
        losses: what was measured there; nothing at full width.
        weight: what a loss on this curve is worth once the other widths are narrowed too.
    """

    widths: tuple[int, ...]
    losses: tuple[float, ...]
    weight: float = 1.0

    @property
    def is_sound(self) -> bool:
        """Whether widths ascend, losses are finite and none below the last, and the weight is positive."""
        return (
            len(self.widths) == len(self.losses) > 0
            and all(a < b for a, b in pairwise(self.widths))
            and all(math.isfinite(loss) and loss >= self.losses[-1] for loss in self.losses)
            and 0 < self.weight < math.inf
        )

    @property
    def least(self) -> int:
        """The smallest width that was measured."""
        return self.widths[0]

    def loss(self, width: int) -> float:
        """The weighted loss at a width, on the convex minorant."""
        return self.weight * float(np.interp(width, *self.minorant))

    @cached_property
    def minorant(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Vertices of the greatest convex function below the points. It never rises with the width, as the last point
        is the lowest; where the measured losses do, that is noise."""
        kept: list[tuple[int, float]] = []
        for x, y in zip(self.widths, self.losses, strict=True):
            while len(kept) > 1 and _turns_down(kept[-2], kept[-1], (x, y)):
                kept.pop()
            kept.append((x, y))
        widths, losses = zip(*kept, strict=True)
        return widths, losses


def allocate(
    curves: Mapping[str, Curve],
    allowed: Mapping[str, Sequence[int]],
    cost: CostOf,
    *,
    limit: float | None = None,
    most_loss: float = math.inf,
) -> dict[str, int]:
    """The widths that lose least for a budget, or save most for a loss.

    Args:
        curves: by name of a shared width.
        allowed: by name, the widths that may be kept, ascending, at least one. Names without a curve have one.
        cost: to be brought down to `limit`.
        limit: where to stop; without one the descent goes on as long as the sum of losses stays within `most_loss`.
        most_loss: largest sum of losses, where there is no limit.

    Returns:
        One width for each name. With a limit that cannot be met: the least of all.
    """
    widths = {name: choices[-1] for name, choices in allowed.items()}
    stuck: set[str] = set()
    while limit is None or cost(widths) > limit:
        steps = [step for step in _steps_down(curves, allowed, cost, widths) if step[1] not in stuck]
        if not steps:
            break
        _, name, width = min(steps)
        lower = widths | {name: width}
        if limit is None and _total(curves, lower) > most_loss:
            stuck.add(name)
            continue
        widths = lower
    return widths if limit is None else _fill(curves, allowed, cost, widths, limit)


def _steps_down(
    curves: Mapping[str, Curve], allowed: Mapping[str, Sequence[int]], cost: CostOf, widths: Mapping[str, int]
) -> Iterator[tuple[float, str, int]]:
    """For each width its next lower one: loss gained for each unit of cost saved, name, width."""
    now = cost(widths)
    for name, choices in allowed.items():
        at = choices.index(widths[name])
        # A first step may save nothing (an embedding in two factors has one matrix more): look beyond it.
        for width in reversed(choices[:at]):
            if (saved := now - cost({**widths, name: width})) > 0:
                yield (curves[name].loss(width) - curves[name].loss(widths[name])) / saved, name, width
                break


def _fill(
    curves: Mapping[str, Curve],
    allowed: Mapping[str, Sequence[int]],
    cost: CostOf,
    widths: dict[str, int],
    limit: float,
) -> dict[str, int]:
    """What the last step left over, spent where it gains most."""
    while True:
        now, steps = cost(widths), []
        for name, choices in allowed.items():
            at = choices.index(widths[name])
            for width in choices[at + 1 : at + 2]:
                wider = widths | {name: width}
                gain = curves[name].loss(widths[name]) - curves[name].loss(width)
                if gain > 0 and (spent := cost(wider)) <= limit:
                    steps.append((gain / max(spent - now, 1e-9), name, wider))
        if not steps:
            return widths
        _, _, widths = max(steps, key=lambda step: step[:2])


def _total(curves: Mapping[str, Curve], widths: Mapping[str, int]) -> float:
    return sum(curves[name].loss(width) for name, width in widths.items() if name in curves)


def _turns_down(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether `b` lies on or above the line from `a` to `c`."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
