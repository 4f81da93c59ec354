"""Where processes that train together meet: by flags, or as Slurm and Open MPI tell. Only the standard library."""

from __future__ import annotations

import os
from typing import NamedTuple

from jaxlm.errors import ConfigError


class Meeting(NamedTuple):
    """None throughout: as the launcher tells."""

    address: str | None = None  # HOST:PORT of process 0
    processes: int | None = None  # how many
    number: int | None = None  # of this one, from 0


def asked(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> Meeting | None:
    """The meeting that flags, or else a launcher's environment, ask for; None where this process is alone, as it is
    with --num_processes=1.

    Raises:
      ConfigError: flags that can't be, or some of them without the others.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if num_processes == 1:
        return None
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        sizes = (os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
        return Meeting() if any(size.isdecimal() and int(size) > 1 for size in sizes) else None
    if missing:
        there = ", ".join(name for name in given if name not in missing)
        raise ConfigError(f"{' and '.join(missing)} must be given with {there}")
    assert coordinator_address is not None and num_processes is not None and process_id is not None
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id={process_id} of --num_processes={num_processes}; expected from 0 to one less")
    host, _, port = coordinator_address.rpartition(":")
    if not host or not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"--coordinator_address is {coordinator_address!r}; expected HOST:PORT of process 0")
    return Meeting(coordinator_address, num_processes, process_id)
