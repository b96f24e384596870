"""State of the machine while it is measured: clocks, temperature, power, throttling, energy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from compress import packages

_RAPL = Path("/sys/class/powercap")
_CPUS = Path("/sys/devices/system/cpu")
BUSY_PCT = 10.0  # of all processors, taken by other processes: the machine is not idle
STOLEN_PCT = 2.0  # of their time, given to other machines by the host: the same
_HARMLESS_REASONS = 0x1 | 0x2  # NVML: the GPU idles; its clocks were set by the user


class EnergyMeter:
    """A counter of energy that only grows.

    Args:
        name: What it counts: "cpu_package", "gpu0".
        read: Returns the counter, millijoules.
        wrap_mj: Where the counter starts again from zero, if it does.
    """

    def __init__(self, name: str, read: Callable[[], float], wrap_mj: float = 0.0) -> None:
        self.name, self._read, self._wrap_mj = name, read, wrap_mj
        self._last, self._turns = read(), 0

    def read_mj(self) -> float:
        """Return the energy since an arbitrary start, millijoules; never less than before."""
        now = self._read()
        if now < self._last:
            self._turns += 1
        self._last = now
        return now + self._turns * self._wrap_mj

    @classmethod
    def all(cls, root: Path = _RAPL) -> list[EnergyMeter]:
        """Return the meters that can be read here: RAPL's packages, NVML's GPUs; often none."""
        return [*_rapl(root), *_nvml_meters()]


class Conditions:
    """Samples of the machine's state; each reading that this machine refuses is left out."""

    def __init__(self, cpus: Path = _CPUS) -> None:
        self._cpus = cpus
        self._samples: dict[str, list[float]] = {}
        self._throttled_before = self._throttle_count()
        self._times_before, self._own_before = psutil.cpu_times(), _own_seconds()
        self._gpu_reasons = 0
        self._gpus = list(_nvml_handles())

    def sample(self) -> None:
        """Take one reading of everything that can be read."""
        for name, value in (*_cpu_readings(), *self._gpu_readings()):
            self._samples.setdefault(name, []).append(value)

    def summary(self) -> dict[str, Any]:
        """Return least, mean and largest of each reading, and whether anything was throttled."""
        told: dict[str, Any] = {
            name: {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
            for name, values in self._samples.items()
        }
        told.update(self._taken())
        count = self._throttle_count()
        if count is not None and self._throttled_before is not None:
            told["cpu_throttled"] = count > self._throttled_before
        if self._gpus:
            told["gpu_throttled"] = bool(self._gpu_reasons & ~_HARMLESS_REASONS)
        return told

    def _taken(self) -> dict[str, Any]:
        """Return the shares of CPU time that others took, percent, and in words if they matter.

        The host gives time to other machines (steal); other processes take it here.
        """
        now, before = psutil.cpu_times(), self._times_before
        total = sum(now) - sum(before)
        if total <= 0:
            return {}
        rest = sum(getattr(now, key, 0.0) - getattr(before, key, 0.0) for key in _NOT_WORKING)
        others = total - rest - (_own_seconds() - self._own_before)
        told: dict[str, Any] = {"cpu_others_pct": max(0.0, 100 * others / total)}
        if hasattr(now, "steal"):
            told["cpu_steal_pct"] = 100 * (now.steal - before.steal) / total
        if (why := disturbance(**told)) is not None:
            told["busy"] = why
        return told

    def _throttle_count(self) -> int | None:
        """Return how often a core was slowed down for its heat since the machine started."""
        counters = self._cpus.glob("cpu*/thermal_throttle/core_throttle_count")
        values = [value for path in counters if (value := _read_number(path)) is not None]
        return int(sum(values)) if values else None

    def _gpu_readings(self) -> Iterator[tuple[str, float]]:
        for index, (nvml, handle) in enumerate(self._gpus):
            readings: Sequence[tuple[str, Callable[..., float], tuple[Any, ...], float]] = (
                ("sm_clock_mhz", nvml.nvmlDeviceGetClockInfo, (handle, 1), 1),
                ("temperature_c", nvml.nvmlDeviceGetTemperature, (handle, 0), 1),
                ("power_w", nvml.nvmlDeviceGetPowerUsage, (handle,), 1000),
            )
            for name, read, arguments, per_unit in readings:
                try:
                    yield f"gpu{index}_{name}", float(read(*arguments)) / per_unit
                except nvml.NVMLError:  # this GPU does not tell
                    continue
            try:
                self._gpu_reasons |= nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
            except nvml.NVMLError:
                continue


def disturbance(cpu_others_pct: float, cpu_steal_pct: float = 0.0) -> str | None:
    """Return what kept the processors from what was timed; None on an otherwise idle machine."""
    taken = []
    if cpu_others_pct > BUSY_PCT:
        taken.append(f"other processes took {cpu_others_pct:.0f} % of the processors")
    if cpu_steal_pct > STOLEN_PCT:
        taken.append(f"the host gave {cpu_steal_pct:.0f} % of their time to other machines")
    return " and ".join(taken) or None


def _own_seconds() -> float:
    """Return the CPU time of this process and of those it started and waited for."""
    return float(sum(psutil.Process().cpu_times()[:4]))


_NOT_WORKING = ("idle", "iowait", "steal", "guest", "guest_nice")  # guests are in user already


def _cpu_readings() -> Iterator[tuple[str, float]]:
    if hasattr(psutil, "getloadavg"):
        yield "load_average_1m", float(psutil.getloadavg()[0])
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, AttributeError):  # no frequency on this platform
        frequency = None
    if frequency and frequency.current:
        yield "cpu_clock_mhz", float(frequency.current)
    if hasattr(psutil, "sensors_temperatures"):
        sensors = psutil.sensors_temperatures()
        for chip in ("coretemp", "k10temp", "zenpower", "cpu_thermal"):
            if sensors.get(chip):
                yield "cpu_temperature_c", max(float(s.current) for s in sensors[chip])


def _rapl(root: Path) -> Iterator[EnergyMeter]:
    for domain in sorted(root.glob("intel-rapl:[0-9]*")):
        name, counter = domain / "name", domain / "energy_uj"
        is_package = domain.name.count(":") == 1
        if not is_package or _read_number(counter) is None or not name.is_file():
            continue
        wrap = _read_number(domain / "max_energy_range_uj") or 0.0
        label = f"cpu_{name.read_text().strip().replace('-', '_')}"
        read = partial(lambda path: float(path.read_text()) / 1000, counter)  # of microjoules
        yield EnergyMeter(label, read, wrap / 1000)


def _nvml_meters() -> Iterator[EnergyMeter]:
    for index, (nvml, handle) in enumerate(_nvml_handles()):
        try:
            yield EnergyMeter(
                f"gpu{index}", partial(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
            )
        except nvml.NVMLError:  # GPUs before Volta have no counter
            continue


def _nvml_handles() -> Iterator[tuple[Any, Any]]:
    """Yield NVML and a handle of each GPU; nothing where there is no driver or no pynvml."""
    if not packages.is_installed("pynvml"):
        return
    nvml = packages.require("pynvml", extra="gpu", purpose="reading clocks of a GPU")
    try:
        nvml.nvmlInit()
        for index in range(nvml.nvmlDeviceGetCount()):
            yield nvml, nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError:  # installed, but no driver
        return


def _read_number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # not there, or root's alone
        return None
