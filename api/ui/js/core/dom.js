// Builds DOM nodes. Text is always a text node: nothing in the UI sets innerHTML, so that no name can inject markup.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Make an element: h("a", { class: "x", href: "#", onclick: f }, "text", node, [more], null).
 * Null, undefined and false attributes and children are left out; `true` makes an empty attribute.
 */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG elements. */
export function s(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) setAttribute(node, name, value);
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) return;
  if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
  else if (name === "style") for (const [key, part] of Object.entries(value)) node.style.setProperty(key, part);
  else if (name === "value" && "value" in node) node.value = value;
  else node.setAttribute(name, value === true ? "" : String(value));
}

/** Set the text of a node only where it changes, so that selections and live regions are left alone. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Replace all children. */
export function replace(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
}

let counter = 0;

/** An id that is unique in the page, for labels and descriptions. */
export function uid(prefix = "id") {
  counter += 1;
  return `${prefix}-${counter}`;
}

const ICONS = {
  plus: "M8 3v10M3 8h10",
  pause: "M5.5 3.5v9M10.5 3.5v9",
  play: "M5 3.2v9.6L12.5 8z",
  stop: "M4 4h8v8H4z",
  copy: "M5.5 5.5h7v7h-7zM3.5 10.5v-7h7",
  trash: "M3 4.5h10M6 4.5v-1.5h4v1.5M4.5 4.5l.6 8.5h5.8l.6-8.5",
  export: "M8 9.5v-6.5M5.2 5.5L8 2.8l2.8 2.7M3 9.5v3.5h10V9.5",
  enqueue: "M3 4h7M3 8h5M3 12h5M12 7v6M9 10h6",
  sun: "M8 5.2a2.8 2.8 0 1 0 0 5.6a2.8 2.8 0 1 0 0-5.6M8 1.2v1.4M8 13.4v1.4M1.2 8h1.4M13.4 8h1.4M3.2 3.2l1 1M11.8 11.8l1 1M12.8 3.2l-1 1M4.2 11.8l-1 1",
  moon: "M13 9.6A5.6 5.6 0 0 1 6.4 3a5.3 5.3 0 1 0 6.6 6.6z",
  close: "M4 4l8 8M12 4l-8 8",
  check: "M3 8.5l3.2 3.2L13 4.8",
};

/** An icon, hidden from assistive technology: the text or label beside it says the same. */
export function icon(name) {
  return s("svg", { viewBox: "0 0 16 16", class: "icon-svg", "aria-hidden": "true" }, s("path", { d: ICONS[name] }));
}

/** A <button type="button">. */
export function button(label, onclick, options = {}) {
  const { icon: name, kind = "", ...attributes } = options;
  return h("button", { type: "button", class: `button ${kind}`, onclick, ...attributes }, name && icon(name), label);
}

/** A card with a heading and tools at the right. */
export function card(title, tools, ...body) {
  const id = uid("card");
  return h(
    "section",
    { class: "card", "aria-labelledby": id },
    h("header", null, h("h2", { id }, title), tools && h("div", { class: "tools" }, tools)),
    h("div", { class: "body" }, body),
  );
}

/** A <select> of [value, text] pairs. */
export function select(options, value, onchange, attributes = {}) {
  const node = h("select", attributes, options.map(([key, text]) => h("option", { value: key }, text)));
  node.value = value;
  if (onchange) node.addEventListener("change", () => onchange(node.value));
  return node;
}
