"""Between a cut and what recovery made of it: the weights on the line between both that are nearest to the teacher.

A cut in closed form is near its teacher already, and recovery takes it on past the nearest point. The way back is a
straight line, along which held-out rows choose at the cost of a few evaluations.

Reference:
    Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903, §3 (weights before and after
    fine-tuning, interpolated).
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

SHARES = (0.25, 0.5, 0.75)
"""Of the way from the cut to the end of recovery, beside the end itself."""

Way = tuple[tuple[float, float], ...]
"""Shares of the way that were tried, and the distance from the teacher at each."""


@torch.no_grad()
def blend(
    student: nn.Module, start: Mapping[str, Tensor], distance: Callable[[], float], settle: Callable[[], None]
) -> tuple[float, Way]:
    """Leave a student, in place, where on the line between its parameters of before and now it is nearest.

    Args:
        student: after recovery.
        start: all its parameters before recovery, by name.
        distance: of the student, as it is when called, from its teacher.
        settle: called at every point but the end: it gives norms the statistics of these weights.

    Returns:
        The share of the way that is kept, one of `SHARES`, or 1; and the distance at each of them, of the end first.
    """
    end = {name: parameter.clone() for name, parameter in student.named_parameters()}

    def go_to(share: float) -> None:
        for name, parameter in student.named_parameters():
            parameter.copy_(start[name].to(parameter.device).lerp(end[name], share))

    def buffers() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in student.named_buffers()}

    best, least, statistics = 1.0, distance(), buffers()
    way = [(best, least)]
    for share in SHARES:
        go_to(share)
        settle()
        way.append((share, found := distance()))
        if found < least or math.isnan(least):
            best, least, statistics = share, found, buffers()
    go_to(best)
    for name, buffer in student.named_buffers():
        buffer.copy_(statistics[name])
    return best, tuple(way)
