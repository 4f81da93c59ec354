"""What to compare: a question, a base config, variants of it, seeds, and a budget that all arms share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, config_file, config_json, functions
from jaxlm.ablation.points import Axes, Overrides, Range, combinations, sampled, size, spread
from jaxlm.ablation.scoring import SCORES
from jaxlm.ablation.variants import labels, shown
from jaxlm.config_rules import number
from jaxlm.errors import ConfigError, DataError, nearest

BUDGETS = ("tokens", "steps", "flops", "seconds", "joules")
SEARCHES = ("grid", "random", "halton", "optuna")

# last parts of the names of metrics
_HIGHER_IS_BETTER = frozenset(
    ["accuracy", "accuracy_by_length", "exact_match", "f1", "macro_f1", "bleu", "chrf", "mfu", "tokens_per_second"]
)


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


def _whole(value: Any) -> bool:
    return type(value) is int


def _all_whole(value: Any) -> bool:
    return isinstance(value, Sequence) and all(map(_whole, value))


def _numbers(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and all(map(_is(numbers.Real), value.values())))


# What the fields of a study are: what follows, in their ranges and what they mean together, can rely on it.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "question": (_is(str), "text"),
    "base": (_is(str, Path, ConfigDict, FrozenConfigDict), "a config, or the path of its file"),
    "baseline": (_is(str), "the name of a variant"),
    "variants": (_is(Mapping), "{name: {config field: value}}"),
    "seeds": (_all_whole, "whole numbers, such as (0, 1, 2)"),
    "metric": (_is(str), "a name of metrics.jsonl, such as 'eval/loss'"),
    "overrides": (_is(Mapping), "{config field: value}"),
    "lower_is_better": (_is(bool), "True or False"),
    "score": (_is(str), "a name"),
    "budget": (_numbers, "a number of one kind, such as {'tokens': 1e6}"),
    "tuning": (_is(Mapping), "{config field: values}"),
    "tuning_seeds": (_all_whole, "whole numbers, such as (100, 101)"),
    "tuning_trials": (_whole, "a whole number"),
    "search": (_is(str), "a name"),
    "lanes": (_whole, "a whole number"),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison: every variant with every seed, at an equal budget.

    An arm of another `data.batch_size` than the baseline's gets the `eval.batches` that hold as many windows of
    held-out text, which are then the same ones, unless it sets them or they don't divide. Where arms are evaluated on
    different text nonetheless, a doubt says so; `overrides={"eval.batches": 0}` evaluates all on the whole split.

    Args:
      question: what the study answers.
      base: `configs/x.py[:arg]`, or a config.
      baseline: the variant that the others are compared with.
      variants: name -> how its config differs from the base's.
      seeds: of the compared trials. Each seed gives all variants the same initial parameters and the same data order.
      metric: a name of metrics.jsonl. "-name", as for an accuracy: higher is better; the study then holds the name, and
        `lower_is_better` False.
      overrides: of the base, for all variants.
      lower_is_better: of the metric.
      score: which of its values counts. "final": that of the model a trial ends with, as `jaxlm.load` gives it: the
        last, or of an arm that may stop early that where `checkpoint.best` was best. "best": in all trials that where
        `checkpoint.best` was best, which asks what helps beyond stopping in time.
      budget: what each trial may spend: one of {"tokens": n}, {"steps": n}, {"flops": n} of the model's forward and
        backward passes, {"seconds": n} or {"joules": n} by what a step takes here. None: the tokens of the baseline's
        `steps`. {}: each variant has its own `steps`.
      tuning: {config field: values} to choose from for each arm, by the mean of the metric over `tuning_seeds`; under a
        variant's name, axes of its own: {"lion": {config field: values}}. Values are a sequence or a `Range`.
      tuning_seeds: none of `seeds`, so that no arm is compared where it was chosen.
      tuning_trials: points for each arm; 0, for a grid, all of them.
      search: how they are found: "grid", "random", "halton", or "optuna" (its TPE sampler, extra `cluster`).
      lanes: runs at once in one program; 0: as many as are fastest here.

    Raises:
      ConfigError: the study can't be run as it stands.
    """

    question: str
    base: str | Path | ConfigDict
    baseline: str
    variants: Mapping[str, Overrides]
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    metric: str = "eval/loss"
    overrides: Overrides = dataclasses.field(default_factory=dict)
    lower_is_better: bool = True
    score: str = "final"
    budget: Mapping[str, float] | None = None
    tuning: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tuning_seeds: Sequence[int] = ()
    tuning_trials: int = 0
    search: str = "grid"
    lanes: int = 0

    def __post_init__(self) -> None:
        for name, (fits, expected) in _FIELDS.items():
            if not fits(value := getattr(self, name)):
                raise ConfigError(f"{name} is {value!r}; expected {expected}")
        if self.metric.startswith("-"):
            object.__setattr__(self, "metric", self.metric.removeprefix("-"))
            object.__setattr__(self, "lower_is_better", False)
        if self.lower_is_better and self.metric.rpartition("/")[2] in _HIGHER_IS_BETTER:
            raise ConfigError(
                f"metric is {self.metric!r}, of which lower would count as better; write metric={'-' + self.metric!r}"
            )
        for name, overrides in self.variants.items():
            if not isinstance(name, str) or not name:
                raise ConfigError(f"variant {name!r}: expected a name, a string such as {str(name) or 'smaller'!r}")
            if not isinstance(overrides, Mapping):
                raise ConfigError(f"variant {name!r} is {overrides!r}; expected {{config field: value}}")
            if "seed" in overrides:
                raise ConfigError(f"variant {name!r} sets the seed, which each trial gets from seeds; leave it out")
        if self.baseline not in self.variants:
            raise ConfigError(f"baseline {self.baseline!r} is no variant: {nearest(self.baseline, self.variants)}")
        for what, seeds in (("seeds", self.seeds), ("tuning_seeds", self.tuning_seeds)):
            if len(set(seeds)) < len(seeds):
                raise ConfigError(f"{what}={tuple(seeds)} has a seed twice, which would count one run as two")
        if not self.seeds:
            raise ConfigError("seeds is empty; expected one at least, and several to conclude anything")
        if self.budget and (len(self.budget) != 1 or next(iter(self.budget)) not in BUDGETS):
            raise ConfigError(
                f"budget is {dict(self.budget)}; expected one of {', '.join(BUDGETS)}, such as tokens=1e6"
            )
        if self.budget and not 0 < next(iter(self.budget.values())) < math.inf:
            raise ConfigError(f"budget is {dict(self.budget)}; expected a number above 0")
        if self.lanes < 0 or self.tuning_trials < 0:
            raise ConfigError(f"lanes={self.lanes}, tuning_trials={self.tuning_trials}; expected at least 0")
        for what, given, known in (("score", self.score, SCORES), ("search", self.search, SEARCHES)):
            if given not in known:
                raise ConfigError(f"{what} is {given!r}: {nearest(given, known)}")
        self._check_tuning()

    def _check_tuning(self) -> None:
        for name, value in self.tuning.items():
            if isinstance(value, Mapping) and name not in self.variants:
                raise ConfigError(f"tuning has axes for {name!r}, which is no variant: {nearest(name, self.variants)}")
        for variant in self.variants:
            for path, values in self.axes(variant).items():
                if path == "seed":
                    raise ConfigError("tuning over the seed would choose luck; give several tuning_seeds instead")
                if isinstance(values, Range) and self.search == "grid":
                    raise ConfigError(f"tuning axis {path!r} is a range, which a grid can't search; give its values")
                if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
                    raise ConfigError(f"tuning axis {path!r} is {values!r}; expected a sequence of values, or a Range")
                if isinstance(values, Range):
                    values.at(0.0)
        if bool(self.tuning) != bool(self.tuning_seeds):
            raise ConfigError("tuning and tuning_seeds go together: axes to choose from, and seeds to choose by")
        if both := sorted(set(self.seeds) & set(self.tuning_seeds)):
            raise ConfigError(
                f"seed {both[0]} is one of seeds and of tuning_seeds; arms are compared on seeds that chose none"
            )
        if self.tuning and self.search != "grid" and self.tuning_trials < 1:
            raise ConfigError(f"search={self.search!r} needs tuning_trials, the points that each arm may try")

    def axes(self, variant: str) -> Axes:
        """The tuning axes of an arm."""
        own = self.tuning.get(variant)
        if not isinstance(own, Mapping):
            own = {path: values for path, values in self.tuning.items() if not isinstance(values, Mapping)}
        return {path: _values(values) for path, values in own.items()}

    def points(self, variant: str) -> list[Overrides]:
        """What an arm tries, as far as it is known before: nothing of what Optuna will propose.

        Of a grid all points, or `tuning_trials` of them, see `points.spread`.
        """
        axes = self.axes(variant)
        if not axes or self.search == "optuna":
            return []
        if self.search != "grid":
            return sampled(axes, self.tuning_trials, self.search)
        return spread(axes, self.tuning_trials) if self.tuning_trials else combinations(axes)

    def tries(self, variant: str) -> int:
        """How many points an arm tries."""
        axes = self.axes(variant)
        if self.search == "optuna":
            return int(min(self.tuning_trials, size(axes))) if axes else 0
        return len(self.points(variant))


