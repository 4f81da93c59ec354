"""A study before it runs, in words: what is doubtful in it, and what it will cost."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import FrozenConfigDict

from jaxlm import config, redact
from jaxlm.ablation import lanes
from jaxlm.ablation.memory import Memory
from jaxlm.ablation.plan import (
    Arm,
    allowed,
    budget,
    budgeted,
    changes,
    check,
    cost,
    flops_of,
    known_trials,
    like,
    of_a_step,
    tokens_of,
    windows,
)
from jaxlm.ablation.scoring import judge
from jaxlm.ablation.study import Study, essential
from jaxlm.data import heldout
from jaxlm.telemetry.text import aligned
from jaxlm.training.prepare import prepare

_LENGTHS = ("warmup", "cooldown", "timescale", "boundaries")  # of schedules: below 1 shares of the run, else steps
_PER_TOKEN = ("loss", "perplexity", "accuracy")


def doubts(study: Study, arms: Mapping[str, FrozenConfigDict], memory: Memory) -> list[str]:
    """What of a study's plan its author may not have meant, as lines to say.

    Args:
      arms: variant -> its budgeted config.
      memory: what steps were found to take.
    """
    out = []
    if len(study.seeds) < 2:
        out.append("one seed: nothing can be concluded; give several")
    same = [
        (one, other)
        for one, other in itertools.combinations(arms, 2)
        if not config.differences(essential(arms[one]), essential(arms[other])) and study.axes(one) == study.axes(other)
    ]
    for one, other in same:
        fields = ", ".join(config.differences(arms[one], arms[other]))
        but = f" but {fields}, on which no result depends" if fields else ""
        if study.baseline in (one, other):
            variant = other if one == study.baseline else one
            out.append(f"variant {variant!r} changes nothing{but}: its run is that of the baseline {study.baseline!r}")
        else:
            out.append(f"variants {one!r} and {other!r} are alike{but}: one run serves both")
    tokens = {name: tokens_of(cfg) for name, cfg in arms.items()}
    kind = "" if study.budget == {} else allowed(study, arms[study.baseline])[0]
    if kind != "tokens" and max(tokens.values()) - min(tokens.values()) > max(
        cost(cfg).tokens_per_step for cfg in arms.values()
    ):
        listed = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        out.append(f"the arms see different numbers of training tokens: {listed}")
    if kind:
        out += _overspent(study, arms, memory)
    out += _chosen_looks(study, arms) + _schedules(arms) + _texts(study, arms) + _tokenizers(study, arms, kind)
    points = {name: study.tries(name) for name in arms}
    if len(set(points.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in points.items())
        out.append(f"the arms are tuned with different numbers of points: {listed}")
    return out


def _overspent(study: Study, arms: Mapping[str, FrozenConfigDict], memory: Memory) -> list[str]:
    """Where whole steps are too coarse for the budget."""
    kind, amount = allowed(study, arms[study.baseline])
    spent = {name: cfg.steps * of_a_step(kind, cfg, memory) for name, cfg in arms.items()}
    listed = [f"{name} {value:,.6g} in {arms[name].steps}" for name, value in spent.items() if _off(value, amount)]
    of = "FLOPs" if kind == "flops" else kind
    return [f"the budget is {amount:,.6g} {of}, and steps are whole: {', '.join(listed)}"] if listed else []


def _off(value: float, amount: float, by: float = 0.01) -> bool:
    return abs(value / amount - 1) > by


def _chosen_looks(study: Study, arms: Mapping[str, FrozenConfigDict]) -> list[str]:
    """Where some arms count at the best of their evaluations, and others at the last; or could, and don't."""
    out = []
    choosing = [name for name, cfg in arms.items() if judge(cfg, study.score)]
    if 0 < len(choosing) < len(arms) and study.metric.startswith("eval/"):
        out.append(
            f"arms that may stop early ({', '.join(choosing)}) count at the best of their evaluations, the others at "
            "their last: the best of several looks at the text that scores it is a little too good; score='best' takes "
            "all arms at their best, and asks what helps beyond it"
        )
    late = [name for name, cfg in arms.items() if cfg.early_stopping.patience and not cfg.checkpoint.best]
    if late:
        out.append(
            f"{', '.join(late)} may stop early and count where they stopped, evaluations after their best: "
            "checkpoint.best is '', set it to return there"
        )
    return out


def _schedules(arms: Mapping[str, FrozenConfigDict]) -> list[str]:
    """Where a warmup of so many steps is another part of each arm's run."""
    if len({cfg.steps for cfg in arms.values()}) < 2:
        return []
    given = {
        f"{path}={value!r}": None
        for cfg in arms.values()
        for path, value in config.items(cfg.optimizer, "optimizer.")
        if path.rpartition(".")[2] in _LENGTHS and _in_steps(value)
    }
    listed = ", ".join(f"{name} {cfg.steps:,}" for name, cfg in arms.items())
    said = f"the arms train for different numbers of steps ({listed}), and a schedule's length is given in steps"
    return [f"{said} ({', '.join(given)}): a fraction below 1 would follow the budget"] if given else []


