// The job's spec as it was submitted, and the compatibility report.

import { button, h, setText } from "../core/dom.js";
import { plural } from "../core/format.js";
import { copyText } from "../core/notify.js";
import { toYaml } from "../core/yaml.js";

const FORMATS = { YAML: toYaml, JSON: (value) => `${JSON.stringify(value, null, 2)}\n` };

export function specPanel(model) {
  const pre = h("pre", { class: "code", tabindex: "0", "aria-label": "Job spec" });
  let format = "YAML";
  const show = (name) => {
    format = name;
    buttons.forEach((one) => one.setAttribute("aria-pressed", String(one.textContent === name)));
    pre.textContent = FORMATS[name](model.job.spec);
  };
  const buttons = Object.keys(FORMATS).map((name) => h("button", { type: "button", onclick: () => show(name) }, name));
  const node = h("details", { class: "card" }, h("summary", null, h("h2", null, "Job spec")),
    h("div", { class: "body" },
      h("div", { class: "fold-tools" }, h("div", { class: "segmented", role: "group", "aria-label": "Format" }, buttons),
        button("Copy", () => copyText(FORMATS[format](model.job.spec)), { icon: "copy", kind: "small" })), pre));
  node.addEventListener("toggle", () => show(format));
  return node;
}

const TONES = { error: "bad", warning: "warn", info: "neutral" };

/** Findings as a list of notices. */
export function findingList(findings) {
  return h("ul", { class: "findings" }, findings.map((finding) => h("li", { class: "notice", "data-tone": TONES[finding.severity] },
    h("span", null, h("strong", null, `${finding.severity} · ${finding.model}: `), finding.message),
    finding.tensors.length > 0 && h("details", { class: "fold" }, h("summary", null, plural(finding.tensors.length, "tensor")),
      h("ul", { class: "mono" }, finding.tensors.map((name) => h("li", null, name)))))));
}

export function findingsPanel(model) {
  const title = h("h2");
  const body = h("div", { class: "body" });
  const node = h("details", { class: "card" }, h("summary", null, title), body);
  let shown = null;
  const update = () => {
    const { findings } = model.job;
    const text = JSON.stringify(findings);
    if (text === shown) return;
    shown = text;
    setText(title, findings.length ? `Compatibility: ${plural(findings.length, "finding")}` : "Compatibility: nothing to report");
    body.replaceChildren(findings.length ? findingList(findings) : h("p", { class: "muted" }, "Shapes, types and architectures of the checkpoints are checked when the job starts."));
    node.open = findings.some((finding) => finding.severity !== "info");
  };
  model.topics.on(["job"], update);
  update();
  return node;
}
