// The log of events: the newest, scrolled to the end unless the user looks further up.

import { card, h } from "../core/dom.js";
import { dateTime, plural, score, timeOfDay } from "../core/format.js";

const SHOWN = 200;

export function eventLog(model) {
  let autoscroll = true;
  let last = 0;
  const list = h("ol", { class: "log", tabindex: "0", role: "log", "aria-live": "off", "aria-label": "Events" });
  const box = h("input", { type: "checkbox", checked: true, onchange: () => follow(box.checked) });
  const follow = (on) => {
    autoscroll = on;
    box.checked = on;
    if (on) list.scrollTop = list.scrollHeight;
  };
  list.addEventListener("scroll", () => {
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 30;
    if (atEnd !== autoscroll) {
      autoscroll = atEnd;
      box.checked = atEnd;
    }
  }, { passive: true });
  const update = () => {
    const fresh = model.events.filter((event) => event.id > last).slice(-SHOWN);
    if (!fresh.length) return;
    last = fresh.at(-1).id;
    list.append(...fresh.map((event) => line(model, event)));
    while (list.children.length > SHOWN) list.firstChild.remove();
    if (autoscroll) list.scrollTop = list.scrollHeight;
  };
  const node = card("Events", h("label", { class: "check small" }, box, "Follow"), list);
  node.classList.add("flush");
  model.topics.on(["events"], update);
  update();
  return { node, ready: () => (list.scrollTop = list.scrollHeight) };
}

function line(model, event) {
  const [text, tone] = describe(model, event);
  return h("li", { "data-tone": tone },
    h("time", { datetime: event.at, title: dateTime(event.at) }, timeOfDay(event.at)), h("span", null, text));
}

const DESCRIBE = {
  "job.state": (data) => [`The job is ${data.state}${data.reason ? `: ${data.reason}` : ""}`, data.state === "failed" ? "bad" : "strong"],
  "job.note": (data) => [data.message, ""],
  "candidates.proposed": (data) => [
    `Proposed ${data.count === 1 ? `#${data.first}` : `#${data.first} to #${data.first + data.count - 1}`}${
      data.generation >= 0 ? ` (generation ${data.generation})` : ` (${{ warm_start: "warm start", user: "enqueued" }[data.origin] ?? data.origin})`}${
      data.phase ? `, phase ${data.phase + 1}` : ""}`, ""],
  "candidate.evaluated": (data, model) => [
    data.values
      ? `#${data.index}${data.label ? ` ${data.label}` : ""}: ${model.objectives.map((objective, i) => `${objective.name} ${score(data.values[i])}`).join(", ")}${data.partial ? ` · on ${plural(data.partial, "item")}` : ""}${data.on_front ? " · on the front" : ""}`
      : `#${data.index} ${data.state}`,
    data.values ? (data.on_front ? "front" : "") : "bad"],
  "job.verifying": (data) => [`${plural(data.candidates.length, "candidate")} to measure anew`, ""],
  "candidate.verified": (data) => [
    data.state === "failed"
      ? `#${data.index} could not be measured anew`
      : `#${data.index} on ${Object.keys(data.test).length ? "test" : "all"} items: ${Object.entries(Object.keys(data.test).length ? data.test : data.search).map(([name, value]) => `${name} ${score(value)}`).join(", ")}${
        data.overfitted.length ? ` · overfitted: ${data.overfitted.join(", ")}` : ""}`,
    data.state === "failed" ? "bad" : data.overfitted.length ? "warn" : ""],
  "candidate.enqueued": (data) => [`A candidate was enqueued (number ${data.queued} in the queue)`, ""],
  "candidate.rejected": (data) => [`An enqueued candidate was rejected: ${data.message}`, "bad"],
  "export.progress": (data) => [`Export of #${data.candidate}: ${data.state} (${Math.round(100 * data.progress)} %)`, data.state === "failed" ? "bad" : ""],
};

function describe(model, event) {
  const known = DESCRIBE[event.type];
  return known ? known(event.data, model) : [`${event.type} (${plural(Object.keys(event.data).length, "field")})`, ""];
}
