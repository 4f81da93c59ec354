"""A study before it runs: each arm's config under the budget, what is doubtful in it, what it will cost."""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from jaxlm import config, config_json, files, redact
from jaxlm.ablation import lanes
from jaxlm.ablation.study import Study, Trial, arm, naming, trial, with_fields
from jaxlm.ablation.variants import Overrides, crossing
from jaxlm.errors import ConfigError, DataError
from jaxlm.model import gpt2
from jaxlm.optim import chain
from jaxlm.telemetry import energy, flops
from jaxlm.telemetry.text import aligned
from jaxlm.training import sanity
from jaxlm.training.prepare import prepare

Arm = Callable[[str, Overrides | None], FrozenConfigDict]  # (variant, point of its tuning axes) -> its budgeted config


class Memory:
    """What a study must not decide twice, kept in its directory: the lanes of each program, the seconds and joules of a
    step, all measured, and which trials it had when it last ran. Where an arm is tuned, the point at which it will be
    compared isn't known before: its trials are noted as they would be without one.

    Raises:
      DataError: the file is damaged.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self.lanes: dict[str, int] = {}
        self.steps: dict[str, dict[str, float]] = {"seconds": {}, "joules": {}}
        self._trials: dict[str, str] = {}
        if path is not None and path.exists():
            try:
                read = json.loads(path.read_text(encoding="utf-8"))
                self.lanes, self.steps, self._trials = read["lanes"], read["steps"], read["trials"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path} is damaged: {error!r}; delete it, and its numbers are taken anew") from error

    def write(self) -> None:
        if self._path is not None:
            value = {"lanes": self.lanes, "steps": self.steps, "trials": self._trials}
            with files.atomic(self._path) as file:
                file.write(json.dumps(value, indent=1).encode())

    def note(self, trials: Sequence[Trial]) -> list[str]:
        """Takes down which trials the study has now; how they differ from those that it had, as lines to say."""
        now = {one.address: one.title for one in trials}
        before, self._trials = self._trials, now
        self.write()
        gone = [title for address, title in before.items() if address not in now]
        new = [title for address, title in now.items() if address not in before]
        if not before or not (gone or new):
            return []
        kept = f", {len(gone)} are no longer looked at but keep their directories ({_few(gone)})" if gone else ""
        added = f" ({_few(new)})" if new else ""
        return [f"the study was edited: {len(now) - len(new)} trials stay, {len(new)} are new{added}{kept}"]


def _few(titles: Sequence[str]) -> str:
    return ", ".join(titles[:3]) + (", ..." if len(titles) > 3 else "")


class Cost(NamedTuple):
    tokens_per_step: int
    flops_per_token: int  # of the model's forward and backward pass; the optimizer's are not counted


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
    return Cost(data.batch_size * prepared.context_length, flops.of_model(prepared, gpt2.shapes(prepared)))


def _tokens(cfg: FrozenConfigDict) -> int:
    """That a run of a budgeted config trains on."""
    return cfg.steps * cost(cfg).tokens_per_step


def _flops(cfg: FrozenConfigDict) -> float:
    """Of a run of a budgeted config."""
    return float(_tokens(cfg)) * cost(cfg).flops_per_token


def budgeted(study: Study, variant: str, point: Overrides | None, memory: Memory) -> FrozenConfigDict:
    """The config of an arm with the steps that the study's budget allows.

    Raises:
      ConfigError: an override is wrong; names the variant. Or it sets the steps, which the budget decides.
      DataError: data is missing or broken.
    """
    cfg = arm(study, variant, point)
    if study.budget != {}:
        baseline = arm(study, study.baseline)
        if cfg.steps != baseline.steps:
            raise ConfigError(
                f"variant {variant!r} sets steps={cfg.steps}, and the study's budget decides them; "
                "give budget={} to compare arms of different budgets"
            )
        with naming(study.baseline):
            kind, amount = next(iter((study.budget or {"tokens": _tokens(baseline)}).items()))
        with naming(variant):
            cfg = with_fields(cfg, steps=max(1, round(amount / _of_a_step(kind, cfg, memory))))
    with naming(variant):
        chain.build(cfg.optimizer.to_dict(), None, cfg.steps)
    return cfg


def _of_a_step(kind: str, cfg: FrozenConfigDict, memory: Memory) -> float:
    """What a step spends of a budget: seconds and joules are those of a run alone, measured once."""
    if kind == "steps":
        return 1.0
    if kind not in memory.steps:
        return cost(cfg).tokens_per_step * (cost(cfg).flops_per_token if kind == "flops" else 1.0)
    prepared, known = prepare(cfg), memory.steps[kind]
    digest = lanes.digest(lanes.shared(prepared.config))
    if digest not in known:
        known[digest] = lanes.seconds_per_step([prepared], 0) if kind == "seconds" else lanes.joules_per_step(prepared)
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
        `functions.digest` knows of them.
    """
    trials = [*trials, *(one for name in study.variants for one in _like(study, arm, name))]
    first: dict[str, Trial] = {}
    for one in trials:
        other = first.setdefault(one.address, one)
        if changed := config.differences(other.config, one.config):
            raise ConfigError(
                f"{other.title} and {one.title} differ only in functions that look alike, in {', '.join(changed)}: "
                "one run would serve both; give the functions names of their own, or arguments in the config"
            )
    return {address: program(one) for address, one in first.items()}


