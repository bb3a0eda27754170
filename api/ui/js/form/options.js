// Fields that the registries fill: algorithms, operators and evaluators by name, and the options that each declares.

import { h, replace } from "../core/dom.js";
import { label } from "../core/format.js";
import { same } from "../core/util.js";
import { choiceWidget, jsonWidget, parseScalar, textWidget } from "./scalars.js";
import { boundsText, numberProblem, resolve } from "./schema.js";
import { frame, helpOf } from "./frame.js";

/** A select of a registry's entries; a plain text field where the registry is empty. */
export function registryWidget(schema, context, entries) {
  const pairs = entries.map((entry) => [entry.name, entry.name]);
  const listeners = [];
  const summary = h("p", { class: "help summary" });
  const changed = (name) => {
    const entry = entries.find((one) => one.name === name) ?? null;
    summary.textContent = entry ? [entry.summary, entry.reference].filter(Boolean).join(" · ") : "";
    for (const listener of listeners) listener(entry);
  };
  const widget = entries.length ? choiceWidget({ ...schema, description: undefined }, { ...context, required: true }, pairs, changed) : textWidget(schema, context);
  widget.node.append(summary);
  widget.node.classList.add("wide");
  widget.entry = () => entries.find((one) => one.name === widget.read()) ?? null;
  widget.onEntry = (listener) => {
    listeners.push(listener);
    listener(widget.entry());
  };
  changed(widget.read());
  return widget;
}

/**
 * The options of the entry chosen beside it. With `variables`, each may be fixed, a range, or a list of choices; it is a
 * function of the entry and an option's name that says what the option may differ between: { groups, experts }.
 * Options that the entry does not declare are kept and shown as JSON.
 */
export function optionsWidget(schema, context, variables) {
  const box = h("div", { class: "fields" });
  const other = jsonWidget({ type: "object", description: "Options that are not declared." }, { ...context, text: "Other options", required: false });
  const framed = frame({ text: context.text, help: null, target: h("div", { class: "nested" }, box, other.node) });
  let children = new Map();
  let kept = {};
  const declared = (entry) => entry?.options_schema?.properties ?? {};
  const widget = {
    node: framed.node,
    use(entry) {
      kept = { ...kept, ...widget.read() };
      const defs = entry?.options_schema?.$defs ?? {};
      children = new Map(Object.entries(declared(entry)).map(([name, property]) => {
        const inner = { ...context, defs, path: `${context.path}.${name}`, text: label(name), required: false, depth: context.depth + 1 };
        return [name, variables ? variableWidget(property, inner, variables(entry, name)) : context.make(property, inner)];
      }));
      replace(box, [...children.values()].map((one) => one.node));
      widget.defaults = Object.fromEntries(Object.entries(declared(entry)).map(([name, property]) => [name, resolve(property, defs).schema.default]));
      widget.write(kept);
    },
    defaults: {},
    child: (name) => children.get(name) ?? null,
    check: () => [...children.values(), other].flatMap((one) => one.check()),
    clear: () => {
      framed.clear();
      for (const one of children.values()) one.clear();
    },
    fail: framed.fail,
    focus: () => (children.values().next().value ?? other).focus(),
    read: () => {
      const out = { ...(other.node.hidden ? {} : other.read()) };
      for (const [name, one] of children) {
        const value = one.read();
        if (value !== undefined && !same(value, widget.defaults[name])) out[name] = value;
      }
      return out;
    },
    write: (value) => {
      kept = { ...value };
      for (const [name, one] of children) one.write(value?.[name] ?? widget.defaults[name] ?? undefined);
      const rest = Object.fromEntries(Object.entries(value ?? {}).filter(([name]) => !children.has(name)));
      other.write(rest);
      other.node.hidden = Object.keys(rest).length === 0;
      framed.node.hidden = other.node.hidden && children.size === 0;
    },
  };
  widget.node.classList.add("wide");
  widget.write({});
  return widget;
}

const MODES = [["fixed", "fixed"], ["each", "fixed for each expert"], ["range", "searched in a range"], ["choices", "searched among choices"]];

