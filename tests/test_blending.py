"""The claims of `blending`: a student goes back towards its cut, as far as where it is nearest to its teacher."""

import pytest
import torch
from torch import nn

from rmtkd.blending import SHARES, blend


def moved(best: float) -> tuple[nn.BatchNorm1d, float, list[float]]:
    """A network whose weights went from 0 to 1 and whose distance is least at a point; the share that is kept, and the
    weights at which statistics were gathered."""
    student, settled = nn.BatchNorm1d(3), []
    start = {name: torch.zeros_like(parameter) for name, parameter in student.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(1.0)
    student.running_mean.fill_(7.0)  # type: ignore[union-attr]

    def settle() -> None:
        settled.append(float(student.weight[0]))
        student.running_mean.fill_(settled[-1])  # type: ignore[union-attr]

    share, way = blend(student, start, lambda: abs(float(student.weight[0]) - best), settle)
    assert way == tuple((point, abs(point - best)) for point in (1.0, *SHARES))
    return student, share, settled


@pytest.mark.parametrize("best", SHARES)
def test_weights_are_left_where_the_answers_are_nearest_with_the_statistics_of_that_point(best: float):
    student, share, settled = moved(best)
    assert share == best == student.weight[0] == student.bias[0]
    assert student.running_mean is not None and student.running_mean[0] == best
    assert settled == [*SHARES]


@pytest.mark.parametrize("best", [1.0, 5.0])
def test_where_recovery_ended_nearest_nothing_changes(best: float):
    student, share, _ = moved(best)
    assert share == student.weight[0] == 1
    assert student.running_mean is not None and student.running_mean[0] == 7


def test_an_end_that_is_no_number_is_left():
    student = nn.Linear(1, 1)
    start = {name: torch.zeros_like(parameter) for name, parameter in student.named_parameters()}
    distances = iter([float("nan"), 0.5, 0.4, float("nan")])
    assert blend(student, start, lambda: next(distances), lambda: None)[0] == SHARES[1]


def test_a_quarter_of_recovery_is_kept_at_least():
    student, share, _ = moved(0.0)
    assert share == student.weight[0] == min(SHARES)
