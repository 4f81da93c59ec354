"""Choosing each arm's point of its tuning axes, such as its learning rate, on seeds of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxlm.ablation.outcomes import Outcome
from jaxlm.ablation.plan import Arm, tuning_trials
from jaxlm.ablation.points import Axes, Overrides, Range, combinations, size
from jaxlm.ablation.study import Study, Trial
from jaxlm.errors import ConfigError

if TYPE_CHECKING:
    import optuna

Train = Callable[[Sequence[Trial]], list[Outcome]]
_ROUND = 4  # points that Optuna proposes before it learns what they gave


class Chosen(NamedTuple):
    points: dict[str, Overrides]  # variant -> the best point; empty where nothing is tuned
    outcomes: list[Outcome]  # of all tuning trials
    warnings: list[str]


def choose(study: Study, arm: Arm, train: Train, workdir: Path) -> Chosen:
    """Tries the points of each arm with every tuning seed, and takes the one with the best mean of the metric.

    A point at which some seed diverged counts as worse than any at which none did.
    """
    tried = {variant: study.points(variant) for variant in study.variants if study.axes(variant)}
    if not tried:
        return Chosen({}, [], [])

    def attempt(points: Mapping[str, Sequence[Overrides]]) -> list[Outcome]:
        return train(tuning_trials(study, arm, points))

    if study.search == "optuna":
        outcomes = _with_optuna(study, list(tried), attempt, workdir / "optuna.db")
    else:
        outcomes = attempt(tried)
    chosen: dict[str, Overrides] = {}
    warnings = []
    for variant in tried:
        means = scores(study, [outcome for outcome in outcomes if outcome.variant == variant])
        best, score = min(means, key=lambda pair: pair[1])
        if not math.isfinite(score):
            warnings.append(f"variant {variant!r} diverged, or gave no {study.metric}, at every point that was tried")
        else:
            warnings += _edges(study, variant, [point for point, _ in means], best)
        chosen[variant] = best
    return Chosen(chosen, outcomes, warnings)


def scores(study: Study, outcomes: Sequence[Outcome]) -> list[tuple[Overrides, float]]:
    """Each point with the mean of the metric over its seeds, the lower the better; inf where one of them diverged."""
    points: dict[str, list[Outcome]] = {}  # by what it shows: an optimizer's spec is a dict, which has no hash
    for outcome in outcomes:
        points.setdefault(repr(outcome.point), []).append(outcome)
    sign = 1 if study.lower_is_better else -1
    means = [(seeds[0].point, sign * sum(one.value for one in seeds) / len(seeds)) for seeds in points.values()]
    return [(point, mean if math.isfinite(mean) else math.inf) for point, mean in means]


def _edges(study: Study, variant: str, tried: Sequence[Overrides], best: Overrides) -> list[str]:
    """Where the best point is at an end of the values tried, the best of all may lie beyond."""
    out = []
    for path in study.axes(variant):
        values = [point[path] for point in tried]
        fewest = 2 if study.search == "grid" else 3  # of two that are drawn one is always best
        if any(type(value) not in (int, float) for value in values) or len(set(values)) < fewest:
            continue
        low, high = min(values), max(values)
        if best[path] in (low, high):
            end = "largest" if best[path] == high else "smallest"
            out.append(
                f"the best {path} of {variant!r}, {best[path]:g}, is the {end} that was tried ({low:g} to {high:g}): "
                "try values beyond it"
            )
    return out


def _with_optuna(
    study: Study,
    tuned: Sequence[str],
    attempt: Callable[[Mapping[str, Sequence[Overrides]]], list[Outcome]],
    record: Path,
) -> list[Outcome]:
    """Points that Optuna's TPE sampler proposes (Bergstra et al. 2011), a few at a time.

    It is seeded and begins afresh: a study that runs again asks again, and finds the points' runs in their directories.

    Args:
      record: where its studies, one an arm, are stored in the end, for Optuna's own dashboard and plots.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("search='optuna' needs Optuna, which is not installed: pip install jaxlm[cluster]") from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.InMemoryStorage()
    searches = {
        variant: optuna.create_study(
            study_name=variant,
            storage=storage,
            sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=_ROUND),
        )
        for variant in tuned
    }
    outcomes: list[Outcome] = []
    tried: dict[str, list[Overrides]] = {variant: [] for variant in tuned}
    while going := [variant for variant in tuned if len(tried[variant]) < study.tries(variant)]:
        asked: dict[str, list[optuna.Trial]] = {variant: [] for variant in going}
        for variant in going:
            for _ in range(min(_ROUND, study.tries(variant) - len(tried[variant]))):
                one, point = _propose(searches[variant], study.axes(variant), tried[variant])
                asked[variant].append(one)
                tried[variant].append(point)
        points = {variant: tried[variant][-len(asked[variant]) :] for variant in going}
        found = attempt(points)
        outcomes += found
        for variant in going:
            means = scores(study, [outcome for outcome in found if outcome.variant == variant])
            for one, point in zip(asked[variant], points[variant], strict=True):
                value = next(mean for other, mean in means if other == point)
                searches[variant].tell(one, value if math.isfinite(value) else 1e30)
    record.unlink(missing_ok=True)
    for variant in tuned:
        optuna.copy_study(from_study_name=variant, from_storage=storage, to_storage=f"sqlite:///{record}")
    return outcomes


def _propose(search: optuna.Study, axes: Axes, tried: Sequence[Overrides]) -> tuple[optuna.Trial, Overrides]:
    """A point of axes that was not tried: where Optuna proposes one that was, another of the combinations."""
    from optuna.trial import TrialState

    one = search.ask()
    point = _point(one, axes)
    if point in tried and size(axes) < math.inf:
        search.tell(one, state=TrialState.FAIL)
        other = next(other for other in combinations(axes) if other not in tried)
        search.enqueue_trial({path: list(values).index(other[path]) for path, values in axes.items()})
        one = search.ask()
        point = _point(one, axes)
    return one, point


def _point(asked: optuna.Trial, axes: Axes) -> dict[str, Any]:
    """What a trial of Optuna's proposes."""
    point: dict[str, Any] = {}
    for path, values in axes.items():
        if isinstance(values, Range):
            point[path] = asked.suggest_float(path, values.low, values.high, log=values.log)
        else:
            point[path] = values[asked.suggest_categorical(path, range(len(values)))]
    return point
