// Single keys, wherever no text is typed; the dialog of help lists them.

const KEYS = [
  ["← → ↑ ↓", "from token to token"],
  ["Enter", "open a token; there: put the chosen one in its place and continue"],
  ["1 … 9, 0", "choose one of the ten likeliest"],
  ["/", "your own words"],
  ["n", "next token of which the model was not sure", "next"],
  ["u", "undo", "undo"],
  ["r", "redo", "redo"],
  ["x", "take the mark off a corrected token", "unmark"],
  ["k", "mark as right what only the trained model says", "keep"],
  ["g", "go on with the answer", "go"],
  ["Esc", "interrupt the model, or close the panel"],
  ["a", "accept: write the answer to the file", "accept"],
  ["s", "skip to the next prompt", "skip"],
  ["c", "the answer before, beside the one now", "compare"],
  ["t", "tint by something else", "tint"],
  ["p", "type a prompt", "prompt"],
  ["d", "light, dark or as the system", "theme"],
  ["?", "this list", "help"],
];

export function listenKeys(does) {
  const list = document.getElementById("keys");
  for (const [keys, what] of KEYS) {
    const term = document.createElement("dt");
    for (const key of keys.split(" ")) {
      if (key === "…") term.append(" … ");
      else term.append(Object.assign(document.createElement("kbd"), { textContent: key.replace(",", "") }), " ");
    }
    list.append(term, Object.assign(document.createElement("dd"), { textContent: what }));
  }
  const named = new Map(KEYS.filter(([, , name]) => name).map(([key, , name]) => [key, does[name]]));

  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.isComposing) return;
    if (document.querySelector("dialog[open]")) return;
    const typing = event.target.closest("textarea, input:not([type=radio], [type=checkbox])");
    if (event.key === "Escape") {
      if (typing) event.target.blur();
      does.escape();
      return void event.preventDefault();
    }
    if (typing) return;
    if (event.key === "Enter" && event.target.type === "radio" && event.target.name === "choice") {
      event.preventDefault();
      return void event.target.form.requestSubmit();
    }
    if (event.repeat && event.key !== "n") return;
    if (/^[0-9]$/.test(event.key)) {
      if (does.digit(Number(event.key))) event.preventDefault();
      return;
    }
    if (event.key.startsWith("Arrow") && event.target === document.body) {
      event.preventDefault();
      return void does.answer();
    }
    const call = event.key === "/" ? does.own : named.get(event.key);
    if (!call) return;
    event.preventDefault();
    call();
  });
}
