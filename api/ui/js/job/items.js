// Per-item scores of one objective: a strip (one cell for each item) and a histogram.

import { h, s } from "../core/dom.js";
import { plural, score } from "../core/format.js";
import { token } from "./plotly.js";

const BINS = 24;
const STRIP_UP_TO = 4000;

/** Draw the scores of an objective's items. */
export function itemScores(objective, scores) {
  const values = scores.filter(Number.isFinite);
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  const [low, high] = [sorted[0], sorted.at(-1)];
  const binary = values.every((value) => value === 0 || value === 1);
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const text = binary
    ? `${values.filter(Boolean).length} of ${plural(values.length, "item")} score 1`
    : `${plural(values.length, "item")} · mean ${score(mean)} · median ${score(sorted[Math.floor(sorted.length / 2)])} · ${score(low)} to ${score(high)}`;
  return h(
    "div",
    { class: "items" },
    h("div", { class: "items-head" }, h("span", null, objective.name), h("span", { class: "small muted" }, text)),
    strip(scores.slice(0, STRIP_UP_TO), low, high, `Score of each item of ${objective.name}`),
    binary ? null : histogram(values, low, high, `Histogram of ${objective.name}: ${text}`),
  );
}

function strip(values, low, high, label) {
  const canvas = h("canvas", { class: "strip", width: values.length, height: 1, role: "img", "aria-label": label });
  const context = canvas.getContext("2d");
  const [from, to] = [token("--surface-3"), token("--plot-front")];
  values.forEach((value, i) => {
    context.globalAlpha = 1;
    context.fillStyle = from;
    context.fillRect(i, 0, 1, 1);
    if (!Number.isFinite(value)) return;
    context.globalAlpha = high > low ? (value - low) / (high - low) : 1;
    context.fillStyle = to;
    context.fillRect(i, 0, 1, 1);
  });
  return canvas;
}

function histogram(values, low, high, label) {
  const counts = new Array(BINS).fill(0);
  for (const value of values) counts[Math.min(BINS - 1, Math.floor(((value - low) / (high - low || 1)) * BINS))] += 1;
  const most = Math.max(...counts);
  return s("svg", { class: "histogram", viewBox: `0 0 ${BINS} 10`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    counts.map((n, i) => {
      const height = (10 * n) / most;
      const [from, to] = [i, i + 1].map((edge) => score(low + ((high - low) * edge) / BINS));
      return s("rect", { x: i + 0.08, y: 10 - height, width: 0.84, height }, s("title", null, `${from} to ${to}: ${plural(n, "item")}`));
    }));
}
