// The selected candidate: scores, origin, coefficients, items, recipe.

import { button, card, h, replace } from "../core/dom.js";
import { costText, dateTime, duration, errorText, objectiveTitle, plural, score } from "../core/format.js";
import { copyText } from "../core/notify.js";
import { layerPlan, tables } from "./coefficients.js";
import { verification } from "./verification.js";
import { heatmap } from "./heatmap.js";
import { itemScores } from "./items.js";

const ORIGINS = { algorithm: "proposed by the algorithm", warm_start: "warm start", user: "enqueued by a user" };
const MOST_TABLES = 6;
const STOPPED = "It had lost to a better candidate beyond doubt; its values are estimates";

export function candidatePanel(model, page, onExport) {
  const body = h("div", { class: "candidate" });
  const exporting = button("Export…", () => onExport(model.selected), { icon: "export", kind: "small", hidden: true });
  const reuse = h("span");
  const node = card("Candidate", [reuse, exporting], body);
  node.classList.add("candidate-card");
  let wanted = 0;

  async function show() {
    const turn = ++wanted;
    if (model.selected === null) {
      exporting.hidden = true;
      replace(body, h("p", { class: "muted" }, "Choose a candidate on a plot or in the table to see how it is merged."));
      return;
    }
    try {
      const candidate = await model.candidate(model.selected);
      if (turn !== wanted || page.signal.aborted) return;
      exporting.hidden = candidate.state !== "completed";
      replace(body, detail(model, candidate));
    } catch (error) {
      if (turn !== wanted || page.signal.aborted) return;
      exporting.hidden = true;
      replace(body, h("p", { class: "notice", "data-tone": "bad" }, error.message));
    }
  }

  model.topics.on(["selected"], show);
  document.addEventListener("themechange", show, { signal: page.signal });
  void show();
  return node;
}

function detail(model, candidate) {
  return [
    heading(candidate),
    candidate.failure && h("div", { class: "notice", "data-tone": "bad" }, h("strong", null, candidate.failure.code), h("span", null, candidate.failure.message)),
    candidate.values && values(model, candidate),
    verification(model, candidate),
    facts(model, candidate),
    coefficients(model, candidate),
    items(model, candidate),
    recipe(candidate),
  ];
}

function heading(candidate) {
  return h(
    "div",
    { class: "candidate-head" },
    h("h3", null, `#${candidate.index}${candidate.label ? ` · ${candidate.label}` : ""}`),
    candidate.on_front && h("span", { class: "badge", "data-tone": "accent" }, "on the front"),
    candidate.state !== "completed" && h("span", { class: "badge", "data-tone": candidate.state === "failed" ? "bad" : "neutral" }, candidate.state),
    candidate.partial !== null && h("span", { class: "badge", title: candidate.stopped ? STOPPED : "Estimates, which join no front" },
      `${candidate.stopped ? "stopped after" : "measured on"} ${plural(candidate.partial, "item")} of each objective`),
    candidate.estimated && h("span", { class: "badge", title: "Measured on a few items, which stand for all; values with 95 % error bars" }, "estimated"),
    candidate.violation > 0 && h("span", { class: "badge", "data-tone": "warn" }, `violates constraints by ${score(candidate.violation)}`),
  );
}

function values(model, candidate) {
  return h("dl", { class: "values" }, model.objectives.map((objective, i) => h(
    "div",
    { title: objectiveTitle(objective) },
    h("dt", null, objective.name, objective.direction && h("span", { class: "muted" }, objective.direction === "minimise" ? " ↓" : " ↑")),
    h("dd", null, score(candidate.values[i]), candidate.errors && h("span", { class: "small muted", title: "An estimate, with its 95 % error bar" }, errorText(candidate.errors[i]))),
  )));
}