def _like(study: Study, arm: Arm, variant: str) -> list[Trial]:
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
        return _program(with_fields(one.config, seed=0))


@functools.lru_cache(maxsize=4096)
def _program(cfg: FrozenConfigDict) -> Hashable:
    if "jsonl" not in (given := tuple(cfg.log.writers)):
        raise ConfigError(f"log.writers is {given}, without 'jsonl', where a study reads its metrics")
    cfg = prepare(cfg).config
    sanity.check(cfg)
    energy.intensity(cfg.log.carbon_intensity)
    return lanes.shared(cfg)


def doubts(study: Study, arms: Mapping[str, FrozenConfigDict]) -> list[str]:
    """What of a study's plan its author may not have meant, as lines to say.

    Args:
      arms: variant -> its budgeted config.
    """
    out = []
    if len(study.seeds) < 2:
        out.append("one seed: nothing can be concluded; give several")
    same = [
        (one, other)
        for one, other in itertools.combinations(arms, 2)
        if not config.differences(arms[one], arms[other]) and study.axes(one) == study.axes(other)
    ]
    for one, other in same:
        if study.baseline in (one, other):
            variant = other if one == study.baseline else one
            out.append(f"variant {variant!r} changes nothing: its config is that of the baseline {study.baseline!r}")
        else:
            out.append(f"variants {one!r} and {other!r} are alike: one run serves both")
    tokens = {name: _tokens(cfg) for name, cfg in arms.items()}
    if max(tokens.values()) - min(tokens.values()) > max(cost(cfg).tokens_per_step for cfg in arms.values()):
        listed = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        out.append(f"the arms see different numbers of training tokens: {listed}")
    points = {name: study.tries(name) for name in arms}
    if len(set(points.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in points.items())
        out.append(f"the arms are tuned with different numbers of points: {listed}")
    return out


def changes(old: FrozenConfigDict, new: FrozenConfigDict) -> dict[str, tuple[Any, Any]]:
    """How a config differs, without secrets; functions by their names."""
    named = config_json.objects(old), config_json.objects(new)
    differing = config.differences(redact.fields(old), redact.fields(new))
    return {path: (named[0].get(path, was), named[1].get(path, now)) for path, (was, now) in differing.items()}


def budget(study: Study, arms: Mapping[str, FrozenConfigDict]) -> str:
    """The budget of a trial, in words."""
    if study.budget == {}:
        return "each variant its own number of steps"
    baseline = arms[study.baseline]
    if study.budget is None or "tokens" in study.budget:
        return f"{_tokens(baseline):,} training tokens a trial"
    kind, amount = next(iter(study.budget.items()))
    return f"{amount:,.6g} {'FLOPs' if kind == 'flops' else kind} a trial"


def describe(study: Study, say: Callable[[str], None]) -> str:
    """What `runner.run` will do: trials, lanes, tokens, FLOPs, and the time, for which some steps are timed."""
    arm: Arm = functools.partial(budgeted, study, memory=Memory())
    arms = {name: arm(name, None) for name in study.variants}
    trials = known_trials(study, arm)
    found = check(study, arm, trials)
    if study.search == "optuna":
        for name in filter(study.axes, arms):
            trials += study.tries(name) * _like(study, arm, name)[: len(study.tuning_seeds)]
    rows = [("variant", "trials", "tuning", "steps", "tokens", "FLOPs a trial", "differs from the baseline in")]
    for name, cfg in arms.items():
        changed = changes(arms[study.baseline], cfg)
        shown = "; ".join(f"{path} {was!r} -> {now!r}" for path, (was, now) in changed.items())
        shown = shown if len(shown) <= 100 else shown[:97] + "..."
        tuned = str(study.tries(name) * len(study.tuning_seeds))
        spent = f"{_tokens(cfg):,}", f"{_flops(cfg):.3g}"
        rows.append((name, str(len(study.seeds)), tuned, f"{cfg.steps:,}", *spent, shown))
    programs = Counter(lanes.digest(found[one.address]) for one in trials)
    baseline = arms[study.baseline]
    say("timing a few steps of the baseline")
    step_seconds = lanes.seconds_per_step([prepare(baseline)], 0)
    tokens, in_all = sum(_tokens(one.config) for one in trials), sum(_flops(one.config) for one in trials)
    minutes = step_seconds * baseline.steps * in_all / _flops(baseline) / 60
    fit = study.lanes or min(lanes.most(prepare(baseline).config), max(programs.values()))
    text = "\n".join(
        [
            study.question,
            f"metric {study.metric}, baseline {study.baseline!r}, seeds {', '.join(map(str, study.seeds))}",
            f"budget: {budget(study, arms)}",
            *(f"  {line}" for line in aligned(rows)),
            *(f"doubt: {line}" for line in doubts(study, arms)),
            f"{len(trials)} trials in {len(programs)} programs, as lanes of up to {fit} where that is faster",
            f"{tokens:,} training tokens, {in_all:.3g} FLOPs, about {minutes:,.1f} minutes here, one run after another "
            f"at the baseline's {step_seconds * 1e3:.3g} ms a step; evaluation and compilation come on top",
        ]
    )
    return redact.text(text)
