// Timing: everything that events drive goes through these, so that a fast job cannot freeze the page.

/** Call `run` at most once every `ms`: at once the first time, then once more after the last call. */
export function throttle(run, ms) {
  let last = -Infinity;
  let timer = 0;
  return () => {
    if (timer) return;
    const wait = Math.max(0, last + ms - performance.now());
    timer = setTimeout(() => {
      timer = 0;
      last = performance.now();
      run();
    }, wait);
  };
}

/** Call `run` once no call has come for `ms`. */
export function debounce(run, ms) {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => run(...args), ms);
  };
}

/**
 * Wrap an async `load` so that it runs once at a time and at most once every `ms`, and never takes more than a quarter
 * of the time: a slow answer is asked for less often. Failures go to `onError`.
 */
export function refresher(load, ms, signal, onError) {
  let timer = 0;
  let running = false;
  let again = false;
  let next = -Infinity;
  const run = async () => {
    timer = 0;
    running = true;
    again = false;
    const begun = performance.now();
    try {
      await load();
    } catch (error) {
      if (!signal.aborted) onError(error);
    } finally {
      running = false;
      next = begun + Math.max(ms, 4 * (performance.now() - begun));
      if (again) schedule();
    }
  };
  const schedule = () => {
    if (!timer && !signal.aborted) timer = setTimeout(run, Math.max(0, next - performance.now()));
  };
  signal.addEventListener("abort", () => clearTimeout(timer));
  return () => {
    if (running) again = true;
    else schedule();
  };
}

/** Let parts of a page listen to topics; redraws of a topic are coalesced to four a second. */
export class Topics {
  #listeners = new Map();
  #dirty = new Set();
  #flush;

  constructor(signal) {
    this.#flush = throttle(() => {
      if (signal.aborted) return;
      const dirty = [...this.#dirty];
      this.#dirty.clear();
      const calls = new Set(dirty.flatMap((topic) => this.#listeners.get(topic) ?? []));
      for (const call of calls) call();
    }, 250);
  }

  /** Call `run` after each of the topics changed. */
  on(topics, run) {
    for (const topic of topics) this.#listeners.set(topic, [...(this.#listeners.get(topic) ?? []), run]);
  }

  /** Say that a topic changed. */
  touch(...topics) {
    for (const topic of topics) this.#dirty.add(topic);
    this.#flush();
  }
}

/** Whether two plain values are equal. */
export function same(a, b) {
  if (a === b) return true;
  if (typeof a !== "object" || typeof b !== "object" || a === null || b === null) return false;
  if (Array.isArray(a) !== Array.isArray(b)) return false;
  const keys = Object.keys(a);
  return keys.length === Object.keys(b).length && keys.every((key) => key in b && same(a[key], b[key]));
}

/** A random key for requests that must take effect once. */
export function randomKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
