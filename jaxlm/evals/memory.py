"""What to change where an evaluation is too much for the memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from jaxlm.errors import ConfigError


def exhausted(error: Exception) -> bool:
    """Whether an error of JAX's is a device's lack of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def explained(rows: int, advice: str) -> Iterator[None]:
    """Turns a lack of memory, of a device or of this machine, into an error that says what to change.

    Args:
      rows: at once. Of one, there is nothing to change but the device.
      advice: for more than one.

    Raises:
      ConfigError: in its place.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and not exhausted(error):
            raise
        said = str(error).splitlines() or ["no memory is left"]
        hint = advice if rows > 1 else "one row at a time is too much for this device"
        raise ConfigError(f"out of memory: {said[0].rstrip('.')}; {hint}") from error
