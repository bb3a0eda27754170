// Server-sent events over fetch: unlike EventSource it can send the token, and the UI sees every reconnection.

import { address, authorization, get, needToken, readError } from "./api.js";

const SILENCE_MS = 60_000; // the server pings more often than this
const HIDDEN_MS = 60_000; // browsers allow six connections to a server: a tab nobody sees gives its one back

/** Split the text of a stream into messages; call with chunks in order, get `{ id, data }` in `onMessage`. */
export function parser(onMessage) {
  let rest = "";
  let id = null;
  let data = [];
  const line = (text) => {
    if (text === "") {
      if (data.length) onMessage({ id, data: data.join("\n") });
      data = [];
      return;
    }
    const colon = text.indexOf(":");
    const name = colon < 0 ? text : text.slice(0, colon);
    const value = colon < 0 ? "" : text.slice(colon + 1).replace(/^ /, "");
    if (name === "data") data.push(value);
    else if (name === "id") id = value;
  };
  return (chunk) => {
    rest += chunk;
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    lines.forEach(line);
  };
}

/**
 * Follow a stream of events until `signal` aborts, through any number of lost connections.
 *
 * `after` is the id of the last event already known; `onEvent` gets each event's view in order;
 * `onStatus` gets "connecting", "live" or "reconnecting".
 */
export async function follow({ path, after, signal, onEvent, onStatus }) {
  let last = after;
  let failures = 0;
  while (!signal.aborted) {
    await visible(signal);
    onStatus(failures ? "reconnecting" : "connecting");
    try {
      await connectOnce(path, last, signal, (event) => {
        failures = 0;
        last = event.id;
        onEvent(event);
      }, () => {
        failures = 0;
        onStatus("live");
      });
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 404 || (error.status === 401 && !(await needToken()))) {
        onStatus("closed");
        return;
      }
    }
    if (signal.aborted) return;
    failures += 1;
    if (!document.hidden) onStatus("reconnecting");
    await pause(Math.min(15_000, 500 * 2 ** Math.min(failures, 6)) * (0.75 + Math.random() / 2), signal);
  }
}

async function connectOnce(path, last, signal, onEvent, onOpen) {
  const connection = new AbortController();
  const stop = () => connection.abort();
  let silence = 0;
  let hidden = 0;
  const alive = () => {
    clearTimeout(silence);
    silence = setTimeout(stop, SILENCE_MS);
  };
  const onVisibility = () => {
    clearTimeout(hidden);
    if (document.hidden) hidden = setTimeout(stop, HIDDEN_MS);
  };
  signal.addEventListener("abort", stop);
  document.addEventListener("visibilitychange", onVisibility);
  alive();
  try {
    const response = await fetch(address(path, { after: last }), {
      headers: { Accept: "text/event-stream", "Last-Event-ID": String(last), ...authorization() },
      signal: connection.signal,
      cache: "no-store",
    });
    if (!response.ok) throw await readError(response);
    onOpen();
    await read(response.body, alive, onEvent);
  } finally {
    clearTimeout(silence);
    clearTimeout(hidden);
    connection.abort();
    signal.removeEventListener("abort", stop);
    document.removeEventListener("visibilitychange", onVisibility);
  }
}

async function read(body, alive, onEvent) {
  const feed = parser((message) => {
    const event = JSON.parse(message.data);
    if (typeof event.id === "number") onEvent(event);
  });
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    alive();
    feed(value);
  }
}

function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    const now = () => {
      clearTimeout(timer);
      resolve();
    };
    signal.addEventListener("abort", now, { once: true });
    window.addEventListener("online", now, { once: true });
  });
}

function visible(signal) {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener("visibilitychange", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
    signal.addEventListener("abort", look);
  });
}

const PAGE = 500;
const TAIL = 1000;

/**
 * Return the newest events (at least those among the last thousand ids), oldest first.
 *
 * The API reads events forwards only, and a long job has hundreds of thousands: so look for the end with doubling, then
 * halving steps instead of reading them all.
 */
export async function newestEvents(path, signal) {
  const read = (after, limit = PAGE) => get(path, { follow: false, after, limit }, signal);
  const first = await read(0);
  if (first.length < PAGE) return first;
  let low = first.at(-1).id; // exists
  let high = Infinity; // nothing follows it
  let step = PAGE;
  while (high - low > 1) {
    const probe = high === Infinity ? low + step : Math.floor((low + high) / 2);
    const found = await read(probe);
    if (found.length) low = found.at(-1).id;
    else high = probe;
    if (found.length && found.length < PAGE) break;
    step *= 2;
  }
  return read(Math.max(0, low - TAIL), TAIL);
}
