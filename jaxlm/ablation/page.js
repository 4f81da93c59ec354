"use strict";

const figures = JSON.parse(document.getElementById("figures").textContent);
const touch = matchMedia("(pointer: coarse)").matches; // there a drag must scroll the page, not zoom
const charts = [...document.querySelectorAll(".chart")];

for (const chart of charts) {
  const { data, layout, axes } = figures[chart.id];
  if (axes) {
    data.forEach((trace, i) => (trace.x = axes.tokens.x[i]));
    Object.assign(layout.xaxis, axis(axes.tokens));
  }
  if (touch) layout.dragmode = false;
  Plotly.newPlot(chart, data, layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: !touch,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "autoScale2d", "toImage"]], // without "Share": nothing leaves
    showSendToCloud: false,
  });
}

function axis({ title, tick, hover }) {
  return { title: { text: title }, tickformat: tick, hoverformat: hover, autorange: true };
}

for (const choice of document.querySelectorAll("input[name=axis]")) {
  choice.checked = choice.defaultChecked; // browsers remember the choice over a reload
  choice.addEventListener("change", () => {
    const chosen = figures.curves.axes[choice.value];
    const layout = Object.fromEntries(Object.entries(axis(chosen)).map(([name, value]) => ["xaxis." + name, value]));
    Plotly.update("curves", { x: chosen.x }, layout);
  });
}

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    const chart = document.getElementById(button.parentElement.dataset.chart);
    const traces = chart.data.flatMap((trace, i) => (trace.legendgroup === button.dataset.variant ? [i] : []));
    button.setAttribute("aria-pressed", shown);
    Plotly.restyle(chart, { visible: shown ? true : "legendonly" }, traces);
  });
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement;
    const body = header.closest("table").tBodies[0];
    const sign = header.ariaSort === "ascending" ? -1 : 1;
    for (const other of header.parentElement.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.cells[header.cellIndex];
      return cell.className === "number" ? Number(cell.dataset.key) : cell.dataset.key;
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b), sign)));
  });
}

function compare(a, b, sign) {
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // unknown comes last, both ways
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

// A plot has the width of the screen; on paper it must have the paper's.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const chart of charts) Plotly.relayout(chart, { width: 660 });
});
addEventListener("afterprint", () => {
  for (const chart of charts) Plotly.relayout(chart, { width: null, autosize: true });
});
