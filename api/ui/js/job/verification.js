// What a candidate came to once the search was over, on all items and on test items.

import { h } from "../core/dom.js";
import { plural, score } from "../core/format.js";

const OVERFITTED = "The interval on the test items lies entirely on the worse side of that on the search items: the search has fitted its items, or the test items are harder. Compare the baselines.";

/** "0.71", with its 95 % interval beneath, which a mean over items that nobody saw one by one does not have. */
export function interval(found) {
  if (!found) return h("span", { class: "muted" }, "–");
  if (found.items < 2) return h("span", null, score(found.value));
  return [h("span", null, score(found.value)), h("span", { class: "small muted interval" }, `${score(found.low)} to ${score(found.high)}`)];
}

export function overfittedBadge(found) {
  return found?.overfitted.length ? h("span", { class: "badge", "data-tone": "warn", title: OVERFITTED }, "overfitted") : null;
}

/** A table of the objectives on search and test items; null where the candidate is not verified. */
export function verification(model, { verification: found }) {
  if (!found) return null;
  if (found.state === "waiting") return h("p", { class: "muted small" }, "It will be measured anew.");
  if (found.state === "failed") {
    return h("div", { class: "notice", "data-tone": "bad" }, h("strong", null, "It could not be measured anew"), h("span", null, found.failure?.message));
  }
  const worse = found.overfitted;
  const tested = Object.keys(found.test).length > 0;
  return h("section", { class: "verification" },
    h("h4", null, tested ? "On items the search never saw" : "On all items"),
    worse.length > 0 && h("div", { class: "notice", "data-tone": "warn" }, h("strong", null, `Overfitted: ${worse.join(", ")}`), h("span", null, OVERFITTED)),
    h("table", { class: "grid" },
      h("thead", null, h("tr", null, ["Objective", "Search items", tested && "Test items"].filter(Boolean).map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", null, model.objectives.filter(({ name }) => found.search[name]).map((objective) => row(objective, found, tested)))),
    h("p", { class: "small muted" }, "With 95 % bootstrap intervals over the items."));
}

function row({ name }, { search, test, overfitted }, tested) {
  const sizes = [search[name], test[name]].filter(Boolean).map((one) => plural(one.items, "item")).join(", ");
  return h("tr", { "data-overfitted": String(overfitted.includes(name)) },
    h("th", { scope: "row", title: sizes }, name), h("td", { class: "num" }, interval(search[name])), tested && h("td", { class: "num" }, interval(test[name])));
}
