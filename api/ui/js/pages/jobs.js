// The list of jobs: filters, pages, live progress.

import { get, jobPath } from "../core/api.js";
import { button, h, replace, select, setText } from "../core/dom.js";
import { ago, count, dateTime, duration, fraction, isOpen, jobState, plural, score } from "../core/format.js";
import { showError, streamStatus } from "../core/notify.js";
import { setQuery } from "../core/router.js";
import { follow, newestEvents } from "../core/stream.js";
import { debounce, refresher, Topics } from "../core/util.js";

const STATES = ["queued", "running", "paused", "completed", "failed", "cancelled"];
const PAGE = 50;

export async function jobsPage(page) {
  document.title = "Jobs – mergeopt";
  const filter = { state: page.query.get("state") ?? "", name: page.query.get("name") ?? "" };
  const rows = new Map();
  const topics = new Topics(page.signal);
  const list = h("ul", { class: "jobs", "aria-label": "Jobs" });
  const empty = h("div", { class: "empty", hidden: true });
  const more = button("Load more", () => load(false).catch(showError), { hidden: true });
  const summary = h("p", { class: "muted small", role: "status" });
  let cursor = null;
  let turn = 0;

  async function load(fresh) {
    const mine = ++turn;
    const answer = await get("jobs", { ...filter, limit: PAGE, cursor: fresh ? null : cursor }, page.signal);
    if (mine !== turn) return; // the filter has changed meanwhile
    if (fresh) {
      rows.clear();
      list.replaceChildren();
    }
    for (const job of answer.items) show(job, false);
    cursor = answer.next_cursor;
    more.hidden = cursor === null;
    showCount();
  }

  function show(job, first) {
    const row = rows.get(job.id);
    if (row) {
      row.job = job;
      row.update();
      return;
    }
    const made = jobRow(job);
    rows.set(job.id, made);
    if (first) list.prepend(made.node);
    else list.append(made.node);
  }

  function showCount() {
    const filtered = Boolean(filter.state || filter.name);
    empty.hidden = rows.size > 0;
    if (!rows.size) replace(empty, filtered ? nothingMatches() : howToStart());
    setText(summary, rows.size ? `${plural(rows.size, "job")}${cursor ? " shown, more below" : ""}` : "");
  }

  const refilter = () => {
    setQuery(filter);
    load(true).catch(showError);
  };
  const tools = h(
    "div",
    { class: "jobs-tools" },
    h("h1", null, "Jobs"),
    h("label", { class: "visually-hidden", for: "jobs-name" }, "Filter by name"),
    h("input", {
      id: "jobs-name",
      type: "search",
      placeholder: "Filter by name",
      value: filter.name,
      oninput: debounce((event) => {
        filter.name = event.target.value.trim();
        refilter();
      }, 250),
    }),
    h("label", { class: "visually-hidden", for: "jobs-state" }, "Filter by state"),
    select(
      [["", "All states"], ...STATES.map((state) => [state, jobState({ state })[0]])],
      filter.state,
      (value) => {
        filter.state = value;
        refilter();
      },
      { id: "jobs-state" },
    ),
    h("a", { class: "button primary", href: "#/new" }, "New job"),
  );

  if (!page.root.children.length) replace(page.root, h("p", { class: "loading", role: "status" }, "Loading the jobs…"));
  const since = (await newestEvents("events", page.signal)).at(-1)?.id ?? 0;
  await load(true);
  if (page.signal.aborted) return;
  replace(page.root, tools, h("div", { class: "jobs-head", "aria-hidden": "true" },
    ["State", "Name", "Best so far", "Progress", "Elapsed", "Created"].map((text) => h("span", null, text))), list, empty,
  h("div", { class: "jobs-more" }, summary, more));

  const stale = new Set();
  const refetch = refresher(async () => {
    const ids = [...stale];
    stale.clear();
    for (const id of ids) await refresh(id);
    showCount();
  }, 1000, page.signal, showError);

  async function refresh(id) {
    const job = await get(jobPath(id), {}, page.signal).catch((error) => {
      if (error.status === 404) return null;
      throw error;
    });
    const fits = job && (!filter.state || job.state === filter.state)
      && job.name.toLowerCase().includes(filter.name.toLowerCase());
    if (fits) show(job, true);
    else {
      rows.get(id)?.node.remove();
      rows.delete(id);
    }
  }

  const changed = new Set();
  topics.on(["rows"], () => {
    for (const id of changed) rows.get(id)?.update();
    changed.clear();
  });
  const onEvent = (event) => {
    const row = rows.get(event.job_id);
    if (event.type === "candidate.evaluated" && row) {
      row.evaluated(event.data);
      changed.add(event.job_id);
      topics.touch("rows");
    } else if (event.type === "job.state" || (!row && !filter.state && !filter.name)) {
      stale.add(event.job_id);
      refetch();
    }
  };
  const clock = setInterval(() => {
    for (const row of rows.values()) row.tick();
  }, 1000);
  page.signal.addEventListener("abort", () => {
    clearInterval(clock);
    streamStatus(null);
  });
  void follow({ path: "events", after: since, signal: page.signal, onEvent, onStatus: statusOf(page) });
}

