// Exports: start one, watch its progress, see where it went.

import { jobPath, post } from "../core/api.js";
import { openDialog } from "../core/dialogs.js";
import { button, card, h, replace, select, uid } from "../core/dom.js";
import { dateTime } from "../core/format.js";
import { announce, copyText, toast } from "../core/notify.js";

const TONES = { completed: "ok", failed: "bad" };

export function exportsPanel(model) {
  const list = h("ul", { class: "exports" });
  const node = card("Exports", button("Export…", () => exportDialog(model, model.selected), { kind: "small", icon: "export" }), list);
  const states = new Map();
  const update = () => {
    for (const one of model.exports) {
      if (states.has(one.id) && states.get(one.id) !== one.state) announce(`Export of candidate ${one.candidate}: ${one.state}`);
      states.set(one.id, one.state);
    }
    replace(list, model.exports.length ? model.exports.map(row) : h("li", { class: "muted" }, "Nothing exported yet. An export writes a candidate as a Hugging Face checkpoint on the server."));
  };
  model.topics.on(["exports"], update);
  update();
  return node;
}

function row(one) {
  const percent = Math.round(100 * one.progress);
  return h(
    "li",
    { "data-export": one.id, "data-state": one.state },
    h("div", { class: "export-head" },
      h("strong", null, `#${one.candidate}`),
      h("span", { class: "muted" }, one.head ? `with the head of ${one.head}` : ""),
      h("span", { class: "badge", "data-tone": TONES[one.state] ?? "accent", title: dateTime(one.created_at) }, one.state)),
    one.state === "completed" || one.state === "failed" ? null : h("div", { class: "bar", role: "progressbar", "aria-label": `Export of candidate ${one.candidate}`, "aria-valuenow": percent, "aria-valuemin": 0, "aria-valuemax": 100 },
      h("span", { style: { width: `${percent}%` } })),
    one.path && h("div", { class: "export-path" }, h("code", null, one.path), button("Copy path", () => copyText(one.path), { kind: "small" })),
    one.error && h("p", { class: "notice", "data-tone": "bad" }, one.error.message),
  );
}

/** Ask which candidate with whose head, and start the export. */
export function exportDialog(model, index) {
  const ids = { candidate: uid("export"), head: uid("export") };
  const candidate = h("input", { id: ids.candidate, type: "number", min: 0, step: 1, required: true, value: index ?? model.front.front[0]?.index ?? "" });
  const experts = model.job.spec.experts?.map((expert) => expert.name) ?? [];
  const named = model.job.spec.objectives?.some((objective) => objective.head);
  const head = select([["", "none"], ...experts.map((name) => [name, name])], named ? (experts[0] ?? "") : "", null, { id: ids.head });
  return openDialog({
    title: "Export a candidate",
    body: [
      h("p", { class: "muted" }, "Writes the merged model as a Hugging Face checkpoint into the server's export directory."),
      h("div", { class: "field" }, h("label", { for: ids.candidate }, "Candidate number"), candidate),
      h("div", { class: "field" }, h("label", { for: ids.head }, "Head of"), head,
        h("p", { class: "help" }, "Heads are not merged: a model with a task head takes one expert's.")),
    ],
    submit: "Start the export",
    onSubmit: async () => {
      const number = Number(candidate.value);
      if (candidate.value === "" || !Number.isInteger(number) || number < 0) throw new Error("Enter the number of a candidate.");
      await post(jobPath(model.id, "/exports"), { candidate: number, head: head.value || null });
      model.refreshExports();
      toast(`The export of #${number} has started.`, "ok");
    },
  });
}
