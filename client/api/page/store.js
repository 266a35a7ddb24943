// What survives a reload: the conversation and the settings until they are changed, the key until the tab is closed.

const CONVERSATION = "potluck.conversation";
const SETTINGS = "potluck.settings";
const KEY = "potluck.key";

export const DEFAULTS = { model: "", system: "", temperature: 0 };

/** The messages of the conversation: {role, content, note?, trouble?, seen?}. */
export function loadMessages() {
  const found = read(CONVERSATION);
  const isMessage = (it) => ["user", "assistant"].includes(it?.role) && typeof it.content === "string";
  return Array.isArray(found) ? found.filter(isMessage) : [];
}

export function saveMessages(messages) {
  write(CONVERSATION, messages);
}

export function loadSettings() {
  const found = read(SETTINGS) ?? {};
  const isGood = (name) => typeof found[name] === typeof DEFAULTS[name];
  return Object.fromEntries(Object.entries(DEFAULTS).map(([name, value]) => [name, isGood(name) ? found[name] : value]));
}

export function saveSettings(settings) {
  write(SETTINGS, settings);
}

export function loadKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function saveKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // a browser that keeps nothing asks again after a reload
  }
}

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // nothing is kept here, or something else was: the page begins anew
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // full, or not allowed: all works but for a reload
  }
}
