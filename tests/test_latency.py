"""The claims of `planning.latency`: between measured widths times are interpolated, and a table is measured once.

No clock runs here: the time of a call is the number of its floating-point operations.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import assert_untouched, random_rows, snapshot, tiny, tiny_bert
from rmtkd import reporting
from rmtkd.activations import observe
from rmtkd.errors import PlanError
from rmtkd.planning import (
    LATENCY,
    LatencyTable,
    Plan,
    Target,
    make_plan,
    predict_cost,
    retarget,
    settle,
    spectra_of,
)
from rmtkd.planning.latency import Grid, cache_folder, circumstances, in_turns
from rmtkd.planning.timed_parts import MOST_KNOTS, parts_by_shape
from rmtkd.schedule import History, Options, plan_finished
from rmtkd.sites import Site, feed_forward_site, find_sites

BATCH = next(iter(random_rows(4)))
CPU = torch.device("cpu")


def flops(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """A stopwatch by which a call takes a millisecond for every operation; and one for what is not counted."""
    times = []
    for call in calls:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        times.append(float(counter.get_total_flops() + 1))
    return times


def no_time(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    pytest.fail("nothing must be timed")


MODEL = tiny_bert()
SITES = find_sites(MODEL)
SPECTRUMS = spectra_of(observe(MODEL, SITES, random_rows(64)))
TABLE = LatencyTable.measure(MODEL, SITES, BATCH, stopwatch=flops)


def plan(target: str | None = "60%latency", **options: Any) -> Plan:
    aim = None if target is None else Target.parse(target)
    return make_plan(MODEL, SITES, SPECTRUMS, BATCH, **{"multiple_of": 2, "target": aim, "latency": TABLE, **options})


def widths_of(sites: Sequence[Site], draw: Callable[[Site], int]) -> dict[str, int]:
    """A width for every site, the same for those that share it."""
    shared: dict[str, int] = {}
    for site in sites:
        shared.setdefault(site.shares, draw(site))
    return {site.name: shared[site.shares] for site in sites}


# ---------------------------------------------------------------------------------------------- interpolation

GRIDS = st.integers(1, 3).flatmap(
    lambda n: st.tuples(
        st.tuples(*[st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True) for _ in range(n)]),
        st.integers(0, 999),
    )
)


def ascending_grid(knots: Sequence[Sequence[int]], seed: int) -> Grid:
    """Times that rise with every width."""
    knots = tuple(tuple(sorted(sizes)) for sizes in knots)
    values = np.random.default_rng(seed).random([len(sizes) for sizes in knots])
    for axis in range(values.ndim):
        values = values.cumsum(axis)
    return Grid(parts=(tuple("abc"[: len(knots)]),), knots=knots, ms=tuple(values.ravel().tolist()))


@given(GRIDS)
@settings(deadline=None)
def test_the_time_at_a_measured_width_is_the_measured_one(drawn: tuple[Any, int]) -> None:
    grid = ascending_grid(*drawn)
    assert [grid.at(point) for point in itertools.product(*grid.knots)] == pytest.approx(grid.ms, rel=1e-12)


@given(GRIDS, st.lists(st.integers(0, 120), min_size=3, max_size=3), st.integers(0, 2), st.integers(0, 30))
@settings(deadline=None)
def test_where_measured_times_rise_with_the_width_so_do_those_in_between(
    drawn: tuple[Any, int], at: list[int], axis: int, more: int
) -> None:
    grid = ascending_grid(*drawn)
    point = at[: len(grid.knots)]
    wider = [width + more * (i == axis) for i, width in enumerate(point)]
    assert min(grid.ms) <= grid.at(point) <= grid.at(wider) + 1e-12
    assert grid.at(wider) <= max(grid.ms) + 1e-12


def test_between_two_widths_the_time_lies_on_the_line() -> None:
    grid = Grid(parts=(("a",),), knots=((8, 16, 32),), ms=(1.0, 2.0, 10.0))
    assert [grid.at([width]) for width in (1, 8, 12, 16, 20, 32)] == [1.0, 1.0, 1.5, 2.0, 4.0, 10.0]


def jumpy(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Times with noise of half their size."""
    noise = np.random.default_rng(1).uniform(0.5, 1.5, len(calls))
    return [float(time * factor) for time, factor in zip(flops(calls, device), noise, strict=True)]


