"""The claims of energy: joules come from a counter, rest is subtracted, and without a counter there is no number."""

import itertools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from rmtkd.energy import Metered, Nvml, Rapl, counter_of, measure_energy
from rmtkd.errors import DataError

CPU = torch.device("cpu")


class Clock:
    """Time that goes on only where somebody waits for it: no other work on the machine changes what is measured."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that energy is measured by."""
    clock = Clock()
    monkeypatch.setattr("rmtkd.energy.time", clock)
    return clock


class Meter:
    """Two watts at rest, and 0.05 joules a pass."""

    source = "a meter"

    def __init__(self, clock: Clock, at_rest: float = 2.0, each: float = 0.05):
        self.clock, self.at_rest, self.each, self.passes = clock, at_rest, each, 0

    def work(self) -> None:
        self.passes += 1
        self.clock.sleep(0.001)

    def read(self) -> float:
        return self.at_rest * self.clock.now + self.each * self.passes

    def joules(self, start: float, end: float) -> float:
        return end - start


def test_a_pass_costs_what_it_adds_to_rest(clock: Clock) -> None:
    meter = Meter(clock)
    (found,) = measure_energy([meter.work], CPU, counter=meter, seconds=0.1)
    assert found.joules == pytest.approx(0.05)
    assert found.rest_watts == pytest.approx(2.0)
    assert found.watts == pytest.approx(2.0 + 0.05 / 0.001)
    assert found.passes == meter.passes - 1 == pytest.approx(100, abs=1) and found.source == "a meter"
    assert found.seconds == pytest.approx(0.001 * found.passes) and found.reason is None


def test_a_machine_that_wakes_late_rests_for_as_long_as_it_did(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    meter, sleep = Meter(clock), clock.sleep
    monkeypatch.setattr(clock, "sleep", lambda seconds: sleep(1.5 * seconds))
    (found,) = measure_energy([meter.work], CPU, counter=meter, seconds=0.1)
    assert found.rest_watts == pytest.approx(2.0) and found.joules == pytest.approx(0.05)


def test_work_that_does_not_rise_above_rest_has_no_number_and_a_reason(clock: Clock) -> None:
    meter = Meter(clock, each=-0.01)
    (found,) = measure_energy([meter.work], CPU, counter=meter, seconds=0.02)
    assert found.joules is None and "did not rise above rest" in (found.reason or "")


@pytest.mark.parametrize("fault", [ValueError("no number"), OSError("gone"), None])
def test_a_counter_that_tells_no_number_ends_no_run(fault: Exception | None, clock: Clock) -> None:
    class Broken(Meter):
        def joules(self, start: float, end: float) -> float:
            if fault is not None:
                raise fault
            return float("nan")

    (found,) = measure_energy([lambda: clock.sleep(0.001)], CPU, counter=Broken(clock), seconds=0.01)
    assert found.joules is None and found.reason


def zones(root: Path, **energies: int) -> Path:
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "psys"}
    for zone, name in names.items():
        (root / zone).mkdir(exist_ok=True)
        (root / zone / "name").write_text(f"{name}\n")
        (root / zone / "max_energy_range_uj").write_text("999999\n")
        (root / zone / "energy_uj").write_text(f"{energies.get(name.partition('-')[0], 0)}\n")
    return root


def test_rapl_adds_packages_and_memory_and_goes_on_where_a_counter_begins_again(tmp_path: Path) -> None:
    counter = Rapl(zones(tmp_path, package=900_000, core=5, dram=100, psys=7))
    start = counter.read()
    zones(tmp_path, package=100_000, core=900_000, dram=300_100, psys=900_000)
    assert counter.joules(start, counter.read()) == pytest.approx(0.2 + 0.3)
    assert counter.source == "RAPL: dram, package-0"


def test_without_a_counter_there_is_no_number_and_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no RAPL counters"):
        Rapl(tmp_path / "nothing")
    root = zones(tmp_path)
    original = Path.read_text

    def locked(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return original(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", locked)
    with pytest.raises(DataError, match=r"may not be read \(Permission denied\)"):
        Rapl(root)
    monkeypatch.setattr("rmtkd.energy.POWERCAP", tmp_path / "nothing")
    monkeypatch.setattr(Rapl.__init__, "__defaults__", (tmp_path / "nothing",))
    found = measure_energy([lambda: None, lambda: None], CPU)
    assert [energy.joules for energy in found] == [None, None] and "RAPL" in (found[0].reason or "")
    with pytest.raises(DataError, match="no RAPL counters"):
        counter_of(CPU)


def test_nvml_reads_the_board_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count(10_000, 2_500)
    fake: Any = types.ModuleType("pynvml")
    fake.NVMLError = type("NVMLError", (Exception,), {})
    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByUUID = lambda name: name
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: {"GPU-abc": next(readings)}[handle]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = types.SimpleNamespace(name="Board", uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    counter = Nvml(torch.device("cuda"))
    assert counter.joules(counter.read(), counter.read()) == 2.5 and counter.source == "NVML: Board, the whole board"
    fake.nvmlInit = lambda: (_ for _ in ()).throw(fake.NVMLError("no driver"))
    with pytest.raises(DataError, match="no driver"):
        Nvml(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(DataError, match="pip install nvidia-ml-py"):
        Nvml(torch.device("cuda"))


def test_a_meters_file_is_integrated_over_the_time_of_the_work(tmp_path: Path) -> None:
    path = tmp_path / "meter.csv"
    path.write_text("seconds,watts\n" + "".join(f"{100 + i},{10 * i}\n" for i in range(6)))
    counter = Metered(path, wait=0.0)
    assert counter.joules(101.0, 103.0) == pytest.approx(40.0)  # a ramp from 10 to 30 watts
    assert counter.joules(101.25, 101.75) == pytest.approx(0.5 * 15.0)
    with pytest.raises(DataError, match="from before the work to after it"):
        counter.joules(99.0, 103.0)
    path.write_text(path.read_text() + "106,")  # the meter is writing
    assert Metered(path, wait=0.0).joules(101.0, 103.0) == pytest.approx(40.0)
    path.write_text("seconds,power\n1,2\n")
    with pytest.raises(DataError, match="columns seconds and watts"):
        counter.joules(1.0, 2.0)
    with pytest.raises(DataError, match="There is none"):
        Metered(tmp_path / "other.csv")


def test_a_meters_file_may_be_written_while_work_goes_on(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, busy = tmp_path / "meter.csv", False
    path.write_text("seconds,watts\n")

    def written(seconds: float) -> None:
        """The meter writes every millisecond what is taken."""
        with path.open("a") as file:
            for _ in range(round(seconds / 0.001)):
                clock.now += 0.001
                file.write(f"{clock.now:.4f},{30.0 if busy else 10.0}\n")

    def work() -> None:
        nonlocal busy
        busy = True
        clock.sleep(0.01)
        busy = False

    monkeypatch.setattr(clock, "sleep", written)
    clock.sleep(0.01)
    (found,) = measure_energy([work], CPU, counter=Metered(path, wait=0.05), seconds=0.5)
    assert found.rest_watts == pytest.approx(10.0, rel=0.01)
    assert found.watts == pytest.approx(30.0, rel=0.01)
    assert found.joules == pytest.approx(20 * 0.01, rel=0.01)