/** Show the stream's state as long as the page is open. */
export function statusOf(page) {
  return (status) => {
    if (!page.signal.aborted) streamStatus(status);
  };
}

function howToStart() {
  return [
    h("h2", null, "No jobs yet"),
    h("p", null, "A job searches for the best way to merge a few fine-tuned models: name a base, its experts, what the merged model must be good at, and a budget."),
    h("a", { class: "button primary", href: "#/new" }, "New job"),
    h("p", { class: "small" }, "Or from a terminal, with a job spec in a file:"),
    h("pre", null, h("code", null, "mergeopt submit job.yaml")),
  ];
}

function nothingMatches() {
  return [h("h2", null, "No job matches"), h("p", null, "Change the state or the name above.")];
}

/** One job of the list, with methods that bring its numbers up to date. */
function jobRow(job) {
  const badge = h("span", { class: "badge" });
  const name = h("a", { class: "job-name", href: `#/jobs/${encodeURIComponent(job.id)}` });
  const sub = h("span", { class: "muted small" });
  const best = h("dl", { class: "job-best" });
  const fill = h("span");
  const bar = h("div", { class: "bar" }, fill);
  const numbers = h("span", { class: "small" });
  const elapsed = h("span", { class: "job-elapsed small" });
  const node = h(
    "li",
    { class: "job-row", "data-job": job.id },
    h("span", { class: "job-state" }, badge),
    h("div", { class: "job-title" }, name, sub),
    best,
    h("div", { class: "job-progress" }, bar, numbers),
    elapsed,
    h("time", { class: "job-created small muted", datetime: job.created_at, title: dateTime(job.created_at) }, ago(job.created_at)),
  );
  const row = {
    job,
    node,
    since: performance.now(),
    update() {
      const [text, tone] = jobState(row.job);
      const { progress } = row.job;
      setText(badge, text);
      badge.dataset.tone = tone;
      badge.dataset.live = String(row.job.state === "running");
      setText(name, row.job.name);
      setText(sub, [`${row.job.algorithm} · ${row.job.operator}`, row.job.state === "failed" ? row.job.reason : null].filter(Boolean).join(" · "));
      replace(best, row.job.objectives.map((objective, i) =>
        h("div", null, h("dt", { title: objective.name }, objective.name), h("dd", null, score(row.job.best[i])))));
      fill.style.width = `${100 * fraction(progress)}%`;
      bar.dataset.tone = { completed: "ok", failed: "bad", paused: "warn" }[row.job.state] ?? "";
      setText(numbers, `${count(progress.completed + progress.failed)} / ${count(progress.budget)} evaluations`);
      row.since = performance.now();
      row.tick();
    },
    tick() {
      const running = row.job.state === "running" ? (performance.now() - row.since) / 1000 : 0;
      setText(elapsed, row.job.started_at ? duration(row.job.progress.elapsed_s + running) : "–");
    },
    evaluated(data) {
      row.job.progress = data.progress ?? row.job.progress;
      if (!data.values || data.violation > 0) return;
      row.job.best = row.job.objectives.map((objective, i) => better(objective, row.job.best[i], data.values[i]));
    },
  };
  row.update();
  if (!isOpen(job)) node.classList.add("ended");
  return row;
}

function better(objective, old, value) {
  if (old === null || old === undefined) return value;
  return objective.direction === "minimise" ? Math.min(old, value) : Math.max(old, value);
}
