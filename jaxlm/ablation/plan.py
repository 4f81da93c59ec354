"""A study before it runs: each arm's config under the budget, and the trials, which are checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, config_file, config_json, redact
from jaxlm.ablation import lanes, scoring
from jaxlm.ablation.memory import Memory
from jaxlm.ablation.points import Overrides, crossing
from jaxlm.ablation.study import Study, Trial, arm, essential, naming, trial, with_fields
from jaxlm.errors import ConfigError
from jaxlm.model import gpt2
from jaxlm.optim import chain
from jaxlm.telemetry import carbon, flops
from jaxlm.training import devices, sanity
from jaxlm.training.prepare import prepare

Arm = Callable[[str, Overrides | None], FrozenConfigDict]  # (variant, point of its tuning axes) -> its budgeted config


class Cost(NamedTuple):
    tokens_per_step: int
    flops_per_token: int  # of the model's forward and backward pass; the optimizer's are not counted
    model: FrozenConfigDict  # as it is built, with the vocabulary of its data


def cost(cfg: FrozenConfigDict) -> Cost:
    """Of a resolved config; opens its data, since the vocabulary comes from there.

    It is that of the model and the data, whatever the optimizer: a schedule may fit the steps of a budget alone.
    """
    return _cost(cfg.model, cfg.data, cfg.init_from, cfg.log.progress)


@functools.lru_cache(maxsize=256)
def _cost(model: FrozenConfigDict, data: FrozenConfigDict, init_from: str, progress: bool) -> Cost:
    cfg = config.default()
    cfg.model, cfg.data, cfg.init_from, cfg.log.progress = ConfigDict(model), ConfigDict(data), init_from, progress
    prepared = prepare(cfg).config.model
    return Cost(data.batch_size * prepared.context_length, flops.of_model(prepared, gpt2.shapes(prepared)), prepared)


def tokens_of(cfg: FrozenConfigDict) -> int:
    """That a run of a budgeted config trains on."""
    return cfg.steps * cost(cfg).tokens_per_step


def flops_of(cfg: FrozenConfigDict) -> float:
    """Of a run of a budgeted config."""
    return float(tokens_of(cfg)) * cost(cfg).flops_per_token


def budgeted(study: Study, variant: str, point: Overrides | None, memory: Memory) -> FrozenConfigDict:
    """The config of an arm with the steps that the study's budget allows, evaluated on as many windows as the baseline:
    in other batches, as far as that divides, where neither the variant nor its point sets `eval.batches`.

    Raises:
      ConfigError: an override is wrong; names the variant. Or it sets the steps, which the budget decides.
      DataError: data is missing or broken.
    """
    cfg, baseline = arm(study, variant, point), arm(study, study.baseline)
    if cfg.data.batch_size != baseline.data.batch_size and not windows(baseline) % cfg.data.batch_size:
        if "eval.batches" not in {**study.variants[variant], **(point or {})}:
            batches = windows(baseline) // cfg.data.batch_size
            cfg = config.resolve(config.override(cfg, {"eval.batches": batches}))
    if study.budget != {}:
        if cfg.steps != baseline.steps:
            raise ConfigError(
                f"variant {variant!r} sets steps={cfg.steps}, and the study's budget decides them; "
                "give budget={} to compare arms of different budgets"
            )
        with naming(study.baseline):
            kind, amount = allowed(study, baseline)
        with naming(variant):
            cfg = with_fields(cfg, steps=max(1, round(amount / of_a_step(kind, cfg, memory))))
    with naming(variant):
        scoring.judge(cfg, study.score)
        chain.build(cfg.optimizer.to_dict(), None, cfg.steps)
    return cfg


def windows(cfg: FrozenConfigDict) -> int:
    """Of held-out text, or rows of pairs, in an evaluation; 0: the whole split."""
    return int(cfg.eval.batches * cfg.data.batch_size)


def allowed(study: Study, baseline: FrozenConfigDict) -> tuple[str, float]:
    """The budget of a trial, if arms share one: its kind and amount."""
    return next(iter((study.budget or {"tokens": tokens_of(baseline)}).items()))


def of_a_step(kind: str, cfg: FrozenConfigDict, memory: Memory) -> float:
    """What a step spends of a budget: seconds and joules are those of a run alone, measured once."""
    if kind == "steps":
        return 1.0
    if kind not in memory.steps:
        return cost(cfg).tokens_per_step * (cost(cfg).flops_per_token if kind == "flops" else 1.0)
    prepared, known = prepare(cfg), memory.steps[kind]
    digest = lanes.digest(lanes.shared(essential(prepared.config)))
    if digest not in known:
        known[digest] = (lanes.median_seconds_per_step if kind == "seconds" else lanes.joules_per_step)(prepared)
        memory.write()
    return known[digest]


def tuning_trials(study: Study, arm: Arm, points: Mapping[str, Sequence[Overrides]]) -> list[Trial]:
    """Those of points of each arm, with every tuning seed."""
    arms = [(variant, point, arm(variant, point)) for variant in points for point in points[variant]]
    return [
        trial(cfg, variant, seed, point, tuning=True) for variant, point, cfg in arms for seed in study.tuning_seeds
    ]


def compared_trials(study: Study, arm: Arm, chosen: Mapping[str, Overrides]) -> list[Trial]:
    """Those of each arm at its chosen point, with every seed."""
    configs = {variant: arm(variant, chosen.get(variant)) for variant in study.variants}
    return [trial(cfg, name, seed, chosen.get(name)) for name, cfg in configs.items() for seed in study.seeds]


def known_trials(study: Study, arm: Arm) -> list[Trial]:
    """All trials, as far as they are known before the first: compared ones as they are without a point.

    Raises:
      ConfigError, DataError: as `budgeted`, of any of them.
    """
    points = {variant: study.points(variant) for variant in study.variants}
    return [*tuning_trials(study, arm, points), *compared_trials(study, arm, {})]


def check(study: Study, arm: Arm, trials: Sequence[Trial]) -> dict[str, Hashable]:
    """Before anything is trained: what a run would refuse of trials that are known, and of what Optuna may try.

    Returns:
      The `program` of each address.

    Raises:
      ConfigError, DataError: as `program`, of any of them; or two differ in functions alone, and in nothing that
        `functions.digest` knows of them; or no trial will write the study's metric.
    """
    trials = [*trials, *(one for name in study.variants for one in like(study, arm, name))]
    first: dict[str, Trial] = {}
    for one in trials:
        other = first.setdefault(one.address, one)
        if one.config != other.config:  # in what no result depends on, which may be wrong nonetheless
            program(one)
        if changed := config.differences(essential(other.config), essential(one.config)):
            raise ConfigError(
                f"{other.title} and {one.title} differ only in functions that look alike, in {', '.join(changed)}: "
                "one run would serve both; give the functions names of their own, or arguments in the config"
            )
    found = {address: program(one) for address, one in first.items()}
    with naming(study.baseline):
        usual = next(one for one in trials if one.variant == study.baseline)
        _check_metric(usual.config, usual.code, study.metric)
    return found


def like(study: Study, arm: Arm, variant: str) -> list[Trial]:
    """Trials such as Optuna will propose, in which each value of an axis comes up."""
    if study.search != "optuna" or not (axes := study.axes(variant)):
        return []
    return tuning_trials(study, arm, {variant: crossing(axes)})


def program(one: Trial) -> Hashable:
    """What trials that one program can train have in common.

    Raises:
      ConfigError, DataError: of what a run would refuse, now or later; names the variant.
    """
    with naming(one.variant):
        return _program(with_fields(one.config, seed=0), one.code)


@functools.lru_cache(maxsize=4096)
def _program(cfg: FrozenConfigDict, code: str) -> Hashable:  # the code of what the config names
    if "jsonl" not in (given := tuple(cfg.log.writers)):
        raise ConfigError(f"log.writers is {given}, without 'jsonl', where a study reads its metrics")
    cfg = prepare(cfg).config
    sanity.check(cfg)
    devices.imagined(cfg)
    carbon.intensity(cfg.log.carbon_intensity)
    return lanes.shared(cfg)


@functools.lru_cache(maxsize=64)
def _check_metric(cfg: FrozenConfigDict, code: str, metric: str) -> None:
    sanity.check_metric(prepare(cfg).config, metric)


def changes(old: FrozenConfigDict, new: FrozenConfigDict) -> dict[str, tuple[Any, Any]]:
    """How a config differs, without secrets; functions by their names."""
    names = [
        {path: name.replace(config_file.MODULE, "", 1) for path, name in config_json.objects(cfg).items()}
        for cfg in (old, new)
    ]
    differing = config.differences(redact.fields(old), redact.fields(new))
    return {path: (names[0].get(path, was), names[1].get(path, now)) for path, (was, now) in differing.items()}


def budget(study: Study, arms: Mapping[str, FrozenConfigDict]) -> str:
    """The budget of a trial, in words."""
    if study.budget == {}:
        return "each variant its own number of steps"
    baseline = arms[study.baseline]
    if study.budget is None or "tokens" in study.budget:
        return f"{tokens_of(baseline):,} training tokens a trial"
    kind, amount = next(iter(study.budget.items()))
    return f"{amount:,.6g} {'FLOPs' if kind == 'flops' else kind} a trial"