def _values(axis: Any) -> Any:
    """The values of an axis, NumPy's as Python's."""
    if isinstance(axis, np.ndarray):
        return axis.tolist()
    return type(axis)(map(number, axis)) if type(axis) in (list, tuple) else axis


class Trial(NamedTuple):
    """A run of a study."""

    variant: str
    seed: int
    tuning: bool  # one that chooses the arm's point, not one that is compared
    point: Overrides  # the values of the tuning axes
    config: FrozenConfigDict
    code: str  # the digest of the config's functions, of those that it names too

    @property
    def address(self) -> str:
        """The hash of its resolved config, as far as results depend on it, and of its functions: a study that runs
        again finds by it what was run."""
        return hashlib.sha256((config_json.to_json(essential(self.config)) + self.code).encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        label = labels(self.point)
        values = "".join(f" {label[path]}={shown(value)}" for path, value in self.point.items())
        return f"{self.variant}{values} seed={self.seed}"


def load(path: str) -> Study:
    """The study that the `study()` of a Python file returns. Executes the file.

    Raises:
      ConfigError: no such file, or it defines no study.
    """
    found = config_file.call(path, "study", "experiments")
    if not isinstance(found, Study):
        raise ConfigError(f"study() of {path!r} returned {type(found).__name__}; expected a jaxlm.ablation.Study")
    return found


def base(study: Study) -> ConfigDict:
    """The config that the variants differ from, with the study's overrides.

    Raises:
      ConfigError: it can't be read, or an override is wrong.
    """
    cfg = config_file.load(str(study.base)) if isinstance(study.base, (str, Path)) else study.base
    return apply(cfg, study.overrides)


def arm(study: Study, variant: str, point: Overrides | None = None) -> FrozenConfigDict:
    """The resolved config of a variant, with its own `steps` and the base's seed; its chain is checked once the budget
    has its say on the steps.

    Raises:
      ConfigError: an override is wrong; names the variant.
    """
    with naming(variant):
        return config.resolve(apply(apply(base(study), study.variants[variant]), point or {}))


@contextlib.contextmanager
def naming(*variants: str) -> Iterator[None]:
    """What is wrong with a config, or its data, in here is told of its variant, or of those that it may be of."""
    try:
        yield
    except (ConfigError, DataError) as error:
        whose = f"variant{'s' if len(variants) > 1 else ''} {' and '.join(map(repr, variants))}"
        raise type(error)(f"{whose}: {error}") from error


def apply(cfg: ConfigDict, overrides: Overrides) -> ConfigDict:
    """A copy of a config with overrides; see `Overrides`."""
    cfg = config.override(cfg, {})
    for path, value in overrides.items():
        if path == "optimizer":
            value = _edited(value, cfg.optimizer.to_dict()) if callable(value) else value
            if not isinstance(value, (Mapping, ConfigDict)):
                raise ConfigError(f"optimizer is {value!r}; expected a spec, or a function that returns one")
        cfg = config.override(cfg, {path: value})
    return cfg


def _edited(edit: Callable[[dict[str, Any]], Any], spec: dict[str, Any]) -> Any:
    try:
        return edit(spec)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"its edit of the optimizer raised {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=4096)
def essential(cfg: FrozenConfigDict) -> FrozenConfigDict:
    """A resolved config, where fields on which no result depends are the defaults: how a run is shown, and what it
    saves, unless it goes back to what it saved."""
    fields = ["log.progress", "log.writers", "log.profile", "log.carbon_intensity", "data.cache_dir"]
    if not cfg.divergence.rollback_z:
        fields += ["checkpoint.every", "checkpoint.keep", "checkpoint.max_failures"]
    usual = config.flat(config.default())
    return config.resolve(config.override(cfg, {path: usual[path] for path in fields}))


def trial(
    cfg: FrozenConfigDict, variant: str, seed: int, point: Overrides | None = None, tuning: bool = False
) -> Trial:
    """A run of an arm with a seed."""
    return Trial(variant, seed, tuning, dict(point or {}), with_fields(cfg, seed=seed), functions.digest(cfg))


def with_fields(cfg: FrozenConfigDict, **fields: Any) -> FrozenConfigDict:
    """A resolved config with top-level fields replaced."""
    return config.resolve(config.override(cfg, fields))