def test_noise_makes_no_narrower_model_slower() -> None:
    table = LatencyTable.measure(MODEL, SITES, BATCH, stopwatch=jumpy)
    for grid in table.grids:
        values = np.array(grid.ms).reshape([len(knots) for knots in grid.knots])
        for axis in range(values.ndim):
            steps = np.diff(values, axis=axis)
            # The last step of an embedding is down: a whole table has no second factor.
            assert (steps[:-1] if grid.parts[0] == ("embeddings.word",) else steps).min() >= 0


# ---------------------------------------------------------------------------------------------- the table


class Own(nn.Module):
    """A network whose parts lie in no module of their own, but are called."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 40), nn.Linear(40, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(x).relu()))


def own() -> tuple[Own, tuple[Site, ...], Any]:
    model = Own().eval()
    site = feed_forward_site(model, "ffn", writers=["up"], reader="down")
    return model, (site,), (torch.randn(5, 12), torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "eurobert", "own"])
def test_where_time_is_operations_the_latency_of_any_plan_is_predicted_exactly(name: str) -> None:
    """Of layers with a module each, of layers that are called again and again, and of the whole model."""
    model, batch = (None, BATCH) if name == "own" else (tiny(name), BATCH)
    sites = () if model is None else find_sites(model)
    if model is None:
        model, sites, batch = own()
    before = snapshot(model)
    table = LatencyTable.measure(model, sites, batch, stopwatch=flops)
    assert_untouched(model, before)
    rng = np.random.default_rng(0)
    draws = [lambda site: int(rng.integers(site.least, site.width + 1))] * 6
    for draw in (lambda site: site.width, lambda site: site.least, *draws):
        widths = widths_of(sites, draw)
        expected = predict_cost(model, sites, widths, batch)["flops"] + 1
        assert table.cost(widths) == pytest.approx(expected, rel=1e-6)
    assert table.cost({}) == table.full_ms


def test_layers_of_one_shape_are_measured_once() -> None:
    calls: list[int] = []

    def watch(given: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
        calls.append(len(given))
        return flops(given, device)

    for layers in (1, 4):
        model = tiny_bert(layers=layers)
        table = LatencyTable.measure(model, find_sites(model), BATCH, stopwatch=watch)
        assert [len(grid.parts) for grid in table.grids] == [1, layers, layers]
    assert calls[0] == calls[1] < 30


class Strided(nn.Module):
    """Two blocks of the same parameters, of which the second does a sixteenth of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Sequential(nn.Conv2d(4, 8, 3, stride, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, 1, 1)) for stride in (1, 4)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.one(x).mean((2, 3)) + self.two(x).mean((2, 3)))


def test_parts_that_do_other_work_with_the_same_parameters_are_measured_apart() -> None:
    model = Strided().eval()
    batch = (torch.randn(2, 4, 16, 16), torch.zeros(2, dtype=torch.long))
    sites = find_sites(model, batch)
    found = [part.path for parts in parts_by_shape(model, sites, batch) for part in parts[:1]]
    assert "one" in found and "two" in found


