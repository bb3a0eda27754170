// The form of a job spec, made from its JSON schema and the registries.

import { label, plural } from "../core/format.js";
import { dictWidget, flagsWidget, listWidget, objectWidget, optionalWidget, usualWidget } from "./collections.js";
import { optionsWidget, registryWidget, rolesWidget } from "./options.js";
import { checkboxWidget, choiceWidget, enumWidget, jsonWidget, numbersWidget, numberWidget, scalarWidget, textWidget } from "./scalars.js";
import { kindOf, resolve } from "./schema.js";

const WIDGETS = {
  string: textWidget, number: numberWidget, integer: numberWidget, boolean: checkboxWidget, enum: enumWidget,
  scalar: scalarWidget, numbers: numbersWidget, json: jsonWidget, object: objectWidget, list: listWidget,
  flags: flagsWidget, dict: dictWidget,
};

/**
 * Make the form. `registries` = { algorithms, spaces, operators, evaluators }, as their routes answer, and `jobs` that a new
 * one may begin with.
 * Returns { node, read, write, check, clear, problems }.
 */
export function jobForm(schema, registries) {
  const defs = schema.$defs ?? {};
  const heads = new Set();

  function make(part, context) {
    const found = resolve(part, context.defs);
    if (special.fields[context.path]) return special.fields[context.path](found.schema, context);
    const kind = kindOf(found.schema);
    if (kind === "object" && found.nullable) return (found.schema["x-usual"] ? usualWidget : optionalWidget)(found.schema, context);
    return WIDGETS[kind](found.schema, context);
  }

  let root = null; // the fields that look at the experts are made before it is complete
  const experts = () => (root?.child("experts")?.read() ?? []).map((expert) => expert.name).filter(Boolean);
  const refreshHeads = () => {
    for (const head of heads) head.fill(experts().map((name) => [name, name]));
  };
  // Phases stand in place of the algorithm: the form shows one of the two.
  const hasPhases = () => (root.child("phases")?.read() ?? []).length > 0;
  const refresh = () => {
    refreshHeads();
    root.child("algorithm").node.hidden = hasPhases();
  };
  const special = specials(registries, heads, experts);
  root = make(schema, { path: "", text: label("job"), required: true, depth: 0, bare: true, defs, make, wire: special.wire, changed: () => refresh() });
  root.node.addEventListener("input", (event) => {
    if (event.target.closest(".item")) refreshHeads();
  });

  return {
    node: root.node,
    read: () => {
      const { algorithm, ...spec } = root.read();
      return hasPhases() || algorithm === undefined ? spec : { ...spec, algorithm };
    },
    write: (spec) => {
      root.write(spec);
      refresh();
    },
    clear: () => root.clear(),
    check: () => root.check(),
    /** Show the server's problems beside the fields; returns those that belong to no field, and the widgets that failed. */
    problems: (problems) => showProblems(root, problems),
  };
}

/** Fields that are more than their schema says, and how fields depend on each other. */
function specials(registries, heads, experts) {
  const registry = (name) => (schema, context) => registryWidget(schema, context, registries[name]);
  const some = (test) => (schema, context) => registryWidget(schema, context, registries.operators.filter(test));
  const options = (variables) => (schema, context) => optionsWidget(schema, context, variables);
  const differs = (entry, name) => ({ groups: true, experts: entry.varies?.includes(name) ?? false });
  const fields = {
    "algorithm.name": registry("algorithms"),
    "algorithm.options": options(null),
    "phases.*.algorithm.name": registry("algorithms"),
    "phases.*.algorithm.options": options(null),
    "merge.space.name": registry("spaces"),
    "merge.space.options": options(null),
    "warm_starts.jobs.*": (schema, context) => choiceWidget(schema, context, registries.jobs.map((job) => [job.id, jobText(job)])),
    "merge.operator": some((one) => one.max_experts !== 1),
    "merge.options": options(differs),
    "merge.modifiers.*.operator": some((one) => one.modifier),
    "merge.modifiers.*.options": options(() => ({ groups: false, experts: false })),
    "objectives.*.evaluator": registry("evaluators"),
    "objectives.*.options": options(null),
    "objectives.*.metric": (schema, context) => choiceWidget(schema, context, []),
    "objectives.*.data.columns": (schema, context) => rolesWidget(schema, context, () => dictWidget(schema, context)),
    "objectives.*.test.columns": (schema, context) => rolesWidget(schema, context, () => dictWidget(schema, context)),
    "objectives.*.head": (schema, context) => {
      const widget = choiceWidget(schema, context, experts().map((name) => [name, name]));
      heads.add(widget);
      return widget;
    },
  };
  const named = (widget) => widget.child("name").onEntry?.((entry) => widget.child("options").use(entry));
  const wires = {
    algorithm: named,
    "phases.*.algorithm": named,
    "merge.space": named,
    merge: (widget) => widget.child("operator").onEntry?.((entry) => widget.child("options").use(entry)),
    "merge.modifiers.*": (widget) => widget.child("operator").onEntry?.((entry) => widget.child("options").use(entry)),
    "objectives.*": (widget) => widget.child("evaluator").onEntry?.((entry) => {
      widget.child("options").use(entry);
      widget.child("data").child("columns").use(entry);
      widget.child("test").child("columns").use(entry);
      widget.child("metric").fill(Object.entries(entry?.metrics ?? {}).map(([name, direction]) => [name, `${name} (${direction})`]));
    }),
  };
  return { fields, wire: (path, widget) => wires[path]?.(widget) };
}

const jobText = (job) => `${job.name} · ${job.state}, ${plural(job.progress.front, "candidate")} on the front · ${job.id.slice(0, 6)}`;

/** Find the field of a dotted path; parts that are no fields (pydantic names the variants it tried) are passed over. */
function find(root, path) {
  let widget = root;
  for (const part of path.split(".")) widget = widget.child(part) ?? widget;
  return widget;
}

function showProblems(root, problems) {
  const failed = [];
  const rest = [];
  for (const { field, message } of problems) {
    // A problem of several fields together names them at the beginning of its message.
    const inside = field && field !== "body" ? field : (/^([a-z_]+(?:\.\w+)*):/.exec(message)?.[1] ?? "");
    const widget = find(root, inside);
    if (widget === root) rest.push({ field, message });
    else {
      widget.fail(message);
      failed.push(widget);
    }
  }
  return { failed, rest };
}
