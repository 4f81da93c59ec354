"""The HTML page that shows a study's findings: one file that needs no network.

Its text is `page.html` (Jinja2), its looks `page.css`, its behaviour `page.js`; the charts are Plotly's.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.ablation import figures, plot_data
from jaxlm.ablation.findings import Findings, judged, ranked
from jaxlm.ablation.tables import Table

_DOTTED = "2px,3px"


def render(findings: Findings, tables: Mapping[str, Table], words: Mapping[str, Any]) -> str | None:
    """The page; None if Jinja2 or Plotly isn't installed.

    Args:
      tables: what `report` also writes as Markdown, by the names that page.html uses.
      words: the other text of page.html.
    """
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    here = Path(__file__)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here.parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    figures = {"forest": _forest(findings), "curves": _curves(findings)}
    tuned = plot_data.sensitivities(findings)
    for i, axis in enumerate(tuned):
        figures[f"sensitivity-{i}"] = _sensitivity(findings, axis, tuned[axis])
    return environment.get_template("page.html").render(
        findings=findings,
        tables=tables,
        words=words,
        looks=plot_data.looks(findings),
        figures=_json(figures),
        axes=[(name, axis["title"]) for name, axis in figures["curves"]["axes"].items()],
        shown=list(plot_data.bands(findings)),
        tuned={axis: list(found) for axis, found in tuned.items()},
        css=here.with_suffix(".css").read_text(encoding="utf-8"),
        js=here.with_suffix(".js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )


def _forest(findings: Findings) -> dict[str, Any]:
    shown, data, labels = plot_data.looks(findings), [], []
    low, high = plot_data.difference_limits(findings)
    for row, one in enumerate(ranked(findings)):
        color, (left, right) = shown[one.variant].color, one.interval
        own = figures.decimals(one.deviation, one.interval, findings.places)
        mean = figures.number(one.mean, own, "+")
        bar = {"type": "data", "symmetric": False, "array": [right - one.mean], "arrayminus": [one.mean - left]}
        ends = ", ".join(figures.number(end, own, "+") for end in one.interval)
        interval = "" if math.isnan(left) else f" [{ends}]"
        data.append(
            {"type": "scatter", "mode": "markers", "x": [one.mean], "y": [row], "showlegend": False}
            | {"name": _text(plot_data.cut(one.variant)), "marker": {"color": color, "size": 10}}
            | {"error_x": bar | {"visible": bool(interval), "thickness": 2, "width": 5}}
            | {"hovertemplate": f"{mean}{interval}<br>{judged(findings, one)}"}
        )
        for side, edge in plot_data.beyond(findings, one).items():
            arrow = {"symbol": f"triangle-{side}", "size": 11, "color": color}
            data.append(
                {"type": "scatter", "mode": "markers", "x": [edge], "y": [row], "showlegend": False}
                | {"marker": arrow, "cliponaxis": False, "hoverinfo": "skip"}
            )
        label = f"{plot_data.cut(one.variant, 24)} · {plot_data.remark(findings, one)}"
        place = {"xref": "paper", "x": 0, "xanchor": "left", "y": row - 0.36, "showarrow": False}
        labels.append(place | {"text": _text(label)})
    behind = {"y0": 0, "y1": 1, "yref": "paper", "layer": "between"}
    zero = {"type": "line", "x0": 0, "x1": 0, "line": {"color": plot_data.GREY, "width": 2}}
    layout = _layout(f"{_text(findings.metric)}: variant minus baseline", "")
    layout["xaxis"] |= {"range": [low, high]}
    layout["yaxis"] |= {"range": [len(labels) - 0.4, -0.75], "visible": False, "fixedrange": True}
    layout |= {"annotations": labels, "shapes": [zero | behind], "hovermode": "closest"}
    layout |= {"height": 110 + 54 * len(labels), "margin": {"l": 8, "r": 8, "t": 32, "b": 52}}
    return {"data": data, "layout": layout}


def _curves(findings: Findings) -> dict[str, Any]:
    """With `axes`: of each x axis its title and the x of every trace, which page.js puts in."""
    found, shown, data = plot_data.bands(findings), plot_data.looks(findings), []
    unit, seconds = plot_data.time_unit(found)
    form = _form(findings)
    axes: dict[str, dict[str, Any]] = {
        "tokens": {"title": "training tokens", "tick": "~s", "hover": ",.0f", "x": []},
        "flops": {"title": "training FLOPs", "tick": ".1~e", "hover": ".3~e", "x": []},
    }
    if unit:
        axes["time"] = {"title": f"training time ({unit})", "tick": "~f", "hover": ".1f", "x": []}
    for variant, band in found.items():
        color, dash = shown[variant]
        several = np.isfinite(band.deviation).any()
        edge = np.flatnonzero(np.isfinite(band.mean) & np.isfinite(band.deviation))
        around = np.concatenate([edge, edge[::-1]])
        outline = band.mean[around] + band.deviation[around] * np.repeat([1, -1], len(edge))
        group = {"type": "scatter", "legendgroup": variant, "showlegend": False}
        data.append(
            group
            | {"y": outline, "mode": "lines", "fill": "toself", "fillcolor": _pale(color), "line": {"width": 0}}
            | {"hoverinfo": "skip"}
        )
        data.append(
            group
            | {
                "y": band.mean,
                "mode": "lines",
                "name": _text(plot_data.cut(variant)),
                "customdata": band.deviation,
            }
            | {"line": {"color": color, "dash": _dash(dash) if band.finished else _DOTTED, "width": 2}}
            | {"hovertemplate": f"%{{y:{form}}}" + (f" ± %{{customdata:{form}}}" if several else "")}
        )
        if training := np.isfinite(band.training).any():
            data.append(
                group
                | {"y": band.training, "mode": "lines", "name": _text(f"{plot_data.cut(variant)}, training")}
                | {"line": {"color": color, "dash": "dash", "width": 1}, "hovertemplate": f"%{{y:{form}}}"}
            )
        for name, x in (("tokens", band.tokens), ("flops", band.flops), ("time", band.seconds / seconds)):
            if name in axes:
                axes[name]["x"] += [x[around], x, *([x] if training else [])]
    layout = _layout("", findings.metric)
    layout["yaxis"]["range"] = plot_data.band_limits(found)
    return {"data": data, "layout": layout | {"hovermode": "x unified", "hoverdistance": -1}, "axes": axes}


def _sensitivity(findings: Findings, axis: str, found: Mapping[str, plot_data.Sensitivity]) -> dict[str, Any]:
    shown, data = plot_data.looks(findings), []
    heights, form = plot_data.edge_heights(findings, found), _form(findings)
    for variant, one in found.items():
        color, dash = shown[variant]
        group = {"type": "scatter", "legendgroup": variant, "showlegend": False}
        group |= {"name": _text(plot_data.cut(variant))}
        fills = [color if good else "#ffffff" for good in one.good]
        mark = {"size": 9, "color": fills, "line": {"color": color, "width": 2}}
        data.append(
            group
            | {"x": one.values, "y": one.metric, "mode": "lines+markers", "marker": mark}
            | {"line": {"color": color, "dash": _dash(dash)}, "hovertemplate": f"%{{x:.6~g}}: %{{y:{form}}}"}
        )
        if not math.isnan(one.edge):
            cross = {"symbol": "x-thin", "size": 9, "line": {"color": color, "width": 2.5}}
            data.append(
                group
                | {"x": [one.edge], "y": [heights[variant]], "mode": "markers", "marker": cross}
                | {"hovertemplate": "diverged from %{x:.6~g}"}
            )
    layout = _layout(_text(axis), findings.metric)
    layout["xaxis"] |= {"type": plot_data.scale(found)}
    if ticks := plot_data.tried(found):
        layout["xaxis"] |= {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    layout["yaxis"] |= {"range": plot_data.sensitivity_limits(found, findings.lower_is_better)}
    return {"data": data, "layout": layout | {"hovermode": "closest"}}


def _form(findings: Findings) -> str:
    """How Plotly writes the metric."""
    return figures.form(findings.places, *(one.value for one in findings.outcomes)).replace("g", "~g")


def _layout(x: str, y: str) -> dict[str, Any]:
    axis = {"automargin": True, "gridcolor": "#e5e5e5", "linecolor": "#aaaaaa", "zeroline": False, "ticks": "outside"}
    return {
        "xaxis": axis | {"title": {"text": x}},
        "yaxis": axis | {"title": {"text": _text(y)}},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        "margin": {"l": 56, "r": 12, "t": 32, "b": 52},
        "height": 420,
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "hoverlabel": {"namelength": -1, "bgcolor": "#ffffff", "font": {"color": "#222222"}},
    }


def _text(text: str) -> str:
    """As Plotly, which knows some tags and entities, shows it unchanged."""
    return html.escape(text, quote=False)


def _dash(lengths: tuple[int, ...]) -> str:
    return ",".join(f"{length}px" for length in lengths) or "solid"


def _pale(color: str) -> str:
    return "rgba({}, {}, {}, 0.18)".format(*bytes.fromhex(color[1:]))


def _json(value: Any) -> str:
    """JSON that may stand inside a script element: no nan, and nothing that would end it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(one) for name, one in value.items()}
        if isinstance(value, (list, tuple, np.ndarray)):
            return [plain(one) for one in value]
        if isinstance(value, (float, np.floating)):
            return float(f"{value:.8g}") if math.isfinite(value) else None
        return value.item() if isinstance(value, np.generic) else value

    return json.dumps(plain(value), allow_nan=False).replace("<", "\\u003c")
