// The OpenAI API of this server, as far as the page needs it. Knows nothing of the page.

const SILENT_MS = 60_000; // the server says something at least every few seconds, if only that it is alive

/** What went wrong, as a sentence for a person. */
export class Trouble extends Error {
  constructor(sentence, { needsKey = false } = {}) {
    super(sentence);
    this.needsKey = needsKey;
  }
}

/** The names of the models that can be asked. */
export async function models(key) {
  const response = await call("v1/models", { headers: headers(key) });
  const { data } = await json(response);
  if (!Array.isArray(data)) throw new Trouble("The server's list of models cannot be read.");
  return data.map((model) => String(model.id));
}

/**
 * Asks, and yields the chunks of the answer as they come.
 * Throws a Trouble; or an AbortError once `signal` says so.
 */
export async function* answer(question, key, signal) {
  const quiet = new AbortController();
  const either = AbortSignal.any([signal, quiet.signal]);
  let timer = 0;
  const alive = () => {
    clearTimeout(timer);
    timer = setTimeout(() => quiet.abort(), SILENT_MS);
  };
  try {
    alive();
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { ...headers(key), "Content-Type": "application/json" },
      body: JSON.stringify({
        ...question,
        stream: true,
        stream_options: { include_usage: true },
        potluck: { trace: true },
      }),
      signal: either,
    });
    let isOver = false;
    for await (const data of events(response.body, alive)) {
      if (data === "[DONE]") return;
      const chunk = parsed(data);
      if (chunk.error) throw new Trouble(sentence(chunk.error.message));
      isOver ||= Boolean(chunk.choices?.[0]?.finish_reason);
      yield chunk;
    }
    if (!isOver) throw new Trouble("The connection ended before the answer did.");
  } catch (error) {
    if (quiet.signal.aborted) throw new Trouble("The server has said nothing for a minute.");
    if (error.name === "AbortError" || error instanceof Trouble) throw error;
    throw new Trouble("The connection ended before the answer did.");
  } finally {
    clearTimeout(timer);
    quiet.abort(); // whoever stops reading also hangs up
  }
}

/** The data of each server-sent event. Comments only show that the server is alive. */
async function* events(body, alive) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    alive();
    pending += value;
    const blocks = pending.split(/\r?\n\r?\n/);
    pending = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached; perhaps it was stopped.");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    throw new Trouble("The server wants an API key, or another one.", { needsKey: true });
  }
  const found = await response.json().catch(() => ({}));
  throw new Trouble(sentence(found.error?.message ?? `The server answered with status ${response.status}`));
}

async function json(response) {
  return parsed(await response.text());
}

function parsed(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    throw new Trouble("The server sent what cannot be read.");
  }
}

function sentence(text) {
  const said = String(text || "Something went wrong").trim();
  const begun = said.charAt(0).toUpperCase() + said.slice(1);
  return /[.!?…]$/.test(begun) ? begun : `${begun}.`;
}
