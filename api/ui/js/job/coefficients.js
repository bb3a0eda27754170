// Coefficient tables of recipes: which rows and columns they have, and their means.

/** A group's name as the server writes it: "layer 3 · mlp". */
export function groupLabel({ positions, modules }) {
  const parts = [];
  if (positions) {
    const layers = positions.filter((position) => typeof position === "number");
    const words = positions.filter((position) => typeof position === "string");
    if (layers.length) words.push(layers.length === 1 ? `layer ${layers[0]}` : `layers ${layers[0]}-${layers.at(-1)}`);
    parts.push(words.join(" + "));
  }
  if (modules) parts.push(modules.join(" + "));
  return parts.join(" · ") || "all";
}

const isMerge = (node) => Array.isArray(node?.coefficients);

function inputName(node) {
  return node.model ?? node.operator ?? "input";
}

function columnNames(node, job) {
  const width = node.coefficients[0].length;
  if (width === node.inputs.length) return node.inputs.map(inputName);
  if (width === job.columns.length) return job.columns;
  return Array.from({ length: width }, (_, i) => `coefficient ${i + 1}`);
}

/** Every table of a recipe, the outermost first: [{ operator, rows, columns, values }]. */
export function tables(job, recipe) {
  const found = [];
  const visit = (node) => {
    if (!isMerge(node)) return;
    found.push({
      operator: node.operator,
      rows: node.groups.map(groupLabel),
      columns: columnNames(node, job),
      values: node.coefficients,
    });
    visit(node.base);
    node.inputs.forEach(visit);
  };
  visit(recipe.root);
  return found;
}

/** Mean coefficient of each column of the outermost table, by name. */
export function coefficientMeans(job, candidate) {
  const [table] = tables(job, candidate.recipe);
  if (!table) return {};
  return Object.fromEntries(table.columns.map((name, i) => {
    const sum = table.values.reduce((total, row) => total + row[i], 0);
    return [name, sum / table.values.length];
  }));
}
