// What surrounds every control: label, help, the message about a problem.

import { h, uid } from "../core/dom.js";

/**
 * Frame a control: returns { node, fail(message), clear(), invalid() }.
 * `target` gets the id of the label, and points to help and problem for screen readers.
 */
export function frame({ text, required, help, target, control = target, kind = "field" }) {
  const id = uid("f");
  const problem = h("p", { class: "problem", id: `${id}-problem`, hidden: true });
  const hint = help ? h("p", { class: "help", id: `${id}-help` }, help) : null;
  const isGroup = !("value" in target);
  target.id = id;
  if (hint) target.setAttribute("aria-describedby", hint.id);
  if (required && !isGroup) target.setAttribute("aria-required", "true");
  const name = [text, required && h("span", { class: "required", title: "required" }, " *")];
  const label = isGroup ? h("span", { class: "label", id: `${id}-label` }, name) : h("label", { for: id }, name);
  if (isGroup) {
    target.setAttribute("role", "group");
    target.setAttribute("aria-labelledby", `${id}-label`);
  }
  const node = kind === "check"
    ? h("div", { class: "field" }, h("div", { class: "check" }, control, label), hint, problem)
    : h("div", { class: "field" }, label, control, hint, problem);
  return {
    node,
    fail(message) {
      problem.textContent = message;
      problem.hidden = false;
      target.setAttribute("aria-invalid", "true");
      target.setAttribute("aria-describedby", [problem.id, hint?.id].filter(Boolean).join(" "));
    },
    clear() {
      problem.hidden = true;
      target.removeAttribute("aria-invalid");
    },
  };
}

/** Description and bounds of a schema as one help text; code in backquotes is set as code. */
export function helpOf(schema, bounds = null) {
  const text = [schema.description, bounds && `${bounds.charAt(0).toUpperCase()}${bounds.slice(1)}.`].filter(Boolean).join(" ");
  if (!text) return null;
  return text.split("`").map((part, i) => (i % 2 ? h("code", null, part) : part));
}
