// Coefficient tables of recipes: which rows and columns they have, and their means.

import { count } from "../core/format.js";

/** A group's name as the server writes it: "layer 3 · mlp". */
export function groupLabel({ positions, modules, tensors }) {
  const parts = [];
  if (positions) {
    const layers = positions.filter((position) => typeof position === "number");
    const words = positions.filter((position) => typeof position === "string");
    if (layers.length) words.push(layers.length === 1 ? `layer ${layers[0]}` : `layers ${layers[0]}-${layers.at(-1)}`);
    parts.push(words.join(" + "));
  }
  if (modules) parts.push(modules.join(" + "));
  if (tensors) parts.push(tensors.join(" + "));
  return parts.join(" · ") || "all";
}

/** Names of a table's rows: groups of parameters, or ranges of the flat vector of all. */
function rowNames(node) {
  if (node.groups) return node.groups.map(groupLabel);
  const ends = [...node.breaks.map(count), "end"];
  return ends.map((end, i) => `parameters ${i ? ends[i - 1] : 0} to ${end}`);
}

/** Where the ranges of the flat vector begin and end: 0, …, number of parameters; null for groups. */
function edges(node, job) {
  if (!node.breaks) return null;
  const last = node.breaks.at(-1) ?? 0;
  return [0, ...node.breaks, Math.max(job.parameters ?? 0, last + 1)];
}

const isMerge = (node) => Array.isArray(node?.coefficients);

/** A modified expert goes by the expert's name. */
function inputName(node) {
  return node.model ?? (node.inputs?.length === 1 ? inputName(node.inputs[0]) : node.operator) ?? "input";
}

function columnNames(node, job) {
  const width = node.coefficients[0].length;
  if (width === node.inputs.length) return node.inputs.map(inputName);
  if (width === job.columns.length) return job.columns;
  return Array.from({ length: width }, (_, i) => `coefficient ${i + 1}`);
}

/** Every table of a recipe, the outermost first: [{ operator, rows, edges, columns, values }]. */
export function tables(job, recipe) {
  const found = [];
  const visit = (node) => {
    if (!isMerge(node)) return;
    found.push({
      operator: node.operator,
      rows: rowNames(node),
      edges: edges(node, job),
      columns: columnNames(node, job),
      values: node.coefficients,
    });
    for (const [name, values] of Object.entries(node.tables ?? {})) {
      found.push({ operator: `${node.operator} ${name}`, rows: rowNames(node), edges: edges(node, job), columns: values[0].length === 1 ? [name] : node.inputs.map(inputName), values });
    }
    visit(node.base);
    node.inputs.forEach(visit);
  };
  visit(recipe.root);
  for (const planned of recipe.layers ?? []) visit(planned.node);
  return found;
}

/** The layers of a recipe that rearranges them: [{ depth, from, scale }]; empty where they stay as they are. */
export function layerPlan(recipe) {
  return (recipe.layers ?? []).map(({ layer, node, scale }, depth) => {
    const source = node ?? recipe.root;
    return { depth, from: `layer ${source.layer ?? layer} of ${isMerge(source) ? `a ${source.operator} merge` : source.model}`, scale: scale ?? 1 };
  });
}

/** The table that the search varies: the first with the job's columns (modifiers may stand around it). */
export function searchedTable(job, recipe) {
  const found = tables(job, recipe);
  return found.find((table) => table.columns.length === job.columns.length && table.rows.length === job.groups.length) ?? found[0];
}

/** Mean coefficient of each column of the searched table, by name. */
export function coefficientMeans(job, candidate) {
  const table = searchedTable(job, candidate.recipe);
  if (!table) return {};
  const sizes = table.edges ? table.edges.slice(1).map((end, i) => end - table.edges[i]) : table.values.map(() => 1);
  const whole = sizes.reduce((total, size) => total + size, 0);
  return Object.fromEntries(table.columns.map((name, i) => {
    const sum = table.values.reduce((total, row, k) => total + sizes[k] * row[i], 0);
    return [name, sum / whole];
  }));
}
