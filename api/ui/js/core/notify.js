// Messages to the user: toasts to see, the announcer for screen readers, the stream's state in the top bar.

import { button, h, setText } from "./dom.js";

const SHOWN_MS = 7000;

/** Show a message for a while; errors stay until dismissed. */
export function toast(text, tone = "accent") {
  const root = document.getElementById("toasts");
  const node = h(
    "div",
    { class: "toast", "data-tone": tone, role: tone === "bad" ? "alert" : "status" },
    h("div", null, text),
    button(null, () => node.remove(), { icon: "close", kind: "quiet icon small", "aria-label": "Dismiss" }),
  );
  root.append(node);
  while (root.children.length > 4) root.firstChild.remove();
  if (tone !== "bad") setTimeout(() => node.remove(), SHOWN_MS);
}

/** Show an error as a toast. */
export function showError(error) {
  if (error.name === "AbortError") return;
  toast([error.message, error.remedy].filter(Boolean).join(" "), "bad");
}

/** Say something to screen readers. */
export function announce(text) {
  setText(document.getElementById("announcer"), text);
}

const STREAM = { connecting: "Connecting…", live: "Live", reconnecting: "Reconnecting…", closed: "Not connected" };

/** Show the state of the event stream; null hides it. */
export function streamStatus(status) {
  const node = document.getElementById("stream");
  node.hidden = status === null;
  node.dataset.status = status ?? "";
  setText(node, STREAM[status] ?? "");
}

/** Run an action of a button: busy while it runs, errors as toasts. */
export async function act(node, run) {
  if (node.getAttribute("aria-busy") === "true") return;
  node.setAttribute("aria-busy", "true");
  try {
    await run();
  } catch (error) {
    showError(error);
  } finally {
    node.removeAttribute("aria-busy");
  }
}

/** Copy text to the clipboard and say so. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied.", "ok");
  } catch {
    toast("The browser does not allow copying here; select the text instead.", "bad");
  }
}
