import sys

import pytest

from jaxlm.errors import ConfigError
from jaxlm.telemetry import carbon


def test_intensity():
    assert carbon.intensity("") is None
    assert carbon.intensity("56.5") == 56.5
    assert carbon.intensity("FRA") == carbon.intensity("fra")
    assert 20 < carbon.intensity("FRA") < 150  # mostly nuclear
    assert carbon.intensity("POL") > 400  # mostly coal


@pytest.mark.parametrize("text", ["FRX", "-3", "nan", "inf", "much"])
def test_intensity_that_is_none(text):
    with pytest.raises(ConfigError, match="expected grams of CO2e per kWh, or a country"):
        carbon.intensity(text)


def test_intensity_without_codecarbon(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon.input", None)
    with pytest.raises(ConfigError, match="need codecarbon"):
        carbon.intensity("FRA")
