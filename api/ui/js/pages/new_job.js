// A new job: a form made from the schema, or pasted YAML or JSON; also to clone a job.

import { get, jobPath, post } from "../core/api.js";
import { button, h, replace, uid } from "../core/dom.js";
import { count, plural } from "../core/format.js";
import { act, announce, showError, toast } from "../core/notify.js";
import { go } from "../core/router.js";
import { randomKey } from "../core/util.js";
import { toYaml } from "../core/yaml.js";
import { jobForm } from "../form/form.js";
import { findingList } from "../job/spec.js";

const EXAMPLE = `name: three word tasks
base: models/base
experts:
  - {name: language, path: models/language}
  - {name: polarity, path: models/polarity}
objectives:
  - name: language
    evaluator: text_classification
    data: {path: data/language, split: search}
    head: language
budget: {evaluations: 200}
`;

export async function newJobPage(page) {
  const from = page.query.get("clone");
  replace(page.root, h("p", { class: "loading", role: "status" }, "Loading the form…"));
  const [schema, algorithms, spaces, operators, evaluators, jobs, original] = await Promise.all([
    get("schema/job", {}, page.signal),
    ...["algorithms", "spaces", "operators", "evaluators"].map((name) => get(name, {}, page.signal)),
    get("jobs", { limit: 200 }, page.signal),
    from ? get(jobPath(from), {}, page.signal) : null,
  ]);
  if (page.signal.aborted) return;
  const title = original ? `Clone “${original.name}”` : "New job";
  document.title = `${title} – mergeopt`;
  const found = jobs.items.filter((job) => job.progress.front > 0);
  const form = jobForm(schema, { algorithms, spaces, operators, evaluators, jobs: found });
  if (original) form.write(original.spec);
  const pasted = pasteTab(original);
  const tabs = makeTabs([["form", "Form", form.node], ["text", "Paste YAML or JSON", pasted.node]]);
  const result = h("div", { class: "result", role: "status", tabindex: "-1" });
  const keyed = idempotency();

  const formSource = {
    body: () => ({ body: form.read() }),
    check() {
      form.clear();
      return form.check();
    },
    problems: (problems) => form.problems(problems),
  };
  const source = () => (tabs.current() === "form" ? formSource : pasted);

  async function run(send) {
    replace(result);
    const failed = source().check();
    if (failed.length) {
      complain(failed, [], failed.length);
      return null;
    }
    try {
      return await send(source().body());
    } catch (error) {
      if (error.status !== 422 && error.status !== 413) throw error;
      const { failed: fields, rest } = source().problems(error.problems);
      complain(fields, rest, error.problems.length, error.remedy);
      return null;
    }
  }

  function complain(fields, rest, total, remedy) {
    replace(result, h("div", { class: "notice", "data-tone": "bad", role: "alert" },
      h("strong", null, `${plural(total, "problem")} to put right`),
      fields.length > 0 && tabs.current() === "form" && h("span", null, `${fields.length === 1 ? "It" : "Each"} is shown beside its field.`),
      rest.map(({ field, message }) => h("span", null, field && field !== "body" ? h("code", null, field) : null, field && field !== "body" ? ": " : null, message)),
      remedy && rest.length > 0 && h("span", { class: "muted" }, remedy)));
    focusOn(fields[0]);
  }

  const validate = button("Validate", (event) => act(event.currentTarget, async () => {
    const answer = await run(({ body, type }) => post("jobs/validate", body, { type }));
    if (!answer) return;
    replace(result, validation(answer, tabs.current() === "text" && (() => {
      form.write(answer.spec);
      tabs.select("form");
    })));
    announce("The job spec is valid.");
  }));
  const submit = h("button", { type: "submit", class: "button primary" }, "Submit");
  const submitJob = () => act(submit, async () => {
    const job = await run(({ body, type }) => (original && type === undefined
      ? post(jobPath(original.id, "/clone"), { changes: patch(original.spec, body) }, { headers: keyed(body) })
      : post("jobs", body, { type, headers: keyed(body) })));
    if (!job) return;
    toast(`“${job.name}” is queued.`, "ok");
    go(`/jobs/${encodeURIComponent(job.id)}`);
  });

  const asText = button("Show as YAML", () => {
    pasted.set(toYaml(form.read()));
    tabs.select("text");
  }, { kind: "quiet" });
  const node = h("form", { class: "new-job", novalidate: true },
    h("div", { class: "page-head" }, h("h1", null, title), tabs.list),
    original && h("p", { class: "muted" }, "Everything is filled in as the original has it. Change what should differ, then submit."),
    tabs.panels,
    h("div", { class: "submit-bar" }, result, h("div", { class: "actions" }, asText, validate, submit)));
  node.addEventListener("submit", (event) => {
    event.preventDefault();
    void submitJob();
  });
  tabs.onSelect = (name) => (asText.hidden = name !== "form");
  replace(page.root, node);
}

