"""Trials on a Ray cluster: each call's worth of lanes is a task, tried again where its worker or its node is lost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm.ablation import lanes
from jaxlm.ablation.runner import Execute, Group, Stopped, train_group
from jaxlm.ablation.study import Trial
from jaxlm.errors import ConfigError, DataError, JaxlmError
from jaxlm.telemetry.board import Board
from jaxlm.training.signals import Signals

_RETRIES = 10  # of a task whose worker died; a run goes on from its checkpoint
_LOOK = 1.0  # seconds between looks at the signals


def on_ray(address: str = "") -> Execute:
    """Trains groups as tasks of Ray, with a GPU each where the cluster has some.

    The study's directory must be the same one on all nodes, and jaxlm installed there.

    Args:
      address: of a cluster that runs, such as "auto" or "ray://host:10001"; "": one of this machine, for this study.

    Raises:
      ConfigError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--executor=ray needs Ray, which is not installed: pip install jaxlm[cluster]") from error

    def execute(groups: Sequence[Group], workdir: Path, board: Board, signals: Signals) -> None:
        if not ray.is_initialized():
            try:
                ray.init(address=address or "local", include_dashboard=False, log_to_driver=False)
            except (ConnectionError, ValueError) as error:
                raise ConfigError(f"no Ray cluster at {address!r}: {error}") from error
        gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)(_task)
        waiting = {}
        for group in groups:
            for i in range(0, len(group.trials), group.lanes):
                chunk = Group(group.trials[i : i + group.lanes], group.lanes)
                waiting[task.remote(chunk, str(workdir.absolute()), sys.path)] = chunk
        while waiting:
            over, _ = ray.wait(list(waiting), timeout=_LOOK)
            if signals.caught:
                for reference in waiting:
                    ray.cancel(reference)
                raise Stopped(signals.exit_code)
            for reference in over:
                chunk = waiting.pop(reference)
                try:
                    failed = ray.get(reference)
                except ray.exceptions.RayError as error:
                    raise DataError(f"{chunk.trials[0].title} failed on the cluster: {error}") from error
                if failed:
                    raise failed
                for one in chunk.trials:
                    with board.lane(one.title, one.config.steps, 0) as lane:
                        lane.update(one.config.steps)

    return execute


def _task(group: Group, workdir: str, path: list[str]) -> JaxlmError | None:
    """In a worker: trains a group; gives back the error that the user can mend, which trying again does not."""
    sys.path[:] = path  # experiments that name their own functions
    trials: list[Trial] = group.trials
    try:
        with Signals() as signals, Board(len(trials), sum(one.config.steps for one in trials)) as board:
            train_group(Group(trials, group.lanes), Path(workdir), board, signals, lanes.Programs())
    except JaxlmError as error:
        return error
    return None
