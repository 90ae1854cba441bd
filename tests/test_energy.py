"""The claims of energy: joules come from a counter, rest is subtracted, and without a counter there is no number."""

import itertools
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from rmtkd.energy import Metered, Nvml, Rapl, counter_of, measure_energy
from rmtkd.errors import DataError

CPU = torch.device("cpu")


class Meter:
    """Two watts at rest, and 0.05 joules a pass."""

    source = "a meter"

    def __init__(self, passes: list[int], at_rest: float = 2.0, each: float = 0.05):
        self.passes, self.at_rest, self.each = passes, at_rest, each

    def read(self) -> float:
        return self.at_rest * time.perf_counter() + self.each * len(self.passes)

    def joules(self, start: float, end: float) -> float:
        return end - start


def test_a_pass_costs_what_it_adds_to_rest() -> None:
    passes: list[int] = []
    (found,) = measure_energy([lambda: passes.append(1) or time.sleep(0.001)], CPU, counter=Meter(passes), seconds=0.1)
    assert found.joules == pytest.approx(0.05, rel=0.2)  # on a busy machine clock and counter are not read at once
    assert found.rest_watts == pytest.approx(2.0, rel=0.2)
    assert found.watts == pytest.approx(2.0 + 0.05 * found.passes / found.seconds, rel=0.2)
    assert found.passes == len(passes) - 1 and found.source == "a meter" and found.reason is None


def test_work_that_does_not_rise_above_rest_has_no_number_and_a_reason() -> None:
    passes: list[int] = []
    (found,) = measure_energy([lambda: passes.append(1)], CPU, counter=Meter(passes, each=-0.01), seconds=0.02)
    assert found.joules is None and "did not rise above rest" in (found.reason or "")


@pytest.mark.parametrize("fault", [ValueError("no number"), OSError("gone"), None])
def test_a_counter_that_tells_no_number_ends_no_run(fault: Exception | None) -> None:
    class Broken(Meter):
        def joules(self, start: float, end: float) -> float:
            if fault is not None:
                raise fault
            return float("nan")

    (found,) = measure_energy([lambda: None], CPU, counter=Broken([]), seconds=0.01)
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


def test_a_meters_file_may_be_written_while_work_goes_on(tmp_path: Path) -> None:
    path, stop, busy = tmp_path / "meter.csv", threading.Event(), threading.Event()
    path.write_text("seconds,watts\n")

    def write() -> None:
        with path.open("a", buffering=1) as file:
            while not stop.wait(0.005):
                file.write(f"{time.time():.4f},{30.0 if busy.is_set() else 10.0}\n")

    def work() -> None:
        busy.set()
        time.sleep(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.05)
    busy.set()  # the first call, which is not measured, is work too
    counter = Metered(path, wait=0.05)
    rest = counter.read
    counter.read = lambda: (busy.clear(), time.sleep(0.02), rest())[2]  # type: ignore[method-assign]
    (found,) = measure_energy([work], CPU, counter=counter, seconds=0.5)
    stop.set()
    writer.join()
    assert found.rest_watts == pytest.approx(10.0, rel=0.1)
    assert found.watts == pytest.approx(30.0, rel=0.15)
    assert found.joules == pytest.approx(20 * found.seconds / found.passes, rel=0.2)
