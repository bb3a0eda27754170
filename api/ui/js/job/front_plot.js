// The Pareto front: any two objectives (or the candidate's number) as axes.

import { card, h, select, s } from "../core/dom.js";
import { count, errorText, half, plural, score } from "../core/format.js";
import { axis, baseLayout, drawing, plain, token } from "./plotly.js";

const NUMBER = "#";

export function frontPlot(model, page) {
  const [first, second] = model.axes;
  const state = { partial: false, x: second === undefined ? NUMBER : first, y: second ?? first };
  const plot = h("div", { class: "plot plot-front", role: "img" });
  const options = (withNumber) => [
    ...(withNumber ? [[NUMBER, "candidate number"]] : []),
    ...model.objectives.map((objective, i) => [String(i), objective.name]),
  ];
  const choose = (key) => (value) => {
    state[key] = value === NUMBER ? NUMBER : Number(value);
    update();
  };
  const box = h("input", { type: "checkbox", onchange: () => {
    state.partial = box.checked;
    update();
  } });
  const partial = h("label", { class: "check", title: "Candidates that were measured on some items only: estimates" }, box, "Partial");
  const tools = [
    partial,
    h("label", null, "x", select(options(true), String(state.x), choose("x"), { "aria-label": "Objective on the x axis" })),
    h("label", null, "y", select(options(false), String(state.y), choose("y"), { "aria-label": "Objective on the y axis" })),
  ];
  const [symbols, hollow] = legend();
  const node = card("Pareto front", tools, symbols, plot);
  const draw = drawing(plot, page, () => figure(model, state, { width: plot.clientWidth - 80, height: plot.clientHeight - 60 }), (point) => model.select(point.customdata));
  const update = () => {
    plot.setAttribute("aria-label", describe(model));
    partial.hidden = hollow.hidden = !model.front.partial.length;
    draw();
  };
  model.topics.on(["front", "selected", "job"], update);
  update();
  return node;
}

function describe({ front }) {
  return `Plot of ${count(front.total)} evaluated candidates, ${count(front.front.length)} of them on the front. The table of candidates has the same numbers.`;
}

function legend() {
  const symbol = (shape, colour, open) => s("svg", { viewBox: "0 0 12 12", width: 12, height: 12, "aria-hidden": "true" },
    s("path", open ? { d: shape, fill: "none", stroke: `var(${colour})`, "stroke-width": 1.5 } : { d: shape, fill: `var(${colour})` }));
  const circle = "M6 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8";
  const diamond = "M6 1l5 5l-5 5l-5-5z";
  const partial = h("li", null, symbol(circle, "--plot-muted", true), "measured on some items");
  return [h(
    "ul",
    { class: "legend", "aria-label": "Legend" },
    h("li", null, symbol(circle, "--plot-front"), "on the front"),
    h("li", null, symbol(circle, "--plot-muted"), "dominated"),
    h("li", null, symbol(diamond, "--plot-baseline"), "baselines, your own, and others with a name"),
    partial,
    h("li", null, symbol(circle, "--plot-selected"), "selected"),
  ), partial];
}

const isShown = (axes) => (point) => axes.every((key) => key === NUMBER || Number.isFinite(point.values[key]));
const coordinate = (point, key) => (key === NUMBER ? point.index : point.values[key]);

function figure(model, { x, y, partial }, size) {
  const { front } = model;
  const shown = isShown([x, y]);
  const trace = (points, extra) => ({
    type: "scatter",
    mode: "markers",
    x: points.map((point) => coordinate(point, x)),
    y: points.map((point) => coordinate(point, y)),
    customdata: points.map((point) => point.index),
    text: points.map((point) => hover(model, point)),
    hoverinfo: "text",
    ...extra,
  });
  const baselines = front.baselines.filter(shown);
  const own = new Set(baselines.map((point) => point.index));
  const other = (point) => shown(point) && !own.has(point.index);
  const feasible = front.dominated.filter((point) => other(point) && point.violation <= 0);
  const infeasible = front.dominated.filter((point) => other(point) && point.violation > 0);
  const best = front.front.filter(other);
  const estimated = partial ? front.partial.filter(shown) : [];
  const data = [
    trace(estimated, { ...estimateBars(model, estimated, x, y), marker: { size: 6, symbol: "circle-open", color: token("--plot-muted"), opacity: 0.7 } }),
    trace(feasible, { marker: { size: 6, color: token("--plot-muted"), opacity: 0.45 } }),
    trace(infeasible, { marker: { size: 6, symbol: "x", color: token("--plot-muted"), opacity: 0.45 } }),
    staircase(model, front.front.filter(shown), x, y),
    trace(best, { ...errorBars(model, best, x, y), marker: { size: 9, color: token("--plot-front"), line: { width: 1, color: token("--surface") } } }),
    trace(baselines, baselineStyle(baselines, labelPlaces(model, baselines, [x, y], size))),
    trace(selectedPoint(model, shown), {
      marker: { size: 17, symbol: "circle-open", color: token("--plot-selected"), line: { width: 2.5 } },
      hoverinfo: "skip",
    }),
  ];
  const layout = {
    ...baseLayout(),
    xaxis: axis(axisTitle(model, x, ["better →", "← better"])),
    yaxis: axis(axisTitle(model, y, ["better ↑", "better ↓"])),
    uirevision: `${x}/${y}`, // keeps the user's zoom while points arrive
  };
  return { data, layout };
}

function axisTitle(model, key, [more, less]) {
  if (key === NUMBER) return "candidate number";
  const { name, metric, direction } = model.objectives[key];
  const what = metric && metric !== name ? `${name} · ${metric}` : name;
  if (!direction) return what;
  return direction === "maximise" ? `${what}   ${more}` : `${less}   ${what}`;
}

