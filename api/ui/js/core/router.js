// Pages by the part of the address after #. A page gets an AbortSignal that ends all it started when it is left.

const routes = [];
let leave = new AbortController();

/** Register a page: route("jobs/:id", "jobs", show). */
export function route(pattern, nav, show) {
  routes.push({ parts: pattern.split("/"), nav, show });
}

/** The path's parts and the query of the present address. */
export function here() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { parts: path.split("/").filter(Boolean).map(decodeURIComponent), query: new URLSearchParams(query) };
}

/** Go to another page. */
export function go(hash) {
  location.hash = hash;
}

/** Change the query of this page's address without leaving the page. */
export function setQuery(values) {
  const { parts, query } = here();
  for (const [key, value] of Object.entries(values)) {
    if (value === null || value === "") query.delete(key);
    else query.set(key, String(value));
  }
  const text = query.toString();
  history.replaceState(null, "", `#/${parts.map(encodeURIComponent).join("/")}${text ? `?${text}` : ""}`);
}

function match(parts) {
  for (const { parts: pattern, nav, show } of routes) {
    if (pattern.length !== parts.length) continue;
    const params = {};
    const fits = pattern.every((part, i) => {
      if (!part.startsWith(":")) return part === parts[i];
      params[part.slice(1)] = parts[i];
      return true;
    });
    if (fits) return { nav, show, params };
  }
  return null;
}

/** Show the page of the present address, now and whenever it changes. */
export function start(root, missing, failed) {
  const show = async () => {
    leave.abort();
    leave = new AbortController();
    const { parts, query } = here();
    const found = match(parts.length ? parts : ["jobs"]) ?? { nav: "", show: missing, params: {} };
    for (const link of document.querySelectorAll("[data-nav]")) {
      if (link.dataset.nav === found.nav) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const page = { root, params: found.params, query, signal: leave.signal };
    try {
      await found.show(page);
    } catch (error) {
      if (!page.signal.aborted) failed(page, error);
    }
  };
  window.addEventListener("hashchange", () => {
    window.scrollTo(0, 0);
    root.focus({ preventScroll: true });
    void show();
  });
  void show();
}
