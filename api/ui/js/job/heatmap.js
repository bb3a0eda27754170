// Heat map of a candidate's coefficients, colours diverging from 0: groups × experts as an ordinary table, ranges of the
// parameters drawn by their length.

import { h, s, setText } from "../core/dom.js";
import { count, plural } from "../core/format.js";
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

/** Draw one coefficient table { operator, rows, edges, columns, values }. */
export function heatmap(table) {
  return table.edges && table.edges.length > 2 ? rangemap(table) : gridmap(table);
}

const MAP = { width: 420, height: 340, left: 54, top: 18 };
const NUMBERED_RANGES = 300;

/** Ranges of the flat vector: each as high as its share of the parameters, with the numbers in a fold. */
function rangemap(table) {
  const { edges, columns, values } = table;
  const limit = Math.max(...values.flat().map(Math.abs));
  const colour = colours(limit);
  const whole = edges.at(-1);
  const wide = (MAP.width - MAP.left) / columns.length;
  const y = (at) => MAP.top + ((MAP.height - MAP.top) * at) / whole;
  const readout = h("p", { class: "readout small muted" });
  const rest = `${plural(values.length, "range")} of the ${count(whole)} merged parameters. Point at one for its numbers.`;
  setText(readout, rest);
  const cells = values.map((row, i) => row.map((value, j) => s("rect", {
    x: MAP.left + j * wide, y: y(edges[i]), width: Math.max(1, wide - 2), height: y(edges[i + 1]) - y(edges[i]),
    fill: colour(value).background, "data-row": i, "data-column": j,
  })));
  const heads = columns.map((name, j) => s("text", { x: MAP.left + (j + 0.5) * wide - 1, y: 11, "text-anchor": "middle" },
    name.length * 6.5 > wide ? `${name.slice(0, Math.max(1, Math.floor(wide / 6.5) - 1))}…` : name, s("title", null, name)));
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => s("g", null,
    s("line", { x1: MAP.left - 5, x2: MAP.left - 1, y1: y(part * whole), y2: y(part * whole) }),
    s("text", { x: MAP.left - 8, y: y(part * whole) + (part === 0 ? 8 : part === 1 ? -1 : 4), "text-anchor": "end" }, amount(part * whole))));
  const map = s("svg", { class: "ranges", viewBox: `0 0 ${MAP.width} ${MAP.height}`, role: "img",
    "aria-label": `Coefficients of ${table.operator} in ${values.length} ranges of the parameters; the numbers follow in a table` }, heads, ticks, cells);
  map.addEventListener("pointerover", (event) => {
    const at = event.target.dataset;
    setText(readout, at?.row === undefined ? rest : `${table.rows[at.row]} · ${columns[at.column]}: ${values[at.row][at.column].toPrecision(5)}`);
  });
  map.addEventListener("pointerleave", () => setText(readout, rest));
  const numbers = h("details", { class: "fold" }, h("summary", null, "Numbers"));
  numbers.addEventListener("toggle", () => {
    if (!numbers.open || numbers.children.length > 1) return;
    const part = { ...table, edges: null, rows: table.rows.slice(0, NUMBERED_RANGES), values: values.slice(0, NUMBERED_RANGES) };
    numbers.append(gridmap(part), ...(values.length > NUMBERED_RANGES ? [h("p", { class: "small muted" }, `${count(values.length - NUMBERED_RANGES)} more ranges are in the recipe.`)] : []));
  });
  return h("figure", { class: "heatmap" }, map, scale(limit), readout, numbers);
}

/** A number of parameters, short: 12 K, 3.4 M. */
function amount(value) {
  const [size, unit] = value >= 1e9 ? [1e9, " G"] : value >= 1e6 ? [1e6, " M"] : value >= 1e4 ? [1e3, " K"] : [1, ""];
  return `${Number((value / size).toPrecision(3))}${unit}`;
}

function gridmap(table) {
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
