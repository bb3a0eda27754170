// Parallel coordinates of the front, as plain SVG (plotly's needs WebGL and code made at run time).

import { card, h, replace, s } from "../core/dom.js";
import { score } from "../core/format.js";
import { showError } from "../core/notify.js";
import { coefficientMeans } from "./coefficients.js";

const SIZE = { width: 820, height: 290, top: 34, bottom: 24, side: 64, step: 100 };
const MOST_LINES = 200;

export function parallelPlot(model, page) {
  let withMeans = false;
  let means = new Map();
  const box = h("div", { class: "parallel scroll", tabindex: "0", role: "group", "aria-label": "Parallel coordinates of the front" });
  const readout = h("p", { class: "readout small muted" }, " ");
  const toggle = h("label", { class: "check small" }, h("input", {
    type: "checkbox",
    onchange: (event) => {
      withMeans = event.target.checked;
      load();
    },
  }), "Mean coefficients");
  toggle.hidden = model.job.columns.length === 0;
  const node = card("Trade-offs on the front", toggle, box, readout);

  async function load() {
    try {
      if (withMeans) means = await loadMeans(model, shownPoints(model.front.front));
    } catch (error) {
      showError(error);
    }
    if (!page.signal.aborted) draw();
  }

  function draw() {
    const points = shownPoints(model.front.front);
    if (!points.length) {
      replace(box, h("p", { class: "muted" }, "The front appears with the first evaluated candidates."));
      return;
    }
    replace(box, chart(model, points, withMeans ? means : null, (point) => {
      readout.textContent = point ? describe(model, point) : " ";
    }));
  }

  model.topics.on(["front", "job"], () => {
    toggle.hidden = model.job.columns.length === 0; // some search spaces have no coefficients
    return withMeans ? load() : draw();
  });
  model.topics.on(["selected"], draw);
  draw();
  return node;
}

function shownPoints(points) {
  if (points.length <= MOST_LINES) return points;
  const every = points.length / MOST_LINES;
  return Array.from({ length: MOST_LINES }, (_, i) => points[Math.floor(i * every)]);
}

async function loadMeans(model, points) {
  const means = new Map();
  const queue = [...points];
  const worker = async () => {
    for (let point = queue.pop(); point; point = queue.pop()) {
      means.set(point.index, coefficientMeans(model.job, await model.candidate(point.index)));
    }
  };
  await Promise.all([worker(), worker(), worker(), worker()]);
  return means;
}

function describe(model, point) {
  const values = model.objectives.map((objective, i) => `${objective.name} ${score(point.values[i])}`);
  return `#${point.index}${point.label ? ` ${point.label}` : ""}: ${values.join(", ")}`;
}

/** One axis: how to read a point, and whether small values stand at the top. */
function makeAxes(model, points, means) {
  const axes = model.objectives.map((objective, i) => ({
    name: objective.name,
    note: objective.direction === "minimise" ? "lower is better" : "higher is better",
    read: (point) => point.values[i],
    flip: objective.direction === "minimise",
  }));
  if (means) {
    for (const name of model.job.columns) {
      axes.push({ name, note: "mean coefficient", read: (point) => means.get(point.index)?.[name], flip: false });
    }
  }
  return axes.map((one) => {
    const values = points.map(one.read).filter(Number.isFinite);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const scale = (value) => (high > low ? (value - low) / (high - low) : 0.5);
    return { ...one, low, high, at: (point) => (one.flip ? 1 - scale(one.read(point)) : scale(one.read(point))) };
  });
}

function chart(model, points, means, onHover) {
  const axes = makeAxes(model, points, means);
  const gaps = Math.max(1, axes.length - 1);
  const width = Math.max(SIZE.width, 2 * SIZE.side + SIZE.step * gaps);
  const inner = SIZE.height - SIZE.top - SIZE.bottom;
  const x = (i) => SIZE.side + (i * (width - 2 * SIZE.side)) / gaps;
  const y = (part) => SIZE.top + (1 - part) * inner;
  const lines = [...points].sort((a) => (a.index === model.selected ? 1 : -1)).map((point) => {
    const spots = axes.map((one, i) => [x(i), y(one.at(point))]).filter((spot) => spot.every(Number.isFinite));
    return s("polyline", {
      points: spots.map((spot) => spot.map((part) => part.toFixed(1)).join(",")).join(" "),
      class: point.index === model.selected ? "line selected" : "line",
      "data-index": point.index,
      onclick: () => model.select(point.index),
      onpointerenter: () => onHover(point),
      onpointerleave: () => onHover(null),
    }, s("title", null, describe(model, point)));
  });
  return s("svg", { viewBox: `0 0 ${width} ${SIZE.height}`, style: { "min-width": `${Math.max(560, 0.7 * width)}px` }, role: "img", "aria-label": `${points.length} candidates of the front over ${axes.length} axes, better values at the top` },
    axes.map((one, i) => axisNode(one, x(i), inner)), s("g", null, lines));
}

function axisNode(one, x, inner) {
  const [top, bottom] = one.flip ? [one.low, one.high] : [one.high, one.low];
  const name = one.name.length > 15 ? `${one.name.slice(0, 14)}…` : one.name;
  const text = (y, content, kind) => s("text", { x, y, "text-anchor": "middle", class: kind }, content);
  return s("g", null,
    s("line", { x1: x, x2: x, y1: SIZE.top, y2: SIZE.top + inner, class: "axis" }),
    text(12, name, "name"),
    text(26, score(top), "tick"),
    text(SIZE.top + inner + 14, score(bottom), "tick"),
    s("title", null, `${one.name}: ${one.note}`));
}
