"""The tables and the words of a report, whatever it is written as."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.ablation import figures, plot_data, scoring, speedup
from jaxlm.ablation.findings import Findings, compared, judged, rank
from jaxlm.ablation.variants import written

_NOTES = (
    (
        "Paired seeds",
        "Every variant runs on the baseline's seeds, and a difference is taken seed by seed, variant minus baseline: "
        "what a seed does to both cancels. The correlation of the two over the seeds says what that gains: much near "
        "1, nothing near 0. A diverged seed has no value and is left out of the pairs; the ranking counts it.",
    ),
    (
        "Diverged seeds",
        "A run diverged where its loss is no finite number any more. Seeds on which one of the two arms alone diverged "
        "have a sign test of their own, corrected with the others: "
        "where it finds that one arm loses more of them, that arm is the worse one. With five such seeds or fewer it "
        "finds nothing at 95%.",
    ),
    (
        "Exploded losses",
        f"Where the metric is a loss, what of it is more than {scoring.MARGIN:g} nat above a uniform guess, the "
        "logarithm of the vocabulary's size (or, of a run that began with a model's weights, above its first training "
        "loss, if that is more), counts by its logarithm, log(1 + x), unless the training loss is lower, as in an "
        "overfitted model. The spread of runs that exploded would hide from a test that they did.",
    ),
    (
        "Interval and p",
        "From the paired t-test. p is how often seeds alone would give a difference at least as large if the variant "
        "changed nothing. With several variants a small p turns up by luck; Holm's correction allows for that. The "
        "interval is at the variant's corrected level: it leaves out 0 where the corrected test finds a difference.",
    ),
    (
        "Bootstrap and sign test",
        "Two checks that need no normal distribution, neither corrected. The bootstrap draws the seeds again and "
        "again; with few seeds its interval is too narrow. The sign test counts only on how many seeds the variant was "
        "better; with 5 seeds or fewer its p cannot fall below 0.05.",
    ),
    (
        "Noise floor",
        "Two arms of the baseline's config, with as many but different seeds, have means that differ by less than this "
        "in 95 of 100 studies. It is for means that share no seeds; the paired differences have their own intervals, "
        "which are mostly narrower.",
    ),
    (
        "Smallest visible effect and seeds needed",
        "The true difference that so many seeds would show with the study's power. No difference shown does not mean "
        "that there is none: a smaller one would mostly stay unseen. Seeds needed is for planning: how many would show "
        "the observed difference if it were the true one.",
    ),
    (
        "One seed",
        "A single seed cannot tell a difference from luck: nothing can be concluded.",
    ),
)


class Cell(NamedTuple):
    """What a table says in one place."""

    text: str
    key: float | str  # to sort by; nan comes last


class Table(NamedTuple):
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def tables(findings: Findings) -> dict[str, Table]:
    """All of them, by name."""
    digits = findings.places
    return {
        "ranking": _ranking(findings, digits),
        "effects": _effects(findings, digits),
        "tuning": _tuning(findings, digits),
        "changes": _changes(findings),
        "costs": _costs(findings),
        "statistics": _statistics(findings, digits),
        "trials": _trials(findings, digits),
    }


def words(findings: Findings) -> dict[str, Any]:
    """The facts, what the plots show, and notes on the statistics."""
    figure = functools.partial(figures.number, places=findings.places)
    noise, direction = findings.noise, "lower" if findings.lower_is_better else "higher"
    facts = [
        f"Metric: {findings.metric}, {direction} is better; score: {findings.score}.",
        f"Budget: {findings.budget}.",
    ]
    if noise:
        facts.append(
            f"Baseline (“{findings.baseline}”): {figure(noise.mean)} ± {figure(noise.deviation)} "
            f"(mean ± standard deviation over {noise.seeds} seeds); noise floor ±{figure(noise.floor)}."
        )
    else:
        facts.append(f"Baseline (“{findings.baseline}”): fewer than two seeds finished, so its noise is not known.")
    smallest = [one for one in findings.comparisons if math.isfinite(one.smallest)]
    if smallest:
        ends = (end(smallest, key=lambda one: one.smallest) for end in (min, max))
        low, high = (
            figures.number(one.smallest, figures.decimals(one.deviation, one.interval, findings.places)) for one in ends
        )
        facts.append(
            f"Smallest effect that so many seeds can show: {low if low == high else f'{low} to {high}, by variant'}."
        )
    floors = [one.floor for found in plot_data.sensitivities(findings).values() for one in found.values()]
    width = f"±{figure(max(floors))}, as it is for means over the seeds that tuned" if floors else ""
    good = f"the good region, within the noise floor ({width}) of " if noise else ""
    return {
        "facts": facts,
        "forest": f"Points: mean difference over the paired seeds; bars: intervals. Further left is "
        f"{'better' if findings.lower_is_better else 'worse'}. Arrows: bars that go on beyond the plot.",
        "curves": "Lines: mean over the seeds that finished, as far as all of them ran; bands: ± one standard "
        "deviation over the seeds. Dotted: no seed finished. Thin and dashed, where the metric is eval/loss: the mean "
        "training loss since the evaluation before. The scale is that of what follows the first third of the run.",
        "sensitivity": f"At the best of the other tuned values. Filled points: {good}the variant's best; where a seed "
        "diverged, a point is the mean of the others and never filled. ✕: the smallest value at which a seed "
        "diverged. Values far from the best may lie outside.",
        "notes": _NOTES,
    }


def _ranking(findings: Findings, places: int) -> Table:
    """Best first, by `findings.rank`."""
    against = {one.variant: one for one in findings.comparisons}
    rows = []
    for variant in sorted(findings.variants, key=lambda variant: rank(findings, variant)):
        trials = compared(findings, variant)
        values = [one.value for one in trials if one.finished]
        mean = float(np.mean(values)) if values else math.nan
        spread = f" ± {figures.number(float(np.std(values, ddof=1)), places)}" if len(values) > 1 else ""
        lost = sum(one.diverged for one in trials)
        seeds = f"{len(values)} of {len(findings.seeds)}" + (f", {lost} diverged" if lost else "")
        one = against.get(variant)
        difference, interval, p = Cell("baseline", 0.0), _number(math.nan), _number(math.nan)
        if one:
            own = figures.decimals(one.deviation, one.interval, places)
            difference, interval = _figure(one.mean, own, "+"), _interval(one.interval, own)
            p = _p(one.p_corrected)
        row = [_word(variant), _word(judged(findings, one) if one else "baseline")]
        row += [Cell(f"{figures.number(mean, places)}{spread}" if values else "–", mean), difference, interval, p]
        gaps = [one.gap for one in trials if one.finished]
        row += [_share(speedup.tokens_to_baseline(findings, variant))]
        rows.append(
            [*row, _figure(float(np.mean(gaps)) if gaps else math.nan, places, "+"), Cell(seeds, float(len(values)))]
        )
    headers = ["Variant", "Verdict", findings.metric, "Difference", "Interval", "Corrected p"]
    headers += ["Tokens to baseline", "Gap", "Seeds finished"]
    title = (
        "By the mean over the seeds, below the others those that lost a seed; differences and intervals are to the "
        "baseline; tokens to baseline: those at which the variant first reached the baseline's final value on the same "
        "seed, as a share of those at which the baseline did, the median over the seeds; gap: eval/loss minus training "
        "loss"
    )
    return Table(title, headers, rows)


def _effects(findings: Findings, places: int) -> Table:
    rows = []
    for one in findings.effects:
        own = figures.decimals(one.deviation, one.interval, places)
        row = [_word(one.name), _number(one.seeds, "d"), _figure(one.mean, own, "+"), _interval(one.interval, own)]
        rows.append([*row, _p(one.p), _p(one.p_corrected)])
    title = (
        "Of each value against the baseline's, the mean over all values of the other fields; ×: how much two such "
        "effects together differ from their sum; paired over the seeds on which every variant finished, intervals and "
        "p corrected over these rows by Holm's method"
    )
    return Table(title, ("Effect", "Seeds", "Difference", "Interval", "p", "Corrected p"), rows)


def _tuning(findings: Findings, places: int) -> Table:
    rows = []
    for axis, found in plot_data.sensitivities(findings).items():
        for variant, one in found.items():
            best, value, good = math.nan, math.nan, "none finished on every seed"
            if one.whole.any():
                metric = one.metric if findings.lower_is_better else -one.metric
                index = int(np.argmin(np.where(one.whole, metric, math.inf)))
                best, value, ends = one.values[index], one.metric[index], one.values[one.good][[0, -1]]
                good = " to ".join(f"{end:.6g}" for end in dict.fromkeys(ends)) if findings.noise else "not known"
            row = [_word(variant), _word(axis), _number(best, ".6g"), _figure(value, places), _word(good)]
            chosen = written(findings.chosen.get(variant, {}).get(axis, "–"))
            rows.append([*row, _number(one.edge, ".6g", "no seed diverged"), Cell(str(chosen), chosen)])
    headers = ("Variant", "Tuned", "Best value", findings.metric, "Good region", "Diverged from", "Compared at")
    title = (
        "Best value: of those at which no seed diverged; good region: the smallest and the largest of these whose mean "
        "is within the noise floor of the best's; diverged from: the smallest value at which a seed did"
    )
    return Table(title, headers, rows)


def _changes(findings: Findings) -> Table:
    rows = [
        [_word(variant), _word(field), *(_word(str(value)) for value in pair)]
        for variant, fields in findings.differences.items()
        for field, pair in fields.items()
    ]
    return Table("Settings that differ from the baseline's", ("Variant", "Setting", "Baseline", "Variant's"), rows)


def _costs(findings: Findings) -> Table:
    rows = []
    carbon = any(math.isfinite(one.gco2e) for one in findings.outcomes)
    for variant in findings.variants:
        trials = list({one.trial: one for one in findings.outcomes if one.variant == variant}.values())
        tuning = sum(one.tuning for one in trials)
        measured = [one for one in trials if math.isfinite(one.joules) and one.tokens]
        per_token = sum(one.joules for one in measured) / sum(one.tokens for one in measured) if measured else math.nan
        rows.append(
            [
                _word(variant),
                Cell(f"{len(trials) - tuning} + {tuning}", float(len(trials))),
                _total([one.tokens for one in trials], "{:,.0f}".format),
                _total([one.flops for one in trials], "{:.3g}".format),
                _total([one.seconds for one in trials], _duration),
                _total([one.joules for one in trials], lambda x: f"{x:,.0f} J" if x < 1e4 else f"{x / 1e3:,.1f} kJ"),
                _number(per_token, ".3g", "not measured"),
            ]
        )
        if carbon:
            rows[-1].append(_total([one.gco2e for one in trials], "{:,.3g} g".format))
    energy = "Energy, estimated" if any(one.estimated for one in findings.outcomes) else "Energy"
    headers = ["Variant", "Trials, compared + tuning", "Tokens", "FLOPs", "Training time", energy, "Joules per token"]
    headers += ["CO2e"] if carbon else []
    return Table("Of all trials of a variant together, tuning included", headers, rows)


def _statistics(findings: Findings, places: int) -> Table:
    rows = []
    for one in findings.comparisons:
        own = figures.decimals(one.deviation, one.interval, places)
        row = [_word(one.variant), _number(len(one.seeds), "d"), _figure(one.mean, own, "+")]
        row += [_figure(one.deviation, own), _interval(one.interval, own), _interval(one.bootstrap, own)]
        row += [*map(_p, (one.p, one.p_corrected, one.p_sign, one.p_lost)), _number(one.correlation, ".2f")]
        needed = math.nan if one.needed is None else one.needed
        rows.append([*row, _figure(one.smallest, own), _number(needed, ",")])
    headers = "Variant|Pairs|Difference|Deviation|Interval|Bootstrap|p|Corrected p|Sign test p|Diverged p|Correlation"
    headers += "|Smallest visible|Seeds needed"
    return Table("Differences to the baseline over the paired seeds", headers.split("|"), rows)


def _trials(findings: Findings, places: int) -> Table:
    baseline = {one.seed: one.value for one in compared(findings, findings.baseline)}
    rows = []
    for one in findings.outcomes:
        alone = one.tuning or one.variant == findings.baseline
        difference = math.nan if alone else one.value - baseline.get(one.seed, math.nan)
        row = [_word(one.variant), _number(one.seed, "d"), _figure(one.value, places)]
        row += [_figure(difference, places, "+"), _word("tuning" if one.tuning else "compared")]
        point = ", ".join(f"{name} = {written(value)}" for name, value in one.point.items())
        status = f"{one.status}, lost" if one.diverged and one.status != "diverged" else one.status
        rows.append([*row, *map(_word, (point, status or "not begun", one.trial))])
    headers = ("Variant", "Seed", findings.metric, "Difference", "Role", "Tuned values", "Status", "Trial")
    return Table("One row a trial; the difference is to the baseline's value on the same seed", headers, rows)


def _word(text: str) -> Cell:
    return Cell(text, text)


def _number(value: float, form: str = "", unknown: str = "–") -> Cell:
    return Cell(format(value, form) if math.isfinite(value) else unknown, float(value))


def _figure(value: float, places: int, sign: str = "") -> Cell:
    return Cell(figures.number(value, places, sign) if math.isfinite(value) else "–", float(value))


def _share(value: float) -> Cell:
    return Cell("not reached", value) if value == math.inf else _number(value, ".0%")


def _interval(ends: tuple[float, float], places: int) -> Cell:
    shown = ", ".join(figures.number(end, places, "+") for end in ends)
    return Cell("–" if math.isnan(ends[0]) else f"[{shown}]", ends[0])


def _p(value: float) -> Cell:
    return Cell("< 0.0001", value) if value < 1e-4 else _number(value, ".2g")


def _total(values: Sequence[float], words: Callable[[float], str]) -> Cell:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Cell("not measured", math.nan)
    part = "" if len(known) == len(values) else f" ({len(known)} of {len(values)} trials measured)"
    return Cell(words(sum(known)) + part, float(sum(known)))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 100 else f"{seconds / 60:.1f} min"