def _in_steps(value: Any) -> bool:
    return any(type(one) in (int, float) and one >= 1 for one in (value if isinstance(value, tuple) else (value,)))


def _tokenizers(study: Study, arms: Mapping[str, FrozenConfigDict], kind: str) -> list[str]:
    """Where a token is not the same in all arms."""
    if len({cfg.data.tokenizer for cfg in arms.values()}) < 2:
        return []
    listed = ", ".join(f"{name} {cfg.data.tokenizer!r}" for name, cfg in arms.items())
    said = f"the arms have different tokenizers ({listed})"
    section, _, last = study.metric.rpartition("/")
    out = []
    if section in ("train", "eval") and last in _PER_TOKEN:
        out.append(f"{said}, and {study.metric} is per token: compare eval/bits_per_byte")
    if kind == "tokens":
        out.append(f"{said}: as many tokens are different amounts of text")
    return out


def _texts(study: Study, arms: Mapping[str, FrozenConfigDict]) -> list[str]:
    """Where arms are evaluated on different text."""
    if not study.metric.startswith("eval/"):
        return []
    out = []
    parts = {name: (windows(cfg), cfg.model.context_length, cfg.data.tokenizer) for name, cfg in arms.items()}
    if any(count for count, *_ in parts.values()) and len(set(parts.values())) > 1:
        listed = "; ".join(
            f"{name} {count or 'all'} windows of {length} tokens by {tokenizer!r}"
            for name, (count, length, tokenizer) in parts.items()
        )
        out.append(
            f"the arms are evaluated on different parts of the held-out text ({listed}): set eval.batches=0 in "
            "overrides, to evaluate the whole split"
        )
    texts = {
        name: {
            "data.validation": data.validation,
            "data.source": data.source if heldout.share(data.validation) else "",  # of which a share is held out
            "data.format": data.format,
        }
        for name, data in ((name, cfg.data) for name, cfg in arms.items())
    }
    for field in ("data.validation", "data.source", "data.format"):
        if len({one[field] for one in texts.values()}) > 1:
            listed = ", ".join(f"{name} {one[field]!r}" for name, one in texts.items())
            out.append(f"the arms are evaluated on different text, by {field} ({listed}): their {study.metric} differ")
    return out


def describe(study: Study, say: Callable[[str], None]) -> str:
    """What `runner.run` will do: trials, lanes, tokens, FLOPs, and the time, for which some steps are timed."""
    memory = Memory()
    arm: Arm = functools.partial(budgeted, study, memory=memory)
    arms = {name: arm(name, None) for name in study.variants}
    trials = known_trials(study, arm)
    found = check(study, arm, trials)
    if study.search == "optuna":
        for name in filter(study.axes, arms):
            trials += study.tries(name) * like(study, arm, name)[: len(study.tuning_seeds)]
    rows = [("variant", "trials", "tuning", "steps", "tokens", "FLOPs a trial", "differs from the baseline in")]
    for name, cfg in arms.items():
        changed = changes(arms[study.baseline], cfg)
        shown = "; ".join(f"{path} {was!r} -> {now!r}" for path, (was, now) in changed.items())
        shown = shown if len(shown) <= 100 else shown[:97] + "..."
        tuned = str(study.tries(name) * len(study.tuning_seeds))
        spent = f"{tokens_of(cfg):,}", f"{flops_of(cfg):.3g}"
        rows.append((name, str(len(study.seeds)), tuned, f"{cfg.steps:,}", *spent, shown))
    programs = Counter(lanes.digest(found[one.address]) for one in trials)
    baseline = arms[study.baseline]
    say("timing a few steps of the baseline")
    step_seconds = lanes.median_seconds_per_step(prepare(baseline))
    tokens, in_all = sum(tokens_of(one.config) for one in trials), sum(flops_of(one.config) for one in trials)
    minutes = step_seconds * baseline.steps * in_all / flops_of(baseline) / 60
    fit = study.lanes or min(lanes.most(prepare(baseline).config), max(programs.values()))
    text = "\n".join(
        [
            study.question,
            f"metric {study.metric}, baseline {study.baseline!r}, seeds {', '.join(map(str, study.seeds))}",
            f"budget: {budget(study, arms)}",
            *(f"  {line}" for line in aligned(rows)),
            *(f"doubt: {line}" for line in doubts(study, arms, memory)),
            f"{len(trials)} trials in {len(programs)} programs, as lanes of up to {fit} where that is faster",
            f"{tokens:,} training tokens, {in_all:.3g} FLOPs, about {minutes:,.1f} minutes here, one run after another "
            f"at the baseline's {step_seconds * 1e3:.3g} ms a step; evaluation and compilation come on top",
        ]
    )
    return redact.text(text)
