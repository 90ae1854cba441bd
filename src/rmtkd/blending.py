"""Between a cut and what recovery made of it: the weights on the line between both that are nearest to the teacher.

A cut in closed form is near its teacher already, and recovery takes it on past the nearest point. The way back is a
straight line, along which held-out rows choose at the cost of a few evaluations.

Reference:
    Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903, §3 (weights before and after
    fine-tuning, interpolated).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

SHARES = (0.25, 0.5, 0.75)
"""Of the way from the cut to the end of recovery, beside the end itself."""


@torch.no_grad()
def blend(
    student: nn.Module, start: Mapping[str, Tensor], distance: Callable[[], float], settle: Callable[[], None]
) -> float:
    """Leave a student, in place, where on the line between its parameters of before and now it is nearest.

    Args:
        student: after recovery.
        start: its parameters before recovery, by name.
        distance: of the student, as it is when called, from its teacher.
        settle: called at every point but the end: it gives norms the statistics of these weights.

    Returns:
        The share of the way that is kept: one of `SHARES`, or 1.
    """
    parameters = {name: parameter for name, parameter in student.named_parameters() if name in start}
    end = {name: parameter.clone() for name, parameter in parameters.items()}
    gathered = {name: buffer.clone() for name, buffer in student.named_buffers()}

    def go_to(share: float) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(start[name].to(parameter.device).lerp(end[name], share))
        if share < 1:
            settle()
        else:
            for name, buffer in student.named_buffers():
                buffer.copy_(gathered[name])

    least, best = distance(), 1.0
    for share in SHARES:
        go_to(share)
        if (found := distance()) < least:
            least, best = found, share
    go_to(best)
    return best
