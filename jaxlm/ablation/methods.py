"""How a study was done, for the "Setup" of its report: model, data and statistics, and what trained it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import redact
from jaxlm.ablation import stats
from jaxlm.ablation.plan import cost
from jaxlm.ablation.study import Study
from jaxlm.model import gpt2
from jaxlm.training import processes

Machine = Mapping[str, str]
"""{"device": its kind, "jax": its version, ...}: what a run's numbers depend on beside its config. Empty: unknown."""


def machine() -> dict[str, str]:
    """This process's."""
    return {"device": jax.devices()[0].device_kind} | processes.versions()


def setup(study: Study, baseline: FrozenConfigDict, machines: Sequence[Machine]) -> dict[str, str]:
    """The lines of the section by their names, without secrets.

    Args:
      baseline: its budgeted config.
      machines: of all trials.
    """
    model, data = cost(baseline).model, baseline.data
    parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(gpt2.shapes(model)))
    tokens = cost(baseline).tokens_per_step
    base = str(study.base) if isinstance(study.base, (str, Path)) else "a config made in Python"
    tuning = f"; tuning on {_listed(study.tuning_seeds)}" if study.tuning_seeds else ""
    lines = {
        "Base config": f"{base}; what follows is of the baseline, “{study.baseline}”",
        "Model": f"GPT-2, {parameters:,} parameters: {_counted(model.num_layers, 'layer')} of width {model.embed_dim}, "
        f"{_counted(model.num_heads, 'head')}, context of {model.context_length} tokens, vocabulary of "
        f"{model.vocab_size:,}",
        "Weights": f"those of {baseline.init_from}" if baseline.init_from else "random",
        "Data": f"{_brief(data.source)}, tokenizer {_brief(data.tokenizer)}, held out: "
        f"{_brief(data.validation) or 'nothing'}",
        "Training": f"{baseline.steps:,} steps of {data.batch_size:,} sequences, {baseline.steps * tokens:,} tokens",
        "Seeds": f"{_listed(study.seeds)}{tuning}",
        "Intervals": f"{stats.CONFIDENCE:.0%} for all verdicts together: each is drawn at its variant's level of "
        "Holm's method, and leaves out 0 where the corrected test finds a difference",
        "Power": f"{stats.POWER:.0%}, for the smallest visible effect and the seeds needed, at the corrected level",
        "Versions": _told(machines, "jaxlm", "jax"),
        "Device": _told(machines, "device"),
    }
    return {name: redact.text(line) for name, line in lines.items()}


def mixed(machines: Sequence[Machine]) -> list[str]:
    """A warning where the trials of a study were not all trained alike."""
    known = [one for one in machines if one]
    differing = {name: _values(known, name) for one in known for name in one}
    listed = "; ".join(f"{name} {', '.join(values)}" for name, values in differing.items() if len(values) > 1)
    if not listed:
        return []
    return [f"the trials were trained with different versions or devices, which alone can move a result: {listed}"]


def _told(machines: Sequence[Machine], *names: str) -> str:
    known = [one for one in machines if one]
    if not known:
        return "not recorded"
    part = (
        "" if len(known) == len(machines) else f" ({len(known)} of {len(machines)} trials; of the others not recorded)"
    )
    if names == ("device",):
        return ", ".join(_values(known, "device")) + part
    return "; ".join(f"{name} {', '.join(_values(known, name))}" for name in names) + part


def _values(machines: Sequence[Machine], name: str) -> list[str]:
    return sorted({one.get(name, "unknown") for one in machines})


def _brief(path: str) -> str:
    """As a reader elsewhere needs it: without where the author's home is."""
    home = f"{Path.home()}/"
    return f"~/{path.removeprefix(home)}" if path.startswith(home) else path


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
