"""A study's findings as files: report.md, report.html, results.csv, results.parquet and pictures."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm import files
from jaxlm.ablation import page
from jaxlm.ablation.findings import Findings, Outcome
from jaxlm.ablation.page import Cell, Table
from jaxlm.telemetry import curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NOTES = (
    (
        "Paired seeds",
        "Every variant runs on the baseline's seeds, and a difference is taken seed by seed, variant minus baseline: "
        "what a seed does to both cancels. The correlation of the two over the seeds says what that gains: much near "
        "1, nothing near 0. A diverged seed has no value and is left out of the pairs; the ranking counts it.",
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
        "in 95 of 100 studies.",
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


def write(findings: Findings, folder: Path) -> list[Path]:
    """Writes the report into `folder`, each file atomically.

    Returns:
      The files, report.md first. Without matplotlib no pictures, without Plotly or Jinja2 no page, without pyarrow no
      results.parquet are among them.

    Raises:
      OSError: a file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = _places(findings)
    tables = {
        "ranking": _ranking(findings, places),
        "tuning": _tuning(findings, places),
        "changes": _changes(findings),
        "costs": _costs(findings),
        "statistics": _statistics(findings, places),
        "trials": _trials(findings, places),
    }
    words = _words(findings, places)
    drawn = [draw(findings, folder) for draw in (_ranking_png, _curves_png, _sensitivity_png)]
    pictures = [picture for picture in drawn if picture]
    written = [_text(folder / "report.md", _markdown(findings, tables, words, [path.name for path in pictures]))]
    html = page.render(findings, tables, words, places)
    if html is not None:
        written.append(_text(folder / "report.html", html))
    return written + _results(findings, folder) + pictures


def _places(findings: Findings) -> int:
    """Decimals of the metric: two digits of what the seeds make of it."""
    spreads = [one.deviation for one in findings.comparisons]
    spreads += [findings.noise.deviation] if findings.noise else []
    spreads = [spread for spread in spreads if spread > 0 and math.isfinite(spread)]
    return min(max(1 - math.floor(math.log10(np.median(spreads))), 0), 8) if spreads else 4


def _words(findings: Findings, places: int) -> dict[str, Any]:
    noise, direction = findings.noise, "lower" if findings.lower_is_better else "higher"
    facts = [f"Metric: {findings.metric}, {direction} is better.", f"Budget: {findings.budget}."]
    if noise:
        facts.append(
            f"Baseline (“{findings.baseline}”): {noise.mean:.{places}f} ± {noise.deviation:.{places}f} "
            f"(mean ± standard deviation over {noise.seeds} seeds); noise floor ±{noise.floor:.{places}f}."
        )
    else:
        facts.append(f"Baseline (“{findings.baseline}”): fewer than two seeds finished, so its noise is not known.")
    smallest = [one.smallest for one in findings.comparisons if math.isfinite(one.smallest)]
    if smallest:
        low, high = (f"{end(smallest):.{places}f}" for end in (min, max))
        facts.append(
            f"Smallest effect that so many seeds can show: {low if low == high else f'{low} to {high}, by variant'}."
        )
    floor = f"Grey: the noise floor, ±{noise.floor:.{places}f}." if noise else "The noise floor is not known."
    good = f"the good region, within the noise floor (±{noise.floor:.{places}f}) of " if noise else ""
    return {
        "facts": facts,
        "forest": f"Points: mean difference over the paired seeds; bars: intervals. Further left is "
        f"{'better' if findings.lower_is_better else 'worse'}. {floor}",
        "curves": "Lines: mean over the seeds that finished, as far as all of them ran; bands: ± one standard "
        "deviation over the seeds. Dotted: no seed finished. The start of the run lies outside.",
        "sensitivity": f"At the best of the other tuned values. Filled points: {good}the variant's best. ✕ at the top: "
        "the smallest value from which a seed diverged. Extreme values may lie outside.",
        "notes": _NOTES,
    }


