// The answer as words made of tokens, each a button. One of them is in the order of Tab; arrows move on.

import { face, percent, quoted, startsWord } from "./text.js";

const clamp = (t) => Math.min(1, Math.max(0, t));

// How a token is tinted, from 0 to 1, and what the legend says. Null: nothing is known.
export const TINTS = {
  probability: {
    title: "Probability",
    of: (token) => clamp(-Math.log(Math.max(token.p, 1e-9)) / Math.log(100)),
    scale: ["100 %", "10 %", "1 %"],
  },
  entropy: { title: "Entropy", of: (token) => clamp(token.entropy / 4), scale: ["0", "2", "4 nats"] },
  kl: {
    title: "KL to the original",
    of: (token) => (token.kl === undefined ? 0 : clamp(token.kl)),
    scale: ["0", "0.5", "1 nat"],
  },
};

export class Answer {
  constructor(root, opened) {
    this.root = root;
    this.opened = opened; // (position, by keyboard)
    this.tokens = [];
    this.buttons = [];
    this.tint = "probability";
    this.at = 0; // the token that Tab leads to
    this.selected = null;
    this.moved = () => {};
    root.addEventListener("click", (event) => {
      const button = event.target.closest(".tok");
      if (button) this.choose(Number(button.dataset.at), event.detail === 0);
    });
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("focusin", (event) => {
      const button = event.target.closest(".tok");
      if (button) this.rove(Number(button.dataset.at));
    });
  }

  choose(at, keyboard) {
    this.rove(at);
    this.opened(at, keyboard);
  }

  // All tokens anew; the focus stays where it was, by position.
  show(tokens, open) {
    const focused = this.root.contains(document.activeElement);
    this.tokens = [];
    this.buttons = [];
    this.word = null;
    this.root.replaceChildren();
    for (const token of tokens) this.add(token);
    if (open) this.addEnd();
    this.at = Math.max(0, Math.min(this.at, this.buttons.length - 1));
    this.rove(this.at);
    this.mark(this.selected);
    if (focused) (this.buttons[this.at] || this.root).focus({ preventScroll: true });
  }

  add(token) {
    const last = this.tokens.at(-1);
    const shown = face(token);
    const starts = startsWord(token, last);
    if (starts || !this.word) {
      if (shown.before) this.root.append(shown.before);
      this.word = document.createElement("span");
      this.word.className = "word";
      this.root.append(this.word);
    }
    const button = document.createElement("button");
    button.type = "button";
    button.tabIndex = this.buttons.length === this.at ? 0 : -1;
    button.dataset.at = this.buttons.length;
    this.tokens.push(token);
    this.buttons.push(button);
    this.dress(button, token, shown);
    this.word.append(button);
    this.word.classList.toggle("long", this.word.childElementCount > 6 || this.word.textContent.length > 24);
    for (let k = 0; k < shown.breaks; k++) this.root.append(document.createElement("br"));
    if (shown.breaks) this.word = null;
    if (shown.after) this.root.append(shown.after);
    if (document.activeElement === this.root) button.focus({ preventScroll: true });
  }

  // Where the answer could go on.
  addEnd() {
    const button = document.createElement("button");
    button.type = "button";
    button.tabIndex = -1;
    button.className = "tok end";
    button.dataset.at = this.buttons.length;
    button.textContent = "…";
    button.setAttribute("aria-label", "What comes next: add a token at the end");
    this.buttons.push(button);
    this.root.append(" ", button);
  }

  dress(button, token, shown = face(token)) {
    const classes = ["tok"];
    if (token.special) classes.push("special");
    else if (shown.picture) classes.push("picture");
    if (token.anchor) classes.push("anchor");
    else if (token.replaced) classes.push("replaced");
    button.className = classes.join(" ");
    button.replaceChildren(token.part && token.part[0] > 1 ? "·" : shown.text);
    if (token.part) button.append(small("sub", `${token.part[0]}/${token.part[1]}`));
    if (token.anchor?.was) button.append(small("was", token.anchor.was.trim() || quoted({ text: token.anchor.was })));
    button.style.setProperty("--t", token.anchor ? "0" : TINTS[this.tint].of(token).toFixed(3));
    button.setAttribute("aria-label", this.label(token, Number(button.dataset.at)));
  }

  label(token, at) {
    const parts = [quoted(token), percent(token.p), `token ${at + 1}`];
    if (token.special) parts.push("special token");
    if (token.part) parts.push(`part ${token.part[0]} of ${token.part[1]} of a character`);
    if (token.anchor) parts.push(`corrected, was ${quoted({ text: token.anchor.was ?? "" })}`);
    else if (token.replaced) parts.push("replaced, no anchor");
    else if (token.rank > 1) parts.push(`rank ${token.rank}`);
    return parts.join(", ");
  }

  retint(tint) {
    this.tint = tint;
    this.tokens.forEach((token, at) => this.dress(this.buttons[at], token));
    this.mark(this.selected);
  }

  rove(at) {
    if (this.buttons[this.at]) this.buttons[this.at].tabIndex = -1;
    this.at = at;
    if (this.buttons[at]) this.buttons[at].tabIndex = 0;
  }

  // The token whose panel is open.
  mark(at) {
    this.buttons[this.selected]?.classList.remove("open");
    this.buttons[this.selected]?.removeAttribute("aria-current");
    this.selected = at;
    this.buttons[at]?.classList.add("open");
    this.buttons[at]?.setAttribute("aria-current", "true");
  }

  // The token that has the focus.
  focused() {
    return this.root.contains(document.activeElement) ? this.at : null;
  }

  focus(at = this.at) {
    (this.buttons[at] || this.buttons.at(-1) || this.root).focus();
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !this.buttons.length) return;
    const right = getComputedStyle(this.root).direction === "rtl" ? -1 : 1;
    const to = {
      ArrowRight: () => this.at + right,
      ArrowLeft: () => this.at - right,
      ArrowDown: () => this.line(1),
      ArrowUp: () => this.line(-1),
      Home: () => 0,
      End: () => this.buttons.length - 1,
    }[event.key];
    if (!to) return;
    event.preventDefault();
    const at = Math.max(0, Math.min(this.buttons.length - 1, to()));
    this.focus(at);
    this.moved(at);
  }

  // The token above or below.
  line(step) {
    const here = this.buttons[this.at].getBoundingClientRect();
    const middle = here.left + here.width / 2;
    let best = this.at;
    let least = Infinity;
    this.buttons.forEach((button, at) => {
      const box = button.getBoundingClientRect();
      const lines = (box.top - here.top) * step;
      if (lines < here.height / 2) return;
      const far = lines * 100 + Math.abs(box.left + box.width / 2 - middle);
      if (far < least) [least, best] = [far, at];
    });
    return best;
  }
}

function small(name, text) {
  const found = document.createElement("span");
  found.className = name;
  found.textContent = text;
  return found;
}