/** Open what hides a field, and move the focus there. */
function focusOn(widget) {
  if (!widget) return;
  for (let node = widget.node; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  widget.focus();
  widget.node.scrollIntoView({ block: "center" });
}

/** One key for each body: sending the same again (a lost answer, a double click) makes no second job. */
function idempotency() {
  let last = { text: null, key: null };
  return (body) => {
    const text = JSON.stringify(body);
    if (text !== last.text) last = { text, key: randomKey() };
    return { "Idempotency-Key": last.key };
  };
}

/** The merge patch (RFC 7396) that makes `to` of `from`, where what `to` leaves out goes back to its default. */
function patch(from, to) {
  const out = {};
  for (const [key, value] of Object.entries(to)) {
    const isPart = (one) => typeof one === "object" && one !== null && !Array.isArray(one);
    out[key] = isPart(value) && isPart(from[key]) ? patch(from[key], value) : value;
  }
  for (const [key, value] of Object.entries(from)) if (!(key in to) && value !== null) out[key] = null;
  return out;
}

function validation(answer, openInForm) {
  return h("div", { class: "notice", "data-tone": "ok" },
    h("strong", null, "The job spec is valid"),
    h("span", null, searched(answer)),
    answer.estimate.requests && h("span", null, `Services: ${estimated(answer.estimate)} at most.`),
    answer.phases.length > 0 && h("span", null, `Evaluations: ${answer.phases.map((phase) => `${phase.algorithm} ${count(phase.evaluations)}`).join(", then ")}.`),
    answer.phases.map((phase) => phase.why && h("span", { class: "muted" }, `${phase.algorithm}: ${phase.why}`)),
    answer.findings.length > 0 && findingList(answer.findings),
    openInForm && h("div", null, button("Open in the form", openInForm, { kind: "small" })));
}

function estimated({ requests, tokens, money }) {
  return [`about ${plural(Math.round(requests), "request")}`, tokens && plural(Math.round(tokens), "token"), money && `${money.toPrecision(3)} in money`]
    .filter(Boolean).join(", ");
}

function searched({ variables, groups, columns }) {
  const all = variables ? `${plural(variables, "variable")} to search` : "A search space of no fixed dimension";
  if (!groups.length) return `${all}.`;
  return `${all}: ${plural(groups.length, "coefficient group")} × ${plural(columns.length, "coefficient")} (${columns.join(", ")}).`;
}

function pasteTab(original) {
  const id = uid("paste");
  const area = h("textarea", { id, class: "mono", rows: 24, spellcheck: "false", placeholder: EXAMPLE, value: original ? toYaml(original.spec) : "" });
  const problem = h("p", { class: "problem", id: `${id}-problem`, hidden: true });
  area.setAttribute("aria-describedby", problem.id);
  const file = h("input", { type: "file", accept: ".yaml,.yml,.json,application/json", id: uid("file"), onchange: async () => {
    const [chosen] = file.files;
    if (chosen) area.value = await chosen.text().catch((error) => showError(error)) ?? "";
  } });
  const isJson = () => area.value.trimStart().startsWith("{");
  const fail = (message) => {
    problem.textContent = message;
    problem.hidden = false;
    area.setAttribute("aria-invalid", "true");
  };
  const clear = () => {
    problem.hidden = true;
    area.removeAttribute("aria-invalid");
  };
  const widget = { node: area, focus: () => area.focus() };
  return {
    node: h("div", { class: "card" }, h("div", { class: "body" }, h("div", { class: "field" },
      h("label", { for: id }, "Job spec as YAML or JSON"), area, problem),
    h("div", { class: "file" }, h("label", { for: file.id }, "Or read it from a file"), file))),
    set: (text) => {
      area.value = text;
      clear();
    },
    check: () => {
      clear();
      if (area.value.trim()) return [];
      fail("Paste a job spec first.");
      return [widget];
    },
    body: () => ({ body: area.value, type: isJson() ? "application/json" : "application/yaml" }),
    problems: (problems) => {
      area.setAttribute("aria-invalid", "true");
      return { failed: [widget], rest: problems };
    },
  };
}

/** Tabs in the ARIA pattern: arrow keys move between them. */
function makeTabs(entries) {
  const tabs = entries.map(([name, text]) => h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": `panel-${name}`, onclick: () => api.select(name) }, text));
  const panels = entries.map(([name, , node]) => h("div", { role: "tabpanel", id: `panel-${name}`, "aria-labelledby": `tab-${name}` }, node));
  const list = h("div", { class: "segmented", role: "tablist", "aria-label": "Form or text" }, tabs);
  let current = entries[0][0];
  const api = {
    list,
    panels,
    onSelect: null,
    current: () => current,
    select(name) {
      current = name;
      entries.forEach(([key], i) => {
        tabs[i].setAttribute("aria-selected", String(key === name));
        tabs[i].tabIndex = key === name ? 0 : -1;
        panels[i].hidden = key !== name;
      });
      api.onSelect?.(name);
    },
  };
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (entries.findIndex(([name]) => name === current) + step + entries.length) % entries.length;
    api.select(entries[next][0]);
    tabs[next].focus();
  });
  api.select(current);
  return api;
}
