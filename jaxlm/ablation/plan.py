"""A study before it runs: each arm's config under the budget, what is doubtful in it, what it will cost."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import FrozenConfigDict

from jaxlm import config, files, redact
from jaxlm.ablation import lanes
from jaxlm.ablation.study import Overrides, Study, Trial, arm, grid_points, trial, with_fields
from jaxlm.errors import ConfigError, DataError
from jaxlm.model import gpt2
from jaxlm.telemetry import flops
from jaxlm.telemetry.text import aligned
from jaxlm.training.prepare import prepare


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


@functools.lru_cache(maxsize=256)
def _cost(cfg: FrozenConfigDict) -> Cost:
    model = prepare(cfg).config.model
    params = jax.eval_shape(gpt2.build(model).init, jax.random.key(0))
    return Cost(cfg.data.batch_size * model.context_length, flops.of_model(model, params))


def cost(cfg: FrozenConfigDict) -> Cost:
    """Of a resolved config; opens its data, since the vocabulary comes from there."""
    return _cost(with_fields(cfg, seed=0))


def budgeted(study: Study, variant: str, point: Overrides | None, memory: Memory) -> FrozenConfigDict:
    """The config of an arm with the steps that the study's budget allows.

    Raises:
      ConfigError: an override is wrong; names the variant. Or it sets the steps, which the budget decides.
      DataError: data is missing or broken.
    """
    cfg = arm(study, variant, point)
    if study.budget == {}:
        return cfg
    baseline = arm(study, study.baseline)
    if cfg.steps != baseline.steps:
        raise ConfigError(
            f"variant {variant!r} sets steps={cfg.steps}, and the study's budget decides them; "
            "give budget={} to compare arms of different budgets"
        )
    whole = baseline.steps * cost(baseline).tokens_per_step
    kind, amount = next(iter((study.budget or {"tokens": whole}).items()))
    if kind == "steps":
        per_step = 1.0
    elif kind in memory.steps:
        per_step = _of_a_step(kind, cfg, memory)
    else:
        per_step = cost(cfg).tokens_per_step * (cost(cfg).flops_per_token if kind == "flops" else 1.0)
    return with_fields(cfg, steps=max(1, round(amount / per_step)))


def _of_a_step(kind: str, cfg: FrozenConfigDict, memory: Memory) -> float:
    """The seconds or joules of a step of a run alone, measured once."""
    prepared, known = prepare(cfg), memory.steps[kind]
    digest = lanes.digest(lanes.shared(prepared.config))
    if digest not in known:
        known[digest] = lanes.seconds_per_step([prepared], 0) if kind == "seconds" else lanes.joules_per_step(prepared)
        memory.write()
    return known[digest]


def doubts(study: Study, arms: Mapping[str, FrozenConfigDict]) -> list[str]:
    """What of a study's plan its author may not have meant, as lines to say.

    Args:
      arms: variant -> its budgeted config.

    Raises:
      ConfigError: two arms differ in functions of one name alone, by which their runs can't be told apart.
    """
    out = []
    addresses = {name: trial(cfg, name, 0).address for name, cfg in arms.items()}
    for one, other in itertools.combinations(arms, 2):
        changed = config.differences(arms[one], arms[other])
        if changed and addresses[one] == addresses[other]:
            raise ConfigError(
                f"variants {one!r} and {other!r} differ only in functions that have one name, in {', '.join(changed)}: "
                "one run would serve both; give the functions names of their own, or arguments in the config"
            )
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
    tokens = {name: cfg.steps * cost(cfg).tokens_per_step for name, cfg in arms.items()}
    if max(tokens.values()) - min(tokens.values()) > max(cost(cfg).tokens_per_step for cfg in arms.values()):
        listed = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        out.append(f"the arms see different numbers of training tokens: {listed}")
    points = {name: _points(study, name) for name in arms}
    if len(set(points.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in points.items())
        out.append(f"the arms are tuned with different numbers of points: {listed}")
    return out


def changes(old: FrozenConfigDict, new: FrozenConfigDict) -> dict[str, tuple[Any, Any]]:
    """How a config differs, without secrets; functions by their names."""
    named = config.objects(old), config.objects(new)
    differing = config.differences(redact.fields(old), redact.fields(new))
    return {path: (named[0].get(path, was), named[1].get(path, now)) for path, (was, now) in differing.items()}


def budget(study: Study, arms: Mapping[str, FrozenConfigDict]) -> str:
    """The budget of a trial, in words."""
    if study.budget == {}:
        return "each variant its own number of steps"
    baseline = arms[study.baseline]
    if study.budget is None or "tokens" in study.budget:
        return f"{baseline.steps * cost(baseline).tokens_per_step:,} training tokens a trial"
    kind, amount = next(iter(study.budget.items()))
    return f"{amount:,.6g} {'FLOPs' if kind == 'flops' else kind} a trial"


def describe(study: Study, say: Callable[[str], None]) -> str:
    """What `runner.run` will do: trials, lanes, tokens, FLOPs, and the time, for which some steps are timed."""
    memory = Memory()
    arms = {name: budgeted(study, name, None, memory) for name in study.variants}
    compared, tuned = len(study.seeds), {name: _points(study, name) * len(study.tuning_seeds) for name in arms}
    rows = [("variant", "trials", "tuning", "steps", "tokens", "FLOPs a trial", "differs from the baseline in")]
    in_all = tokens = 0.0
    programs: dict[str, int] = {}
    for name, cfg in arms.items():
        own = cost(cfg)
        trial_tokens = cfg.steps * own.tokens_per_step
        changed = changes(arms[study.baseline], cfg)
        shown = "; ".join(f"{path} {was!r} -> {now!r}" for path, (was, now) in changed.items())
        shown = shown if len(shown) <= 100 else shown[:97] + "..."
        total = compared + tuned[name]
        in_all += total * trial_tokens * own.flops_per_token
        tokens += total * trial_tokens
        trial_flops = f"{trial_tokens * own.flops_per_token:.3g}"
        rows.append((name, str(compared), str(tuned[name]), f"{cfg.steps:,}", f"{trial_tokens:,}", trial_flops, shown))
        digest = lanes.digest(lanes.shared(prepare(cfg).config))
        programs[digest] = programs.get(digest, 0) + total
    baseline = arms[study.baseline]
    say("timing a few steps of the baseline")
    step_seconds = lanes.seconds_per_step([prepare(baseline)], 0)
    per_flop = step_seconds / (cost(baseline).tokens_per_step * cost(baseline).flops_per_token)
    fit = study.lanes or min(lanes.most(prepare(baseline).config), max(programs.values()))
    trials = sum(programs.values())
    minutes = in_all * per_flop / 60
    text = "\n".join(
        [
            study.question,
            f"metric {study.metric}, baseline {study.baseline!r}, seeds {', '.join(map(str, study.seeds))}",
            f"budget: {budget(study, arms)}",
            *(f"  {line}" for line in aligned(rows)),
            *(f"doubt: {line}" for line in doubts(study, arms)),
            f"{trials} trials in {len(programs)} programs, as lanes of up to {fit} where that is faster",
            f"{tokens:,.0f} training tokens, {in_all:.3g} FLOPs, about {minutes:,.1f} minutes here, one run after "
            f"another at the baseline's {step_seconds * 1e3:.3g} ms a step; evaluation and compilation come on top",
        ]
    )
    return redact.text(text)


def _points(study: Study, variant: str) -> int:
    """How many points of its tuning axes an arm tries."""
    if not study.axes(variant):
        return 0
    return len(grid_points(study, variant)) if study.search == "grid" else study.tuning_trials