def test_a_long_chain_of_widths_is_timed_at_no_more_points_than_a_short_one() -> None:
    """Every width meets the next in a parameter: together they would have two to the ninth combinations."""
    layers = [part for _ in range(9) for part in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    batch = (torch.randn(2, 4, 8, 8), torch.zeros(2, dtype=torch.long))
    sites = find_sites(model, batch)
    assert len(sites) == 9
    parts = [part for parts in parts_by_shape(model, sites, batch) for part in parts]
    assert sum(math.prod(part.shape) for part in parts) < 9 * MOST_KNOTS


def test_parts_are_scaled_to_the_whole_model() -> None:
    """Alone a part may take another time than within the model: all widths at their least take what was measured."""

    def warm_caches(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
        times = flops(calls, device)
        return [*times[:2], *(0.5 * time for time in times[2:])]

    table = LatencyTable.measure(MODEL, SITES, BATCH, stopwatch=warm_caches)
    least = {site.name: site.least for site in SITES}
    assert table.cost(least) == pytest.approx(TABLE.cost(least), rel=1e-9)
    assert table.cost(least) == pytest.approx(predict_cost(MODEL, SITES, least, BATCH)["flops"], rel=1e-3)


def test_the_stopwatch_takes_the_median_of_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = 0.0, []

    def call(name: str, seconds: list[float]) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            order.append(name)
            now += seconds.pop(0) if seconds else 4.0

        return run

    for clock in ("perf_counter", "thread_time"):
        monkeypatch.setattr(f"time.{clock}", lambda: now)
    # Two turns are not counted; then one of each call is far off.
    fast, slow = in_turns([call("a", [99, 3, 2, 3, 2, 50, 1]), call("b", [99, 9, 7, 9, 7, 60, 8])], CPU)
    assert (fast, slow) == (2000.0, 8000.0)
    assert order == ["a", "b"] * 7


def test_circumstances_name_no_machine_and_no_path() -> None:
    words = circumstances(MODEL, BATCH)
    assert set(words) >= {"processor", "threads", "device", "torch", "dtype", "batch", "clock"}
    assert not any(str(Path.home()) in word or "/" in word for word in words.values())


# ---------------------------------------------------------------------------------------------- the cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RMTKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached(stopwatch: Any = flops, model: nn.Module = MODEL, batch: Any = BATCH) -> LatencyTable:
    return LatencyTable.cached(model, find_sites(model), batch, stopwatch=stopwatch)


def test_a_table_is_measured_once(cache: Path) -> None:
    assert cached() == cached(no_time) == TABLE
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("other", ["batch", "model", "threads", "attention"])
def test_another_batch_model_attention_or_number_of_threads_is_measured_anew(
    cache: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached()
    if other == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    batch = next(iter(random_rows(3))) if other == "batch" else BATCH
    models = {"model": tiny_bert(intermediate_size=40), "attention": tiny_bert(attn_implementation="eager")}
    cached(model=models.get(other, MODEL), batch=batch)
    assert len(list(cache.iterdir())) == 2


def test_another_order_of_memory_is_measured_anew(cache: Path) -> None:
    """Convolutions take other times with their channels last."""
    images = (torch.randn(4, 3, 8, 8), torch.zeros(4).long())
    between = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 3, 3))
    model: Any = nn.Sequential(*between, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    sites = find_sites(model, images)
    for order in (torch.contiguous_format, torch.channels_last, torch.channels_last):
        LatencyTable.cached(model.to(memory_format=order), sites, images, stopwatch=flops)
    assert len(list(cache.iterdir())) == 2


def emptied(text: str) -> str:
    return ""


def cut_short(text: str) -> str:
    return text[: len(text) // 2]


def of_another(text: str) -> str:
    return json.dumps({**json.loads(text), "key": "of another model"})


def with_times_missing(text: str) -> str:
    file = json.loads(text)
    file["table"]["grids"][0]["ms"].pop()
    return json.dumps(file)


def with_words_for_times(text: str) -> str:
    file = json.loads(text)
    file["table"]["full_ms"] = "fast"
    return json.dumps(file)


def of_other_widths(text: str) -> str:
    return text.replace("layer.0.ffn", "layer.0.fnn")


@pytest.mark.parametrize(
    "damage", [emptied, cut_short, of_another, with_times_missing, with_words_for_times, of_other_widths]
)
def test_a_damaged_or_foreign_file_is_measured_anew_and_replaced(cache: Path, damage: Callable[[str], str]) -> None:
    cached()
    (path,) = cache.iterdir()
    path.write_text(damage(path.read_text()))
    assert cached() == TABLE
    assert cached(no_time) == TABLE
    assert list(cache.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("here is no folder")
    monkeypatch.setenv("RMTKD_CACHE", str(tmp_path / "file"))
    assert cached() == TABLE


def test_the_folder_of_the_cache_is_where_others_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RMTKD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "rmtkd"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/rmtkd")
    monkeypatch.setenv("RMTKD_CACHE", "/own")
    assert cache_folder() == Path("/own")


# ---------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("target", ["60%latency", "2x", "1.0x"])
def test_a_plan_meets_a_target_of_latency_by_its_table(target: str) -> None:
    made = plan(target)
    limit = Target.parse(target).amount * TABLE.full_ms
    assert made.baseline[LATENCY] == TABLE.full_ms
    assert made.predicted[LATENCY] == TABLE.cost(made.widths) <= limit
    assert made.predicted[LATENCY] > 0.8 * limit
    assert made.meets_target
    assert isinstance(made.predicted["params"], int) and isinstance(made.predicted["flops"], int)
    assert any("Latency is predicted" in remark and "times of the real shapes" in remark for remark in made.remarks)
    console_table = reporting.plan_table(made)
    assert "predicted from measured shapes" in str(console_table.caption)


def test_the_table_is_measured_when_a_target_asks_for_latency_and_only_then(cache: Path) -> None:
    assert cached() == TABLE  # as if it had been measured before
    assert plan(latency=None) == plan()
    other = plan("60%params", latency=None)
    assert other.latency is None and set(other.baseline) == set(other.predicted) == {"params", "flops"}


def test_a_target_of_latency_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(PlanError, match=r"at least .* ms latency \(\d+\.\d% of .* ms\)"):
        plan("1%latency")


def test_a_plan_with_latency_is_written_and_read_back_whole() -> None:
    made = plan()
    assert Plan.from_json(made.to_json(), sites=SITES) == made


def test_a_plan_with_latency_is_made_anew_without_its_model_by_the_very_same_times() -> None:
    earlier = Plan.from_json(plan("60%params").to_json())
    made = retarget(earlier, SPECTRUMS, target="50%latency")
    assert made == plan("50%latency")
    assert retarget(made, SPECTRUMS, target="60%params") == plan("60%params")


def test_a_plan_without_times_is_not_made_anew_for_latency() -> None:
    with pytest.raises(PlanError, match=r"rest on measured times.* Plan with the model.*--target 2x"):
        retarget(plan("60%params", latency=None), SPECTRUMS, target="2x")


def test_an_edited_plan_is_settled_by_its_own_times() -> None:
    made = plan()
    site = next(site for site in made.sites if site.name == "layer.0.ffn")
    wider = replace(site, keep=48)
    edited = replace(made, sites=tuple(wider if s is site else s for s in made.sites))
    settled = settle(edited, MODEL, SITES, SPECTRUMS, BATCH)
    assert settled.latency == TABLE
    assert settled.predicted[LATENCY] == TABLE.cost(edited.widths) > made.predicted[LATENCY]
    assert not settled.meets_target
    assert any("The target 60%latency is not met" in remark and " ms too much" in remark for remark in settled.remarks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan.update(latency=None), "a target of latency must come with the measured times"),
        (lambda plan: plan["latency"].update(full_ms=0), "must be more than 0 ms. Got 0"),
        (lambda plan: plan["latency"].update(full_ms="3"), "latency: full_ms must be a finite number. Got '3'."),
        (lambda plan: plan["latency"]["grids"][1]["ms"].pop(), "a time of at least 0 for every combination"),
        (lambda plan: plan["latency"]["grids"][1]["knots"][0].reverse(), "for every combination of ascending widths"),
        (lambda plan: plan["latency"]["grids"][0]["parts"][0].append("x"), "for every combination"),
        (
            lambda plan: plan["latency"]["grids"][0]["parts"].append(["x"]),
            "of the plan's sites at full width. x differ",
        ),
        (lambda plan: plan["predicted"].pop("latency_ms"), "predicted must be params and flops, each a whole number"),
        (lambda plan: plan["baseline"].update(params=7.5), "each a whole number of at least 1, and latency_ms"),
        (lambda plan: plan["predicted"].update(latency_ms=0), "and latency_ms"),
    ],
)
def test_a_plan_with_broken_times_is_refused(change: Callable[[Any], object], message: str) -> None:
    fields = json.loads(plan().to_json())
    change(fields)
    with pytest.raises(PlanError) as caught:
        Plan.from_json(json.dumps(fields, indent=1), sites=SITES)
    assert message in str(caught.value)


def test_a_run_that_reached_a_latency_says_that_it_is_predicted() -> None:
    history = History(options=Options(target="2.5x"), baseline_accuracy=0.9, rounds=(), pending=0)
    assert plan_finished(history) == "target: 40%latency reached, as predicted from measured shapes"
