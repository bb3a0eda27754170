// The head of a job's page: name, state, progress, and what can be done with it.

import { jobPath, post, remove } from "../core/api.js";
import { confirmDialog, openDialog } from "../core/dialogs.js";
import { button, h, replace, setText } from "../core/dom.js";
import { ago, amount, costText, count, dateTime, duration, fraction, isOpen, jobState, label, objectiveTitle, score } from "../core/format.js";
import { act, copyText, toast } from "../core/notify.js";
import { go } from "../core/router.js";
import { frame } from "../form/frame.js";
import { enqueueDialog } from "./enqueue.js";
import { exportDialog } from "./exports.js";

export function jobHeader(model, page) {
  const badge = h("span", { class: "badge", id: "job-state" });
  const title = h("h1");
  const meta = h("p", { class: "meta muted small" });
  const reason = h("p", { class: "notice", hidden: true });
  const actions = h("div", { class: "actions", role: "group", "aria-label": "Actions" });
  const stats = statistics(model);
  const buttons = makeButtons(model);
  replace(actions, Object.values(buttons));
  const node = h("header", { class: "job-header" },
    h("nav", { class: "crumbs small", "aria-label": "Breadcrumb" }, h("a", { href: "#/jobs" }, "Jobs")),
    h("div", { class: "job-headline" }, h("div", { class: "job-name-line" }, title, badge), actions),
    meta, reason, stats.node);

  const update = () => {
    const { job } = model;
    const [text, tone] = jobState(job);
    setText(badge, text);
    badge.dataset.tone = tone;
    badge.dataset.live = String(job.state === "running");
    setText(title, job.name);
    replace(meta, metaParts(job));
    reason.hidden = !job.reason;
    setText(reason, job.reason ?? "");
    reason.dataset.tone = job.state === "failed" ? "bad" : "neutral";
    showButtons(buttons, job);
    progress();
  };
  const progress = () => {
    const { job } = model;
    stats.update();
    document.title = `${job.state === "running" ? `${Math.round(100 * fraction(job.progress))} % · ` : ""}${job.name} – mergeopt`;
  };
  model.topics.on(["job"], update);
  model.topics.on(["progress"], progress);
  const clock = setInterval(stats.tick, 1000);
  page.signal.addEventListener("abort", () => clearInterval(clock));
  update();
  return node;
}

function metaParts(job) {
  const parts = [
    [job.algorithm, job.spec.merge?.space?.name, job.operator].filter(Boolean).join(" · "),
    h("time", { datetime: job.created_at, title: dateTime(job.created_at) }, `created ${ago(job.created_at)}`),
    job.variables.length ? `${count(job.variables.length)} variables` : null,
    job.cloned_from ? h("a", { href: `#/jobs/${encodeURIComponent(job.cloned_from)}` }, "cloned from another job") : null,
    h("button", { type: "button", class: "link", "aria-label": `Copy the job's id ${job.id}`, onclick: () => copyText(job.id) }, h("code", null, job.id)),
  ];
  return parts.filter(Boolean).map((part) => h("span", null, part));
}

function makeButtons(model) {
  const send = (action) => async () => model.setJob(await post(jobPath(model.id, `/${action}`)));
  const acting = (run) => (event) => act(event.currentTarget, run);
  return {
    pause: button("Pause", acting(send("pause")), { icon: "pause" }),
    resume: button("Resume", (event) => (budgets(model.job).length ? budgetDialog(model) : acting(send("resume"))(event)), { icon: "play", kind: "primary" }),
    cancel: button("Cancel", () => confirmDialog(`Cancel “${model.job.name}”?`,
      "The search ends and cannot be resumed. What has been evaluated stays.", "Cancel the job", send("cancel")), { icon: "stop" }),
    enqueue: button("Enqueue…", () => enqueueDialog(model), { icon: "enqueue" }),
    export: button("Export…", () => exportDialog(model, model.selected), { icon: "export" }),
    clone: button("Clone", () => go(`/new?clone=${encodeURIComponent(model.id)}`), { icon: "copy" }),
    remove: button("Delete", () => confirmDialog(`Delete “${model.job.name}”?`,
      "Its candidates, scores and events are deleted. Exported checkpoints stay.", "Delete the job", async () => {
        await remove(jobPath(model.id));
        toast("The job is deleted.", "ok");
        go("/jobs");
      }), { icon: "trash", kind: "danger" }),
  };
}

/** The budgets that a paused job may be given anew. */
const budgets = ({ spec, state }) => (state === "paused" ? ["requests", "tokens", "money"].filter((name) => spec.budget[name] != null) : []);

