// The REST API: requests, errors, and the access token.

const BASE = new URL("../api/v1/", document.baseURI);
const TOKEN = "mergeopt.token";

/** An answer that is not a success, in the API's one error shape. */
export class ApiError extends Error {
  constructor(status, body) {
    super(body.message);
    this.name = "ApiError";
    this.status = status;
    this.code = body.code;
    this.field = body.field ?? null;
    this.remedy = body.remedy ?? null;
    this.problems = body.problems?.length ? body.problems : [{ field: this.field, message: body.message }];
  }
}

let askForToken = async () => null;
let asking = null;

/** Set the dialog that asks for a token; it resolves to the token, or null when the user gives up. */
export function onTokenNeeded(ask) {
  askForToken = ask;
}

/** Resolve to a new token; several requests that fail at once share one dialog. */
export function needToken() {
  const rejected = sessionStorage.getItem(TOKEN) !== null;
  asking ??= askForToken(rejected).finally(() => {
    asking = null;
  });
  return asking.then((token) => {
    if (token) sessionStorage.setItem(TOKEN, token);
    return token;
  });
}

/** Headers that every request carries. */
export function authorization() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { Authorization: `Bearer ${token}` } : {};
}

/** The address of a route with its query; undefined, null and empty values are left out. */
export function address(path, query = {}) {
  const url = new URL(path, BASE);
  for (const [key, value] of Object.entries(query)) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(key, value);
  }
  return url;
}

const RETRY_MS = 400;

/** Send a request; one that only reads is tried twice, as when the machine changes its network. */
async function send(url, options, tries = options.method === "GET" ? 2 : 1) {
  try {
    return await fetch(url, { ...options, headers: { Accept: "application/json", ...options.headers, ...authorization() } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (tries === 1) throw new ApiError(0, { code: "unreachable", message: "The server cannot be reached.", remedy: "Is it running?" });
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    return send(url, options, tries - 1);
  }
}

/** Read the error of an answer, also where a proxy answered with something else. */
export async function readError(response) {
  const body = await response.json().catch(() => null);
  const fallback = { code: "http_error", message: `The server answered ${response.status} ${response.statusText}`.trim() };
  return new ApiError(response.status, body?.error ?? fallback);
}

/**
 * Send a request and return the answer's JSON (null when it has none). Throws ApiError.
 * A plain object as `body` is sent as JSON; a string needs its `type`.
 */
export async function request(method, path, { query, body, type, headers, signal } = {}) {
  const options = { method, signal, headers: { ...headers } };
  if (body !== undefined) {
    options.body = typeof body === "string" ? body : JSON.stringify(body);
    options.headers["Content-Type"] = type ?? "application/json";
  }
  const url = address(path, query);
  let response = await send(url, options);
  while (response.status === 401 && (await needToken())) response = await send(url, options);
  if (!response.ok) throw await readError(response);
  return response.status === 204 ? null : response.json();
}

export const get = (path, query, signal) => request("GET", path, { query, signal });
export const post = (path, body = {}, options = {}) => request("POST", path, { body, ...options });
export const remove = (path) => request("DELETE", path);

/** Path of a job's route. */
export const jobPath = (id, rest = "") => `jobs/${encodeURIComponent(id)}${rest}`;
