// What the page asks the server for, and what it hears from it.

export class Refused extends Error {
  constructor(status, body) {
    super(body.error || `The server answered ${status}.`);
    this.status = status;
    this.stale = Boolean(body.stale);
    this.unsaved = Boolean(body.unsaved);
  }
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new Refused(0, { error: "The server does not answer." });
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(response.status, body);
  return body;
}

export const get = (name, query) => ask(`/api/${name}?${new URLSearchParams(query)}`);

export const post = (name, body) =>
  ask(`/api/${name}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

// `heard(kind, data)` for every event; `connected(true | false, reason)` when that changes.
export function listen(heard, connected) {
  let source;
  function open() {
    source = new EventSource("/events");
    source.onopen = () => connected(true);
    source.onerror = () => {
      connected(false);
      if (source.readyState === EventSource.CLOSED) setTimeout(retry, 2000);
    };
    for (const kind of ["state", "token", "kl", "before", "tasks"])
      source.addEventListener(kind, (event) => heard(kind, JSON.parse(event.data)));
  }
  // A server that was started anew has another secret, and says so.
  async function retry() {
    try {
      await get("state");
    } catch (error) {
      connected(false, error.status ? error.message : undefined);
      return void setTimeout(retry, 2000);
    }
    open();
  }
  open();
  addEventListener("pagehide", () => source.close());
  addEventListener("pageshow", (event) => event.persisted && open());
}
