// Enqueue a candidate of the user's own: coefficients for each expert, a genome, or a whole recipe.

import { jobPath, post } from "../core/api.js";
import { openDialog } from "../core/dialogs.js";
import { button, h, uid } from "../core/dom.js";
import { toast } from "../core/notify.js";
import { searchedTable } from "./coefficients.js";

const MODES = [["coefficients", "Coefficients"], ["genome", "Genome"], ["recipe", "Recipe"]];

function numbers(text, what) {
  const parts = text.replace(/^\[|\]$/g, "").split(/[\s,;]+/).filter(Boolean).map(Number);
  if (!parts.length || parts.some((part) => !Number.isFinite(part))) throw new Error(`${what}: enter numbers, separated by commas.`);
  return parts;
}

/** Ask for a candidate and enqueue it. */
export function enqueueDialog(model) {
  const { columns: known, parameters, spec } = model.job;
  const prepared = parameters !== null;
  const names = known.length || prepared ? known : (spec.experts ?? []).map((expert) => expert.name);
  const modes = MODES.filter(([key]) => key !== "coefficients" || names.length); // some search spaces have none
  const ids = Object.fromEntries(["label", "genome", "recipe"].map((name) => [name, uid("enqueue")]));
  const label = h("input", { id: ids.label, maxlength: 100, autocomplete: "off" });
  const columns = new Map(names.map((name) => [name, h("input", { id: uid("enqueue"), inputmode: "text", autocomplete: "off", placeholder: "0" })]));
  const genome = h("textarea", { id: ids.genome, rows: 5, class: "mono", spellcheck: "false" });
  const recipe = h("textarea", { id: ids.recipe, rows: 9, class: "mono", spellcheck: "false" });
  const groups = model.job.groups.length;
  const parts = {
    coefficients: h("fieldset", { class: "plain" }, h("legend", { class: "visually-hidden" }, "Coefficients"),
      h("p", { class: "help" }, `One number for the whole model${groups > 1 ? `, or ${groups} numbers separated by commas, one for each coefficient group` : ""}. What is left empty is 0.`),
      h("div", { class: "pairs" }, [...columns].map(([name, input]) => [h("label", { for: input.id }, name), input]))),
    genome: h("div", { class: "field" }, h("label", { for: ids.genome }, "Genome"), genome, h("p", { class: "help" }, `The search vector: ${model.job.variables.length || "all"} numbers in the job's order.`)),
    recipe: h("div", { class: "field" }, h("label", { for: ids.recipe }, "Recipe (JSON)"), recipe, h("p", { class: "help" }, "A complete recipe over the job's models, as a candidate's page shows it.")),
  };
  let mode = modes[0][0];
  const buttons = modes.map(([key, text]) => h("button", { type: "button", "aria-pressed": String(key === mode), onclick: () => choose(key) }, text));
  const choose = (key) => {
    mode = key;
    modes.forEach(([name], i) => buttons[i].setAttribute("aria-pressed", String(name === key)));
    for (const [name, part] of Object.entries(parts)) part.hidden = name !== key;
  };
  const prefill = async () => {
    const candidate = await model.candidate(model.selected);
    const table = searchedTable(model.job, candidate.recipe);
    table?.columns.forEach((name, i) => {
      const values = table.values.map((row) => Number(row[i].toFixed(4)));
      const constant = values.every((value) => value === values[0]);
      if (columns.has(name)) columns.get(name).value = constant ? values[0] : values.join(", ");
    });
    genome.value = candidate.genome?.join(", ") ?? "";
    recipe.value = JSON.stringify(candidate.recipe, null, 2);
  };
  const read = () => {
    const out = label.value.trim() ? { label: label.value.trim() } : {};
    if (mode === "genome") return { ...out, genome: numbers(genome.value, "Genome") };
    if (mode === "recipe") return { ...out, recipe: parse(recipe.value) };
    const entries = [...columns].filter(([, input]) => input.value.trim()).map(([name, input]) => {
      const values = numbers(input.value, name);
      return [name, values.length === 1 ? values[0] : values];
    });
    return { ...out, coefficients: Object.fromEntries(entries) };
  };
  choose(mode);
  return openDialog({
    title: "Enqueue a candidate",
    body: [
      h("div", { class: "field" }, h("label", { for: ids.label }, "Label (optional)"), label),
      h("div", { class: "row" }, h("div", { class: "segmented", role: "group", "aria-label": "Given as" }, buttons),
        model.selected !== null && button(`Start from #${model.selected}`, prefill, { kind: "small" })),
      ...Object.values(parts),
    ],
    submit: "Enqueue",
    onSubmit: async () => {
      const { queued } = await post(jobPath(model.id, "/candidates"), read());
      toast(`Enqueued as number ${queued}. It is evaluated next while the job runs.`, "ok");
    },
  });
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`The recipe is not JSON: ${error.message}`);
  }
}
