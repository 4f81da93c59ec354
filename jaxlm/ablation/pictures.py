"""The plots of a report as PNG, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.ablation import plot_data
from jaxlm.ablation.findings import Findings, ranked
from jaxlm.telemetry import curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(findings: Findings, folder: Path) -> list[Path]:
    """ranking.png, curves.png, sensitivity.png: those that have something to show; none without matplotlib."""
    made = [picture(findings, folder) for picture in (_ranking, _curves, _sensitivity)]
    return [path for path in made if path]


def _ranking(findings: Findings, folder: Path) -> Path | None:
    figure = curves.new_figure(1.1 + 0.45 * len(findings.comparisons))
    if figure is None or not findings.comparisons:
        return None
    axes, shown = figure.subplots(), plot_data.looks(findings)
    axes.axvline(0, color=plot_data.GREY, linewidth=1.2, zorder=1)
    for row, one in enumerate(order := ranked(findings)):
        color = shown[one.variant].color
        axes.plot(one.interval, [row, row], color=color, linewidth=2)
        axes.plot([one.mean], [row], color=color, marker="o", markersize=7)
        for side, edge in plot_data.beyond(findings, one).items():
            marker = {"left": "<", "right": ">"}[side]
            axes.plot([edge], [row], color=color, marker=marker, markersize=9, clip_on=False, zorder=5)
        remark = plot_data.remark(findings, one)
        axes.annotate(remark, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize="small")
    axes.set_yticks(range(len(order)), [plot_data.cut(one.variant) for one in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlabel(f"{findings.metric}: variant minus baseline", parse_math=False)
    curves.frame(axes)
    axes.set_xlim(plot_data.difference_limits(findings))
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    return curves.save(figure, folder / "ranking.png")


def _curves(findings: Findings, folder: Path) -> Path | None:
    found, shown = plot_data.bands(findings), plot_data.looks(findings)
    figure = curves.new_figure(5)
    if figure is None or not found:
        return None
    from matplotlib.ticker import EngFormatter

    axes = figure.subplots()
    for variant, band in found.items():
        color, dash = shown[variant]
        style = _style(dash) if band.finished else "dotted"
        axes.plot(band.tokens, band.mean, color=color, linestyle=style, linewidth=1.8)
        axes.plot(band.tokens, band.training, color=color, linestyle="dashed", linewidth=0.8)
        low, high = band.mean - band.deviation, band.mean + band.deviation
        axes.fill_between(band.tokens, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(findings.metric, parse_math=False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    curves.frame(axes)
    axes.set_ylim(plot_data.band_limits(found))
    _legend(axes, list(found), findings)
    return curves.save(figure, folder / "curves.png")


def _sensitivity(findings: Findings, folder: Path) -> Path | None:
    tuned, shown = plot_data.sensitivities(findings), plot_data.looks(findings)
    figure = curves.new_figure(0.6 + 4 * len(tuned))
    if figure is None or not tuned:
        return None
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    panels = figure.subplots(len(tuned), 1, squeeze=False)[:, 0]
    for axes, (axis, found) in zip(panels, tuned.items()):
        heights = plot_data.edge_heights(findings, found)
        for variant, one in found.items():
            color, dash = shown[variant]
            axes.plot(one.values, one.metric, color=color, linestyle=_style(dash), linewidth=1.8)
            for filled in (True, False):
                mask = one.good == filled
                axes.plot(one.values[mask], one.metric[mask], "o", color=color, mfc=color if filled else "white")
            axes.plot([one.edge], [heights[variant]], "x", color=color, mew=2)
        axes.set_xscale(plot_data.scale(found))
        axes.set_xlabel(axis, parse_math=False)
        axes.set_ylabel(findings.metric, parse_math=False)
        curves.frame(axes)
        axes.margins(x=0.05)
        axes.set_ylim(plot_data.sensitivity_limits(found, findings.lower_is_better))
        if ticks := plot_data.tried(found):
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        elif axes.get_xscale() == "log":
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6))
    _legend(panels[-1], list(dict.fromkeys(variant for found in tuned.values() for variant in found)), findings)
    return curves.save(figure, folder / "sensitivity.png")


def _legend(axes: Axes, variants: list[str], findings: Findings) -> None:
    """Below the figure, where it hides nothing."""
    from matplotlib.lines import Line2D

    looks = map(plot_data.looks(findings).__getitem__, variants)
    lines = [Line2D([], [], color=color, linestyle=_style(dash), linewidth=1.8) for color, dash in looks]
    names = [plot_data.cut(one, 26) for one in variants]
    legend = axes.figure.legend(lines, names, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)


def _style(dash: tuple[int, ...]) -> Any:
    return (0, dash) if dash else "solid"
