// Numbers, times and words as people read them.

/** A score, four significant digits. */
export function score(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("-", "−");
  const digits = size >= 1000 ? 1 : size >= 100 ? 2 : size >= 10 ? 3 : 4;
  return value.toFixed(digits).replace("-", "−");
}

/** Half the width of the 95 % interval of a value with a standard error; 0 where it has none. */
export const half = (error) => 1.96 * (error ?? 0);

/** " ± 0.02" behind an estimate. */
export const errorText = (error) => (error ? ` ± ${score(half(error))}` : "");

/** A whole number with thousands separated. */
export function count(value) {
  return new Intl.NumberFormat("en", { maximumFractionDigits: 0 }).format(value);
}

/** "1 candidate", "2 candidates". */
export function plural(value, word) {
  return `${count(value)} ${word}${value === 1 ? "" : "s"}`;
}

/** Seconds as "20 ms", "0.8 s", "12 s", "3 min 04 s", "2 h 10 min". */
export function duration(seconds) {
  if (!(seconds >= 0)) return "–";
  if (seconds > 0 && seconds < 0.1) return `${Math.ceil(1000 * seconds)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  const whole = Math.floor(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
}

/** "just now", "5 min ago", … of an ISO date. */
export function ago(iso) {
  const seconds = (Date.now() - Date.parse(iso)) / 1000;
  if (seconds < 45) return "just now";
  if (seconds < 3600) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h ago`;
  return `${plural(Math.round(seconds / 86400), "day")} ago`;
}

/** A local date and time. */
export function dateTime(iso) {
  return new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" }).format(new Date(iso));
}

/** The local time of day. */
export function timeOfDay(iso) {
  return new Intl.DateTimeFormat(undefined, { timeStyle: "medium" }).format(new Date(iso));
}

const UNITS = { s: "(s)", gb: "(GB)" };
const ACRONYMS = { cpus: "CPUs", gpus: "GPUs" };

/** A key of the spec as a label: `wall_time_s` is "Wall time (s)". */
export function label(key) {
  if (ACRONYMS[key]) return ACRONYMS[key];
  const words = key.split("_");
  const unit = words.length > 1 ? UNITS[words.at(-1)] : undefined;
  if (unit) words[words.length - 1] = unit;
  const text = words.join(" ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** The singular of a list's label: "experts" → "expert". */
export function singular(key) {
  return label(key).toLowerCase().replace(/ies$/, "y").replace(/s$/, "");
}

const STATES = {
  queued: ["Queued", "neutral"],
  running: ["Running", "accent"],
  paused: ["Paused", "warn"],
  completed: ["Completed", "ok"],
  failed: ["Failed", "bad"],
  cancelled: ["Cancelled", "neutral"],
};

/** Text and tone of a job's state; a request that is under way shows as such. */
export function jobState(job) {
  const [text, tone] = STATES[job.state] ?? [job.state, "neutral"];
  if (job.state === "running" && job.requested === "pause") return ["Pausing…", "warn"];
  if (job.state === "running" && job.requested === "cancel") return ["Cancelling…", "warn"];
  if (job.state === "paused" && job.requested === "run") return ["Resuming…", "accent"];
  return [text, tone];
}

/** Whether a job can still change. */
export function isOpen(job) {
  return job.state === "queued" || job.state === "running" || job.state === "paused";
}

/** Evaluations done of those budgeted, in 0 … 1. */
export function fraction(progress) {
  return progress.budget > 0 ? Math.min(1, (progress.completed + progress.failed) / progress.budget) : 0;
}

/** How much of something there is, in whole numbers or with a few digits: "1,200", "0.0125". */
export const amount = (value) => new Intl.NumberFormat("en", { maximumFractionDigits: Math.abs(value) < 1 ? 6 : 2 }).format(value);

/** What evaluations cost: "1,200 items, 34,000 tokens", or "" for nothing. */
export const costText = (cost) => Object.entries(cost ?? {}).map(([part, value]) => `${amount(value)} ${part}`).join(", ");

const USES = { constraint: "a constraint", report: "only reported" };

/** "language (loss, lower is better)". */
export function objectiveTitle(objective) {
  const better = objective.direction ? (objective.direction === "minimise" ? "lower is better" : "higher is better") : null;
  const parts = [objective.metric, better, USES[objective.use]].filter(Boolean);
  return parts.length ? `${objective.name} (${parts.join(", ")})` : objective.name;
}