/** Ask what a job may spend in all from now on, and resume it. */
function budgetDialog(model) {
  const fields = budgets(model.job).map((name) => budgetField(name, model.job));
  return openDialog({
    title: `Resume “${model.job.name}”`,
    body: [h("p", { class: "muted" }, "What it may spend in all, before it pauses again."), ...fields.map((field) => field.node)],
    submit: "Resume",
    onSubmit: async () => {
      const bad = fields.filter((field) => !field.check());
      if (bad.length) {
        bad[0].input.focus();
        throw new Error(""); // the fields say what is wrong
      }
      const budget = Object.fromEntries(fields.map(({ name, input }) => [name, Number(input.value)]));
      model.setJob(await post(jobPath(model.id, "/resume"), { budget }));
    },
  });
}

/** A budget to give anew: { name, node, input, check }. A job that resumes with nothing left to spend would pause again at once. */
function budgetField(name, { spec, progress }) {
  const spent = progress.cost?.[name] ?? 0;
  const input = h("input", { type: "number", min: 0, step: "any", value: spec.budget[name] });
  const framed = frame({ text: label(name), required: true, target: input, help: `${amount(spent)} spent so far.` });
  const check = () => {
    framed.clear();
    let problem = null;
    if (input.validity.badInput) problem = "Enter a number.";
    else if (input.value === "") problem = "This is needed.";
    else if (!(Number(input.value) > spent)) problem = `Must be above the ${amount(spent)} spent so far.`;
    if (problem) framed.fail(problem);
    return !problem;
  };
  input.addEventListener("input", () => {
    if (input.hasAttribute("aria-invalid")) check();
  });
  return { name, node: framed.node, input, check };
}

function showButtons(buttons, job) {
  const open = isOpen(job);
  const held = document.activeElement;
  buttons.pause.hidden = !open || job.requested !== "run" || job.state === "paused";
  buttons.resume.hidden = !open || job.requested === "cancel" || !(job.state === "paused" || job.requested === "pause");
  buttons.cancel.hidden = !open || job.requested === "cancel";
  buttons.enqueue.hidden = !open;
  buttons.remove.hidden = job.state === "running";
  buttons.export.disabled = !job.progress.completed;
  // A button that vanishes under the user's fingers hands the focus to its counterpart.
  if (held?.hidden) [buttons.resume, buttons.pause, buttons.clone].find((one) => !one.hidden)?.focus();
}

function statistics(model) {
  const tile = (name, extra) => {
    const value = h("span");
    return { value, node: h("div", { class: "stat" }, h("dt", null, name), h("dd", null, value, extra)) };
  };
  const fill = h("span");
  const bar = h("div", { class: "bar", role: "progressbar", "aria-label": "Evaluations of the budget", "aria-valuemin": 0, "aria-valuemax": 100 }, fill);
  const evaluations = tile("Evaluations", bar);
  const front = tile("On the front");
  const verified = tile("Verified");
  verified.node.title = "Of the front and the baselines, measured on items that the search never saw";
  const failed = tile("Failed");
  const duplicates = tile("Duplicates");
  const elapsed = tile("Elapsed");
  const best = model.objectives.map((objective) => {
    const one = tile(`Best ${objective.name}`);
    one.node.title = objectiveTitle(objective);
    return one;
  });
  const tick = () => setText(elapsed.value, duration(model.elapsed));
  const update = () => {
    const { progress, state } = model.job;
    const done = progress.completed + progress.failed;
    const percent = Math.round(100 * fraction(progress));
    setText(evaluations.value, `${count(done)} / ${count(progress.budget)}`);
    fill.style.width = `${percent}%`;
    bar.setAttribute("aria-valuenow", percent);
    bar.dataset.tone = { completed: "ok", failed: "bad", paused: "warn" }[state] ?? "";
    setText(front.value, count(progress.front));
    verified.node.hidden = !progress.to_verify;
    setText(verified.value, `${count(progress.verified)} / ${count(progress.to_verify)}`);
    setText(failed.value, count(progress.failed));
    evaluations.node.title = costText(progress.cost);
    failed.value.dataset.tone = progress.failed ? "bad" : "";
    setText(duplicates.value, count(progress.duplicates));
    best.forEach((one, i) => setText(one.value, score(model.job.best[i])));
    tick();
  };
  const node = h("dl", { class: "stats" }, [evaluations, ...best, front, verified, failed, duplicates, elapsed].map((one) => one.node));
  return { node, update, tick };
}
