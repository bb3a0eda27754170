// Heat map of a candidate's coefficients: groups × experts, colours diverging from 0, as an ordinary table.

import { h, setText } from "../core/dom.js";
import { token } from "./plotly.js";

const NUMBERS_UP_TO = 9; // columns

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function luminance(colour) {
  const [r, g, b] = colour.map((part) => {
    const value = part / 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** Make a function from a value to { background, color } on a scale of ±`limit`. */
function colours(limit) {
  const [zero, plus, minus] = ["--heat-zero", "--heat-plus", "--heat-minus"].map((name) => rgb(token(name)));
  return (value) => {
    const part = limit > 0 ? Math.min(1, Math.abs(value) / limit) : 0;
    const end = value < 0 ? minus : plus;
    const mixed = zero.map((from, i) => Math.round(from + (end[i] - from) * part));
    return { background: `rgb(${mixed.join(" ")})`, color: luminance(mixed) > 0.19 ? "#101318" : "#ffffff" };
  };
}

const short = (value) => value.toFixed(2).replace("-", "−");

/** Draw one coefficient table { operator, rows, columns, values }. */
export function heatmap(table) {
  const limit = Math.max(...table.values.flat().map(Math.abs));
  const colour = colours(limit);
  const withNumbers = table.columns.length <= NUMBERS_UP_TO;
  const readout = h("p", { class: "readout small muted" });
  const rest = "Point at a cell, or move to it with the arrow keys, for its exact number.";
  setText(readout, rest);
  const cell = (value, row, column) => h(
    "td",
    {
      style: colour(value),
      tabindex: row + column === 0 ? "0" : "-1",
      "data-row": row,
      "data-column": column,
      "data-value": value,
      title: `${table.rows[row]} · ${table.columns[column]}: ${value.toPrecision(4)}`,
    },
    withNumbers ? short(value) : h("span", { class: "visually-hidden" }, short(value)),
  );
  const grid = h(
    "table",
    { class: `heat${withNumbers ? "" : " dense"}`, "aria-label": `Coefficients of ${table.operator}` },
    h("thead", null, h("tr", null, h("td"), table.columns.map((name) => h("th", { scope: "col" }, h("span", null, name))))),
    h("tbody", null, table.values.map((values, row) => h("tr", null,
      h("th", { scope: "row" }, table.rows[row]),
      values.map((value, column) => cell(value, row, column))))),
  );
  const show = (node) => {
    const at = node?.dataset?.value === undefined ? null : node.dataset;
    setText(readout, at ? `${table.rows[at.row]} · ${table.columns[at.column]}: ${Number(at.value).toPrecision(5)}` : rest);
  };
  grid.addEventListener("pointerover", (event) => show(event.target.closest("td")));
  grid.addEventListener("pointerleave", () => show(null));
  grid.addEventListener("focusin", (event) => show(event.target.closest("td")));
  grid.addEventListener("keydown", (event) => move(grid, event));
  return h("figure", { class: "heatmap" }, h("div", { class: "scroll" }, grid), scale(limit), readout);
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function move(grid, event) {
  const step = STEPS[event.key];
  const from = event.target.closest("td");
  if (!step || from?.dataset.row === undefined) return;
  event.preventDefault();
  const [row, column] = [Number(from.dataset.row) + step[0], Number(from.dataset.column) + step[1]];
  const to = grid.querySelector(`td[data-row="${row}"][data-column="${column}"]`);
  if (!to) return;
  from.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}

function scale(limit) {
  return h("div", { class: "heat-scale small muted", "aria-hidden": "true" },
    h("span", null, `−${limit.toFixed(2)}`), h("span", { class: "ramp" }), h("span", null, `+${limit.toFixed(2)}`));
}
