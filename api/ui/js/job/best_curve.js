// Best value so far of each objective, one strip below the other; above them their weighted mean, as no single
// candidate needs to be best at any one objective for a search to get on.

import { card, h } from "../core/dom.js";
import { score } from "../core/format.js";
import { axis, baseLayout, drawing, plain, token } from "./plotly.js";

const GAP = 0.06;

export function bestCurve(model, page) {
  const plot = h("div", { class: "plot plot-best", role: "img" });
  plot.style.height = `${Math.max(300, 44 + 120 * strips(model).length)}px`;
  const node = card("Best so far", null, plot);
  const draw = drawing(plot, page, () => figure(model), (point) => model.select(point.customdata));
  const update = () => {
    const best = model.objectives.map((objective, i) => `${objective.name} ${score(model.job.best[i])}`);
    plot.setAttribute("aria-label", `Best value so far: ${best.join(", ")}.`);
    draw();
  };
  model.topics.on(["progression", "job"], update);
  update();
  return node;
}

function strips({ progression, objectives, axes }) {
  const each = objectives.map((objective, i) => ({ ...objective, values: progression.best.map((row) => row[i]) }));
  if (axes.length === 1) return each;
  const same = (direction) => axes.every((i) => objectives[i].direction === direction);
  const mean = same("maximise")
    ? { name: "weighted mean", direction: "maximise", values: progression.loss.map((loss) => -loss) }
    : { name: same("minimise") ? "weighted mean" : "weighted mean loss", direction: "minimise", values: progression.loss };
  return [mean, ...each];
}

function figure(model) {
  const { progression, job } = model;
  const drawn = strips(model);
  const rows = drawn.length;
  const height = (1 - GAP * (rows - 1)) / rows;
  const layout = { ...baseLayout(), uirevision: "best", hovermode: "x" };
  layout.xaxis = { ...axis("candidate number"), anchor: rows > 1 ? `y${rows}` : "y", rangemode: "tozero" };
  const end = Math.max(progression.index.at(-1) ?? 0, job.progress.proposed - 1);
  const data = drawn.map((objective, i) => {
    const key = i ? `y${i + 1}` : "y";
    const top = 1 - i * (height + GAP);
    const colour = token(`--line-${(i % 6) + 1}`);
    layout[`yaxis${i ? i + 1 : ""}`] = { ...axis(""), domain: [Math.max(0, top - height), top], nticks: 4 };
    (layout.annotations ??= []).push({
      text: `${plain(objective.name)}${objective.direction ? (objective.direction === "minimise" ? " ↓" : " ↑") : ""}`,
      xref: "paper", yref: "paper", x: 0.995, y: objective.direction === "minimise" ? top : top - height, xanchor: "right",
      yanchor: objective.direction === "minimise" ? "top" : "bottom", showarrow: false, font: { color: colour, size: 12 },
    });
    const { values } = objective;
    return {
      type: "scatter",
      mode: values.length > 40 ? "lines" : "lines+markers",
      x: [...progression.index, ...(values.length ? [end] : [])],
      y: [...values, ...values.slice(-1)],
      customdata: [...progression.index, progression.index.at(-1)],
      yaxis: key,
      line: { shape: "hv", color: colour, width: 2 },
      marker: { size: 5 },
      hovertemplate: `#%{customdata}: %{y:.4f}<extra>${plain(objective.name)}</extra>`,
    };
  });
  return { data, layout };
}
