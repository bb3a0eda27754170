// Writes plain data as YAML (reading YAML is the server's work).

const PLAIN = /^[A-Za-z_/][\w ./@-]*$/;
const WORDS = /^(y|n|yes|no|true|false|on|off|null|~)$/i;

// YAML 1.1 takes 1e-9 for a text: its numbers with an exponent have a point.
const number = (value) => JSON.stringify(value).replace(/^(-?\d+)e/, "$1.0e");

function scalar(value) {
  if (typeof value === "number") return number(value);
  if (typeof value !== "string") return JSON.stringify(value);
  return PLAIN.test(value) && !WORDS.test(value) && !value.endsWith(" ") ? value : JSON.stringify(value);
}

const isEmpty = (value) => Object.keys(value).length === 0;
const isFlat = (value) => Array.isArray(value) && value.every((item) => typeof item !== "object" || item === null);

function block(value, indent) {
  if (typeof value !== "object" || value === null) return ` ${scalar(value)}`;
  if (isEmpty(value)) return Array.isArray(value) ? " []" : " {}";
  if (isFlat(value)) return ` [${value.map(scalar).join(", ")}]`;
  return `\n${lines(value, indent)}`;
}

function lines(value, indent) {
  const pad = "  ".repeat(indent);
  if (!Array.isArray(value)) {
    return Object.entries(value).map(([key, item]) => `${pad}${scalar(key)}:${block(item, indent + 1)}`).join("\n");
  }
  return value.map((item) => {
    if (typeof item !== "object" || item === null || isEmpty(item) || isFlat(item)) return `${pad}-${block(item, indent + 1)}`;
    return `${pad}- ${lines(item, indent + 1).trimStart()}`;
  }).join("\n");
}

/** Return `value` (an object) as YAML text. */
export function toYaml(value) {
  return isEmpty(value) ? "{}\n" : `${lines(value, 0)}\n`;
}