function hover(model, point) {
  const title = point.label ? `<b>#${point.index}</b> ${plain(point.label)}` : `<b>#${point.index}</b>`;
  const values = model.objectives.map((objective, i) => `${plain(objective.name)}: ${score(point.values[i])}${errorText(point.errors?.[i])}`);
  const tests = model.objectives.filter(({ name }) => point.verification?.test[name])
    .map(({ name }) => `${plain(name)} on test items: ${score(point.verification.test[name].value)}`);
  values.push(...tests);
  if (point.partial) values.push(`measured on ${plural(point.partial, "item")} only`);
  if (point.violation > 0) values.push("violates a constraint");
  return [title, ...values].join("<br>");
}

/** The intervals of verified points on all search items, around what the search made of them; else those of estimates. */
function errorBars(model, points, x, y) {
  if (!points.some((point) => point.errors || point.verification?.state === "completed")) return {};
  const bars = (key) => {
    if (key === NUMBER) return undefined;
    const { name } = model.objectives[key];
    const arm = (end) => points.map((point) => {
      const found = point.verification?.search[name];
      if (!found) return half(point.errors?.[key]);
      return Math.max(0, end === "high" ? found.high - point.values[key] : point.values[key] - found.low);
    });
    return { type: "data", symmetric: false, array: arm("high"), arrayminus: arm("low"), thickness: 1, width: 2, color: token("--plot-front") };
  };
  return { error_x: bars(x), error_y: bars(y) };
}

/** The 95 % error bars of estimates. */
function estimateBars(model, points, x, y) {
  if (!points.some((point) => point.errors)) return {};
  const bars = (key) => (key === NUMBER ? undefined : {
    type: "data", array: points.map((point) => half(point.errors?.[key])), thickness: 0.7, width: 0, color: token("--plot-muted"),
  });
  return { error_x: bars(x), error_y: bars(y) };
}

const SYMBOLS = { base: "square", uniform: "star" };

const PLACES = { "top center": [0, -1], "bottom center": [0, 1], "middle right": [1, 0], "middle left": [-1, 0], "top right": [1, -1], "bottom left": [-1, 1], "bottom right": [1, 1], "top left": [-1, -1] };
const LETTER = 7.2; // pixels
const LINE = 16;

/** Choose for each label the first place around its point where it covers no other label; null where there is none. */
function labelPlaces({ front }, points, axes, size) {
  const all = [...front.front, ...front.baselines, ...front.dominated];
  const scales = axes.map((key) => {
    const values = all.map((point) => coordinate(point, key)).filter(Number.isFinite);
    const low = Math.min(...values);
    const spread = Math.max(...values) - low || 1;
    return (point) => (coordinate(point, key) - low) / spread;
  });
  const taken = [];
  return points.map((point) => {
    const [x, y] = [scales[0](point), 1 - scales[1](point)];
    const width = LETTER * (point.label ?? "#00").length;
    const box = ([dx, dy]) => ({ x: x * size.width + (dx * (width + LINE)) / 2, y: y * size.height + 1.1 * dy * LINE, width });
    const inside = ({ x: cx, width: w }) => cx + w / 2 < 1.04 * size.width;
    const free = ({ x: cx, y: cy, width: w }) => taken.every((other) => Math.abs(other.x - cx) > (other.width + w) / 2 || Math.abs(other.y - cy) > LINE);
    const [place, offset] = Object.entries(PLACES).find(([, one]) => free(box(one)) && inside(box(one))) ?? [null];
    if (place) taken.push(box(offset));
    return place;
  });
}

function baselineStyle(points, places) {
  const few = points.length <= 16;
  return {
    mode: few ? "markers+text" : "markers",
    cliponaxis: false,
    marker: {
      size: points.map((point) => (point.on_front ? 12 : 10)),
      symbol: points.map((point) => (point.origin === "user" ? "triangle-up" : (SYMBOLS[point.label] ?? "diamond"))),
      color: token("--plot-baseline"),
      line: { width: points.map((point) => (point.on_front ? 2.5 : 1)), color: points.map((point) => token(point.on_front ? "--plot-front" : "--surface")) },
    },
    texttemplate: points.map((point, i) => (places[i] ? plain(point.label ?? `#${point.index}`) : "")),
    textposition: places.map((place) => place ?? "top center"),
    textfont: { color: token("--plot-baseline"), size: 12, shadow: `0 0 3px ${token("--surface")}, 0 0 3px ${token("--surface")}` },
  };
}

function selectedPoint({ front, selected }, shown) {
  const all = [front.front, front.baselines, front.dominated, front.partial];
  const point = all.flatMap((points) => points.find((one) => one.index === selected) ?? []).at(0);
  return point && shown(point) ? [point] : [];
}

/** The border of what is dominated in these two axes, as a step line through the points that lie on it. */
function staircase(model, points, x, y) {
  const line = { type: "scatter", mode: "lines", hoverinfo: "skip", line: { color: token("--plot-front"), width: 1.5 } };
  if (x === NUMBER) return { ...line, x: [], y: [] };
  const [ahead, above] = [x, y].map((key) => (model.objectives[key].direction === "minimise" ? -1 : 1));
  const sorted = [...points].sort((a, b) => ahead * (b.values[x] - a.values[x]) || above * (b.values[y] - a.values[y]));
  let top = -Infinity;
  const steps = sorted.filter((point) => {
    const height = above * point.values[y];
    if (height <= top) return false;
    top = height;
    return true;
  }).sort((a, b) => a.values[x] - b.values[x]);
  return {
    ...line,
    line: { ...line.line, shape: ahead > 0 ? "vh" : "hv" },
    x: steps.map((point) => point.values[x]),
    y: steps.map((point) => point.values[y]),
  };
}
