// Controls for values made of others: objects, lists, sets of words, dictionaries, optional parts.

import { button, h, uid } from "../core/dom.js";
import { label, singular } from "../core/format.js";
import { same } from "../core/util.js";
import { defaultOf, resolve } from "./schema.js";
import { frame, helpOf } from "./frame.js";

const ALWAYS_OPEN = new Set(["", "base", "experts", "merge", "algorithm", "budget"]);

/** Make the children of an object's properties: a Map of name to widget. */
function properties(schema, context) {
  const entries = Object.entries(schema.properties).sort(([a], [b]) => (b === "name") - (a === "name")); // what a part is called comes first
  return new Map(entries.map(([name, property]) => [
    name,
    context.make(property, {
      ...context,
      path: context.path ? `${context.path}.${name}` : name,
      text: label(name),
      required: schema.required?.includes(name) ?? false,
      depth: context.depth + 1,
      bare: false,
    }),
  ]));
}

/** Read children, leaving out what equals its default: specs stay short, and the server fills defaults in. */
function readChildren(children, schema, defs) {
  const out = {};
  for (const [name, widget] of children) {
    const value = widget.read();
    const isNeeded = schema.required?.includes(name);
    if (value === undefined) continue;
    if (!isNeeded && (same(value, defaultOf(resolve(schema.properties[name], defs).schema)) || isEmpty(value))) continue;
    out[name] = value;
  }
  return out;
}

const isEmpty = (value) => typeof value === "object" && value !== null && Object.keys(value).length === 0;

export function objectWidget(schema, context) {
  const { path } = context;
  const children = properties(schema, context);
  const widget = {
    children,
    child: (name) => children.get(name) ?? null,
    check: () => [...children.values()].flatMap((one) => one.check()),
    clear: () => {
      framed.clear();
      for (const one of children.values()) one.clear();
    },
    focus: () => children.values().next().value?.focus(),
    read: () => readChildren(children, schema, context.defs),
    write: (value) => {
      for (const [name, one] of children) one.write(value?.[name] ?? defaultOf(resolve(schema.properties[name], context.defs).schema));
    },
    fail: (message) => framed.fail(message),
  };
  context.wire?.(context.path, widget);
  const grid = h("div", { class: "fields" }, path === "" ? general(children) : [...children.values()].map((one) => one.node));
  const framed = context.bare ? plainFrame(grid) : section(schema, context, grid, widget);
  widget.node = framed.node;
  if (defaultOf(schema)) widget.write(defaultOf(schema));
  return widget;
}

/** The whole form: its parts as cards, and one card before them for the fields that belong to no part. */
function general(children) {
  const nodes = [...children.values()].map((one) => one.node);
  const loose = nodes.filter((node) => node.classList.contains("field"));
  const id = uid("general");
  return [
    h("section", { class: "card section", "aria-labelledby": id }, h("header", null, h("h2", { id }, "Job")),
      h("div", { class: "body" }, h("div", { class: "fields" }, loose))),
    nodes.filter((node) => !loose.includes(node)),
  ];
}

function plainFrame(grid) {
  const problem = h("p", { class: "problem", hidden: true });
  return { node: h("div", null, problem, grid), fail: (message) => show(problem, message), clear: () => (problem.hidden = true) };
}

function show(problem, message) {
  problem.textContent = message;
  problem.hidden = false;
}

/** A part of the form that folds; parts with needed fields start open. */
function section(schema, context, grid, widget) {
  const { path, text, depth } = context;
  const open = ALWAYS_OPEN.has(path) || (schema.required?.length ?? 0) > 0 || context.required;
  const problem = h("p", { class: "problem", hidden: true });
  const heading = depth === 1 ? h("h2", null, text) : h("span", null, text);
  const node = h("details", { class: depth === 1 ? "card section" : "fold subsection", open },
    h("summary", null, heading, context.required && h("span", { class: "required" }, "*")),
    h("div", { class: "body" }, helpOf(schema) && h("p", { class: "help" }, helpOf(schema)), problem, grid));
  const write = widget.write;
  widget.write = (value) => {
    write(value);
    if (value !== undefined && !isEmpty(widget.read())) node.open = true;
  };
  return {
    node,
    fail: (message) => {
      node.open = true;
      show(problem, message);
    },
    clear: () => (problem.hidden = true),
  };
}

