// What the job page knows: loaded over REST, kept up to date by events; panels listen to topics.

import { get, jobPath } from "../core/api.js";
import { announce, showError, toast } from "../core/notify.js";
import { jobState } from "../core/format.js";
import { setQuery } from "../core/router.js";
import { newestEvents } from "../core/stream.js";
import { refresher, Topics } from "../core/util.js";

const SHOWN_EVENTS = 200;
const DRAWN_POINTS = 2000;

/** Topics: job, front, progression, exports, events, candidates, selected. */
export class JobModel {
  constructor(id, page) {
    this.id = id;
    this.page = page;
    this.topics = new Topics(page.signal);
    this.events = [];
    this.exports = [];
    this.selected = null;
    this.foreign = new Set();
    this.views = new Map();
    const refresh = (load, topic) => refresher(async () => {
      await load();
      this.topics.touch(topic);
    }, 1000, page.signal, showError);
    this.refreshJob = refresh(() => this.loadJob(), "job");
    this.refreshFront = refresh(() => this.loadFront(), "front");
    this.refreshProgression = refresh(() => this.loadProgression(), "progression");
    this.refreshExports = refresh(() => this.loadExports(), "exports");
  }

  /** Load everything; returns the id of the last event that is part of it. */
  async load() {
    const events = await newestEvents(jobPath(this.id, "/events"), this.page.signal);
    await Promise.all([this.loadJob(), this.loadFront(), this.loadProgression(), this.loadExports()]);
    for (const event of events) this.noteOrigin(event);
    this.events = events.slice(-SHOWN_EVENTS);
    return events.at(-1)?.id ?? 0;
  }

  async loadJob() {
    this.setJob(await get(jobPath(this.id), {}, this.page.signal));
  }

  /** Take in a job as the server now shows it. */
  setJob(job) {
    this.seenAt = performance.now();
    this.#change(job);
  }

