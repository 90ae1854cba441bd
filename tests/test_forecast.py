"""What a run will take is told before it is spent, and leaves no trace."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd.distillation import Recovery
from rmtkd.forecast import Forecast, forecast
from rmtkd.measurement import count_parameters
from rmtkd.memory import held_bytes
from rmtkd.progress import describe
from rmtkd.sites import find_sites


def look(model: torch.nn.Module, rows: Iterable[Any] | None = None, **options) -> Forecast:
    rows = random_rows(96) if rows is None else rows
    sites = find_sites(model, next(iter(rows)))
    widths = {site.name: max(2, site.width // 4) for site in sites}
    given = {
        "steps": 100,
        "recovery": Recovery(),
        "blend": False,
        "precision": "fp32",
        "calibration": list(random_rows(160)),
        "seconds_observed": 2.0,
        **options,
    }
    return forecast(model, sites, widths, rows, **given)


def test_the_model_and_the_random_numbers_are_left_alone():
    model = tiny_bert()
    before, state = snapshot(model), torch.get_rng_state()
    look(model)
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_time_is_steps_times_the_time_of_a_step_and_cuts():
    seen = look(tiny_bert())
    assert seen.steps == 100
    assert seen.seconds_recovery == pytest.approx(100 * seen.seconds_step)
    assert seen.seconds_step > 0
    assert look(tiny_bert(), seconds_observed=4.0).seconds_cut == pytest.approx(2 * seen.seconds_cut)


def test_without_recovery_no_step_is_timed():
    assert look(tiny_bert(), steps=0).seconds_recovery == 0


def test_memory_grows_with_what_must_be_held():
    small = look(tiny_bert()).memory_bytes - held_bytes()
    large = look(tiny_bert(hidden_size=256, intermediate_size=1024)).memory_bytes - held_bytes()
    assert 0 < small < large
    # moments alone: two streams of 128 x 2 heads, one of 1024 and one of 256, in each of two layers
    assert large > 2 * 8 * (1024**2 + 3 * 2 * 128**2)


def test_the_largest_batch_is_what_memory_must_hold():
    long = {"input_ids": torch.ones(64, 20, dtype=torch.long)}
    usual = look(tiny_bert()).memory_bytes - held_bytes()
    assert look(tiny_bert(), calibration=[long]).memory_bytes - held_bytes() > 2 * usual


def test_disk_holds_the_teacher_the_state_and_the_kept_calls():
    model = tiny_bert()
    few, many = (look(model, calibration=list(random_rows(160))[:n]).disk_bytes for n in (5, 10))
    assert few > 4 * count_parameters(model)
    assert many > few
    nothing = look(model, calibration=[]).disk_bytes
    assert (few - nothing) % (5 * 16 * 32 * 4) == 0  # five batches of 16 rows of width 32, of the largest length


def test_the_weights_of_the_cut_take_memory_and_disk():
    model = tiny_bert()
    without, kept = look(model), look(model, blend=True)
    assert kept.memory_bytes > without.memory_bytes
    assert kept.disk_bytes > without.disk_bytes


def test_a_forecast_is_told_in_words_and_warns_of_too_little_memory():
    seen = {**asdict(look(tiny_bert())), "event": "forecast", "seconds": 0.0}
    line = describe({**seen, "free_bytes": None, "memory_bytes": 2_000_000_000})
    assert line is not None and "100 steps" in line and "2.0 GB of memory and" in line
    line = describe({**seen, "free_bytes": 1_000_000_000, "memory_bytes": 2_000_000_000})
    assert line is not None and "only 1.0 GB are free" in line


class Divided(torch.nn.Module):
    """A classifier with a temperature of its own, and a weight that is made of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 8, 3))
        self.second, self.head = torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(8, 4)
        self.temperature = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3))) / self.temperature


def test_a_network_that_divides_by_parameters_can_be_forecast() -> None:
    rows = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(6)]
    assert look(Divided().eval(), rows, calibration=rows).seconds_step > 0


class Rooted(torch.nn.Module):
    """Takes a root, which its own weights keep positive and random ones do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)
        with torch.no_grad():
            for parameter in (*self.first.parameters(), *self.second.parameters()):
                parameter.abs_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).sqrt())


def test_a_network_that_gives_no_numbers_from_a_random_start_can_be_forecast() -> None:
    rows = [(torch.rand(8, 6), torch.arange(8) % 4) for _ in range(6)]
    assert look(Rooted().eval(), rows, calibration=rows).seconds_step > 0
