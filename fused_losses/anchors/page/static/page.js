// The page: what the server says is shown, what the user does is asked for. The server has the state, all tabs show it.

import { Answer, TINTS } from "./answer.js";
import { get, listen, post } from "./api.js";
import { listenKeys } from "./keys.js";
import { Panel } from "./panel.js";
import { showCorrections, showStatus, showTalk, Tasks } from "./around.js";
import { ask, keep, kept, theme, toast } from "./chrome.js";
import { differences } from "./text.js";

const $ = (id) => document.getElementById(id);

let state = { version: 0, current: null, tokens: [] };
let comparing = kept("comparing", "no") === "yes";
let shownNotes = "";

const answer = new Answer($("answer"), (at, keyboard) => openToken(at, keyboard));
const panel = new Panel({
  load: (position) =>
    attempt(() => get("likeliest", { position, version: state.version }).then((found) => found.candidates)),
  apply: replace,
  closed: (position, focused) => {
    answer.mark(null);
    if (focused) answer.focus(Math.min(position, answer.buttons.length - 1));
  },
  unmark: (position) => act("unmark", { position }),
});
const tasks = new Tasks($("tasks"), (index) => open(index));

// Refusals become a toast; one of an answer that another tab changed is followed by the new state anyway.
async function attempt(call) {
  try {
    return await call();
  } catch (error) {
    if (error.status !== 401) toast(error.message, "error");
    return undefined;
  }
}

// False where it was refused.
async function act(name, body = {}) {
  try {
    await post(name, { version: state.version, ...body });
    return true;
  } catch (error) {
    if (!error.unsaved) {
      toast(error.message, "error");
      return false;
    }
    return (await ask(error.message)) ? act(name, { ...body, discard: true }) : false;
  }
}

const open = (index, more = {}) => {
  panel.close();
  answer.at = 0;
  return act("open", { index, ...more });
};

async function replace(what) {
  const at = what.position;
  if (!(await act("replace", what))) return;
  panel.close();
  answer.focus(Math.min(at, answer.buttons.length - 1));
}

function openToken(at, keyboard) {
  answer.mark(at);
  const filled = panel.open(at, state.tokens[at], keyboard);
  answer.buttons[at]?.scrollIntoView({ block: "nearest" }); // now that the panel takes its place
  return filled;
}

async function next() {
  if (!state.tokens.length) return;
  const after = panel.position ?? answer.focused() ?? -1;
  const found = await attempt(() => get("suspicious", { after }));
  if (!found) return;
  if (found.position === null) {
    toast(after < 0 ? "The model was sure of every token." : "No doubtful token after this one; n begins anew.");
    panel.close();
    answer.rove(0);
    document.activeElement.blur();
    return;
  }
  answer.focus(found.position);
  await openToken(found.position, false);
}

async function skip() {
  const order = tasks.following(state.current);
  if (order === undefined) toast("There is no other prompt without a record.");
  else await open(order);
}

async function accept() {
  const corrections = state.tokens.filter((token) => token.anchor).length;
  const file = state.file.split("/").at(-1);
  if (!(await act("accept"))) return;
  const what = corrections ? `${corrections} corrected` : "an answer to retain, without corrections";
  toast(`Written to ${file}: ${what}.`, "good");
}

function compare(on = !comparing) {
  comparing = on;
  keep("comparing", on ? "yes" : "no");
  showBefore();
}

// What the server says.

function hear(kind, data) {
  if (kind === "state") {
    const other = data.current !== state.current;
    state = data;
    state.tokens ??= [];
    if (other) panel.close();
    show();
  } else if (kind === "token") {
    if (data.version === state.version && data.token.position === state.tokens.length) append(data.token);
  } else if (kind === "kl" && data.version === state.version) {
    state.tokens.forEach((token, at) => (token.kl = data.kl[at]));
    if (answer.tint === "kl") answer.retint("kl");
  } else if (kind === "before") {
    state.before = data;
    showBefore();
  } else if (kind === "tasks") {
    tasks.show(data.tasks, state);
    showProgress();
  }
}

function append(token) {
  state.tokens.push(token);
  answer.add(token);
  showStatus(state);
}

function show() {
  const open = state.current !== null;
  $("model").textContent = state.model;
  $("file").title = state.file;
  $("file").textContent = `${state.file.split("/").at(-1)} · ${state.records} record${state.records === 1 ? "" : "s"}`;
  document.body.classList.toggle("generating", state.generating);
  document.body.classList.toggle("nothing", !open);
  answer.show(state.tokens, open && !state.finished && !state.generating && state.tokens.length > 0);
  if (panel.position > state.tokens.length) panel.close();
  else if (panel.position !== null) openToken(panel.position, false);
  $("empty").hidden = open;
  $("answer").hidden = !open;
  showTalk($("talk"), state);
  showCorrections($("corrections"), state, (at) => {
    answer.focus(at);
    openToken(at, false);
  });
  showTints();
  showBefore();
  showActions();
  showStatus(state);
  showProgress();
  tasks.current(state);
  const notes = (state.notes || []).join(" ");
  if (notes && notes !== shownNotes) toast(notes);
  shownNotes = notes;
}