/** An object that may be absent: a checkbox that brings its fields. */
export function optionalWidget(schema, context) {
  const box = h("input", { type: "checkbox" });
  const inner = objectWidget({ ...schema, default: undefined, description: undefined }, { ...context, bare: true });
  const framed = frame({ text: context.text, help: helpOf(schema), target: box, kind: "check" });
  const body = h("div", { class: "nested", hidden: true }, inner.node);
  const toggle = (on) => {
    box.checked = on;
    body.hidden = !on;
  };
  box.addEventListener("change", () => toggle(box.checked));
  return {
    node: h("div", { class: "wide" }, framed.node, body),
    child: (name) => inner.child(name),
    check: () => (box.checked ? inner.check() : []),
    clear: () => {
      framed.clear();
      inner.clear();
    },
    fail: framed.fail,
    focus: () => box.focus(),
    read: () => (box.checked ? inner.read() : undefined),
    write: (value) => {
      toggle(value !== undefined && value !== null);
      inner.write(value ?? undefined);
    },
  };
}

/** An optional part that most jobs have: shown as if it were needed, and left out where nothing is filled in. */
export function usualWidget(schema, context) {
  const inner = objectWidget({ ...schema, default: undefined }, context);
  const read = () => {
    const value = inner.read();
    return isEmpty(value) ? undefined : value;
  };
  return { ...inner, read, check: () => (read() === undefined ? [] : inner.check()) };
}

/** A list: any number of items between the bounds. */
export function listWidget(schema, context) {
  const item = resolve(schema.items, context.defs).schema;
  const isObject = Boolean(item.properties);
  const mayBeAbsent = !context.required && defaultOf(schema) === undefined;
  const name = singular(context.path.split(".").filter((part) => part !== "*").at(-1));
  const items = [];
  const box = h("div", { class: isObject ? "list cards" : "list" });
  const add = button(`Add ${name}`, () => {
    const made = insert(undefined);
    made.widget.focus();
    context.changed?.();
  }, { icon: "plus", kind: "small" });
  const framed = isObject && context.depth === 1
    ? section(schema, context, h("div", null, box, add), { write: () => {}, read: () => ({}) })
    : frame({ text: context.text, required: context.required, help: helpOf(schema), target: h("div", { class: "list-frame" }, box, add) });

  function insert(value) {
    const widget = context.make(schema.items, {
      ...context, path: `${context.path}.*`, text: isObject ? "" : `${label(name)}`, required: true, depth: context.depth + 1, bare: true,
    });
    const entry = { widget };
    const remove = button(isObject ? "Remove" : null, () => {
      items.splice(items.indexOf(entry), 1);
      entry.node.remove();
      number();
      add.focus();
      context.changed?.();
    }, { icon: isObject ? "trash" : "close", kind: isObject ? "small quiet" : "quiet icon", "aria-label": `Remove ${name}` });
    entry.title = h("h3");
    entry.remove = remove;
    entry.node = isObject
      ? h("section", { class: "item" }, h("header", null, entry.title, remove), widget.node)
      : h("div", { class: "entry" }, widget.node, remove);
    if (value !== undefined) widget.write(value);
    items.push(entry);
    box.append(entry.node);
    number();
    return entry;
  }

  function number() {
    const title = label(name);
    items.forEach((entry, i) => {
      entry.title.textContent = `${title} ${i + 1}`;
      entry.remove.setAttribute("aria-label", `Remove ${name} ${i + 1}`);
      entry.remove.hidden = isObject && items.length <= (schema.minItems ?? 0);
    });
    add.disabled = items.length >= (schema.maxItems ?? Infinity);
  }

  const widget = {
    node: framed.node,
    child: (segment) => items[Number(segment)]?.widget ?? null,
    check: () => {
      framed.clear();
      const bad = items.flatMap((entry) => entry.widget.check());
      if (items.length >= (schema.minItems ?? 0) || (mayBeAbsent && !items.length)) return bad;
      framed.fail(`At least ${schema.minItems} ${schema.minItems === 1 ? name : context.text.toLowerCase()} is needed.`);
      return [widget, ...bad];
    },
    clear: () => {
      framed.clear();
      for (const entry of items) entry.widget.clear();
    },
    fail: framed.fail,
    focus: () => add.focus(),
    read: () => {
      const values = items.map((entry) => entry.widget.read()).filter((value) => value !== undefined);
      return mayBeAbsent && !values.length ? undefined : values;
    },
    write: (values) => {
      items.length = 0;
      box.replaceChildren();
      for (const value of values ?? []) insert(value);
      if (items.length && framed.node.tagName === "DETAILS") framed.node.open = true;
      while (isObject && items.length < (schema.minItems ?? 0)) insert(undefined);
    },
  };
  widget.node.classList.add("wide");
  widget.write(defaultOf(schema));
  if (schema["x-usual"] && !items.length) insert(undefined);
  return widget;
}

