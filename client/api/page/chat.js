// The page: a conversation, what can be done with it, and the chain beside it.

import { Trouble, answer, models } from "./api.js";
import { Chain } from "./chain.js";
import { rendered } from "./markdown.js";
import { loadKey, loadMessages, loadSettings, saveKey, saveMessages, saveSettings } from "./store.js";

const REDRAW_MS = 60; // a growing answer is laid out this often, at most
const TOAST_MS = 8000;
const NEAR_END_PX = 80; // whoever has scrolled further up is left there
const LOOK_AGAIN_MS = 5000; // for a server that does not answer, or a swarm without a model
const IDEAS = {
  "potluck-demo": ["What is the capital of France?", "What is 27 + 58?", "Spell table.", "What is the opposite of hot?"],
  "": ["Explain how rainbows form.", "Write a limerick about potatoes.", "What makes a good soup?"],
};

const at = (id) => document.getElementById(id);
const log = at("log");
const question = at("question");

let messages = loadMessages();
let settings = loadSettings();
let key = loadKey();
let asking = null; // the AbortController of the answer that is coming
let coming = null; // and what has come of it
const chain = new Chain(say);

// -------------------------------------------------------------------- asking

async function ask() {
  if (asking) return;
  const controller = (asking = new AbortController());
  const conversation = messages;
  const message = { role: "assistant", content: "" };
  const shown = show(message);
  coming = message;
  let tokens = 0;
  chain.begin();
  update();
  say("Answering");
  try {
    for await (const chunk of answer(request(), key, controller.signal)) {
      tokens = chunk.usage?.completion_tokens ?? tokens;
      chain.see(chunk.potluck);
      const choice = chunk.choices?.[0];
      const text = choice?.delta?.content ?? "";
      if (text) {
        chain.beat(chunk.potluck?.tokens);
        message.content += text;
        shown.draw();
      }
      if (choice?.finish_reason === "length") message.note = "The answer ends here because it is as long as it may be.";
    }
  } catch (error) {
    if (error.name === "AbortError") message.note = "Stopped.";
    else if (error instanceof Trouble) message.trouble = error.message;
    else throw error;
    if (error.needsKey) askForKey();
  } finally {
    message.seen = chain.end(tokens);
    asking = coming = null;
    conversation.push(message);
    if (conversation === messages) saveMessages(messages); // else another one was begun meanwhile
    shown.finish();
    update();
    say(message.trouble ?? message.note ?? "The answer is complete.");
  }
}

/** What is asked: the conversation so far, without answers of which nothing came. */
function request() {
  const said = messages.filter((message) => message.role === "user" || message.content);
  const system = settings.system.trim() ? [{ role: "system", content: settings.system.trim() }] : [];
  return {
    model: settings.model,
    messages: [...system, ...said.map(({ role, content }) => ({ role, content }))],
    temperature: settings.temperature,
  };
}

function send() {
  const text = question.value.trim();
  if (!text || asking || !settings.model) return;
  question.value = "";
  fit();
  messages.push({ role: "user", content: text });
  saveMessages(messages);
  show(messages.at(-1));
  toEnd();
  ask();
}

/** The last question again; what was answered to it is forgotten. */
function retry() {
  if (asking) return;
  while (messages.at(-1)?.role === "assistant") {
    messages.pop();
    log.lastElementChild.remove();
  }
  saveMessages(messages);
  question.focus();
  ask();
}

function stop() {
  asking?.abort();
  question.focus();
}

function beginAnew() {
  const before = messages;
  messages = [];
  stop();
  saveMessages(messages);
  showAll();
  update();
  question.focus();
  if (before.length) {
    toast("A new conversation.", "Undo", () => {
      messages = before;
      saveMessages(messages);
      showAll();
      update();
    });
  }
}

// -------------------------------------------------------------------- the conversation

function showAll() {
  for (const article of log.querySelectorAll("article")) article.remove();
  at("welcome").hidden = false;
  for (const message of messages) show(message).finish();
}

/** One message, at the end. Returns what draws it again as it grows, and what ends that. */
function show(message) {
  const article = make("article", `message ${message.role}`);
  const isAnswer = message.role === "assistant";
  article.setAttribute("aria-label", isAnswer ? "The model" : "You");
  article.setAttribute("aria-busy", String(isAnswer));
  const body = make("div", "body");
  article.append(body);
  let timer = 0;
  const draw = (change) => {
    const isFollowed = isNearEnd();
    change();
    if (isFollowed) toEnd();
  };
  const fill = () => {
    timer = 0;
    if (isAnswer) body.replaceChildren(rendered(message.content));
    else body.textContent = message.content;
  };
  draw(() => {
    fill();
    log.append(article);
    at("welcome").hidden = true;
  });
  return {
    draw: () => (timer ||= setTimeout(() => draw(fill), REDRAW_MS)),
    finish: () => {
      clearTimeout(timer);
      draw(() => {
        fill();
        if (isAnswer) article.append(footOf(message));
        article.setAttribute("aria-busy", "false");
      });
    },
  };
}