  #change(job) {
    const before = this.job;
    this.job = job;
    if (before && (before.state !== job.state || before.requested !== job.requested)) {
      announce(`${job.name}: ${jobState(job)[0]}`);
    }
    this.topics.touch("job");
  }

  async loadFront() {
    this.front = await get(jobPath(this.id, "/front"), { limit: DRAWN_POINTS }, this.page.signal);
    const { front, baselines, dominated, partial } = this.front;
    this.drawn = new Set([...front, ...baselines, ...dominated, ...partial].map((point) => point.index));
  }

  async loadProgression() {
    this.progression = await get(jobPath(this.id, "/progression"), {}, this.page.signal);
  }

  async loadExports() {
    this.exports = await get(jobPath(this.id, "/exports"), {}, this.page.signal);
  }

  /** The objectives with their directions, once known. */
  get objectives() {
    return this.job.objectives;
  }

  /** Places of those that are axes of the front: the others only constrain, or are only reported. */
  get axes() {
    return this.objectives.flatMap(({ use }, i) => (use === "objective" ? [i] : []));
  }

  /** Running time, ticking while the job runs. */
  get elapsed() {
    const since = this.job.state === "running" ? (performance.now() - this.seenAt) / 1000 : 0;
    return this.job.progress.elapsed_s + since;
  }

  /** One candidate, whole; those that are evaluated never change and are kept. */
  async candidate(index) {
    const kept = this.views.get(index);
    if (kept) return kept;
    const view = await get(jobPath(this.id, `/candidates/${index}`), {}, this.page.signal);
    if (view.state !== "pending") {
      if (this.views.size > 500) this.views.delete(this.views.keys().next().value);
      this.views.set(index, view);
    }
    return view;
  }

  /** Show a candidate in the detail panel and mark it everywhere. */
  select(index) {
    if (this.selected === index) return;
    this.selected = index;
    setQuery({ candidate: index });
    this.topics.touch("selected");
  }

  noteOrigin(event) {
    if (event.type !== "candidates.proposed" || event.data.origin === "algorithm") return;
    for (let i = 0; i < event.data.count; i += 1) this.foreign.add(event.data.first + i);
  }

  /** Take in an event. */
  apply(event) {
    this.events.push(event);
    if (this.events.length > 2 * SHOWN_EVENTS) this.events = this.events.slice(-SHOWN_EVENTS);
    this.topics.touch("events");
    this.#handlers[event.type]?.(event.data, event);
  }

  #handlers = {
    "job.state": (data) => {
      this.#change({ ...this.job, state: data.state, reason: data.reason });
      this.refreshJob();
      this.refreshFront();
      this.refreshProgression();
      this.topics.touch("candidates");
    },
    "candidates.proposed": (data, event) => {
      this.noteOrigin(event);
      if (this.job.phases[data.phase]?.state === "waiting") this.refreshJob();
      this.job.progress.proposed = Math.max(this.job.progress.proposed, data.first + data.count);
      this.topics.touch("candidates", "progress");
    },
    "candidate.evaluated": (data) => {
      if (data.progress) {
        this.job.progress = data.progress;
        this.seenAt = performance.now();
      }
      this.topics.touch("progress", "candidates");
      if (data.index === this.selected) this.topics.touch("selected");
      if (data.values) this.addPoint(data);
    },
    "job.verifying": (data) => {
      this.job.progress.to_verify = data.to_verify;
      for (const index of data.candidates) this.views.delete(index);
      this.topics.touch("progress", "candidates");
    },
    "candidate.verified": (data) => {
      this.job.progress = data.progress;
      this.views.delete(data.index);
      this.refreshFront();
      this.topics.touch("progress", "candidates");
      if (data.index === this.selected) this.topics.touch("selected");
    },
    "candidate.enqueued": () => this.topics.touch("candidates"),
    "candidate.rejected": (data) => toast(`An enqueued candidate was rejected: ${data.message}`, "bad"),
    "export.progress": (data) => {
      const known = this.exports.find((one) => one.id === data.export_id);
      if (known && data.state === "running") Object.assign(known, { state: data.state, progress: data.progress });
      else this.refreshExports();
      this.topics.touch("exports");
    },
  };

  /** Draw a point that does not change the front without asking the server; everything else is asked for. */
  addPoint({ index, values, errors = null, violation = 0, on_front: onFront, label = null, partial = null }) {
    // What violates a constraint, or was measured on some items only, is no best value.
    const improved = violation <= 0 && partial === null && this.#improve(values);
    if (improved) {
      this.refreshProgression();
      this.topics.touch("progress");
    }
    const others = partial === null ? this.front.dominated : this.front.partial;
    const listed = partial === null && (label !== null || this.foreign.has(index));
    if (onFront || listed || others.length >= DRAWN_POINTS) this.refreshFront();
    else if (!this.drawn.has(index)) {
      this.drawn.add(index); // an answer of the server may know more than the events that have come so far
      others.push({ index, values, errors, on_front: false, label, origin: "algorithm", partial, violation });
      this.front.total += 1;
      this.topics.touch("front");
    }
  }

  #improve(values) {
    let improved = this.loss(values) < (this.progression.loss.at(-1) ?? Infinity);
    this.job.best = this.objectives.map(({ direction }, i) => {
      const old = this.job.best[i];
      const better = old === null || (direction === "minimise" ? values[i] < old : values[i] > old);
      improved ||= better;
      return better ? values[i] : old;
    });
    return improved;
  }

  /** Weighted mean of the front's axes, maximised ones negated. */
  loss(values) {
    const axes = this.axes.map((i) => ({ ...this.objectives[i], value: values[i] }));
    const weights = axes.reduce((sum, { weight }) => sum + weight, 0);
    return axes.reduce((sum, { direction, weight, value }) => sum + (direction === "minimise" ? 1 : -1) * weight * value, 0) / weights;
  }
}
