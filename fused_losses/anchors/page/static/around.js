// What stands around the answer: the prompts, the conversation, the corrections, one line on how it stands.

import { percent, quoted } from "./text.js";

const make = (tag, className, text) =>
  Object.assign(document.createElement(tag), { className, textContent: text ?? "" });

const ENDS = {
  stopped: "Interrupted.",
  max_new_tokens: "Cut at the length that was asked for.",
  context: "The model's context is full.",
};

export class Tasks {
  constructor(root, open) {
    this.root = root;
    this.found = [];
    root.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) open(Number(button.dataset.index));
    });
  }

  show(found, state) {
    this.found = found;
    this.root.replaceChildren(...found.map((task, index) => this.item(task, index)));
    this.current(state);
  }

  item(task, index) {
    const item = make("li", task.records ? "task done" : "task");
    const button = make("button", "task-button");
    button.type = "button";
    button.dataset.index = index;
    button.append(
      make("span", "task-mark", task.records ? "✓" : String(index + 1)),
      make("span", "task-text", task.title),
    );
    if (task.records)
      button.append(make("span", "hidden", task.records === 1 ? ", has a record" : `, has ${task.records} records`));
    item.append(button);
    return item;
  }

  current(state) {
    [...this.root.children].forEach((item, index) => {
      const here = index === state.current;
      if (here && !item.classList.contains("current")) item.scrollIntoView({ block: "nearest" });
      item.classList.toggle("current", here);
      if (here) item.firstChild.setAttribute("aria-current", "true");
      else item.firstChild.removeAttribute("aria-current");
    });
  }

  // The next one without a record, going round; undefined where there is none.
  following(current) {
    const order = this.found.map((_, k) => (k + (current ?? -1) + 1) % this.found.length);
    return order.find((k) => k !== current && !this.found[k].records);
  }
}

export function showTalk(root, state) {
  const names = { user: "You ask", system: "System", assistant: "Answer before", tool: "Tool" };
  root.replaceChildren(
    ...(state.messages || []).map(({ role, text }) => {
      const found = make("div", `turn ${role === "user" ? "user" : ""}`);
      const words = make("p", "plain", text);
      words.dir = "auto";
      found.append(make("span", "role", names[role] ?? role), words);
      return found;
    }),
  );
}

export function showCorrections(root, state, go) {
  const anchors = state.tokens.filter((token) => token.anchor);
  root.hidden = !anchors.length;
  root.querySelector("ol").replaceChildren(
    ...anchors.map((token) => {
      const item = document.createElement("li");
      const button = make("button", "correction");
      const { was, was_p, p, confidence, target, round } = token.anchor;
      const facts = [
        p === null ? "" : `${percent(p)} likely`,
        target === null ? `c = ${confidence}` : `p* = ${target}`,
        `round ${round}`,
      ];
      button.type = "button";
      button.append(
        make("del", "", quoted({ text: was ?? "" })),
        " ",
        make("span", "small", was_p === null ? "" : percent(was_p)),
        make("span", "arrow", " → "),
        make("ins", "", quoted(token)),
        " ",
        make("span", "small", facts.filter(Boolean).join(" · ")),
      );
      button.addEventListener("click", () => go(token.position));
      item.append(button);
      return item;
    }),
  );
}

export function showStatus(state) {
  const status = document.getElementById("status");
  if (state.current === null) return void (status.textContent = "");
  if (state.generating)
    return void (status.textContent = state.tokens.length ? "The model is writing" : "The model reads the prompt");
  const corrections = state.tokens.filter((token) => token.anchor).length;
  const parts = [`${state.tokens.length} tokens`, corrections ? `${corrections} corrected` : "none corrected"];
  const how = state.accepted ? "In the file." : state.finished ? "" : (ENDS[state.ended] ?? "Not finished.");
  status.textContent = `${parts.join(", ")}. ${how}`.trim();
}