function footOf(message) {
  const foot = make("div", "foot");
  if (message.trouble) foot.append(make("p", "trouble", message.trouble));
  if (message.note) foot.append(make("p", "note", message.note));
  const line = make("div", "deeds");
  const seen = message.content ? facts(message.seen) : "";
  if (seen) line.append(make("span", "facts", seen));
  if (message.content) line.append(button("Copy", () => copy(message.content)));
  const again = button("Try again", retry);
  again.classList.add("again"); // seen in the last message only
  line.append(again);
  foot.append(line);
  return foot;
}

/** What is remembered of an answer, as it stands below it. */
function facts(seen) {
  const count = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;
  return [
    seen?.tokens && count(seen.tokens, "token"),
    seen?.perSecond && `${seen.perSecond.toFixed(1)} tokens/s`,
    seen?.peers && count(seen.peers, "peer"),
    seen?.reroutes && count(seen.reroutes, "reroute"),
  ]
    .filter(Boolean)
    .join(" · ");
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast("Copied.");
  } catch {
    toast("This browser does not let the page copy.");
  }
}

// -------------------------------------------------------------------- models, settings, the key

async function lookForModels() {
  let found;
  try {
    found = await models(key);
  } catch (error) {
    if (!(error instanceof Trouble)) throw error;
    pick([], error.needsKey ? "a key is needed" : "no connection");
    if (error.needsKey) askForKey();
    else setTimeout(lookForModels, LOOK_AGAIN_MS);
    return;
  }
  pick(found, "no model is served");
  if (!found.length) setTimeout(lookForModels, LOOK_AGAIN_MS);
}

function pick(names, otherwise) {
  const options = names.map((name) => new Option(name, name, false, name === settings.model));
  at("model").replaceChildren(...(options.length ? options : [new Option(otherwise, "")]));
  at("model").disabled = names.length === 0;
  if (names.length) settings.model = at("model").value;
  const ideas = IDEAS[settings.model] ?? IDEAS[""];
  at("ideas").replaceChildren(
    ...ideas.map((text) => {
      const item = make("li");
      item.append(
        button(text, () => {
          question.value = text;
          send();
        }),
      );
      return item;
    }),
  );
  update();
}

function askForKey() {
  const dialog = at("key-dialog");
  if (dialog.open) return;
  at("key-text").textContent = key
    ? "The key that was given is not the right one. It is kept until this tab is closed."
    : "Its operator has it. It is kept until this tab is closed.";
  at("api-key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
}

at("key-dialog").addEventListener("close", async () => {
  const given = at("api-key").value.trim();
  at("api-key").value = "";
  if (at("key-dialog").returnValue !== "use" || !given) return;
  key = given;
  saveKey(key);
  await lookForModels();
  if (messages.at(-1)?.trouble && !at("key-dialog").open) retry();
});

at("settings").addEventListener("click", () => {
  at("system").value = settings.system;
  at("temperature").value = String(settings.temperature);
  at("temperature-shown").value = String(settings.temperature);
  at("settings-dialog").showModal();
});
at("temperature").addEventListener("input", (event) => {
  at("temperature-shown").value = event.target.value;
});
at("settings-dialog").addEventListener("close", () => {
  settings = { ...settings, system: at("system").value, temperature: Number(at("temperature").value) };
  saveSettings(settings);
  question.focus();
});
at("model").addEventListener("change", () => {
  settings.model = at("model").value;
  saveSettings(settings);
});

// -------------------------------------------------------------------- keys and small things

question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && asking && !document.querySelector("dialog[open]")) stop();
});
question.addEventListener("input", () => {
  fit();
  update();
});
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", beginAnew);

/** The question's field is as high as its text, within limits that the style sets. */
function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function update() {
  at("send").hidden = Boolean(asking);
  at("stop").hidden = !asking;
  at("send").disabled = !question.value.trim() || !settings.model;
  at("new").disabled = !messages.length && !asking;
}

function isNearEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
}

function toEnd() {
  log.scrollTop = log.scrollHeight;
}

function say(text) {
  at("said").textContent = text;
}

let toastTimer = 0;

function toast(text, deed = "", act = null) {
  const [said, doer] = at("toast").children;
  said.textContent = text;
  doer.textContent = deed;
  doer.hidden = !act;
  doer.onclick = () => {
    at("toast").hidden = true;
    act?.();
  };
  at("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (at("toast").hidden = true), TOAST_MS);
}

function make(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function button(text, act) {
  const made = make("button", "quiet", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

if (messages.at(-1)?.role === "user") messages.push({ role: "assistant", content: "", note: "This was not answered." });
addEventListener("pagehide", () => {
  if (coming) saveMessages([...messages, { ...coming, note: "The page was left before the answer was complete." }]);
});
showAll();
chain.recall(messages.at(-1)?.seen?.trace);
toEnd();
fit();
update();
lookForModels();
