// Starts the UI: theme button, token dialog, pages.

import { onTokenNeeded } from "./core/api.js";
import { tokenDialog } from "./core/dialogs.js";
import { button, h, icon, replace } from "./core/dom.js";
import { streamStatus } from "./core/notify.js";
import { route, start } from "./core/router.js";
import { jobPage } from "./pages/job.js";
import { jobsPage } from "./pages/jobs.js";
import { newJobPage } from "./pages/new_job.js";

function themeButton() {
  const node = document.getElementById("theme");
  const show = () => {
    const dark = document.documentElement.dataset.theme === "dark";
    replace(node, icon(dark ? "sun" : "moon"));
    node.setAttribute("aria-label", dark ? "Switch to the light theme" : "Switch to the dark theme");
  };
  node.addEventListener("click", () => document.dispatchEvent(new CustomEvent("themetoggle")));
  document.addEventListener("themechange", show);
  show();
}

function problem(page, title, text, retry) {
  streamStatus(null);
  document.title = `${title} – mergeopt`;
  replace(
    page.root,
    h("div", { class: "empty" }, h("h1", null, title), h("p", null, text),
      h("div", { class: "actions" }, retry && button("Try again", () => location.reload(), { kind: "primary" }),
        h("a", { href: "#/jobs", class: "button" }, "All jobs"))),
  );
}

const main = document.getElementById("main");
// "#main" would be read as a page, so the skip link moves the focus itself.
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
themeButton();
onTokenNeeded(tokenDialog);
route("jobs", "jobs", jobsPage);
route("jobs/:id", "jobs", jobPage);
route("new", "new", newJobPage);
start(
  main,
  (page) => problem(page, "No such page", "The address leads nowhere.", false),
  (page, error) => {
    if (error.status === 404) problem(page, "Not found", error.message, false);
    else if (error.status === 401) problem(page, "An access token is needed", "Without it the server shows nothing.", true);
    else problem(page, "This page cannot be shown", [error.message, error.remedy].filter(Boolean).join(" "), true);
  },
);
