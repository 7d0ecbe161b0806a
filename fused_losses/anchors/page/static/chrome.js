// Toasts, a question, the theme, and what this browser remembers.

const $ = (id) => document.getElementById(id);

export function toast(text, kind = "") {
  const found = document.createElement("div");
  found.className = `toast ${kind}`;
  if (kind === "error") found.setAttribute("role", "alert");
  const words = Object.assign(document.createElement("p"), { textContent: text });
  const close = Object.assign(document.createElement("button"), {
    type: "button",
    textContent: "✕",
    className: "quiet",
  });
  close.setAttribute("aria-label", "Close this message");
  close.addEventListener("click", () => found.remove());
  found.append(words, close);
  $("toasts").append(found);
  while ($("toasts").childElementCount > 3) $("toasts").firstChild.remove();
  setTimeout(() => found.remove(), Math.max(60 * text.length, kind === "error" ? 12000 : 6000));
}

// Whether the user lets corrections go.
export function ask(text) {
  $("confirm-text").textContent = text;
  $("confirm").returnValue = "no";
  $("confirm").showModal();
  return new Promise((done) =>
    $("confirm").addEventListener("close", () => done($("confirm").returnValue === "yes"), { once: true }),
  );
}

// Of preferences only; a browser that keeps nothing does without.
export function kept(name, otherwise) {
  try {
    return localStorage.getItem(`annotate-${name}`) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function keep(name, value) {
  try {
    localStorage.setItem(`annotate-${name}`, value);
  } catch {
    // as it was
  }
}

const THEMES = ["system", "light", "dark"];

function setTheme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme-name").textContent = `: ${name}`;
  keep("theme", name);
}

export function theme() {
  const now = document.documentElement.dataset.theme ?? "system";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
}

setTheme(THEMES.includes(kept("theme", "system")) ? kept("theme", "system") : "system");