/** A set of words from an enumeration, as checkboxes. */
export function flagsWidget(schema, context) {
  const boxes = new Map(schema.items.enum.map((value) => [value, h("input", { type: "checkbox", value, id: uid("flag") })]));
  const group = h("div", { class: "flags" }, [...boxes].map(([value, box]) => h("label", { class: "check", for: box.id }, box, value)));
  const framed = frame({ text: context.text, help: helpOf(schema), target: group });
  const widget = {
    node: framed.node,
    child: () => null,
    check: () => [],
    clear: framed.clear,
    fail: framed.fail,
    focus: () => boxes.values().next().value.focus(),
    read: () => [...boxes].filter(([, box]) => box.checked).map(([value]) => value),
    write: (values) => {
      for (const [value, box] of boxes) box.checked = values?.includes(value) ?? false;
    },
  };
  widget.node.classList.add("wide");
  return widget;
}

/** A dictionary: pairs of a name and a value. */
export function dictWidget(schema, context) {
  const rows = [];
  const box = h("div", { class: "list" });
  const add = button("Add entry", () => insert("", undefined).key.focus(), { icon: "plus", kind: "small" });
  const framed = frame({ text: context.text, help: helpOf(schema), target: h("div", { class: "list-frame" }, box, add) });
  function insert(name, value) {
    const key = h("input", { type: "text", value: name, "aria-label": "Name", placeholder: "name", autocomplete: "off" });
    const widget = context.make(schema.additionalProperties, { ...context, path: `${context.path}.*`, text: "Value", required: false, depth: context.depth + 1 });
    const row = { key, widget };
    row.node = h("div", { class: "entry pair" }, h("div", { class: "field" }, h("span", { class: "label", "aria-hidden": "true" }, "Name"), key), widget.node, button(null, () => {
      rows.splice(rows.indexOf(row), 1);
      row.node.remove();
      add.focus();
    }, { icon: "close", kind: "quiet icon", "aria-label": "Remove entry" }));
    if (value !== undefined) widget.write(value);
    rows.push(row);
    box.append(row.node);
    return row;
  }
  const widget = {
    node: framed.node,
    child: (name) => rows.find((row) => row.key.value === name)?.widget ?? null,
    check: () => rows.flatMap((row) => row.widget.check()),
    clear: () => {
      framed.clear();
      for (const row of rows) row.widget.clear();
    },
    fail: framed.fail,
    focus: () => add.focus(),
    read: () => Object.fromEntries(rows.map((row) => [row.key.value.trim(), row.widget.read()]).filter(([key, value]) => key && value !== undefined)),
    write: (values) => {
      rows.length = 0;
      box.replaceChildren();
      for (const [name, value] of Object.entries(values ?? {})) insert(name, value);
    },
  };
  widget.node.classList.add("wide");
  widget.write(defaultOf(schema));
  return widget;
}
