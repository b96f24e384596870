"""Meters and sensors of a made-up machine, since this one may have none."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from compress import packages
from compress.measure.conditions import Conditions, EnergyMeter


def domain(root: Path, name: str, label: str, microjoules: int, limit: int = 0) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    if limit:
        (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder / "energy_uj"


def test_rapl_packages_are_read_in_millijoules_and_their_parts_are_not(tmp_path: Path) -> None:
    counter = domain(tmp_path, "intel-rapl:0", "package-0", 5_000)
    domain(tmp_path, "intel-rapl:0:0", "core", 1_000)
    domain(tmp_path, "intel-rapl:1", "package-1", 7_000)
    meters = {meter.name: meter for meter in EnergyMeter.all(tmp_path)}
    assert {"cpu_package_0", "cpu_package_1"} <= set(meters)
    assert "cpu_core" not in meters
    before = meters["cpu_package_0"].read_mj()
    counter.write_text("25000")
    assert meters["cpu_package_0"].read_mj() - before == pytest.approx(20.0)


def test_a_counter_that_starts_again_goes_on(tmp_path: Path) -> None:
    counter = domain(tmp_path, "intel-rapl:0", "package-0", 9_000, limit=10_000)
    (meter,) = (m for m in EnergyMeter.all(tmp_path) if m.name == "cpu_package_0")
    before = meter.read_mj()
    counter.write_text("1000")
    assert meter.read_mj() - before == pytest.approx(2.0)
    counter.write_text("500")
    assert meter.read_mj() - before == pytest.approx(11.5)


def test_a_counter_that_only_root_may_read_is_left_out(tmp_path: Path) -> None:
    counter = domain(tmp_path, "intel-rapl:0", "package-0", 9_000)
    counter.unlink()
    assert not [m for m in EnergyMeter.all(tmp_path) if m.name.startswith("cpu")]


def cores(root: Path, *counts: int) -> None:
    for index, count in enumerate(counts):
        folder = root / f"cpu{index}" / "thermal_throttle"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "core_throttle_count").write_text(f"{count}\n")


@pytest.mark.parametrize(("after", "throttled"), [((3, 4), False), ((3, 5), True)])
def test_throttling_of_cores_is_noticed(
    tmp_path: Path, after: tuple[int, int], throttled: bool
) -> None:
    cores(tmp_path, 3, 4)
    conditions = Conditions(cpus=tmp_path)
    cores(tmp_path, *after)
    assert conditions.summary()["cpu_throttled"] is throttled


def test_readings_are_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([1000.0, 3000.0])
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=next(clocks)))
    heat = {"coretemp": [SimpleNamespace(current=50.0), SimpleNamespace(current=61.0)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: heat, raising=False)
    conditions = Conditions(cpus=tmp_path)
    conditions.sample()
    conditions.sample()
    told = conditions.summary()
    assert told["cpu_clock_mhz"] == {"min": 1000.0, "mean": 2000.0, "max": 3000.0}
    assert told["cpu_temperature_c"]["max"] == 61.0
    assert "cpu_throttled" not in told


def test_a_machine_without_sensors_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Any:
        raise NotImplementedError

    monkeypatch.setattr(psutil, "cpu_freq", refuse)
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    conditions = Conditions(cpus=tmp_path)
    conditions.sample()
    assert not {"cpu_clock_mhz", "cpu_temperature_c"} & set(conditions.summary())


class Nvml:
    """A driver with one GPU that is hot, and does not tell its power."""

    class NVMLError(Exception):
        """What the driver refuses."""

    def __init__(self, reasons: int = 0, energy: bool = True) -> None:
        self.reasons, self.energy = reasons, energy

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's own names
        return None

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:  # noqa: N802
        return 1410

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:  # noqa: N802
        return 83

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        raise self.NVMLError

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        return self.reasons

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if not self.energy:
            raise self.NVMLError
        return 123_000


def with_driver(monkeypatch: pytest.MonkeyPatch, nvml: Nvml) -> None:
    monkeypatch.setattr(packages, "is_installed", lambda name: name == "pynvml")
    monkeypatch.setattr(packages, "require", lambda *_, **__: nvml)


@pytest.mark.parametrize(("reasons", "throttled"), [(0x1, False), (0x2, False), (0x41, True)])
def test_a_gpu_tells_its_clock_heat_and_throttling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reasons: int, throttled: bool
) -> None:
    with_driver(monkeypatch, Nvml(reasons))
    conditions = Conditions(cpus=tmp_path)
    conditions.sample()
    told = conditions.summary()
    assert told["gpu0_sm_clock_mhz"]["mean"] == 1410
    assert told["gpu0_temperature_c"]["max"] == 83
    assert "gpu0_power_w" not in told
    assert told["gpu_throttled"] is throttled


def test_energy_of_a_gpu_is_read_where_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_driver(monkeypatch, Nvml())
    (meter,) = EnergyMeter.all(tmp_path)
    assert (meter.name, meter.read_mj()) == ("gpu0", 123_000)
    with_driver(monkeypatch, Nvml(energy=False))
    assert EnergyMeter.all(tmp_path) == []


def test_pynvml_without_a_driver_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = Nvml()

    def refuse() -> None:
        raise nvml.NVMLError

    nvml.nvmlInit = refuse
    with_driver(monkeypatch, nvml)
    assert EnergyMeter.all(tmp_path) == []
    Conditions(cpus=tmp_path).sample()


def processors(monkeypatch: pytest.MonkeyPatch, **seconds: list[float]) -> None:
    """Let psutil tell these seconds of the machine, and ``own`` of this process, in turns."""
    own, steps = iter(seconds.pop("own")), iter(zip(*seconds.values(), strict=True))
    kind = namedtuple("times", list(seconds))  # type: ignore[misc]
    monkeypatch.setattr(psutil, "cpu_times", lambda: kind(*next(steps)))
    process = SimpleNamespace(cpu_times=lambda: (next(own), 0.0, 0.0, 0.0))
    monkeypatch.setattr(psutil, "Process", lambda: process)


@pytest.mark.parametrize(
    ("user", "steal", "own", "words"),
    [
        (50.0, 0.0, 50.0, None),  # all of it was ours
        (50.0, 0.0, 45.0, None),
        (50.0, 0.0, 20.0, "other processes took 30 % of the processors"),
        (50.0, 5.0, 50.0, "the host gave 5 % of their time to other machines"),
    ],
)
def test_others_that_take_the_processors_are_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    user: float,
    steal: float,
    own: float,
    words: str | None,
) -> None:
    idle = 100 - user - steal
    processors(
        monkeypatch, user=[7.0, 7.0 + user], idle=[3.0, 3.0 + idle], steal=[1.0, 1.0 + steal],
        own=[2.0, 2.0 + own],
    )  # fmt: skip
    told = Conditions(cpus=tmp_path).summary()
    assert told["cpu_others_pct"] == pytest.approx(user - own)
    assert told["cpu_steal_pct"] == pytest.approx(steal)
    assert told.get("busy") == words


def test_the_load_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "getloadavg", lambda: (10.5, 1.0, 1.0))
    conditions = Conditions(cpus=tmp_path)
    conditions.sample()
    assert conditions.summary()["load_average_1m"]["max"] == 10.5
