"""The grams of CO2 equivalent that a kWh is counted as."""

from __future__ import annotations

import contextlib

from jaxlm.errors import ConfigError, nearest


def intensity(text: str) -> float | None:
    """Grams of CO2 equivalent per kWh that `log.carbon_intensity` says; None for "".

    Args:
      text: the number, or a country by three letters (ISO 3166), whose figure is the one that codecarbon ships.

    Raises:
      ConfigError: neither, or codecarbon is not installed.
    """
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < float("inf"):
            return value
    try:
        from codecarbon.input import DataSource
    except ImportError as error:
        raise ConfigError(
            f"log.carbon_intensity={text!r}: figures of countries need codecarbon: pip install 'jaxlm[energy]'; "
            "or give grams of CO2e per kWh"
        ) from error
    countries = DataSource().get_global_energy_mix_data()
    if text.upper() not in countries:
        raise ConfigError(
            f"log.carbon_intensity is {text!r}; expected grams of CO2e per kWh, or a country by three letters, as "
            f"'FRA': {nearest(text.upper(), countries)}"
        )
    return float(countries[text.upper()]["carbon_intensity"])