/** An option that the search may vary: its value, one for each expert, or { low, high } or { choices }. */
function variableWidget(property, context, differs) {
  const { schema } = resolve(property, context.defs);
  const numeric = schema.type === "number" || schema.type === "integer";
  const fixed = context.make(property, { ...context });
  const mode = h("select", { "aria-label": `${context.text}: fixed or searched`, class: "mode" },
    MODES.filter(([key]) => key === "fixed" || key === "choices" || (numeric && (key === "range" || differs.experts))).map(([key, text]) => h("option", { value: key }, text)));
  const input = (name) => h("input", { type: "number", step: "any", "aria-label": `${context.text}: ${name}`, placeholder: name });
  const [low, high] = [input("lowest"), input("highest")];
  const choices = h("input", { type: "text", "aria-label": `${context.text}: choices`, placeholder: "separated by commas", autocomplete: "off" });
  const own = { per_group: differs.groups && tick(context.text, "own for each group"), per_expert: differs.experts && tick(context.text, "own for each expert") };
  const ranged = h("div", null, h("div", { class: "range" }, low, h("span", { class: "muted" }, "to"), high),
    Object.values(own).map((one) => one && one.node));
  const searched = frame({ text: context.text, help: helpOf(schema, boundsText(schema)), target: h("div", null, ranged, choices) });
  const show = () => {
    fixed.node.hidden = mode.value !== "fixed";
    searched.node.hidden = mode.value === "fixed";
    ranged.hidden = mode.value !== "range";
    choices.hidden = mode.value !== "choices" && mode.value !== "each";
  };
  mode.addEventListener("change", show);
  const problem = () => {
    if (mode.value === "each") return list().length && list().every((value) => typeof value === "number") ? null : "Give a number for each expert.";
    if (mode.value === "choices") return list().length < 2 ? "Give at least two choices." : null;
    if (low.value === "" || high.value === "") return "Give both bounds.";
    if (Number(low.value) >= Number(high.value)) return "The lowest must be below the highest.";
    return numberProblem(Number(low.value), schema) ?? numberProblem(Number(high.value), schema);
  };
  const list = () => choices.value.split(",").map((part) => part.trim()).filter(Boolean).map(parseScalar);
  const widget = {
    node: h("div", { class: "variable" }, fixed.node, searched.node, mode),
    child: () => null,
    check: () => {
      searched.clear();
      if (mode.value === "fixed") return fixed.check();
      const message = problem();
      if (message) searched.fail(message);
      return message ? [widget] : [];
    },
    clear: () => {
      fixed.clear();
      searched.clear();
    },
    fail: (message) => (mode.value === "fixed" ? fixed : searched).fail(message),
    focus: () => mode.focus(),
    read: () => {
      if (mode.value === "fixed") return fixed.read();
      if (mode.value === "each") return list();
      if (mode.value === "choices") return { choices: list() };
      const range = { low: Number(low.value), high: Number(high.value) };
      if (schema.type === "integer") range.integer = true;
      for (const [name, one] of Object.entries(own)) if (one && one.box.checked) range[name] = true;
      return range;
    },
    write: (value) => {
      mode.value = Array.isArray(value) ? "each" : value?.choices ? "choices" : value?.low !== undefined ? "range" : "fixed";
      if (mode.value === "fixed") fixed.write(value);
      low.value = value?.low ?? "";
      high.value = value?.high ?? "";
      choices.value = (Array.isArray(value) ? value : value?.choices)?.join(", ") ?? "";
      for (const [name, one] of Object.entries(own)) if (one) one.box.checked = value?.[name] ?? false;
      show();
    },
  };
  show();
  return widget;
}

function tick(option, text) {
  const box = h("input", { type: "checkbox", "aria-label": `${option}: ${text}` });
  return { box, node: h("label", { class: "tick" }, box, " ", text) };
}

/** Which data column plays which of the evaluator's roles. */
export function rolesWidget(schema, context, fallback) {
  const box = h("div", { class: "pairs" });
  const plain = fallback();
  const framed = frame({ text: context.text, help: helpOf(schema), target: box });
  let inputs = new Map();
  const node = h("div", { class: "wide" }, framed.node, plain.node);
  const widget = {
    node,
    use(entry) {
      const value = widget.read();
      const roles = Object.entries(entry?.columns ?? {});
      inputs = new Map(roles.map(([role]) => [role, h("input", { type: "text", placeholder: role, autocomplete: "off", "aria-label": `Column of ${role}` })]));
      replace(box, roles.map(([role, help]) => [h("span", { title: help }, role), inputs.get(role)]));
      framed.node.hidden = roles.length === 0;
      plain.node.hidden = roles.length > 0;
      widget.write(value);
    },
    child: () => null,
    check: () => [],
    clear: framed.clear,
    fail: framed.fail,
    focus: () => inputs.values().next().value?.focus(),
    read: () => {
      if (!inputs.size) return plain.read();
      return Object.fromEntries([...inputs].map(([role, input]) => [role, input.value.trim()]).filter(([, text]) => text));
    },
    write: (value) => {
      plain.write(value);
      for (const [role, input] of inputs) input.value = value?.[role] ?? "";
    },
  };
  widget.use(null);
  return widget;
}
