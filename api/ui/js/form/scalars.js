// Controls for single values. Every widget has node, read, write, check, fail, clear, child.

import { h } from "../core/dom.js";
import { boundsText, defaultOf, numberProblem, textProblem } from "./schema.js";
import { frame, helpOf } from "./frame.js";

/** Make a widget of an <input>, <select> or <textarea> and how its text is read, written and checked. */
export function control({ input, schema, context, parse, format, problem, bounds, kind, changed }) {
  const { required, text } = context;
  const framed = frame({ text, required, help: helpOf(schema, bounds), target: input, kind });
  const check = () => {
    framed.clear();
    const raw = input.type === "checkbox" ? "on" : input.value.trim();
    let message = null;
    if (input.validity?.badInput) message = "Enter a number.";
    else if (raw === "") message = required ? "This is needed." : null;
    else message = problem?.(raw) ?? null;
    if (message) framed.fail(message);
    return message ? [widget] : [];
  };
  // Nobody wants to be told off while typing: check when the field is left, then with every key until it is right.
  input.addEventListener("blur", () => {
    if (input.value !== "" || input.hasAttribute("aria-invalid")) check();
  });
  input.addEventListener("input", () => {
    if (input.hasAttribute("aria-invalid")) check();
  });
  if (changed) input.addEventListener("change", () => changed(widget.read()));
  const widget = {
    node: framed.node,
    input,
    fail: framed.fail,
    clear: framed.clear,
    check,
    child: () => null,
    focus: () => input.focus(),
    read: () => (input.value.trim() === "" ? undefined : parse(input.value.trim())),
    write: (value) => {
      input.value = value === undefined || value === null ? "" : format(value);
      framed.clear();
    },
  };
  widget.write(defaultOf(schema));
  return widget;
}

const placeholder = (schema) => (schema.examples?.length ? `e.g. ${String(schema.examples[0])}` : null);

export function textWidget(schema, context) {
  const input = h("input", { type: "text", autocomplete: "off", spellcheck: "false", placeholder: placeholder(schema) });
  return control({ input, schema, context, parse: String, format: String, problem: (raw) => textProblem(raw, schema) });
}

export function numberWidget(schema, context) {
  const input = h("input", { type: "number", step: schema.type === "integer" ? 1 : "any", placeholder: placeholder(schema) });
  return control({
    input, schema, context, parse: Number, format: String, bounds: boundsText(schema), problem: (raw) => numberProblem(Number(raw), schema),
  });
}

export function checkboxWidget(schema, context) {
  const input = h("input", { type: "checkbox" });
  const widget = control({ input, schema, context, parse: Boolean, format: String, kind: "check" });
  widget.read = () => input.checked;
  widget.write = (value) => {
    input.checked = value ?? schema.default ?? false;
  };
  widget.write(schema.default);
  return widget;
}

/** A select of [value, text] pairs; an unknown value that is written to it is added. */
export function choiceWidget(schema, context, options, changed) {
  const input = h("select");
  const fill = (pairs) => {
    const value = input.value;
    const empty = context.required ? (schema.default === undefined ? [["", "choose…"]] : []) : [["", "default"]];
    input.replaceChildren(...[...empty, ...pairs].map(([key, text]) => h("option", { value: key }, text)));
    if (value) set(value);
  };
  const set = (value) => {
    if (value !== "" && ![...input.options].some((option) => option.value === value)) input.append(h("option", { value }, value));
    input.value = value;
  };
  const widget = control({ input, schema, context, parse: String, format: String, changed });
  fill(options);
  widget.fill = fill;
  widget.write = (value) => {
    set(value === undefined || value === null ? "" : String(value));
    if (input.selectedIndex < 0) input.selectedIndex = 0;
    widget.clear();
    changed?.(widget.read());
  };
  widget.write(defaultOf(schema));
  return widget;
}

export function enumWidget(schema, context) {
  return choiceWidget(schema, context, schema.enum.map((value) => [value, value]));
}

/** A text that is read as true, false, a number or, failing that, a text. */
export function scalarWidget(schema, context) {
  const input = h("input", { type: "text", autocomplete: "off", spellcheck: "false" });
  return control({ input, schema, context, parse: parseScalar, format: String });
}

export function parseScalar(raw) {
  if (raw === "true" || raw === "false") return raw === "true";
  return raw !== "" && Number.isFinite(Number(raw)) ? Number(raw) : raw;
}

/** Numbers separated by commas; one alone is a number where the schema allows it. */
export function numbersWidget(schema, context) {
  const long = schema.type === "array";
  const input = long ? h("textarea", { rows: 2, class: "mono", spellcheck: "false" }) : h("input", { type: "text", autocomplete: "off" });
  const split = (raw) => raw.replace(/^\[|\]$/g, "").split(/[\s,;]+/).filter(Boolean).map(Number);
  return control({
    input, schema, context,
    parse: (raw) => {
      const values = split(raw);
      return !long && values.length === 1 ? values[0] : values;
    },
    format: (value) => [value].flat().join(", "),
    problem: (raw) => (split(raw).every(Number.isFinite) ? null : "Enter numbers, separated by commas."),
  });
}

/** Anything else: JSON as text. */
export function jsonWidget(schema, context) {
  const input = h("textarea", { rows: 4, class: "mono", spellcheck: "false", placeholder: schema.type === "object" ? "{ }" : "" });
  const parsed = (raw) => {
    try {
      return JSON.parse(raw);
    } catch {
      return undefined;
    }
  };
  return control({
    input, schema, context,
    parse: (raw) => parsed(raw),
    format: (value) => (same(value, {}) ? "" : JSON.stringify(value, null, 2)),
    problem: (raw) => (parsed(raw) === undefined ? "This is not valid JSON." : null),
  });
}

const same = (value, empty) => typeof value === "object" && !Array.isArray(value) && Object.keys(value).length === Object.keys(empty).length;
