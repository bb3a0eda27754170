// One job: live plots, the chosen candidate, table, events, exports.

import { h, replace } from "../core/dom.js";
import { jobPath } from "../core/api.js";
import { streamStatus } from "../core/notify.js";
import { follow } from "../core/stream.js";
import { baselinesTable } from "../job/baselines.js";
import { bestCurve } from "../job/best_curve.js";
import { candidatePanel } from "../job/candidate.js";
import { eventLog } from "../job/log.js";
import { exportDialog, exportsPanel } from "../job/exports.js";
import { findingsPanel, specPanel } from "../job/spec.js";
import { frontPlot } from "../job/front_plot.js";
import { jobHeader } from "../job/header.js";
import { JobModel } from "../job/model.js";
import { parallelPlot } from "../job/parallel.js";
import { phasesPanel } from "../job/phases.js";
import { candidateTable } from "../job/table.js";
import { loadPlotly } from "../job/plotly.js";
import { statusOf } from "./jobs.js";

export async function jobPage(page) {
  replace(page.root, h("p", { class: "loading", role: "status" }, "Loading the job…"));
  loadPlotly().catch(() => {}); // starts early; the plots report a failure
  const model = new JobModel(page.params.id, page);
  const after = await model.load();
  if (page.signal.aborted) return;
  const chosen = page.query.get("candidate");
  if (chosen !== null && /^\d+$/.test(chosen)) model.selected = Number(chosen);

  const log = eventLog(model);
  replace(
    page.root,
    jobHeader(model, page),
    phasesPanel(model),
    h("div", { class: "job-grid" },
      h("div", { class: "column" }, frontPlot(model, page), baselinesTable(model), bestCurve(model, page), parallelPlot(model, page)),
      h("div", { class: "column side" }, candidatePanel(model, page, (index) => exportDialog(model, index)))),
    candidateTable(model, page),
    h("div", { class: "job-halves" }, log.node, exportsPanel(model)),
    findingsPanel(model),
    specPanel(model),
  );
  log.ready();
  page.signal.addEventListener("abort", () => streamStatus(null));
  void follow({
    path: jobPath(model.id, "/events"),
    after,
    signal: page.signal,
    onEvent: (event) => model.apply(event),
    onStatus: statusOf(page),
  });
}