def _ranking(findings: Findings, places: int) -> Table:
    """Best first; what never finished last."""
    against = {one.variant: one for one in findings.comparisons}
    sign = 1 if findings.lower_is_better else -1
    ranks, rows = {}, []
    for variant in findings.variants:
        trials = page.compared(findings, variant)
        values = [one.value for one in trials if page.finished(one)]
        mean = ranks[variant] = float(np.mean(values)) if values else math.nan
        spread = f" ± {np.std(values, ddof=1):.{places}f}" if len(values) > 1 else ""
        lost = sum(map(page.diverged, trials))
        seeds = f"{len(values)} of {len(findings.seeds)}" + (f", {lost} diverged" if lost else "")
        one = against.get(variant)
        difference, interval, p = Cell("baseline", 0.0), _number(math.nan), _number(math.nan)
        if one:
            difference, interval = _number(one.mean, f"+.{places}f"), _interval(one.interval, places)
            p = _p(one.p_corrected)
        row = [_word(variant), _word(one.verdict if one else "baseline")]
        row += [Cell(f"{mean:.{places}f}{spread}" if values else "–", mean), difference, interval, p]
        rows.append([*row, Cell(seeds, float(len(values)))])
    rows.sort(key=lambda row: math.inf if math.isnan(ranks[row[0].text]) else sign * ranks[row[0].text])
    headers = ("Variant", "Verdict", findings.metric, "Difference", "Interval", "Corrected p", "Seeds finished")
    return Table("By the mean over the seeds; differences and intervals are to the baseline", headers, rows)


def _tuning(findings: Findings, places: int) -> Table:
    rows = []
    for axis, found in page.sensitivities(findings).items():
        for variant, one in found.items():
            best, value, good = math.nan, math.nan, "none finished"
            if len(one.values):
                index = int(np.argmin(one.metric if findings.lower_is_better else -one.metric))
                best, value, ends = one.values[index], one.metric[index], one.values[one.good][[0, -1]]
                good = " to ".join(f"{end:.6g}" for end in dict.fromkeys(ends)) if findings.noise else "not known"
            row = [_word(variant), _word(axis), _number(best, ".6g"), _number(value, f".{places}f"), _word(good)]
            chosen = findings.chosen.get(variant, {}).get(axis, "–")
            rows.append([*row, _number(one.edge, ".6g", "no seed diverged"), Cell(str(chosen), chosen)])
    headers = ("Variant", "Tuned", "Best value", findings.metric, "Good region", "Diverged from", "Compared at")
    return Table("Good region: from the first to the last value within the noise floor of the best", headers, rows)


def _changes(findings: Findings) -> Table:
    rows = [
        [_word(variant), _word(field), *(_word(str(value)) for value in pair)]
        for variant, fields in findings.differences.items()
        for field, pair in fields.items()
    ]
    return Table("Settings that differ from the baseline's", ("Variant", "Setting", "Baseline", "Variant's"), rows)


def _costs(findings: Findings) -> Table:
    rows = []
    for variant in findings.variants:
        trials = [one for one in findings.outcomes if one.variant == variant]
        tuning = sum(one.tuning for one in trials)
        rows.append(
            [
                _word(variant),
                Cell(f"{len(trials) - tuning} + {tuning}", float(len(trials))),
                _total([one.tokens for one in trials], "{:,.0f}".format),
                _total([one.flops for one in trials], "{:.3g}".format),
                _total([one.seconds for one in trials], _duration),
                _total([one.joules for one in trials], lambda x: f"{x:,.0f} J" if x < 1e4 else f"{x / 1e3:,.1f} kJ"),
            ]
        )
    headers = ("Variant", "Trials, compared + tuning", "Tokens", "FLOPs", "Training time", "Energy")
    return Table("Of all trials of a variant together, tuning included", headers, rows)


def _statistics(findings: Findings, places: int) -> Table:
    rows = [
        [
            _word(one.variant),
            _number(len(one.seeds), "d"),
            _number(one.mean, f"+.{places}f"),
            _number(one.deviation, f".{places}f"),
            _interval(one.interval, places),
            _interval(one.bootstrap, places),
            *map(_p, (one.p, one.p_corrected, one.p_sign)),
            _number(one.correlation, ".2f"),
            _number(one.smallest, f".{places}f"),
            _number(math.nan if one.needed is None else one.needed, ","),
        ]
        for one in findings.comparisons
    ]
    headers = "Variant|Pairs|Difference|Deviation|Interval|Bootstrap|p|Corrected p|Sign test p|Correlation"
    headers += "|Smallest visible|Seeds needed"
    return Table("Differences to the baseline over the paired seeds", headers.split("|"), rows)


