// The table of candidates: sorted and paged by the server, brought up to date while the job runs.

import { get, jobPath } from "../core/api.js";
import { button, card, h, replace, select, setText } from "../core/dom.js";
import { errorText, objectiveTitle, plural, score } from "../core/format.js";
import { showError } from "../core/notify.js";
import { refresher, same } from "../core/util.js";
import { overfittedBadge } from "./verification.js";

const PAGE = 50;
const FILTERS = [["", "All candidates"], ["front", "On the front"], ["completed", "With scores"], ["partial", "On some items only"], ["failed", "Failed"], ["pending", "Pending"]];
const ORIGINS = { warm_start: "warm start", user: "user" };

export function candidateTable(model, page) {
  const state = { key: "index", descending: true, filter: "", cursors: [null], next: null };
  const head = h("tr");
  const body = h("tbody");
  const rows = new Map();
  const note = h("p", { class: "small muted", role: "status" });
  const back = button("Newer", () => turn(() => state.cursors.pop()), { kind: "small" });
  const forward = button("Next", () => turn(() => state.cursors.push(state.next)), { kind: "small" });
  const filter = select(FILTERS, "", (value) => {
    state.filter = value;
    turn(() => (state.cursors = [null]));
  }, { "aria-label": "Which candidates" });
  const node = card("Candidates", filter,
    h("div", { class: "scroll table-box", tabindex: "0", role: "group", "aria-label": "Table of candidates" },
      h("table", { class: "grid" }, h("thead", null, head), body)),
    h("div", { class: "pager" }, note, back, forward));
  node.classList.add("flush");

  function turn(change) {
    change();
    drawHead();
    load().catch(showError);
  }

  function query() {
    const byValue = state.key !== "index";
    return {
      sort: `${state.descending ? "-" : ""}${byValue ? "value" : "index"}`,
      objective: byValue ? model.objectives[state.key].name : null,
      on_front: state.filter === "front" ? true : null,
      partial: state.filter === "partial" ? true : null,
      state: state.filter === "front" || state.filter === "partial" ? null : state.filter,
      cursor: state.cursors.at(-1),
      limit: PAGE,
    };
  }

  async function load() {
    const asked = query();
    const answer = await get(jobPath(model.id, "/candidates"), asked, page.signal);
    if (page.signal.aborted || !same(asked, query())) return;
    state.next = answer.next_cursor;
    show(answer.items);
  }

  function show(items) {
    const wanted = new Map(items.map((item) => [item.index, item]));
    for (const [index, row] of rows) {
      if (same(row.item, wanted.get(index))) continue;
      // Keep the row's node (and the focus in it) and fill it anew, or drop it.
      if (wanted.has(index)) fill(row, wanted.get(index));
      else {
        row.node.remove();
        rows.delete(index);
      }
    }
    items.forEach((item, i) => {
      if (!rows.has(item.index)) rows.set(item.index, makeRow(item));
      const { node: row } = rows.get(item.index);
      if (body.children[i] !== row) body.insertBefore(row, body.children[i] ?? null);
    });
    const paged = state.cursors.length - 1;
    setText(note, items.length ? `Rows ${paged * PAGE + 1} to ${paged * PAGE + items.length}` : "No candidate here yet.");
    back.disabled = paged === 0;
    forward.disabled = state.next === null;
    mark();
  }

  function makeRow(item) {
    const choose = h("button", { type: "button", class: "link", onclick: () => model.select(item.index) });
    const row = { node: h("tr", { "data-index": item.index }), choose };
    row.node.addEventListener("click", () => model.select(item.index));
    fill(row, item);
    return row;
  }

  function fill(row, item) {
    row.item = item;
    setText(row.choose, `#${item.index}`);
    row.choose.setAttribute("aria-label", `Show candidate ${item.index}`);
    const phase = model.job.phases.length > 1 && item.origin === "algorithm" ? model.job.phases[item.phase]?.algorithm : null;
    const generation = !item.label && item.origin === "algorithm" && item.generation >= 0 ? `generation ${item.generation}` : null;
    const who = [item.label, ORIGINS[item.origin], phase, generation].filter(Boolean).join(" · ");
    replace(row.node,
      h("td", null, row.choose),
      h("td", null, outcome(item), overfittedBadge(item.verification)),
      model.objectives.map((objective, i) => h("td", { class: "num" }, score(item.values?.[i]), error(item.errors?.[i]), tested(objective, item.verification))),
      h("td", { class: "who", title: who }, who));
  }

  function mark() {
    for (const [index, row] of rows) row.node.classList.toggle("selected", index === model.selected);
  }

  function drawHead() {
    const sorter = (key, text, title) => {
      const active = state.key === key;
      const arrow = active ? (state.descending ? " ↓" : " ↑") : "";
      const cell = h("th", { scope: "col", class: key === "index" ? null : "num", "aria-sort": active ? (state.descending ? "descending" : "ascending") : "none" },
        h("button", { type: "button", class: "sort", title, onclick: () => sortBy(key) }, text + arrow));
      return cell;
    };
    const focused = [...head.children].indexOf(document.activeElement?.closest("th"));
    replace(head, sorter("index", "#", "Sort by number"), h("th", { scope: "col" }, "Outcome"),
      model.objectives.map((objective, i) => sorter(i, objective.name, `Sort by ${objectiveTitle(objective)}`)),
      h("th", { scope: "col" }, "Origin"));
    head.children[focused]?.querySelector("button")?.focus();
  }

  function sortBy(key) {
    const best = key === "index" ? true : model.objectives[key].direction !== "minimise";
    turn(() => {
      state.descending = state.key === key ? !state.descending : best;
      state.key = key;
      state.cursors = [null];
      back.lastChild.textContent = key === "index" && state.descending ? "Newer" : "Previous";
    });
  }

  const refresh = refresher(load, 1000, page.signal, showError);
  model.topics.on(["candidates"], refresh);
  model.topics.on(["selected"], mark);
  model.topics.on(["job"], drawHead);
  drawHead();
  load().catch(showError);
  return node;
}

/** Behind a value that is an estimate: its error bar. */
const error = (found) => found && h("span", { class: "small muted", title: "An estimate, with its 95 % error bar" }, errorText(found));

/** Beneath a value: what it is on test items. */
function tested({ name }, verification) {
  const found = verification?.test[name];
  if (!found) return null;
  const range = found.items < 2 ? "" : `, ${score(found.low)} to ${score(found.high)}`;
  return h("span", { class: "small muted tested", title: `On test items${range}` }, `test ${score(found.value)}`);
}

function outcome(item) {
  if (item.duplicate_of !== null) return `same as #${item.duplicate_of}`;
  if (item.state === "failed") return h("span", { class: "badge", "data-tone": "bad", title: item.failure?.message }, item.failure?.code ?? "failed");
  if (item.state !== "completed") return h("span", { class: "badge" }, item.state);
  if (item.violation > 0) return h("span", { class: "badge", "data-tone": "warn" }, "violates");
  if (item.partial !== null) return h("span", { class: "badge", title: item.stopped ? "Stopped, having lost beyond doubt: an estimate, which joins no front" : "Measured on some items only: an estimate, which joins no front" },
    `${item.stopped ? "stopped, " : ""}${plural(item.partial, "item")}`);
  return item.on_front ? h("span", { class: "badge", "data-tone": "accent" }, "front") : h("span", { class: "muted" }, "scored");
}
