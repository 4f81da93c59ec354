"""Counters that we turn ourselves, files as Linux has them, a stand-in for NVML, and codecarbon itself."""

import sys
import types

import pytest

from jaxlm.telemetry import energy


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """A folder of RAPL counters: zone -> (name, microjoules, range)."""
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    monkeypatch.setattr(energy, "_IDLE_SECONDS", 0.01)

    def zone(folder, name, now, most=10**9):
        (tmp_path / folder).mkdir(exist_ok=True)
        for file, value in (("name", name), ("energy_uj", now), ("max_energy_range_uj", most)):
            (tmp_path / folder / file).write_text(f"{value}\n")

    return zone


def test_rapl_sums_packages_and_memory_and_leaves_out_their_parts(powercap):
    powercap("intel-rapl:0", "package-0", 5_000_000)
    powercap("intel-rapl:0:0", "core", 1_000_000)
    powercap("intel-rapl:0:1", "dram", 2_000_000)
    said = []
    with energy.meter("counter", said.append) as meter:
        powercap("intel-rapl:0", "package-0", 8_000_000)
        powercap("intel-rapl:0:0", "core", 900_000_000)
        powercap("intel-rapl:0:1", "dram", 2_500_000)
        assert meter.read() == pytest.approx(3.5)
        assert not meter.estimated
    assert said == ["energy: RAPL's counters of package-0, dram, 0 W idle"]


def test_rapl_goes_round(powercap):
    powercap("intel-rapl:0", "package-0", 900, most=1000)
    with energy.meter("counter", print) as meter:
        for now in (100, 950, 40):
            powercap("intel-rapl:0", "package-0", now, most=1000)
            last = meter.read()
        assert last == pytest.approx((200 + 850 + 90) / 1e6)


def test_idle_is_measured_before(powercap, monkeypatch):
    powercap("intel-rapl:0", "package-0", 0)
    monkeypatch.setattr(energy.time, "sleep", lambda _: powercap("intel-rapl:0", "package-0", 7_000_000))
    monkeypatch.setattr(energy.time, "perf_counter", iter([0.0, 0.5, 1.0, 1.0]).__next__)
    with energy.meter("counter", print) as meter:
        assert meter.idle == pytest.approx(14.0)


def test_rapl_without_permission_is_said(powercap, monkeypatch):
    powercap("intel-rapl:0", "package-0", 0)

    def refuse(zone):
        raise PermissionError(13, "Permission denied", str(zone / "energy_uj"))

    monkeypatch.setattr(energy, "_Wrapping", refuse)
    _said_and_none("energy_uj can only be read by root")


def _said_and_none(reason):
    said = []
    with energy.meter("counter", said.append) as meter:
        assert meter is None
    assert len(said) == 1 and reason in said[0] and "log.energy=estimate" in said[0]


def test_no_counter_is_said(powercap):
    _said_and_none("no counter here")


def test_off_says_nothing(powercap):
    powercap("intel-rapl:0", "package-0", 0)
    with energy.meter("off", pytest.fail) as meter:
        assert meter is None


class Device(types.SimpleNamespace):
    platform = "gpu"


@pytest.fixture
def nvml(powercap, monkeypatch):
    """A stand-in for pynvml with counters in millijoules, by index or UUID."""
    counters = {0: 1000, 1: 5000, "GPU-a": 70_000}
    module = types.SimpleNamespace(
        open=0,
        counters=counters,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: counters[handle],
    )
    module.nvmlInit = lambda: setattr(module, "open", module.open + 1)
    module.nvmlShutdown = lambda: setattr(module, "open", module.open - 1)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(energy.jax, "local_devices", lambda: [Device(local_hardware_id=0), Device(local_hardware_id=1)])
    return module


def test_nvml_sums_the_gpus_of_this_process(nvml):
    said = []
    with energy.meter("counter", said.append) as meter:
        nvml.counters[0] += 2500
        nvml.counters[1] += 500
        assert meter.read() == pytest.approx(3.0)
    assert nvml.open == 0
    assert said == ["energy: NVML's counters of 2 GPUs, 0 W idle"]


def test_nvml_reads_the_visible_gpus(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-a")
    with energy.meter("counter", print) as meter:
        nvml.counters[0] += 10**6
        nvml.counters[1] += 1000
        nvml.counters["GPU-a"] += 2000
        assert meter.read() == pytest.approx(3.0)


@pytest.mark.parametrize("module", [None, types.SimpleNamespace(nvmlInit=lambda: 1 / 0)])
def test_without_nvml_a_gpu_is_not_measured_by_the_cpus_counter(nvml, powercap, monkeypatch, module):
    powercap("intel-rapl:0", "package-0", 0)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    _said_and_none("pip install 'jaxlm[energy]'" if module is None else "ZeroDivisionError")


def test_a_counter_that_breaks_stands_still_and_is_said_once(nvml):
    said = []
    with energy.meter("counter", said.append) as meter:
        nvml.counters[0] += 2500
        assert meter.read() == pytest.approx(2.5)
        nvml.nvmlDeviceGetTotalEnergyConsumption = lambda _: {}["lost"]
        assert [meter.read(), meter.read()] == [2.5, 2.5]
    assert sum("not measured from here on: KeyError" in line for line in said) == 1


def test_codecarbon_estimates(powercap):
    said = []
    with energy.meter("estimate", said.append) as meter:
        energy.time.sleep(0.3)
        first = meter.read()
        energy.time.sleep(0.3)
        assert meter.estimated
        assert 0 < first < meter.read() < 1000
    assert said == ["energy: an estimate by codecarbon"]


def test_an_estimate_takes_a_counter_where_there_is_one(powercap):
    powercap("intel-rapl:0", "package-0", 0)
    with energy.meter("estimate", print) as meter:
        assert not meter.estimated
