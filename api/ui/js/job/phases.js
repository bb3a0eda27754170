// The phases of a job: who proposes candidates when, which of them is under way, and why mergeopt chose it.

import { card, h, replace } from "../core/dom.js";
import { count, plural } from "../core/format.js";

const STATES = { waiting: ["waiting", "neutral"], under_way: ["under way", "accent"], over: ["over", "ok"] };

export function phasesPanel(model) {
  const list = h("ol", { class: "phases" });
  const node = card("Phases", null, list);
  let shown = null;
  const update = () => {
    const { phases } = model.job;
    const text = JSON.stringify(phases);
    if (text === shown) return;
    shown = text;
    // A single algorithm that the user named needs no list.
    node.hidden = phases.length < 2 && !phases.some((phase) => phase.why);
    replace(list, phases.map(line));
  };
  model.topics.on(["job"], update);
  update();
  return node;
}

function line(phase) {
  const [text, tone] = STATES[phase.state];
  const facts = [
    plural(phase.evaluations, "evaluation"),
    phase.keep_experts !== null && `among ${plural(phase.keep_experts, "expert")}`,
    phase.patience !== null && `or ${count(phase.patience)} without an improvement`,
    ...Object.entries(phase.options).map(([name, value]) => `${name} = ${typeof value === "object" ? JSON.stringify(value) : value}`),
  ];
  return h("li", { "data-state": phase.state, "aria-current": phase.state === "under_way" ? "step" : null },
    h("div", { class: "phase-head" }, h("strong", null, phase.algorithm), h("span", { class: "badge", "data-tone": tone }, text)),
    h("p", { class: "small" }, facts.filter(Boolean).join(" · ")),
    phase.why && h("p", { class: "small muted" }, phase.why));
}