def _trials(findings: Findings, places: int) -> Table:
    baseline = {one.seed: one.value for one in page.compared(findings, findings.baseline)}
    rows = []
    for one in findings.outcomes:
        alone = one.tuning or one.variant == findings.baseline
        difference = math.nan if alone else one.value - baseline.get(one.seed, math.nan)
        row = [_word(one.variant), _number(one.seed, "d"), _number(one.value, f".{places}f")]
        row += [_number(difference, f"+.{places}f"), _word("tuning" if one.tuning else "compared")]
        point = ", ".join(f"{name} = {value}" for name, value in one.point.items())
        rows.append([*row, *map(_word, (point, one.status or "not begun", one.trial))])
    headers = ("Variant", "Seed", findings.metric, "Difference", "Role", "Tuned values", "Status", "Trial")
    return Table("One row a trial; the difference is to the baseline's value on the same seed", headers, rows)


def _word(text: str) -> Cell:
    return Cell(text, text)


def _number(value: float, form: str = "", unknown: str = "–") -> Cell:
    return Cell(format(value, form) if math.isfinite(value) else unknown, float(value))


def _interval(ends: tuple[float, float], places: int) -> Cell:
    return Cell("–" if math.isnan(ends[0]) else f"[{ends[0]:+.{places}f}, {ends[1]:+.{places}f}]", ends[0])


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


