// What a search has to beat: each expert, the uniform merge, greedy soup, …, beside the best candidate.

import { button, card, h, replace, setText } from "../core/dom.js";
import { objectiveTitle, score } from "../core/format.js";

const SHOWN = 10;

/** Whether a point is a merge that people make without a search: a warm start of the job, or the work of `baselines`. */
export function isBaseline(model, point) {
  return (point.origin === "warm_start" && point.phase === 0) || (point.label !== null && model.job.phases[point.phase]?.algorithm === "baselines");
}

export function baselinesTable(model) {
  const box = h("div", { class: "scroll table-box baselines", tabindex: "0", role: "group", "aria-label": "Baselines and the best candidate" });
  const toggle = button("", () => {
    all = !all;
    update();
  }, { kind: "small quiet" });
  const more = h("p", { class: "more" }, toggle);
  const node = card("Baselines", null, box, more);
  node.classList.add("flush");
  let all = false;
  const update = () => {
    const found = compare(model);
    node.hidden = found === null;
    if (!found) return;
    replace(box, table(model, found, all));
    more.hidden = found.baselines.length <= SHOWN;
    setText(toggle, all ? "Show fewer" : `Show all ${found.baselines.length}`);
  };
  model.topics.on(["front", "job", "selected"], update);
  update();
  return node;
}

/** The baselines from the best on, and the best candidate, by weighted mean loss; null before there is a baseline. */
function compare(model) {
  const byLoss = (points) => points.filter((point) => point.violation <= 0).map((point) => ({ ...point, loss: model.loss(point.values) })).sort((a, b) => a.loss - b.loss || a.index - b.index);
  const baselines = byLoss(model.front.baselines.filter((point) => isBaseline(model, point)));
  if (!baselines.length) return null;
  const { front, dominated } = model.front;
  const found = byLoss([...front, ...dominated].filter((point) => !isBaseline(model, point)));
  return { baselines, best: found[0] ?? null };
}

function table(model, { baselines, best }, all) {
  const { objectives } = model;
  const axes = model.axes.map((i) => objectives[i]);
  const single = axes.length === 1;
  const maximised = axes.every((objective) => objective.direction === "maximise");
  const mean = (loss) => (maximised ? -loss : loss);
  const meanName = maximised || axes.every((objective) => objective.direction === "minimise") ? "mean" : "mean loss";
  const cells = (point) => [
    objectives.map((_, i) => h("td", { class: "num" }, score(point.values[i]))),
    !single && h("td", { class: "num" }, score(mean(point.loss))),
  ];
  const row = (point, extra) => h("tr", { class: point.index === model.selected ? "selected" : null, onclick: () => model.select(point.index) },
    h("td", null, h("button", { type: "button", class: "link", "aria-label": `Show ${point.label ?? "candidate"} #${point.index}` }, `#${point.index}`)),
    h("td", { class: "who" }, point.label ?? extra, point.label && extra ? h("span", { class: "muted" }, ` · ${extra}`) : null),
    cells(point));
  return h("table", { class: "grid" },
    h("thead", null, h("tr", null, h("th", { scope: "col" }, "#"), h("th", { scope: "col" }, "Merge"),
      objectives.map((objective) => h("th", { scope: "col", class: "num", title: objectiveTitle(objective) }, `${objective.name} ${objective.direction === "minimise" ? "↓" : "↑"}`)),
      !single && h("th", { scope: "col", class: "num", title: "Mean of the objectives by their weights" }, meanName))),
    h("tbody", null,
      best && row(best, "best candidate"),
      best && gain(objectives, best, baselines[0], single),
      (all ? baselines : baselines.slice(0, SHOWN)).map((point, i) => row(point, i === 0 ? "best baseline" : null))));
}

/** By how much the best candidate is better than the best baseline, in each objective's own direction. */
function gain(objectives, best, baseline, single) {
  const cell = (better) => h("td", { class: "num gain", "data-tone": better > 0 ? "ok" : better < 0 ? "bad" : null },
    better > 0 ? `+${score(better)}` : score(better));
  return h("tr", { class: "gains" }, h("td"), h("td", { class: "who muted" }, `gain over ${baseline.label ?? `#${baseline.index}`}`),
    objectives.map((objective, i) => cell((objective.direction === "minimise" ? -1 : 1) * (best.values[i] - baseline.values[i]))),
    !single && cell(baseline.loss - best.loss));
}
