"""What a study found: the values that tables, plots and the page are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import FrozenConfigDict

from jaxlm import redact
from jaxlm.ablation import factorial, figures, methods, scoring, stats, verdicts
from jaxlm.ablation.factorial import Effect
from jaxlm.ablation.outcomes import OVER, Outcome
from jaxlm.ablation.plan import budget, changes
from jaxlm.ablation.points import Overrides
from jaxlm.ablation.stats import Comparison, Noise
from jaxlm.ablation.study import Study


class Findings(NamedTuple):
    """All that the report says, and nothing that it must look up."""

    name: str  # of the study's file, without .py
    question: str
    metric: str
    lower_is_better: bool
    baseline: str
    variants: Sequence[str]  # in the study's order, with the baseline
    seeds: Sequence[int]
    budget: str  # in words: "250,000 training tokens a trial"
    outcomes: Sequence[Outcome]
    comparisons: Sequence[Comparison]  # one of each variant but the baseline
    noise: Noise | None  # of the baseline; None where it has fewer than two finished seeds
    differences: Mapping[str, Mapping[str, tuple[Any, Any]]]  # variant -> config field -> (the baseline's, its own)
    chosen: Mapping[str, Mapping[str, Any]]  # variant -> the tuned point that is compared
    warnings: Sequence[str]
    verdict: str  # the answer, in a sentence or two
    command: str  # that runs it again
    score: str = scoring.words({})  # which value of a trial counts
    setup: Mapping[str, str] = {}  # how the study was done, in words by their headings
    effects: Sequence[Effect] = ()  # where the variants are a full grid

    @property
    def places(self) -> int:
        """Decimals of the metric. Those of a difference are its own, see `figures.decimals`."""
        return _places(self.noise, self.comparisons)


def gather(
    study: Study,
    arms: Mapping[str, FrozenConfigDict],
    points: Mapping[str, Overrides],
    outcomes: Sequence[Outcome],
    warnings: Sequence[str],
    *,
    name: str,
    command: str,
) -> Findings:
    """What the outcomes of a study say together.

    Args:
      arms: variant -> its config, at its tuned point.
      points: variant -> that point.
    """
    values: dict[str, dict[int, float]] = {variant: {} for variant in study.variants}
    for outcome in outcomes:
        if not outcome.tuning and outcome.status in OVER:
            values[outcome.variant][outcome.seed] = outcome.value
    machines = [one.machine for one in outcomes]
    noise = stats.noise(values[study.baseline])
    comparisons = stats.compare(values, study.baseline, lower_is_better=study.lower_is_better)
    return Findings(
        name=name,
        question=study.question,
        metric=study.metric,
        lower_is_better=study.lower_is_better,
        baseline=study.baseline,
        variants=tuple(study.variants),
        seeds=tuple(study.seeds),
        budget=budget(study, arms),
        outcomes=tuple(outcomes),
        comparisons=comparisons,
        noise=noise,
        differences={variant: changes(arms[study.baseline], cfg) for variant, cfg in arms.items()},
        chosen=points,
        warnings=tuple(map(redact.text, [*warnings, *methods.mixed(machines)])),
        verdict=verdicts.verdict(study, comparisons, values, _places(noise, comparisons)),
        command=command,
        score=scoring.words({variant: scoring.judge(cfg, study.score) for variant, cfg in arms.items()}),
        setup=methods.setup(study, arms[study.baseline], machines),
        effects=factorial.effects(study.variants, study.baseline, values, stats.CONFIDENCE),
    )


def compared(findings: Findings, variant: str) -> list[Outcome]:
    """The variant's trials that are compared, not those that tuned it."""
    return [one for one in findings.outcomes if one.variant == variant and not one.tuning]


def ranked(findings: Findings) -> list[Comparison]:
    """The comparisons in the order of the ranking: by the variant's mean, below the others those that lost seeds."""
    return sorted(findings.comparisons, key=lambda one: rank(findings, one.variant))


def rank(findings: Findings, variant: str) -> tuple[int, float]:
    """What a ranking sorts by, the best first: the seeds that were lost, as the mean of the rest flatters; then it."""
    trials = compared(findings, variant)
    values = [one.value for one in trials if one.finished]
    sign = 1 if findings.lower_is_better else -1
    return sum(one.diverged for one in trials), sign * float(np.mean(values)) if values else math.inf


def judged(findings: Findings, one: Comparison) -> str:
    """The verdict, and how many seeds the variant lost: all that is said of one that lost all, where no test rejects.

    Lost seeds say something to a reader, also where they are too few for any test.
    """
    over = [trial for trial in compared(findings, one.variant) if trial.status in OVER]
    if not one.lost:
        return one.verdict
    lost = f"diverged on {len(one.lost)} of {len(over)} seeds"
    if len(one.lost) == len(over) and one.verdict == "nothing can be concluded":
        return lost
    return f"{one.verdict}; {lost}"


def _places(noise: Noise | None, comparisons: Sequence[Comparison]) -> int:
    """For two digits of the baseline's spread over the seeds, whatever one bad arm's is."""
    own = [noise.deviation] if noise and noise.deviation else []
    return figures.two_digits(own or [one.deviation for one in comparisons])