def _markdown(findings: Findings, tables: Mapping[str, Table], words: Mapping[str, Any], pictures: list[str]) -> str:
    def lines(table: Table) -> str:
        rows = [table.headers, *([cell.text for cell in row] for row in table.rows)]
        head, *body = (f"| {' | '.join(map(_escaped, row))} |" for row in rows)
        return "\n".join([head, "|" + " --- |" * len(table.headers), *body])

    parts = [f"# {_escaped(findings.question)}", f"**{_escaped(findings.verdict)}**"]
    parts.append("\n".join(f"- {_escaped(fact)}" for fact in words["facts"]))
    if findings.warnings:
        parts += ["## Warnings", "\n".join(f"- {_escaped(warning)}" for warning in findings.warnings)]
    parts += ["## Ranking", lines(tables["ranking"]), f"{tables['ranking'].title}."]
    for name, about in (("ranking", "forest"), ("curves", "curves"), ("sensitivity", "sensitivity")):
        if f"{name}.png" in pictures:
            parts += [f"![{name}]({name}.png)", words[about]]
    titles = ("Tuned values", "What the variants change", "Costs", "Statistics")
    for name, title in zip(("tuning", "changes", "costs", "statistics"), titles):
        if tables[name].rows:
            parts += [f"## {title}", lines(tables[name]), f"{tables[name].title}."]
    parts += [f"**{name}.** {note}" for name, note in words["notes"]]
    parts += ["## To run it again", f"```\n{findings.command}\n```", "Every trial is in results.csv."]
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """As Markdown that shows this text, on one line."""
    text = re.sub(r"([\\`*|<$]|~(?=~)|&(?=#?\w+;)|\](?=[(\[:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
    return " ".join(text.split())


def _results(findings: Findings, folder: Path) -> list[Path]:
    axes = list(dict.fromkeys(axis for one in findings.outcomes for axis in one.point))

    def row(one: Outcome) -> dict[str, Any]:
        values = one._asdict()
        point = {f"point.{axis}": one.point.get(axis) for axis in axes}
        before, after = (
            ("trial", "variant", "seed", "tuning"),
            ("status", "value", "tokens", "flops", "seconds", "joules"),
        )
        return {name: values[name] for name in before} | point | {name: values[name] for name in after}

    rows = [row(one) for one in findings.outcomes]
    if not rows:
        return []
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    written = [_text(folder / "results.csv", text.getvalue())]
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return written
    columns = {}
    for name in rows[0]:
        values = [one[name] for one in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError):  # mixed: as text
            columns[name] = pyarrow.array([None if value is None else str(value) for value in values])
    with files.atomic(folder / "results.parquet") as file:
        parquet.write_table(pyarrow.table(columns), file)
    return [*written, folder / "results.parquet"]


def _text(path: Path, text: str) -> Path:
    with files.atomic(path) as file:
        file.write(text.encode())
    return path


def _ranking_png(findings: Findings, folder: Path) -> Path | None:
    figure = curves.new_figure(1.1 + 0.45 * len(findings.comparisons))
    if figure is None or not findings.comparisons:
        return None
    axes, shown = figure.subplots(), page.looks(findings)
    if findings.noise:
        axes.axvspan(-findings.noise.floor, findings.noise.floor, color=page.FLOOR, zorder=0)
    axes.axvline(0, color=page.GREY, linewidth=1.2, zorder=1)
    for row, one in enumerate(findings.comparisons):
        color = shown[one.variant].color
        axes.plot(one.interval, [row, row], color=color, linewidth=2)
        axes.plot([one.mean], [row], color=color, marker="o", markersize=7)
        remark = page.remark(findings, one, _places(findings))
        axes.annotate(remark, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize="small")
    axes.set_yticks(range(len(findings.comparisons)), [page.cut(one.variant) for one in findings.comparisons])
    axes.set_ylim(len(findings.comparisons) - 0.4, -0.6)
    axes.set_xlabel(f"{findings.metric}: variant minus baseline; grey: noise floor", parse_math=False)
    curves.frame(axes)
    axes.set_xlim(page.difference_limits(findings))
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    return curves.save(figure, folder / "ranking.png")


def _curves_png(findings: Findings, folder: Path) -> Path | None:
    found, shown = page.bands(findings), page.looks(findings)
    figure = curves.new_figure(5)
    if figure is None or not found:
        return None
    from matplotlib.ticker import EngFormatter

    axes = figure.subplots()
    for variant, band in found.items():
        color, dash = shown[variant]
        style = _style(dash) if band.finished else "dotted"
        axes.plot(band.tokens, band.mean, color=color, linestyle=style, linewidth=1.8)
        low, high = band.mean - band.deviation, band.mean + band.deviation
        axes.fill_between(band.tokens, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(findings.metric, parse_math=False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    curves.frame(axes)
    axes.set_ylim(page.band_limits(found))
    _legend(axes, list(found), findings)
    return curves.save(figure, folder / "curves.png")


def _sensitivity_png(findings: Findings, folder: Path) -> Path | None:
    tuned, shown = page.sensitivities(findings), page.looks(findings)
    figure = curves.new_figure(0.6 + 4 * len(tuned))
    if figure is None or not tuned:
        return None
    panels = figure.subplots(len(tuned), 1, squeeze=False)[:, 0]
    for axes, (axis, found) in zip(panels, tuned.items()):
        heights = page.edge_heights(findings, found)
        for variant, one in found.items():
            color, dash = shown[variant]
            axes.plot(one.values, one.metric, color=color, linestyle=_style(dash), linewidth=1.8)
            for filled in (True, False):
                mask = one.good == filled
                axes.plot(one.values[mask], one.metric[mask], "o", color=color, mfc=color if filled else "white")
            axes.plot([one.edge], [heights[variant]], "x", color=color, mew=2)
        axes.set_xscale(page.scale(found))
        axes.set_xlabel(axis, parse_math=False)
        axes.set_ylabel(findings.metric, parse_math=False)
        curves.frame(axes)
        axes.margins(x=0.05)
        axes.set_ylim(page.sensitivity_limits(found, findings.lower_is_better))
        if ticks := page.tried(found):
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
    _legend(panels[-1], list(dict.fromkeys(variant for found in tuned.values() for variant in found)), findings)
    return curves.save(figure, folder / "sensitivity.png")


def _legend(axes: Axes, variants: list[str], findings: Findings) -> None:
    """Below the figure, where it hides nothing."""
    from matplotlib.lines import Line2D

    looks = map(page.looks(findings).__getitem__, variants)
    lines = [Line2D([], [], color=color, linestyle=_style(dash), linewidth=1.8) for color, dash in looks]
    names = [page.cut(one, 26) for one in variants]
    legend = axes.figure.legend(lines, names, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)


def _style(dash: tuple[int, ...]) -> Any:
    return (0, dash) if dash else "solid"
