"""Energy, from counters of the hardware alone. Where there is none, there is no number, and the reason is told.

A counter adds up joules as the machine goes. It is read before and after many passes, with the device waited for, and
what the machine takes at rest, measured just before for as long, is subtracted: what remains is what the passes add.

References:
    NVML, `nvmlDeviceGetTotalEnergyConsumption` (the whole board, in millijoules). Linux, `power/powercap.rst` (RAPL
    zones, in microjoules, which begin again at `max_energy_range_uj`).
"""

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from rmtkd.errors import DataError
from rmtkd.measurement import wait

POWERCAP = Path("/sys/class/powercap")
SECONDS = 2.0
"""How long the machine is watched at rest, and each model at work."""


@runtime_checkable
class Counter(Protocol):
    """What adds up joules."""

    source: str
    """Which hardware it is of, in words."""

    def read(self) -> Any:
        """Where it stands now."""
        ...

    def joules(self, start: Any, end: Any) -> float:
        """What was added between two readings."""
        ...


@dataclass(frozen=True, kw_only=True)
class Energy:
    """What one pass over a batch takes beyond rest.

    Attributes:
        joules: of one pass, rest subtracted; None where it could not be measured.
        watts: mean power while passes ran, rest included.
        rest_watts: mean power before, at rest.
        passes: how many ran.
        seconds: how long they took.
        source: the counter, in words; None where there is none.
        reason: why there is no number.
    """

    joules: float | None = None
    watts: float | None = None
    rest_watts: float | None = None
    passes: int = 0
    seconds: float = 0.0
    source: str | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


class Rapl:
    """The processors' own counters: packages, and memory where it has one.

    Args:
        root: folder of the zones.

    Raises:
        DataError: if there are none that may be read.
    """

    def __init__(self, root: Path = POWERCAP):
        zones = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        named = {zone: (zone / "name").read_text().strip() for zone in zones if (zone / "name").is_file()}
        # Zones within a package are parts of it, but for memory.
        self.zones = {zone: name for zone, name in named.items() if name.startswith("package") or name == "dram"}
        if not self.zones:
            raise DataError("the processor has no RAPL counters here (virtual machines seldom have)")
        try:
            self.ranges = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in self.zones}
            self.read()
        except OSError as error:
            raise DataError(f"the RAPL counters may not be read ({error.strerror}): only root may, mostly") from None
        self.source = f"RAPL: {', '.join(sorted(self.zones.values()))}"

    def read(self) -> dict[Path, int]:
        """Microjoules by zone."""
        return {zone: int((zone / "energy_uj").read_text()) for zone in self.zones}

    def joules(self, start: dict[Path, int], end: dict[Path, int]) -> float:
        """The sum over zones; one that is below its start has begun again once."""
        return sum((end[zone] - start[zone]) % (self.ranges[zone] + 1) for zone in self.zones) / 1e6


class Nvml:
    """The board of one GPU.

    Args:
        device: of torch.

    Raises:
        DataError: if it has no counter that can be read.
    """

    def __init__(self, device: torch.device):
        try:
            import pynvml  # type: ignore[import-not-found]
        except ImportError:
            raise DataError("reading the GPU's counter takes NVML: pip install nvidia-ml-py") from None
        try:
            pynvml.nvmlInit()
            # By its own name: torch may see some of the boards, in another order.
            properties = torch.cuda.get_device_properties(device)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        except pynvml.NVMLError as error:
            raise DataError(f"the GPU has no counter of energy that can be read ({error})") from None
        self._nvml, self._handle = pynvml, handle
        self.read()
        self.source = f"NVML: {properties.name}, the whole board"

    def read(self) -> int:
        """Millijoules."""
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            raise DataError(f"the GPU has no counter of energy that can be read ({error})") from None

    def joules(self, start: int, end: int) -> float:
        """From millijoules."""
        return (end - start) / 1e3