function showActions() {
  const open = state.current !== null;
  $("stop").hidden = !state.generating;
  $("go").hidden = state.generating || state.finished || !open;
  $("undo").disabled = !state.can_undo;
  $("redo").disabled = !state.can_redo;
  $("next").disabled = !state.tokens.length;
  $("accept").disabled = !state.tokens.length || state.accepted;
  $("accept").firstChild.textContent = state.accepted ? "Accepted " : "Accept ";
  $("anew").hidden = !(open && !state.generating && state.records_here);
  $("follow").disabled = !open || !state.tokens.length;
  for (const id of ["undo", "redo", "next", "compare", "skip", "accept"]) $(id).hidden = !open;
}

function showProgress() {
  const { done = 0, total = 0 } = state;
  $("progress").max = Math.max(total, 1);
  $("progress").value = done;
  $("progress-text").textContent = total ? `${done} of ${total} done` : "none yet";
}

function showTints() {
  const known = Object.keys(TINTS).filter((tint) => tint !== "kl" || state.adapter);
  const buttons = known.map((tint) => {
    const label = Object.assign(document.createElement("label"), { className: "segment" });
    const radio = Object.assign(document.createElement("input"), {
      type: "radio",
      name: "tint",
      value: tint,
      checked: tint === answer.tint,
    });
    radio.addEventListener("change", () => setTint(tint));
    label.append(radio, TINTS[tint].title);
    return label;
  });
  if ($("tint").childElementCount !== known.length) $("tint").replaceChildren(...buttons);
  $("legend").hidden = state.current === null;
}

function setTint(tint) {
  if (tint === "kl" && !state.adapter) tint = "probability";
  answer.retint(tint);
  keep("tint", tint);
  document.body.dataset.tint = tint;
  for (const radio of $("tint").querySelectorAll("input")) radio.checked = radio.value === tint;
  $("legend-name").textContent = TINTS[tint].title;
  $("legend-scale").replaceChildren(
    ...TINTS[tint].scale.map((text) => Object.assign(document.createElement("span"), { textContent: text })),
  );
}

function nextTint() {
  const known = [...$("tint").querySelectorAll("input")].map((radio) => radio.value);
  if (known.length) setTint(known[(known.indexOf(answer.tint) + 1) % known.length]);
}

function showBefore() {
  const before = state.before;
  const on = comparing && state.current !== null;
  $("before").hidden = $("now-title").hidden = !on;
  $("compare").setAttribute("aria-pressed", String(on));
  if (!on) return;
  $("before-title").textContent = before?.who === "original" ? "The original's answer" : "The model's own answer";
  $("now-title").textContent = before?.who === "original" ? "The trained model's, corrected" : "Corrected";
  const now = state.tokens.map((token) => (token.part?.[0] > 1 || token.special ? "" : token.text)).join("");
  const text = before?.text ?? (state.adapter ? "…" : now);
  const parts = before && !state.generating ? differences(text, now) : [[text, true]];
  $("before-text").replaceChildren(
    ...parts.map(([part, same]) =>
      same ? part : Object.assign(document.createElement("mark"), { textContent: part }),
    ),
  );
}

// What the user does.

const does = {
  stop: () => act("stop"),
  go: () => act("continue"),
  next,
  undo: () => act("undo"),
  redo: () => act("redo"),
  compare: () => compare(),
  anew: () => open(state.current, { anew: true }),
  skip,
  accept,
  theme,
  help: () => $("help-dialog").showModal(),
};
for (const [id, call] of Object.entries(does)) $(id).addEventListener("click", () => call());

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("ask-text").value;
  if (!text.trim()) return $("ask-text").focus();
  panel.close();
  answer.at = 0;
  if (await act("ask", { text, follow: $("follow").checked && !$("follow").disabled })) {
    $("ask-text").value = "";
    $("follow").checked = false;
    $("ask-text").blur();
  }
});
$("ask-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});

answer.moved = (at) => {
  if (panel.position !== null) openToken(at, false);
};
listenKeys({
  ...does,
  tint: nextTint,
  unmark: () => {
    const position = panel.position ?? answer.focused();
    if (state.tokens[position]?.anchor) act("unmark", { position });
  },
  keep: () => act("keep"),
  own: () => {
    if (panel.position === null && answer.buttons.length) openToken(answer.at, false);
    $("own").focus();
  },
  prompt: () => {
    $("tasks-box").open = true;
    $("ask-text").focus();
  },
  digit: (number) => panel.position !== null && panel.digit(number),
  escape: () => {
    if (state.generating) act("stop");
    else panel.close();
  },
  answer: () => answer.focus(),
});

if (location.search) history.replaceState(null, "", "/"); // the secret, which is a cookie by now
if (matchMedia("(max-width: 900px)").matches) $("tasks-box").open = false;
setTint(kept("tint", "probability") in TINTS ? kept("tint", "probability") : "probability");
listen(hear, (on, reason) => {
  $("offline").hidden = on;
  if (!on)
    $("offline").textContent =
      reason ?? "The server does not answer. What was accepted is in the file; start the command anew, or wait.";
});