function facts(model, candidate) {
  const seconds = Object.entries(candidate.seconds).map(([part, value]) => `${part} ${duration(value)}`).join(", ");
  const links = (indices) => indices.map((index, i) => [i ? ", " : "", h("button", { type: "button", class: "link", onclick: () => model.select(index) }, `#${index}`)]);
  const { phases } = model.job;
  const rows = [
    phases.length > 1 && ["Phase", `${candidate.phase + 1} of ${phases.length}${phases[candidate.phase] ? `, ${phases[candidate.phase].algorithm}` : ""}`],
    ["Origin", ORIGINS[candidate.origin] + (candidate.generation >= 0 ? `, generation ${candidate.generation}` : "")],
    candidate.duplicate_of !== null && ["Same as", links([candidate.duplicate_of])],
    candidate.parents.length > 0 && ["Parents", links(candidate.parents)],
    seconds && ["Took", seconds],
    costText(candidate.cost) && ["Cost", costText(candidate.cost)],
    candidate.worker && ["Worker", candidate.worker],
    ["Proposed", dateTime(candidate.created_at)],
    ["Fingerprint", h("code", { title: candidate.fingerprint }, candidate.fingerprint.slice(0, 16))],
  ];
  return h("dl", { class: "facts" }, rows.filter(Boolean).map(([name, value]) => [h("dt", null, name), h("dd", null, value)]));
}

function coefficients(model, candidate) {
  const set = candidate.recipe.root?.values;
  if (set) {
    return h("section", null, h("h4", null, "Parameters"), h("dl", { class: "facts" },
      Object.entries(set).map(([name, value]) => [h("dt", null, name), h("dd", null, typeof value === "number" ? score(value) : String(value))])));
  }
  const found = tables(model.job, candidate.recipe);
  const plan = layerPlan(candidate.recipe);
  if (!found.length && !plan.length) return h("p", { class: "muted" }, `This candidate is the model “${candidate.recipe.root?.model}” as it is.`);
  const options = Object.entries(candidate.recipe.root.options ?? {}).map(([name, value]) => `${name} = ${value}`);
  return h("section", null,
    plan.length > 0 && layers(plan),
    found.slice(0, MOST_TABLES).map((table) => [h("h4", null, found.length > 1 ? `Coefficients of ${table.operator}` : "Coefficients"), heatmap(table)]),
    found.length > MOST_TABLES && h("p", { class: "small muted" }, `${found.length - MOST_TABLES} more tables are in the recipe.`),
    options.length > 0 && h("p", { class: "small" }, h("span", { class: "muted" }, "Options: "), options.join(", ")));
}

/** What stands at each depth of a model whose layers are rearranged. */
function layers(plan) {
  return h("details", { class: "fold", open: plan.length <= 16 }, h("summary", null, plural(plan.length, "layer")),
    h("div", { class: "scroll table-box plan", tabindex: "0", role: "group", "aria-label": "Layers of the merged model" },
      h("table", { class: "grid" },
        h("thead", null, h("tr", null, ["Depth", "Made of", "Scale"].map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", null, plan.map((one) => h("tr", null, h("td", null, one.depth), h("td", null, one.from), h("td", { class: "num" }, score(one.scale))))))));
}

function items(model, candidate) {
  const strips = (scores) => model.objectives.map((objective) => itemScores(objective, scores[objective.name] ?? [])).filter(Boolean);
  const [searched, tested] = [strips(candidate.items), strips(candidate.test_items)];
  return [
    searched.length > 0 && h("section", null, h("h4", null, "Scores of the items"), searched),
    tested.length > 0 && h("section", null, h("h4", null, "Scores of the test items"), tested),
  ];
}

function recipe(candidate) {
  const text = JSON.stringify(candidate.recipe, null, 2);
  const pre = h("pre", { class: "code", tabindex: "0", "aria-label": "Recipe as JSON" });
  const fold = h("details", { class: "fold" }, h("summary", null, "Recipe"),
    h("div", { class: "fold-tools" }, button("Copy", () => copyText(text), { icon: "copy", kind: "small" })), pre);
  fold.addEventListener("toggle", () => {
    pre.textContent = text;
  });
  return fold;
}
