// One token: what else could stand there, and what shall.

import { percent, quoted } from "./text.js";

const $ = (id) => document.getElementById(id);

const NOTES = {
  confidence: "1: this token is right. Below 1: so much of it, and the rest as the original has it.",
  target_probability: "Trained until the token has this probability, and not further.",
};

export class Panel {
  constructor({ load, apply, closed, unmark }) {
    this.load = load; // position -> candidates
    this.apply = apply; // {position, token_id | text, confidence | target_probability}
    this.closed = closed;
    this.position = null;
    this.token = null;
    this.turn = 0;
    this.values = { confidence: 1, target_probability: 0.9 };
    $("edit").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    $("own").addEventListener("input", () => {
      if ($("own").value) for (const radio of this.radios()) radio.checked = false;
      this.ready();
    });
    $("choices-list").addEventListener("change", () => {
      $("own").value = "";
      this.ready();
    });
    $("choices-list").addEventListener("dblclick", () => this.submit());
    $("close").addEventListener("click", () => this.close());
    $("unmark").addEventListener("click", () => unmark(this.position));
    for (const radio of $("edit").elements.kind) radio.addEventListener("change", () => this.kindChanged());
    $("level").addEventListener("input", () => this.level($("level").value, $("level-number")));
    $("level-number").addEventListener("input", () => this.level($("level-number").value, $("level")));
    this.kindChanged();
  }

  get kind() {
    return $("edit").elements.kind.value;
  }

  radios() {
    return [...$("choices-list").querySelectorAll("input")];
  }

  kindChanged() {
    $("strength-note").textContent = NOTES[this.kind];
    $("level").max = $("level-number").max = this.kind === "confidence" ? 1 : 0.99;
    $("level").value = $("level-number").value = this.values[this.kind];
    this.ready();
  }

  level(value, other) {
    this.values[this.kind] = Number(value);
    other.value = value;
    this.ready();
  }

  // `token` is undefined after the last one.
  async open(position, token, keyboard) {
    const again = this.position === position && !$("panel").hidden;
    this.position = position;
    this.token = token;
    $("panel").hidden = false;
    document.body.classList.add("with-panel");
    this.facts();
    if (!again) {
      $("own").value = "";
      const anchor = token?.anchor;
      if (anchor) {
        const kind = anchor.target === null ? "confidence" : "target_probability";
        this.values[kind] = anchor.target ?? anchor.confidence;
        $("edit").elements.kind.value = kind;
        this.kindChanged();
      }
    }
    await this.fill(again);
    if (keyboard) this.focus();
  }

  facts() {
    const { token, position } = this;
    $("panel-title").textContent = token ? `Token ${position + 1}` : "What comes next";
    $("panel-token").textContent = token ? quoted(token) : "the end of the answer";
    const facts = token
      ? [`${percent(token.p)} likely`, `rank ${token.rank}`, `entropy ${token.entropy.toFixed(2)} nats`]
      : [];
    if (token?.kl !== undefined) facts.push(`KL ${token.kl.toFixed(3)}`);
    $("panel-facts").textContent = facts.join(" · ");
    const was = $("panel-was");
    was.hidden = !token?.anchor;
    $("unmark").hidden = !token?.anchor;
    if (!token?.anchor) return;
    const old = document.createElement("del");
    old.textContent = quoted({ text: token.anchor.was ?? "" });
    const { was_p: p, confidence, target, round } = token.anchor;
    const strength = target === null ? `c = ${confidence}` : `p* = ${target}`;
    was.replaceChildren("was ", old, ` ${p === null ? "" : percent(p)} · ${strength} · round ${round}`);
  }

  async fill(again) {
    const turn = ++this.turn;
    const list = $("choices-list");
    const before = again ? this.radios().find((radio) => radio.checked)?.value : undefined;
    list.setAttribute("aria-busy", "true");
    if (!again)
      list.replaceChildren(
        ...Array.from({ length: 10 }, () =>
          Object.assign(document.createElement("div"), { className: "choice ghost" }),
        ),
      );
    this.ready();
    let candidates;
    try {
      candidates = await this.load(this.position);
    } finally {
      if (turn === this.turn) list.removeAttribute("aria-busy");
    }
    if (turn !== this.turn || !candidates) return;
    const focused = list.contains(document.activeElement);
    list.replaceChildren(...candidates.map((candidate, k) => this.choice(candidate, k)));
    const kept = this.radios().find((radio) => radio.value === before);
    if (kept) kept.checked = true;
    if (focused) this.focus();
    this.ready();
  }

  choice(candidate, k) {
    const label = document.createElement("label");
    label.className = "choice";
    label.style.setProperty("--p", candidate.p);
    const radio = Object.assign(document.createElement("input"), {
      type: "radio",
      name: "choice",
      value: candidate.id,
    });
    radio.dataset.text = quoted(candidate);
    const standing = candidate.id === this.token?.id;
    const parts = [
      ["kbd", String((k + 1) % 10), "digit"],
      ["span", quoted(candidate), candidate.special ? "choice-text special" : "choice-text"],
      ["span", standing ? "stands here" : "", "standing"],
      ["span", percent(candidate.p), "choice-p"],
    ].map(([tag, text, name]) => Object.assign(document.createElement(tag), { textContent: text, className: name }));
    label.classList.toggle("current", standing);
    label.append(radio, ...parts);
    return label;
  }

  digit(number) {
    const radio = this.radios()[(number + 9) % 10];
    if (!radio) return false;
    radio.checked = true;
    $("own").value = "";
    radio.focus();
    this.ready();
    return true;
  }

  focus() {
    const radios = this.radios();
    (radios.find((radio) => radio.checked) || radios[0] || $("own")).focus();
  }

  chosen() {
    const radio = this.radios().find((found) => found.checked);
    if (radio) return { what: { token_id: Number(radio.value) }, text: radio.dataset.text };
    return $("own").value ? { what: { text: $("own").value }, text: quoted({ text: $("own").value }) } : null;
  }

  ready() {
    const chosen = this.chosen();
    const value = this.values[this.kind];
    const good = value > 0 && (this.kind === "confidence" ? value <= 1 : value < 1);
    $("apply").disabled = !chosen || !good;
    const verb = this.token ? "Put" : "Add";
    $("apply").textContent = !good
      ? "Give a number within bounds"
      : chosen
        ? `${verb} ${chosen.text} here and continue`
        : "Choose a token";
  }

  submit() {
    const chosen = this.chosen();
    if (!chosen || $("apply").disabled) return;
    this.apply({ position: this.position, ...chosen.what, [this.kind]: this.values[this.kind] });
  }

  close() {
    if ($("panel").hidden) return;
    const inside = $("panel").contains(document.activeElement);
    $("panel").hidden = true;
    document.body.classList.remove("with-panel");
    this.turn++;
    this.closed(this.position, inside);
    this.position = this.token = null;
  }
}
