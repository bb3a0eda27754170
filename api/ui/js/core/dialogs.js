// Modal dialogs: native <dialog>, which traps focus, closes on Escape and gives the focus back.

import { button, h, uid } from "./dom.js";

/**
 * Open a dialog with a form and resolve to what `onSubmit` returns, or null when it is dismissed.
 * While `onSubmit` runs the submit button is busy; an error it throws shows in the dialog, which stays open, unless its
 * message is empty because the fields say what is wrong.
 * A dialog belongs to the page it was opened on, and goes when that is left, as with the browser's Back.
 */
export function openDialog({ title, body, submit, dismiss = "Cancel", danger = false, onSubmit }) {
  return new Promise((resolve) => {
    const id = uid("dialog");
    const message = h("p", { class: "notice", "data-tone": "bad", role: "alert", hidden: true });
    const confirm = h("button", { type: "submit", class: `button ${danger ? "danger" : "primary"}` }, submit);
    let result = null;
    const form = h(
      "form",
      { novalidate: true },
      h("h2", { id }, title),
      body,
      message,
      h("div", { class: "actions" }, button(dismiss, () => dialog.close()), confirm),
    );
    const dialog = h("dialog", { "aria-labelledby": id }, form);
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (confirm.getAttribute("aria-busy") === "true") return;
      confirm.setAttribute("aria-busy", "true");
      message.hidden = true;
      try {
        result = await onSubmit();
        dialog.close();
      } catch (error) {
        message.textContent = [error.message, error.remedy].filter(Boolean).join(" ");
        message.hidden = message.textContent === "";
      } finally {
        confirm.removeAttribute("aria-busy");
      }
    });
    const leave = () => dialog.close();
    window.addEventListener("hashchange", leave);
    dialog.addEventListener("close", () => {
      window.removeEventListener("hashchange", leave);
      dialog.remove();
      resolve(result);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Ask whether to go on. */
export function confirmDialog(title, text, submit, onSubmit) {
  return openDialog({ title, body: h("p", { class: "muted" }, text), submit, dismiss: "Keep it", danger: true, onSubmit });
}

/** Ask for the access token; resolves to null when the user gives up. */
export function tokenDialog(rejected) {
  const id = uid("token");
  const input = h("input", { id, type: "password", autocomplete: "current-password", required: true, spellcheck: "false" });
  return openDialog({
    title: "This server needs an access token",
    body: [
      h("p", { class: "muted" }, rejected
        ? "The token was not accepted: it is mistyped, revoked or expired."
        : "Paste a token made on the server with “mergeopt token create”. It is kept for this browser tab only."),
      h("div", { class: "field" }, h("label", { for: id }, "Token"), input),
    ],
    submit: "Continue",
    onSubmit: async () => {
      const token = input.value.trim();
      if (!token) throw new Error("Enter a token.");
      return token;
    },
  });
}