class Metered:
    """What a meter of one's own writes into a file while work goes on: a CSV with the columns `seconds`, of Unix time,
    and `watts`.

    Args:
        path: of the file.
        wait: seconds after which the meter has surely written what was.

    Raises:
        DataError: if there is no such file.
    """

    def __init__(self, path: str | Path, *, wait: float = 2.0):
        self.path, self.wait = Path(path), wait
        if not self.path.is_file():
            raise DataError(f"{path} must be the file of a meter, with columns seconds and watts. There is none")
        self.source = f"meter: {self.path.name}"

    def read(self) -> float:
        """The time."""
        return time.time()

    def joules(self, start: float, end: float) -> float:
        """The integral of the power over this time, by the trapezoidal rule between readings."""
        time.sleep(max(0.0, end + self.wait - time.time()))
        try:
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1].splitlines()  # the meter may be writing the last line
            rows = sorted((float(row["seconds"]), float(row["watts"])) for row in csv.DictReader(whole))
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise DataError(f"{self.path} must have numbers in columns seconds and watts. Got {error!r}") from None
        if len(rows) < 2 or not rows[0][0] <= start < end <= rows[-1][0]:
            raise DataError(f"{self.path} must have readings from before the work to after it")
        moments = [start, *(moment for moment, _ in rows if start < moment < end), end]
        power = [_between(rows, moment) for moment in moments]
        return sum((b - a) * (p + q) / 2 for a, b, p, q in zip(moments, moments[1:], power, power[1:], strict=False))


def _between(rows: Sequence[tuple[float, float]], moment: float) -> float:
    """The power at a moment, on the line between two readings."""
    after = next(i for i, row in enumerate(rows) if row[0] >= moment)
    (t, p), (u, q) = rows[max(after - 1, 0)], rows[after]
    return q if u == t else p + (q - p) * (moment - t) / (u - t)


def counter_of(device: torch.device) -> Counter:
    """The counter of what a device takes.

    Raises:
        DataError: saying why there is none.
    """
    if device.type not in ("cpu", "cuda"):
        raise DataError(f"no counter of energy is known for a device of type {device.type}")
    return Nvml(device) if device.type == "cuda" else Rapl()


def measure_energy(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    counter: Counter | None = None,
    seconds: float = SECONDS,
) -> list[Energy]:
    """Energy of each call, one after the other.

    Args:
        calls: what to measure, such as forward passes on one batch.
        device: that they compute on, which is waited for.
        counter: the device's own by default.
        seconds: how long the machine rests, and each call is repeated.

    Returns:
        For each call an `Energy`; without a number, and with the reason, where there is no counter or the work does not
        rise above rest.
    """
    return [_measured(call, device, counter, seconds) for call in calls]


def _measured(call: Callable[[], object], device: torch.device, counter: Counter | None, seconds: float) -> Energy:
    try:
        return _above_rest(call, device, counter or counter_of(device), seconds)
    except DataError as error:
        return Energy(reason=str(error))
    except (OSError, ValueError) as error:  # of a counter that goes away, or tells what is no number
        return Energy(reason=f"the counter of energy could not be read ({error or type(error).__name__})")


def _above_rest(call: Callable[[], object], device: torch.device, counter: Counter, seconds: float) -> Energy:
    call()
    wait(device)
    joules, took = _watch(counter, lambda: time.sleep(seconds))  # which may wake late
    rest = joules / took
    passes = 0

    def work() -> None:
        nonlocal passes
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            call()
            wait(device)
            passes += 1

    joules, took = _watch(counter, work)
    beyond = joules - rest * took
    found = Energy(watts=joules / took, rest_watts=rest, passes=passes, seconds=took, source=counter.source)
    if not beyond > 0:
        return replace(found, reason="the work did not rise above rest: others use the machine")
    return replace(found, joules=beyond / passes)


def _watch(counter: Counter, work: Callable[[], object]) -> tuple[float, float]:
    """Joules and seconds of some work."""
    start, began = counter.read(), time.perf_counter()
    work()
    took, end = time.perf_counter() - began, counter.read()
    return counter.joules(start, end), took
