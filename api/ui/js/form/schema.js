// Reading JSON schema: references, optional parts, bounds.

import { count } from "../core/format.js";

/** Follow $ref and take "or null" off: returns { schema, nullable }. */
export function resolve(schema, defs) {
  let { $ref, ...rest } = schema;
  let nullable = false;
  while ($ref) {
    const target = defs[$ref.split("/").at(-1)];
    // What stands beside a reference (description, default) is about this use and goes first.
    ({ $ref, ...rest } = { ...target, ...rest, $ref: target.$ref });
  }
  const variants = rest.anyOf?.filter((variant) => variant.type !== "null");
  if (variants && variants.length < rest.anyOf.length) nullable = true;
  if (variants?.length === 1) {
    const { anyOf, ...outer } = rest;
    const inner = resolve(variants[0], defs);
    return { schema: { ...inner.schema, ...outer }, nullable: true };
  }
  return { schema: variants ? { ...rest, anyOf: variants.map((variant) => resolve(variant, defs).schema) } : rest, nullable };
}

const SCALARS = new Set(["boolean", "integer", "number", "string"]);
const isNumbers = (schema) => schema.type === "array" && ["number", "integer"].includes(schema.items?.type);

/** Which kind of control a resolved schema needs. */
export function kindOf(schema) {
  if (schema.enum) return "enum";
  if (schema.anyOf) {
    if (schema.anyOf.every((variant) => SCALARS.has(variant.type))) return "scalar";
    if (schema.anyOf.every((variant) => variant.type === "number" || isNumbers(variant))) return "numbers";
    return "json";
  }
  if (schema.type === "array") return arrayKind(schema);
  if (schema.type === "object") return objectKind(schema);
  return SCALARS.has(schema.type) ? schema.type : "json";
}

function arrayKind(schema) {
  if (isNumbers(schema)) return "numbers";
  return schema.items?.enum ? "flags" : "list";
}

function objectKind(schema) {
  if (schema.properties) return "object";
  return typeof schema.additionalProperties === "object" ? "dict" : "json";
}

/** The value a field starts with: its default, or nothing. */
export const defaultOf = (schema) => (schema.default === null ? undefined : schema.default);

/** "0 to 10", "at least 1", "above 0", … or null. */
export function boundsText(schema) {
  const { minimum, maximum, exclusiveMinimum, exclusiveMaximum } = schema;
  const number = (value) => (Number.isInteger(value) ? count(value) : String(value));
  const low = minimum !== undefined ? `at least ${number(minimum)}` : exclusiveMinimum !== undefined ? `above ${number(exclusiveMinimum)}` : null;
  const high = maximum !== undefined ? `at most ${number(maximum)}` : exclusiveMaximum !== undefined ? `below ${number(exclusiveMaximum)}` : null;
  return [low, high].filter(Boolean).join(" and ") || null;
}

/** What is wrong with a number, or null. */
export function numberProblem(value, schema) {
  if (schema.type === "integer" && !Number.isInteger(value)) return "Enter a whole number.";
  const outside =
    value < (schema.minimum ?? -Infinity) ||
    value > (schema.maximum ?? Infinity) ||
    value <= (schema.exclusiveMinimum ?? -Infinity) ||
    value >= (schema.exclusiveMaximum ?? Infinity);
  return outside ? `Must be ${boundsText(schema)}.` : null;
}

/** What is wrong with a text, or null. */
export function textProblem(value, schema) {
  if (value.length < (schema.minLength ?? 0)) return `Needs at least ${schema.minLength} characters.`;
  if (value.length > (schema.maxLength ?? Infinity)) return `At most ${schema.maxLength} characters.`;
  if (schema.pattern && !new RegExp(schema.pattern, "u").test(value)) return patternProblem(schema);
  return null;
}

function patternProblem(schema) {
  const example = schema.examples?.[0];
  const rule = schema.pattern.startsWith("^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
    ? "Use letters, digits, “_”, “.” and “-” only, and begin with a letter or digit."
    : "This does not have the right form.";
  return example ? `${rule} Example: ${example}` : rule;
}
